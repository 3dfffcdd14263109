//! Softmax attention over ranks, every method: grouped queries, causal and full, documents, the autograd node, and the bytes
//! that the formulas promise.

use std::sync::{Arc, Mutex, OnceLock};

use anyhow::Result;
use collectives::Group;
use kernels::softmax::{Tile, oracle};
use kernels::testing::{assert_close, relative_rms};
use runtime::config::LayoutKind;
use runtime::sequence::attention::{Attention, Inputs, Lasp2h};
use runtime::sequence::{LayerSizes, Shard, method, softmax_attention};
use tch::{Device, Kind, Tensor};

use crate::{
    LAYOUTS, Sizes, close, count_from_here, hold, leaf, moved, plan, randn, share, sizes, textbook, tolerance,
};

const SCALE: f64 = 0.3;
const BF16_SCALE: f64 = 0.25;
/// A token that sees only itself has dq = dk = 0: terms of order 1 that cancel but for their rounding, of which the order of
/// the sums in a matrix product, another on every CPU, leaves up to 1e-7. They are held against a tenth of their size.
const FLOOR: f64 = 0.1;

pub struct SoftmaxCase {
    pub name: String,
    sizes: Sizes,
    causal: bool,
    kind: Kind,
    /// o, dq, dk, dv.
    truth: OnceLock<Mutex<[Tensor; 4]>>,
}

pub fn softmax_cases() -> Vec<SoftmaxCase> {
    let mut cases = Vec::new();
    let mut add = |sizes: &Sizes, kind, causal| {
        let name = format!("softmax, causal {causal}, {kind:?}, {sizes:?}");
        cases.push(SoftmaxCase { name, sizes: sizes.clone(), causal, kind, truth: OnceLock::new() });
    };
    for (i, mut sizes) in sizes().into_iter().enumerate() {
        sizes.kv_heads = [4, 2, 1][i % 3];
        for (kind, causal) in [(Kind::Double, true), (Kind::Float, true), (Kind::Double, false)] {
            add(&sizes, kind, causal);
        }
    }
    // Heads that 2, 3, 4 and 8 divide, in groups that fit the cut (12), that it cuts (6, 3), and of one head.
    for (kv_heads, documents) in [(24, None), (12, Some(vec![9, 21, 7])), (6, None), (3, Some(vec![30, 0, 7]))] {
        let sizes = Sizes { b: 1, tokens: 37, h: 24, kv_heads, dk: 6, dv: 5, documents };
        add(&sizes, Kind::Double, true);
    }
    cases
}

impl SoftmaxCase {
    /// q, k, v, do of the whole sequence.
    fn tensors(&self) -> [Tensor; 4] {
        let Sizes { b, tokens, h, kv_heads, dk, dv, .. } = self.sizes;
        let make = |seed, heads, width| randn(seed, &[b, tokens, heads, width]).to_kind(self.kind);
        [make(11, h, dk), make(12, kv_heads, dk), make(13, kv_heads, dv), make(14, h, dv)]
    }

    fn truth(&self) -> [Tensor; 4] {
        let compute = || -> Result<[Tensor; 4]> {
            let [q, k, v, d_o] = self.tensors();
            let cu = self.sizes.cu_seqlens().unwrap_or_else(|| vec![0, self.sizes.tokens]);
            let tiles: Vec<_> = cu
                .windows(2)
                .filter(|w| w[0] < w[1])
                .map(|w| Tile { q: w[0]..w[1], k: w[0]..w[1], causal: self.causal })
                .collect();
            let (o, lse) = oracle::forward(&q, &k, &v, &tiles, SCALE)?;
            let (dq, dk, dv) = oracle::backward(&q, &k, &v, &o, &lse, &d_o, &tiles, SCALE)?;
            Ok([o, dq, dk, dv])
        };
        let truth = self.truth.get_or_init(|| Mutex::new(compute().expect("the oracle")));
        truth.lock().unwrap().each_ref().map(Tensor::shallow_clone)
    }

