//! Linear layers without the right-product trick, every method: the results of the recurrence, documents, gradients to
//! everything, the autograd node, and the bytes that the formulas promise.

use std::sync::{Arc, Mutex, OnceLock};

use anyhow::Result;
use collectives::{Group, Reduce};
use kernels::linear::chunkwise::Chunkwise;
use kernels::linear::oracle::Whole;
use kernels::linear::{Inputs, StateMixer};
use kernels::testing::assert_close;
use runtime::config::LayoutKind;
use runtime::sequence::left_product::LeftProduct;
use runtime::sequence::{LayerSizes, LinearMethod, Shard, linear_attention, method};
use tch::{Kind, Tensor};

use crate::{LAYOUTS, Sizes, close, count_from_here, hold, leaf, moved, plan, randn, share, sizes, tolerance};

const SCALE: f64 = 0.7;

pub struct LeftProductCase {
    pub name: String,
    sizes: Sizes,
    /// Of the constant decays per head, if there are any.
    strength: Option<f64>,
    kind: Kind,
    /// o, dq, dk, dv and, with a decay, dlog_decay.
    truth: OnceLock<Mutex<Vec<Tensor>>>,
}

pub fn left_product_cases() -> Vec<LeftProductCase> {
    let mut cases = Vec::new();
    for (i, sizes) in sizes().into_iter().enumerate() {
        // In f32 one whole and one packed sequence do.
        let kinds: &[Kind] = if i == 0 || i == 4 { &[Kind::Double, Kind::Float] } else { &[Kind::Double] };
        for &kind in kinds {
            for strength in [None, Some(-0.05), Some(-40.0)] {
                let name = format!("left product, decay {strength:?}, {kind:?}, {sizes:?}");
                cases.push(LeftProductCase { name, sizes: sizes.clone(), strength, kind, truth: OnceLock::new() });
            }
        }
    }
    cases
}

impl LeftProductCase {
    /// q, k, v, do of the whole sequence, and the decay.
    fn tensors(&self) -> ([Tensor; 4], Option<Tensor>) {
        let Sizes { b, tokens, h, dk, dv, .. } = self.sizes;
        let make = |seed, width| randn(seed, &[b, tokens, h, width]).to_kind(self.kind);
        let decay = self.strength.map(|strength| (randn(25, &[h]).abs() * strength).to_kind(self.kind));
        ([make(21, dk), make(22, dk), make(23, dv), make(24, dv)], decay)
    }

    fn truth(&self) -> Vec<Tensor> {
        let compute = || -> Result<Vec<Tensor>> {
            let ([q, k, v, d_o], decay) = self.tensors();
            let (inputs, cu) = (Inputs::new(&q, &k, &v, decay.as_ref())?, self.sizes.cu_seqlens());
            let whole =
                Whole { inputs: &inputs, cu_seqlens: cu.as_deref(), initial_state: None, causal: true, scale: SCALE };
            let (o, grads) = (whole.forward()?.o, whole.backward(&d_o)?);
            Ok([o, grads.dq, grads.dk, grads.dv].into_iter().chain(grads.dlog_decay).collect())
        };
        let truth = self.truth.get_or_init(|| Mutex::new(compute().expect("the oracle")));
        truth.lock().unwrap().iter().map(Tensor::shallow_clone).collect()
    }

    /// Runs on every rank of `group`, every method on both layouts; panics where it differs.
    pub fn check(&self, group: &Group) -> Result<()> {
        for name in method::LEFT_PRODUCTS {
            let Some(method) = method::left_product(name) else { anyhow::bail!("no method {name}") };
            for layout in LAYOUTS {
                self.check_method(group, layout, method.clone())?;
            }
        }
        Ok(())
    }

    fn check_method(&self, group: &Group, layout: LayoutKind, method: Arc<dyn LeftProduct>) -> Result<()> {
        let (whole, decay) = self.tensors();
        let (truth, tolerance) = (self.truth(), tolerance(self.kind));
        let shard = Arc::new(Shard {
            group: group.clone(),
            plan: plan(group, &self.sizes, layout)?,
            linear: LinearMethod::LeftProduct(method.clone()),
            attention: method::attention("lasp2h")?,
        });
        let plan = &shard.plan;
        let [q, k, v, d_o] = whole.map(|t| share(group, plan, &t).expect("a shard"));
        let decay = decay.map(|g| g.to_device(group.device()));
        let name = |what: &str| {
            let (rank, size, backend) = (group.rank(), group.size(), group.backend_on(group.device()));
            format!("{what}, {}, rank {rank} of {size}, {backend} {layout:?}, {}", method.name(), self.name)
        };

        let Sizes { b, h, dk, dv, .. } = self.sizes;
        let traffic = method.traffic(plan, &LayerSizes { b, heads: h, kv_heads: h, dk, dv, kind: self.kind });
        count_from_here(group);
        let forward = method.forward(&shard, Inputs::new(&q, &k, &v, decay.as_ref())?, SCALE)?;
        let found = moved(group);
        hold(|| assert_eq!(found, traffic.forward, "{}", name("bytes of forward")));
        count_from_here(group);
        let grads = method.backward(&shard, forward.saved, &d_o)?;
        let found = moved(group);
        hold(|| assert_eq!(found, traffic.backward, "{}", name("bytes of backward")));

        let ours = [("o", &forward.o), ("dq", &grads.dq), ("dk", &grads.dk), ("dv", &grads.dv)];
        for ((what, ours), truth) in ours.into_iter().zip(&truth) {
            assert_eq!(ours.kind(), self.kind, "{}", name(what));
            close(&name(what), plan, ours, truth, 0.0, tolerance)?;
        }
        assert_eq!(grads.dlog_decay.is_some(), decay.is_some(), "{}", name("dlog_decay"));
        if let Some(grad) = &grads.dlog_decay {
            let sum = group.all_reduce(&grad.to_kind(Kind::Double), Reduce::Sum)?.wait()?;
            hold(|| assert_close(&name("dlog_decay"), &sum, &truth[4], tolerance));
        }

        let mixer: Arc<dyn StateMixer> = Arc::new(Chunkwise::new(16, SCALE)?);
        let (q, k, v, g) = (leaf(&q), leaf(&k), leaf(&v), decay.as_ref().map(leaf));
        let o = linear_attention(&shard, &mixer, &q, &k, &v, g.as_ref())?;
        kernels::bridge::backward(&o, &d_o)?;
        close(&name("o of the node"), plan, &o, &truth[0], 0.0, tolerance)?;
        close(&name("dq of the node"), plan, &q.grad(), &truth[1], 0.0, tolerance)?;
        close(&name("dk of the node"), plan, &k.grad(), &truth[2], 0.0, tolerance)?;
        close(&name("dv of the node"), plan, &v.grad(), &truth[3], 0.0, tolerance)?;
        if let Some(g) = g {
            let sum = group.all_reduce(&g.grad().to_kind(Kind::Double), Reduce::Sum)?.wait()?;
            hold(|| assert_close(&name("dlog_decay of the node"), &sum, &truth[4], tolerance));
        }
        Ok(())
    }
}
