//! Linear attention: every decay, causal and full, initial states, gradients to everything, and the autograd node.

use std::sync::{Arc, Mutex, OnceLock};

use anyhow::Result;
use collectives::{Group, Reduce};
use kernels::cuda::linear::Fused;
use kernels::linear::chunkwise::Chunkwise;
use kernels::linear::oracle::Whole;
use kernels::linear::{Decay, Inputs, StateMixer, accumulation_kind};
use kernels::testing::{assert_close_at, rms};
use runtime::config::LayoutKind;
use runtime::sequence::attention::Lasp2h;
use runtime::sequence::scan::{Scan, StateSize};
use runtime::sequence::{LinearMethod, Messages, Shard, linear, linear_attention, linear_full, method};
use tch::{Kind, Tensor};

use crate::{
    LAYOUTS, Results, Sizes, count_from_here, fits, hold, leaf, moved, plan, randn, share, sizes, textbook, tolerance,
};

const SCALE: f64 = 0.7;
const DECAYS: [&str; 7] = ["none", "head", "token", "channel", "head strong", "token strong", "channel strong"];

/// The ways of scanning across ranks, all against the same oracle.
const SCANS: [&str; 7] = [
    "lasp2",
    "lasp2:splits=3",
    "lasp2:truncate",
    "lasp1",
    "all_scan:blocks=3",
    "hierarchical:node=2",
    "hierarchical:node=3",
];