    /// Runs on every rank of `group`, every method on both layouts; panics where it differs.
    pub fn check(&self, group: &Group) -> Result<()> {
        for name in method::ATTENTIONS {
            let attention: Arc<dyn Attention> = match *name {
                "lasp2h" => Arc::new(Lasp2h { stages: 2 }),
                name => method::softmax(name, group)?,
            };
            for layout in LAYOUTS {
                if *name == "ulysses" && self.sizes.h % group.size() as i64 != 0 {
                    self.is_refused(group, layout, attention.clone())?;
                } else {
                    self.check_method(group, layout, name, attention.clone())?;
                }
            }
        }
        Ok(())
    }

    fn check_method(
        &self,
        group: &Group,
        layout: LayoutKind,
        method: &str,
        attention: Arc<dyn Attention>,
    ) -> Result<()> {
        let truth = self.truth();
        let tolerance = tolerance(self.kind);
        let (shard, [q, k, v, d_o]) = self.shard(group, layout, attention.clone())?;
        let plan = &shard.plan;
        let name = |what: &str| {
            let (rank, size, backend) = (group.rank(), group.size(), group.backend_on(group.device()));
            format!("{what}, {method}, rank {rank} of {size}, {backend} {layout:?}, {}", self.name)
        };
        let Sizes { b, h, kv_heads, dk, dv, .. } = self.sizes;
        let layer = LayerSizes { b, heads: h, kv_heads, dk, dv, kind: self.kind };
        let traffic = attention.traffic(plan, &layer);
        count_from_here(group);
        let forward = attention.forward(&shard, &Inputs::new(&q, &k, &v, SCALE, self.causal)?)?;
        let found = moved(group);
        hold(|| assert_eq!(found, traffic.forward, "{}", name("bytes of forward")));
        count_from_here(group);
        let grads = attention.backward(&shard, forward.saved, &d_o)?;
        let found = moved(group);
        hold(|| assert_eq!(found, traffic.backward, "{}", name("bytes of backward")));
        for (what, ours, truth) in [
            ("o", &forward.o, &truth[0]),
            ("dq", &grads.dq, &truth[1]),
            ("dk", &grads.dk, &truth[2]),
            ("dv", &grads.dv, &truth[3]),
        ] {
            assert_eq!(ours.kind(), self.kind, "{}", name(what));
            close(&name(what), plan, ours, truth, FLOOR, tolerance)?;
        }
        if self.causal {
            let (q, k, v) = (leaf(&q), leaf(&k), leaf(&v));
            let (o, _) = softmax_attention(&shard, &q, &k, &v, SCALE, None)?;
            kernels::bridge::backward(&o, &d_o)?;
            close(&name("dq of the node"), plan, &q.grad(), &truth[1], FLOOR, tolerance)?;
            close(&name("dk of the node"), plan, &k.grad(), &truth[2], FLOOR, tolerance)?;
            close(&name("dv of the node"), plan, &v.grad(), &truth[3], FLOOR, tolerance)?;
        }
        Ok(())
    }

    /// This rank's q, k, v and do.
    fn shard(
        &self,
        group: &Group,
        layout: LayoutKind,
        attention: Arc<dyn Attention>,
    ) -> Result<(Arc<Shard>, [Tensor; 4])> {
        let plan = plan(group, &self.sizes, layout)?;
        let mine = self.tensors().map(|t| share(group, &plan, &t).expect("a shard"));
        Ok((Arc::new(Shard { group: group.clone(), plan, linear: method::linear("lasp2", group)?, attention }), mine))
    }

