//! Softmax attention over ranks: grouped queries, causal and full, documents, and the autograd node.

use std::sync::{Arc, Mutex, OnceLock};

use anyhow::Result;
use collectives::Group;
use kernels::softmax::{Tile, oracle};
use runtime::sequence::attention::{Attention, Inputs, Lasp2h};
use runtime::sequence::scan::Lasp2;
use runtime::sequence::{Shard, softmax_attention};
use tch::{Kind, Tensor};

use crate::{LAYOUTS, Sizes, close, leaf, plan, randn, sizes, tolerance};

const SCALE: f64 = 0.3;
/// A token that sees only itself has dq = dk = 0 but for rounding, and inputs are of order 1.
const FLOOR: f64 = 0.01;

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
    for (i, mut sizes) in sizes().into_iter().enumerate() {
        sizes.kv_heads = [4, 2, 1][i % 3];
        for (kind, causal) in [(Kind::Double, true), (Kind::Float, true), (Kind::Double, false)] {
            let name = format!("softmax, causal {causal}, {kind:?}, {sizes:?}");
            cases.push(SoftmaxCase { name, sizes: sizes.clone(), causal, kind, truth: OnceLock::new() });
        }
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

    /// Runs on every rank of `group`, on both layouts; panics where it differs.
    pub fn check(&self, group: &Group) -> Result<()> {
        let truth = self.truth();
        let tolerance = tolerance(self.kind);
        for layout in LAYOUTS {
            let plan = plan(group, &self.sizes, layout)?;
            let [q, k, v, d_o] = self.tensors().map(|t| plan.layout.shard(&t, 1, group.rank()).expect("a shard"));
            let attention = Arc::new(Lasp2h { stages: 2 });
            let shard = Arc::new(Shard {
                group: group.clone(),
                plan: plan.clone(),
                scan: Arc::new(Lasp2),
                attention: attention.clone(),
            });
            let name = |what: &str| {
                let (rank, size, backend) = (group.rank(), group.size(), group.backend());
                format!("{what}, rank {rank} of {size}, {backend} {layout:?}, {}", self.name)
            };
            let forward = attention.forward(&shard, &Inputs::new(&q, &k, &v, SCALE, self.causal)?)?;
            let grads = attention.backward(&shard, forward.saved, &d_o)?;
            for (what, ours, truth) in [
                ("o", &forward.o, &truth[0]),
                ("dq", &grads.dq, &truth[1]),
                ("dk", &grads.dk, &truth[2]),
                ("dv", &grads.dv, &truth[3]),
            ] {
                close(&name(what), &plan, ours, truth, FLOOR, tolerance)?;
            }
            if self.causal {
                let (q, k, v) = (leaf(&q), leaf(&k), leaf(&v));
                let o = softmax_attention(&shard, &q, &k, &v, SCALE)?;
                kernels::bridge::backward(&o, &d_o)?;
                close(&name("dq of the node"), &plan, &q.grad(), &truth[1], FLOOR, tolerance)?;
                close(&name("dk of the node"), &plan, &k.grad(), &truth[2], FLOOR, tolerance)?;
                close(&name("dv of the node"), &plan, &v.grad(), &truth[3], FLOOR, tolerance)?;
            }
        }
        Ok(())
    }
}
