//! Linear attention: every decay, causal and full, initial states, gradients to everything, and the autograd node.

use std::sync::{Arc, Mutex, OnceLock};

use anyhow::Result;
use collectives::{Group, Reduce};
use kernels::linear::chunkwise::Chunkwise;
use kernels::linear::oracle::{OracleGrads, Outputs, Whole};
use kernels::linear::{Decay, Inputs};
use kernels::testing::assert_close;
use runtime::config::LayoutKind;
use runtime::sequence::attention::Lasp2h;
use runtime::sequence::scan::{Scan, StateSize};
use runtime::sequence::{LinearMethod, Shard, linear, linear_attention, linear_full, method};
use tch::{Kind, Tensor};

use crate::{LAYOUTS, Sizes, close, leaf, plan, randn, sizes, tolerance};

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
    truth: OnceLock<Mutex<(Outputs, OracleGrads)>>,
}

pub fn linear_cases() -> Vec<LinearCase> {
    let mut cases = Vec::new();
    for (i, sizes) in sizes().into_iter().enumerate() {
        for kind in [Kind::Double, Kind::Float] {
            let mut add = |decay: &'static str, causal: bool, with_initial: bool| {
                let name = format!("linear {decay}, causal {causal}, initial {with_initial}, {kind:?}, {sizes:?}");
                // In f32 one whole and one packed sequence do.
                let every_scan = causal && (kind == Kind::Double || i == 0 || i == 4);
                let (sizes, truth) = (sizes.clone(), OnceLock::new());
                cases.push(LinearCase { name, sizes, decay, causal, with_initial, kind, every_scan, truth });
            };
            for decay in DECAYS {
                add(decay, true, i % 2 == 0);
            }
            add("none", false, i % 2 == 1);
        }
    }
    cases
}