    /// The number of ranks does not divide the heads: every rank says so before anything is sent.
    fn is_refused(&self, group: &Group, layout: LayoutKind, attention: Arc<dyn Attention>) -> Result<()> {
        let (shard, [q, k, v, _]) = self.shard(group, layout, attention.clone())?;
        let (heads, sp) = (self.sizes.h, group.size());
        let expected = format!(
            "ulysses needs the sp degree to divide the heads: {heads} heads, sp = {sp} (parallel.sp); use lasp2h, or one \
             of 1, 2, 4"
        );
        let error = match attention.forward(&shard, &Inputs::new(&q, &k, &v, SCALE, self.causal)?) {
            Ok(_) => anyhow::bail!("{heads} heads on {sp} ranks were not refused"),
            Err(error) => error.to_string(),
        };
        assert_eq!(error, expected);
        Ok(())
    }
}

/// Every method in bf16, held against twice the error of a textbook bf16 attention over the whole sequence.
pub struct Bf16SoftmaxCase {
    sizes: Sizes,
    /// o, dq, dk, dv in f64, and the error that each may have.
    truth: Mutex<[Tensor; 4]>,
    allowed: [f64; 4],
}

impl Bf16SoftmaxCase {
    pub fn new(tokens: i64) -> Result<Self> {
        let sizes = Sizes { b: 1, tokens, h: 8, kv_heads: 2, dk: 16, dv: 16, documents: None };
        let [q, k, v, d_o] = &Self::tensors(&sizes);
        let tile = [Tile { q: 0..tokens, k: 0..tokens, causal: true }];
        let (o, lse) = oracle::forward(q, k, v, &tile, BF16_SCALE)?;
        let (dq, dk, dv) = oracle::backward(q, k, v, &o, &lse, d_o, &tile, BF16_SCALE)?;
        let truth = [o, dq, dk, dv];
        let naive = textbook::softmax([q, k, v, d_o], BF16_SCALE);
        let allowed = [0, 1, 2, 3].map(|i: usize| 2.0 * relative_rms(&naive[i], &truth[i]));
        Ok(Self { sizes, truth: Mutex::new(truth), allowed })
    }

    fn tensors(sizes: &Sizes) -> [Tensor; 4] {
        let make = |seed, heads| randn(seed, &[1, sizes.tokens, heads, sizes.dk]).to_kind(Kind::BFloat16);
        [make(31, sizes.h), make(32, sizes.kv_heads), make(33, sizes.kv_heads), make(34, sizes.h)]
    }

    /// Runs on every rank of `group`, every method on both layouts; each rank looks at the whole.
    pub fn check(&self, group: &Group) -> Result<()> {
        for name in
            method::ATTENTIONS.iter().filter(|name| **name != "ulysses" || self.sizes.h % group.size() as i64 == 0)
        {
            for layout in LAYOUTS {
                let plan = plan(group, &self.sizes, layout)?;
                let (linear, attention) = (method::linear("lasp2", group)?, method::softmax(name, group)?);
                let [q, k, v, d_o] = Self::tensors(&self.sizes).map(|x| share(group, &plan, &x).expect("a share"));
                let shard = Shard { group: group.clone(), plan, linear, attention: attention.clone() };
                let forward = attention.forward(&shard, &Inputs::new(&q, &k, &v, BF16_SCALE, true)?)?;
                let grads = attention.backward(&shard, forward.saved, &d_o)?;
                let layout = &shard.plan.layout;
                let found = [("o", &forward.o), ("dq", &grads.dq), ("dk", &grads.dk), ("dv", &grads.dv)];
                for (i, (what, mine)) in found.into_iter().enumerate() {
                    let mine = mine.to_device(Device::Cpu).transpose(0, 1);
                    let parts = group.all_gather_v(&mine, &layout.tokens_per_rank())?.wait()?;
                    let ours = layout.in_sequence_order(&parts, 0)?.transpose(0, 1);
                    assert_eq!(ours.kind(), Kind::BFloat16);
                    let name = format!("{what}, {name}, {} ranks, {layout:?}", group.size());
                    let truth = self.truth.lock().unwrap()[i].shallow_clone();
                    hold(|| assert_close(&name, &ours, &truth, self.allowed[i]));
                }
            }
        }
        Ok(())
    }
}
