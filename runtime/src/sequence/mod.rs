//! Attention over a sequence that lies sharded on the ranks of the sp axis (Megatron-Core and torchtitan call it context
//! parallelism). One training step reads top down: a [`Plan`] says which tokens this rank holds and where state flows;
//! [`linear_attention`] and [`softmax_attention`] are the two operators as nodes of libtorch's autograd graph; below them
//! [`linear`] is LASP-2's order of work, [`scan`] how states cross the ranks, [`attention`] how keys and values do, and
//! [`left_product`] how they do for linear layers that make no use of states.

pub mod attention;
mod error;
mod layout;
pub mod left_product;
pub mod linear;
pub mod linear_full;
pub mod method;
mod plan;
mod ring;
pub mod scan;
mod settings;
mod traffic;
mod whole;

use std::sync::Arc;

use collectives::{Group, PlaceGuard};
use kernels::linear::{Grads, Inputs, StateMixer};
use tch::Tensor;

pub use error::{Error, Result};
pub use layout::Layout;
pub use plan::{Chain, Link, Piece, Plan};
pub use traffic::{Bytes, Count, LayerSizes, Messages, Traffic};

use crate::config::LayerKind;
use attention::{Attended, Attention};
use left_product::LeftProduct;
use scan::{DecayForm, Scan, StateSize};

/// How the linear layers of all ranks meet.
#[derive(Clone)]
pub enum LinearMethod {
    /// By their states.
    Scan(Arc<dyn Scan>),
    /// By their keys and values, as the paper's baselines.
    LeftProduct(Arc<dyn LeftProduct>),
}

impl LinearMethod {
    /// What the plan's rank sends and receives for one layer.
    pub fn traffic(&self, plan: &Plan, layer: &LayerSizes, decay: DecayForm) -> Traffic {
        match self {
            Self::Scan(scan) => scan.traffic(&plan.chain, plan.rank, &StateSize::of_layer(layer, decay)),
            Self::LeftProduct(method) => method.traffic(plan, layer),
        }
    }
}

/// The sp group, the sequence it holds, and the methods by which its mixers meet: all that an operator needs to know.
pub struct Shard {
    pub group: Group,
    pub plan: Plan,
    pub linear: LinearMethod,
    pub attention: Arc<dyn Attention>,
}

/// What a rank is at, for the flight recorder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Forward(LayerKind),
    Backward(LayerKind),
    /// The sum of the gradient over ranks.
    Gradient,
}

impl Place {
    pub fn name(self) -> &'static str {
        match self {
            Place::Forward(LayerKind::Linear) => "linear layer, forward",
            Place::Backward(LayerKind::Linear) => "linear layer, backward",
            Place::Forward(LayerKind::Softmax) => "softmax layer, forward",
            Place::Backward(LayerKind::Softmax) => "softmax layer, backward",
            Place::Gradient => "gradient",
        }
    }
}

impl Shard {
    /// Messages until the guard is dropped belong to this place.
    pub(crate) fn at(&self, place: Place) -> PlaceGuard {
        self.group.recorder().place(place.name())
    }

    /// The scan of linear layers, for whatever needs states.
    pub fn scan(&self) -> Result<&dyn Scan> {
        match &self.linear {
            LinearMethod::Scan(scan) => Ok(scan.as_ref()),
            LinearMethod::LeftProduct(method) => {
                let expected = format!("a method that carries states, one of {}", method::SCANS.join(", "));
                Err(Error::Method { key: method::LINEAR_KEY, found: method.name().to_owned(), expected })
            }
        }
    }
}

/// How often the mixer of a layer runs forward for a sequence: twice where activations are checkpointed, but softmax attention that
/// attends once ([`Attention::attends_once`]).
pub fn forwards(kind: LayerKind, attends_once: bool, checkpointing: bool) -> u64 {
    let once = kind == LayerKind::Softmax && attends_once;
    if checkpointing && !once { 2 } else { 1 }
}

/// The backward of a linear layer: this rank's gradients, given do.
type LinearBackward = Box<dyn FnOnce(&Shard, &Tensor) -> Result<Grads> + Send>;

/// Causal linear attention as one node of the autograd graph.
///
/// q, k `[B, T, H, K]`, v `[B, T, H, V]` are this rank's tokens in local order; `log_decay` is `[H]`, `[B, T, H]`,
/// `[B, T, H, K]` or none. Returns o `[B, T, H, V]`. B = 1 if the plan has more than one document.
pub fn linear_attention(
    shard: &Arc<Shard>,
    mixer: &Arc<dyn StateMixer>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    log_decay: Option<&Tensor>,
) -> Result<Tensor> {
    let _place = shard.at(Place::Forward(LayerKind::Linear));
    let mut x = Inputs::new(q, k, v, log_decay)?;
    x.decay_grad = log_decay.is_some_and(Tensor::requires_grad);
    let (o, backward): (Tensor, LinearBackward) = match &shard.linear {
        LinearMethod::Scan(_) => {
            let linear::Forward { o, saved, .. } = linear::forward(shard, mixer.as_ref(), x, None)?;
            let mixer = mixer.clone();
            (o, Box::new(move |shard, d_o| Ok(linear::backward(shard, mixer.as_ref(), saved, d_o)?.grads)))
        }
        LinearMethod::LeftProduct(method) => {
            let left_product::Forward { o, saved } = method.forward(shard, x, mixer.scale())?;
            let method = method.clone();
            (o, Box::new(move |shard, d_o| method.backward(shard, saved, d_o)))
        }
    };
    let inputs: Vec<&Tensor> = [q, k, v].into_iter().chain(log_decay.filter(|g| g.requires_grad())).collect();
    let wanted = inputs.len();
    let shard = shard.clone();
    kernels::bridge::attach(&inputs, &[&o], move |mut grads: Vec<Option<Tensor>>| {
        let Some(d_o) = grads.swap_remove(0) else { return Ok((0..wanted).map(|_| None).collect()) };
        let _place = shard.at(Place::Backward(LayerKind::Linear));
        let grads = backward(&shard, &d_o).map_err(Error::into_kernels)?;
        let mut all = vec![Some(grads.dq), Some(grads.dk), Some(grads.dv)];
        all.extend(grads.dlog_decay.map(Some));
        Ok(all)
    })?;
    Ok(o)
}

/// Causal softmax attention as one node of the autograd graph.
///
/// q `[B, T, H, K]`, k `[B, T, Hkv, K]`, v `[B, T, Hkv, V]`: this rank's tokens in local order. Returns o `[B, T, H, V]`, and what need
/// not be computed of these tokens again: `before`, if it was there.
pub fn softmax_attention(
    shard: &Arc<Shard>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    before: Option<Attended>,
) -> Result<(Tensor, Option<Attended>)> {
    let _place = shard.at(Place::Forward(LayerKind::Softmax));
    let forward = attention::forward(shard, &attention::Inputs::new(q, k, v, scale, true)?, before)?;
    let attended = Attended::of(shard.attention.as_ref(), &forward.saved);
    let (node, saved) = (shard.clone(), forward.saved);
    kernels::bridge::attach(&[q, k, v], &[&forward.o], move |mut grads: Vec<Option<Tensor>>| {
        let Some(d_o) = grads.swap_remove(0) else { return Ok(vec![None, None, None]) };
        let _place = node.at(Place::Backward(LayerKind::Softmax));
        let grads = node.attention.backward(&node, saved, &d_o).map_err(Error::into_kernels)?;
        Ok(vec![Some(grads.dq), Some(grads.dk), Some(grads.dv)])
    })?;
    Ok((forward.o, attended))
}