pub type Scans = Vec<(&'static str, Arc<dyn Scan>)>;

/// Collective over `group`.
pub fn scans(group: &Group) -> Result<Scans> {
    SCANS.iter().map(|&name| Ok((name, method::scan(name, group)?))).collect()
}

pub struct LinearCase {
    pub name: String,
    sizes: Sizes,
    decay: &'static str,
    causal: bool,
    with_initial: bool,
    kind: Kind,
    /// Else LASP-2 alone.
    every_scan: bool,
    truth: OnceLock<Mutex<Results>>,
    /// By the textbook, in the kind of the inputs; asked for in bf16 only.
    naive: OnceLock<Mutex<Results>>,
}

pub fn linear_cases() -> Vec<LinearCase> {
    let mut cases = Vec::new();
    for (i, sizes) in sizes().into_iter().enumerate() {
        for kind in [Kind::Double, Kind::Float] {
            // In f32 one whole and one packed sequence do.
            let every_scan = kind == Kind::Double || i == 0 || i == 4;
            let add = |decay| LinearCase::new(&sizes, decay, kind, true, i % 2 == 0, every_scan);
            cases.extend(DECAYS.map(add));
            cases.push(LinearCase::new(&sizes, "none", kind, false, i % 2 == 1, false));
        }
    }
    cases
}

/// One whole and one packed sequence in bf16, every scan.
pub fn bf16_linear_cases() -> Vec<LinearCase> {
    let of = |lengths: &[i64]| DECAYS.map(|decay| LinearCase::bf16(decay, (12, 7), lengths, lengths.len() > 1, true));
    [&[45][..], &[3, 25, 1, 0, 11, 5]].into_iter().flat_map(of).collect()
}

/// The same with heads that CUDA kernels take, and longer.
pub fn cuda_linear_cases() -> Vec<LinearCase> {
    let scalar = ["none", "head", "token", "head strong", "token strong"];
    let mut cases: Vec<_> =
        scalar.into_iter().map(|decay| LinearCase::bf16(decay, (64, 64), &[203], false, true)).collect();
    let documents = [90, 3, 25, 1, 0, 79, 5];
    cases.extend(scalar.map(|decay| LinearCase::bf16(decay, (32, 128), &documents, true, true)));
    // As in training, where nobody asks for documents' states.
    cases.extend(["none", "token"].map(|decay| LinearCase::bf16(decay, (32, 128), &documents, false, false)));
    cases
}

impl LinearCase {
    fn bf16(decay: &'static str, (dk, dv): (i64, i64), lengths: &[i64], with_initial: bool, every_scan: bool) -> Self {
        let documents = (lengths.len() > 1).then(|| lengths.to_vec());
        let sizes = Sizes { b: 1, tokens: lengths.iter().sum(), h: 4, kv_heads: 4, dk, dv, documents };
        Self::new(&sizes, decay, Kind::BFloat16, true, with_initial, every_scan)
    }

    fn new(sizes: &Sizes, decay: &'static str, kind: Kind, causal: bool, with_initial: bool, every_scan: bool) -> Self {
        let name = format!("linear {decay}, causal {causal}, initial {with_initial}, {kind:?}, {sizes:?}");
        let (truth, naive) = (OnceLock::new(), OnceLock::new());
        let every_scan = causal && every_scan;
        Self { name, sizes: sizes.clone(), decay, causal, with_initial, kind, every_scan, truth, naive }
    }

    fn inputs(&self) -> Result<Inputs> {
        let Sizes { b, tokens, h, dk, dv, .. } = self.sizes;
        let make = |seed, shape: &[i64]| randn(seed, shape).to_kind(self.kind);
        // Strong: e^B underflows within a few tokens.
        let strength = if self.decay.ends_with("strong") { -40.0 } else { -0.05 };
        let decay = |shape: &[i64]| Some((randn(4, shape).abs() * strength).to_kind(self.kind));
        let log_decay = match self.decay.split(' ').next() {
            // A constant is kept in f32, as in the model.
            Some("head") => decay(&[h]).map(|g| g.to_kind(accumulation_kind(self.kind))),
            Some("token") => decay(&[b, tokens, h]),
            Some("channel") => decay(&[b, tokens, h, dk]),
            _ => None,
        };
        let (q, k, v) = (make(1, &[b, tokens, h, dk]), make(2, &[b, tokens, h, dk]), make(3, &[b, tokens, h, dv]));
        Ok(Inputs::new(&q, &k, &v, log_decay.as_ref())?)
    }

    fn initial(&self) -> Option<Tensor> {
        let Sizes { h, dk, dv, .. } = self.sizes;
        self.with_initial.then(|| randn(5, &[self.sizes.states(), h, dk, dv]).to_kind(self.kind))
    }

    fn d_o(&self) -> Tensor {
        let Sizes { b, tokens, h, dv, .. } = self.sizes;
        randn(6, &[b, tokens, h, dv]).to_kind(self.kind)
    }

    /// `of` the whole sequence; computed once in a process, however many ranks ask.
    fn results(&self, once: &OnceLock<Mutex<Results>>, of: fn(&Whole, &Tensor) -> Result<Results>) -> Result<Results> {
        let compute = || -> Result<Results> {
            let (inputs, cu, initial_state) = (self.inputs()?, self.sizes.cu_seqlens(), self.initial());
            let whole = Whole {
                inputs: &inputs,
                cu_seqlens: cu.as_deref(),
                initial_state: initial_state.as_ref(),
                causal: self.causal,
                scale: SCALE,
            };
            with_terms(&whole, &self.d_o(), of)
        };
        let results = once.get_or_init(|| Mutex::new(compute().expect("results of the whole sequence")));
        Ok(results.lock().unwrap().iter().map(|(name, x)| (*name, x.shallow_clone())).collect())
    }

    /// Runs on every rank of `group`, on both layouts; panics where it differs.
    pub fn check(&self, group: &Group, scans: &Scans) -> Result<()> {
        for (method, scan) in scans.iter().filter(|(method, _)| self.every_scan || *method == "lasp2") {
            for layout in LAYOUTS {
                self.check_on(group, method, scan, layout)?;
            }
        }
        Ok(())
    }

    fn check_on(&self, group: &Group, method: &str, scan: &Arc<dyn Scan>, layout: LayoutKind) -> Result<()> {
        let plan = plan(group, &self.sizes, layout)?;
        let x = self.inputs()?;
        let shard_of = |t: &Tensor| plan.layout.shard(t, 1, group.rank());
        let mine = |t: &Tensor| share(group, &plan, t);
        let log_decay = match &x.decay {
            Decay::None => None,
            Decay::Head(g) => Some(g.to_device(group.device())),
            Decay::Token(g) | Decay::Channel(g) => Some(mine(g)?),
        };
        let (q, k, v, d_o) = (mine(&x.q)?, mine(&x.k)?, mine(&x.v)?, mine(&self.d_o())?);
        let inputs = Inputs::new(&q, &k, &v, log_decay.as_ref())?;
        let initial = self.initial().map(|state| state.to_device(group.device()));
        let shard = Arc::new(Shard {
            group: group.clone(),
            plan: plan.clone(),
            linear: LinearMethod::Scan(scan.clone()),
            attention: Arc::new(Lasp2h::default()),
        });
        let mixer: Arc<dyn StateMixer> = Arc::new(Fused::new(Chunkwise::new(16, SCALE)?));
        let truth = self.results(&self.truth, oracle)?;
        // FlashAttention's rule: at most twice the error of the textbook in the same kind.
        let naive = (self.kind == Kind::BFloat16).then(|| self.results(&self.naive, textbook::linear)).transpose()?;
        let name = |what: &str| {
            let (rank, size, backend) = (group.rank(), group.size(), group.backend_on(group.device()));
            format!("{what}, {method}, rank {rank} of {size}, {backend} {layout:?}, {}", self.name)
        };
        let close = |what: &str, tensor: &str, ours: &Tensor| -> Result<()> {
            let by_token = ours.dim() > 1 && !tensor.ends_with("state");
            let of = |x: &Tensor| if by_token { shard_of(x) } else { Ok(x.shallow_clone()) };
            let (whole, reference) = (&truth[tensor], of(&truth[tensor])?);
            let scale = rms(&reference).max(if by_token { 0.01 * rms(whole) } else { 0.0 });
            let tolerance = match &naive {
                Some(naive) => {
                    // Of a few sums the error may be small by luck. Then the errors of their terms are added up, as if all had
                    // the same sign; terms by themselves are held in the cases with a decay per token.
                    let luck =
                        if ours.dim() == 1 { rms(&summed_errors(&naive["terms"], &truth["terms"])) } else { 0.0 };
                    2.0 * rms(&(of(&naive[tensor])?.to_kind(Kind::Double) - &reference)).max(luck) / scale
                }
                None => tolerance(self.kind),
            };
            hold(|| assert_close_at(&name(what), ours, &reference, scale, tolerance));
            Ok(())
        };
        let whole_states = |known: Vec<(usize, Tensor)>| -> Result<Tensor> {
            let sum = truth["final_state"].zeros_like();
            for (document, state) in known {
                match &self.sizes.documents {
                    Some(_) => sum.narrow(0, document as i64, 1).copy_(&state),
                    None => sum.shallow_clone().copy_(&state),
                }
            }
            Ok(group.all_reduce(&sum, Reduce::Sum)?.wait()?)
        };

        let (o, mut final_state, grads, mut d_initial) = if self.causal {
            let expected = scan.traffic(&plan.chain, group.rank(), &StateSize::of(&inputs));
            let check = |what: &str, formula: &Messages| {
                let moved = moved(group);
                let name = || format!("{}: moved {moved:?}, expected {formula:?}", name(what));
                hold(|| assert!(fits(&moved, formula, expected.at_most), "{}", name()));
            };
            count_from_here(group);
            let forward =
                linear::forward(&shard, mixer.as_ref(), inputs, Some(linear::States { initial: initial.as_ref() }))?;
            check("forward", &expected.forward);
            let states = whole_states(forward.final_states)?;
            count_from_here(group);
            let backward = linear::backward(&shard, mixer.as_ref(), forward.saved, &d_o)?;
            check("backward", &expected.backward);
            (forward.o, states, backward.grads, whole_states(backward.initial_state_grads)?)
        } else {
            let forward = linear_full::forward(&shard, &inputs, initial.as_ref(), SCALE)?;
            let backward = linear_full::backward(&shard, &inputs, &forward.states, &d_o, SCALE)?;
            (forward.o, forward.states, backward.grads, backward.state_grads)
        };
        // An empty document has no rank: its state is what it was given.
        if let Some(documents) = &self.sizes.documents {
            for (n, _) in documents.iter().enumerate().filter(|(_, length)| **length == 0) {
                let row = |t: &Tensor| t.narrow(0, n as i64, 1);
                row(&final_state).copy_(&row(&truth["final_state"]));
                row(&d_initial).copy_(&row(&truth["dinitial_state"]));
            }
        }
        (final_state, d_initial) = (final_state.to_kind(self.kind), d_initial.to_kind(self.kind));
        for (tensor, ours) in [
            ("o", &o),
            ("dq", &grads.dq),
            ("dk", &grads.dk),
            ("dv", &grads.dv),
            ("final_state", &final_state),
            ("dinitial_state", &d_initial),
        ] {
            close(tensor, tensor, ours)?;
        }
        assert_eq!(grads.dlog_decay.is_some(), log_decay.is_some(), "{}", name("dlog_decay"));
        if let Some(dg) = &grads.dlog_decay {
            let whole = || group.all_reduce(&dg.to_kind(Kind::Double), Reduce::Sum)?.wait();
            close("dlog_decay", "dlog_decay", &if dg.dim() == 1 { whole()? } else { dg.shallow_clone() })?;
        }
        if self.causal && initial.is_none() && method == "lasp2" {
            let (q, k, v) = (leaf(&q), leaf(&k), leaf(&v));
            let log_decay = log_decay.as_ref().map(leaf);
            let o = linear_attention(&shard, &mixer, &q, &k, &v, log_decay.as_ref())?;
            close("o of the node", "o", &o)?;
            kernels::bridge::backward(&o, &d_o)?;
            close("dq of the node", "dq", &q.grad())?;
            close("dk of the node", "dk", &k.grad())?;
            close("dv of the node", "dv", &v.grad())?;
        }
        Ok(())
    }
}

fn summed_errors(terms: &Tensor, truth: &Tensor) -> Tensor {
    (terms.to_kind(Kind::Double) - truth).abs().sum_dim_intlist([0, 1].as_slice(), false, None)
}

/// `of` the whole sequence and, where the decay is one per head, the terms of its gradient, one a token.
fn with_terms(whole: &Whole, d_o: &Tensor, of: fn(&Whole, &Tensor) -> Result<Results>) -> Result<Results> {
    let mut results = of(whole, d_o)?;
    if let Decay::Head(g) = &whole.inputs.decay {
        let (x, (b, t, h, _)) = (whole.inputs, whole.inputs.q.size4()?);
        let x = Inputs::new(&x.q, &x.k, &x.v, Some(&g.expand([b, t, h], false)))?;
        results.insert("terms", of(&Whole { inputs: &x, ..*whole }, d_o)?.remove("dlog_decay").expect("a gradient"));
    }
    Ok(results)
}

fn oracle(whole: &Whole, d_o: &Tensor) -> Result<Results> {
    let (out, grads) = (whole.forward()?, whole.backward(d_o)?);
    let mut results = Results::from([
        ("o", out.o),
        ("final_state", out.final_state),
        ("dq", grads.dq),
        ("dk", grads.dk),
        ("dv", grads.dv),
        ("dinitial_state", grads.dinitial_state),
    ]);
    results.extend(grads.dlog_decay.map(|grad| ("dlog_decay", grad)));
    Ok(results)
}
