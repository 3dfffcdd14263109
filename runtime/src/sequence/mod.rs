//! Attention over a sequence that lies sharded on the ranks of the sp axis (Megatron-Core and torchtitan call it context
//! parallelism). One training step reads top down: a [`Plan`] says which tokens this rank holds and where state flows;
//! [`linear_attention`] and [`softmax_attention`] are the two operators as nodes of libtorch's autograd graph; below them
//! [`linear`] is LASP-2's order of work, [`scan`] how states cross the ranks, [`attention`] how keys and values do.

pub mod attention;
mod error;
mod layout;
pub mod linear;
pub mod linear_full;
pub mod method;
mod plan;
pub mod scan;
mod settings;

use std::sync::Arc;

use collectives::Group;
use kernels::linear::Inputs;
use kernels::linear::chunkwise::Chunkwise;
use tch::Tensor;

pub use error::{Error, Result};
pub use layout::Layout;
pub use plan::{Chain, Link, Piece, Plan};

use attention::Attention;
use scan::Scan;

/// The sp group, the sequence it holds, and the methods by which its mixers meet: all that an operator needs to know.
pub struct Shard {
    pub group: Group,
    pub plan: Plan,
    pub scan: Arc<dyn Scan>,
    pub attention: Arc<dyn Attention>,
}

/// Causal linear attention as one node of the autograd graph.
///
/// q, k `[B, T, H, K]`, v `[B, T, H, V]` are this rank's tokens in local order; `log_decay` is `[H]`, `[B, T, H]`,
/// `[B, T, H, K]` or none. Returns o `[B, T, H, V]`. B = 1 if the plan has more than one document.
pub fn linear_attention(
    shard: &Arc<Shard>,
    mixer: &Arc<Chunkwise>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    log_decay: Option<&Tensor>,
) -> Result<Tensor> {
    let mut x = Inputs::new(q, k, v, log_decay)?;
    x.decay_grad = log_decay.is_some_and(Tensor::requires_grad);
    let forward = linear::forward(shard, mixer.as_ref(), x, None)?;
    let inputs: Vec<&Tensor> = [q, k, v].into_iter().chain(log_decay.filter(|g| g.requires_grad())).collect();
    let wanted = inputs.len();
    let (shard, mixer, saved) = (shard.clone(), mixer.clone(), forward.saved);
    kernels::bridge::attach(&inputs, &[&forward.o], move |mut grads: Vec<Option<Tensor>>| {
        let Some(d_o) = grads.swap_remove(0) else { return Ok((0..wanted).map(|_| None).collect()) };
        let grads = linear::backward(&shard, mixer.as_ref(), saved, &d_o).map_err(Error::into_kernels)?.grads;
        let mut all = vec![Some(grads.dq), Some(grads.dk), Some(grads.dv)];
        all.extend(grads.dlog_decay.map(Some));
        Ok(all)
    })?;
    Ok(forward.o)
}

/// Causal softmax attention as one node of the autograd graph.
///
/// q `[B, T, H, K]`, k `[B, T, Hkv, K]`, v `[B, T, Hkv, V]`: this rank's tokens in local order. Returns o `[B, T, H, V]`.
pub fn softmax_attention(shard: &Arc<Shard>, q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Tensor> {
    let forward = shard.attention.forward(shard, &attention::Inputs::new(q, k, v, scale, true)?)?;
    let (node, saved) = (shard.clone(), forward.saved);
    kernels::bridge::attach(&[q, k, v], &[&forward.o], move |mut grads: Vec<Option<Tensor>>| {
        let Some(d_o) = grads.swap_remove(0) else { return Ok(vec![None, None, None]) };
        let grads = node.attention.backward(&node, saved, &d_o).map_err(Error::into_kernels)?;
        Ok(vec![Some(grads.dq), Some(grads.dk), Some(grads.dv)])
    })?;
    Ok(forward.o)
}