impl LinearCase {
    fn inputs(&self) -> Result<Inputs> {
        let Sizes { b, tokens, h, dk, dv, .. } = self.sizes;
        let make = |seed, shape: &[i64]| randn(seed, shape).to_kind(self.kind);
        // Strong: e^B underflows within a few tokens.
        let strength = if self.decay.ends_with("strong") { -40.0 } else { -0.05 };
        let decay = |shape: &[i64]| Some((randn(4, shape).abs() * strength).to_kind(self.kind));
        let log_decay = match self.decay.split(' ').next() {
            Some("head") => decay(&[h]),
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

    /// Computed once in a process, however many ranks ask.
    fn truth(&self) -> (Outputs, OracleGrads) {
        let compute = || -> Result<_> {
            let (x, cu, initial) = (self.inputs()?, self.sizes.cu_seqlens(), self.initial());
            let whole = Whole {
                inputs: &x,
                cu_seqlens: cu.as_deref(),
                initial_state: initial.as_ref(),
                causal: self.causal,
                scale: SCALE,
            };
            Ok((whole.forward()?, whole.backward(&self.d_o())?))
        };
        let truth = self.truth.get_or_init(|| Mutex::new(compute().expect("the oracle")));
        let (out, grads) = &*truth.lock().unwrap();
        let clone = Tensor::shallow_clone;
        (
            Outputs { o: clone(&out.o), final_state: clone(&out.final_state) },
            OracleGrads {
                dq: clone(&grads.dq),
                dk: clone(&grads.dk),
                dv: clone(&grads.dv),
                dlog_decay: grads.dlog_decay.as_ref().map(clone),
                dinitial_state: clone(&grads.dinitial_state),
            },
        )
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
        let log_decay = match &x.decay {
            Decay::None => None,
            Decay::Head(g) => Some(g.shallow_clone()),
            Decay::Token(g) | Decay::Channel(g) => Some(shard_of(g)?),
        };
        let (q, k, v) = (shard_of(&x.q)?, shard_of(&x.k)?, shard_of(&x.v)?);
        let d_o = shard_of(&self.d_o())?;
        let mine = Inputs::new(&q, &k, &v, log_decay.as_ref())?;
        let initial = self.initial();
        let shard = Arc::new(Shard {
            group: group.clone(),
            plan: plan.clone(),
            linear: LinearMethod::Scan(scan.clone()),
            attention: Arc::new(Lasp2h::default()),
        });
        let mixer = Arc::new(Chunkwise::new(16, SCALE)?);
        let (truth, true_grads) = self.truth();
        let tolerance = tolerance(self.kind);
        let name = |what: &str| {
            let (rank, size, backend) = (group.rank(), group.size(), group.backend());
            format!("{what}, {method}, rank {rank} of {size}, {backend} {layout:?}, {}", self.name)
        };
        let whole_states = |known: Vec<(usize, Tensor)>| -> Result<Tensor> {
            let sum = truth.final_state.zeros_like();
            for (document, state) in known {
                match &self.sizes.documents {
                    Some(_) => sum.narrow(0, document as i64, 1).copy_(&state),
                    None => sum.shallow_clone().copy_(&state),
                }
            }
            Ok(group.all_reduce(&sum, Reduce::Sum)?.wait()?)
        };

        let (o, mut final_state, grads, mut d_initial) = if self.causal {
            let expected = scan.received(&plan.chain, group.rank(), &StateSize::of(&mine));
            group.recorder().clear();
            let forward = linear::forward(&shard, mixer.as_ref(), mine, initial.as_ref())?;
            let received = group.recorder().totals().bytes_received;
            // What has died does not travel: the formula knows no decays.
            let fits = if method == "lasp2:truncate" { received <= expected } else { received == expected };
            assert!(fits, "{}: {received} bytes received, expected {expected}", name("forward"));
            let states = whole_states(forward.final_states)?;
            let backward = linear::backward(&shard, mixer.as_ref(), forward.saved, &d_o)?;
            (forward.o, states, backward.grads, whole_states(backward.initial_state_grads)?)
        } else {
            let forward = linear_full::forward(&shard, &mine, initial.as_ref(), SCALE)?;
            let backward = linear_full::backward(&shard, &mine, &forward.states, &d_o, SCALE)?;
            (forward.o, forward.states, backward.grads, backward.state_grads)
        };
        // An empty document has no rank: its state is what it was given.
        if let Some(documents) = &self.sizes.documents {
            for (n, _) in documents.iter().enumerate().filter(|(_, length)| **length == 0) {
                let row = |t: &Tensor| t.narrow(0, n as i64, 1);
                row(&final_state).copy_(&row(&truth.final_state));
                row(&d_initial).copy_(&row(&true_grads.dinitial_state));
            }
        }
        (final_state, d_initial) = (final_state.to_kind(self.kind), d_initial.to_kind(self.kind));
        close(&name("o"), &plan, &o, &truth.o, 0.0, tolerance)?;
        close(&name("dq"), &plan, &grads.dq, &true_grads.dq, 0.0, tolerance)?;
        close(&name("dk"), &plan, &grads.dk, &true_grads.dk, 0.0, tolerance)?;
        close(&name("dv"), &plan, &grads.dv, &true_grads.dv, 0.0, tolerance)?;
        assert_close(&name("final_state"), &final_state, &truth.final_state, tolerance);
        assert_close(&name("dinitial_state"), &d_initial, &true_grads.dinitial_state, tolerance);
        match (&x.decay, &grads.dlog_decay) {
            (Decay::None, None) => {}
            (Decay::Head(_), Some(dg)) => {
                let sum = group.all_reduce(&dg.to_kind(Kind::Double), Reduce::Sum)?.wait()?;
                assert_close(&name("dlog_decay"), &sum, true_grads.dlog_decay.as_ref().unwrap(), tolerance);
            }
            (_, Some(dg)) => {
                close(&name("dlog_decay"), &plan, dg, true_grads.dlog_decay.as_ref().unwrap(), 0.0, tolerance)?;
            }
            _ => panic!("{}", name("dlog_decay is missing")),
        }
        if self.causal && initial.is_none() && method == "lasp2" {
            let (q, k, v) = (leaf(&q), leaf(&k), leaf(&v));
            let log_decay = log_decay.as_ref().map(leaf);
            let o = linear_attention(&shard, &mixer, &q, &k, &v, log_decay.as_ref())?;
            close(&name("o of the node"), &plan, &o, &truth.o, 0.0, tolerance)?;
            kernels::bridge::backward(&o, &d_o)?;
            close(&name("dq of the node"), &plan, &q.grad(), &true_grads.dq, 0.0, tolerance)?;
            close(&name("dk of the node"), &plan, &k.grad(), &true_grads.dk, 0.0, tolerance)?;
            close(&name("dv of the node"), &plan, &v.grad(), &true_grads.dv, 0.0, tolerance)?;
        }
        Ok(())
    }
}
