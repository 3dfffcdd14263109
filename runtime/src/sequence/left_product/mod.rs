//! Linear attention as LASP-2 (arXiv 2502.07563) ran its baselines: without the right-product trick, as the
//! quadratic left product `((q k^T) * mask) v`, with keys and values on other ranks: one method a file. No state exists, so
//! these are no scans; their results are those of any scan. They are there to repeat the paper's comparison, not to train with:
//! a like-for-like rival of LASP-2 is LASP-1.
//!
//! A decay is none or a constant per head, and there are no initial states.

mod megatron_sp;
mod ring;

use collectives::Group;
use kernels::linear::{Decay, Grads, Inputs};
use tch::Tensor;

pub use megatron_sp::MegatronSpLeftProduct;
pub use ring::RingLeftProduct;

use super::{Error, LayerSizes, Plan, Result, Shard, Traffic};

/// What is kept for backward: q, k, v and decay, of this rank's tokens or, for the whole sequence, of this rank's heads.
pub struct Saved {
    pub x: Inputs,
    pub scale: f64,
    /// H of the layer.
    pub heads: i64,
}

pub struct Forward {
    /// `[B, T, H, V]`.
    pub o: Tensor,
    pub saved: Saved,
}

/// A way of meeting the keys and values of all ranks.
pub trait LeftProduct: Send + Sync {
    /// As in a configuration.
    fn name(&self) -> &'static str;

    /// Makes ready what it sends by ([`Group::connect`]): collectives, if nothing else. Collective, before anything is under way.
    fn connect(&self, group: &Group) -> Result<()> {
        Ok(group.connect(&[], &[])?)
    }

    /// `o_i = scale sum_{j <= i} a^{i-j} <q_i, k_j> v_j` over the document of token i, for this rank's tokens.
    fn forward(&self, shard: &Shard, x: Inputs, scale: f64) -> Result<Forward>;

    /// do: `[B, T, H, V]`. `dlog_decay`, where it is wanted, is `[H]`, this rank's part of the sum.
    fn backward(&self, shard: &Shard, saved: Saved, d_o: &Tensor) -> Result<Grads>;

    /// What the plan's rank sends and receives for one layer, where Hkv = H.
    fn traffic(&self, plan: &Plan, layer: &LayerSizes) -> Traffic;
}

/// The decays with which a left product can be computed.
fn check(method: &dyn LeftProduct, x: &Inputs) -> Result<()> {
    let found = match &x.decay {
        Decay::None | Decay::Head(_) => return Ok(()),
        Decay::Token(_) => "token and head",
        Decay::Channel(_) => "token, head and channel",
    };
    Err(Error::Unsupported(format!(
        "{} with a decay per {found}: expected none or a constant per head (model.decay = none, lightning or retention); or \
         use lasp2 (parallel.linear_method)",
        method.name()
    )))
}

/// `x` in the kind of `like`.
fn in_kind(x: &Tensor, like: &Tensor) -> Result<Tensor> {
    Ok(x.f_to_kind(like.kind())?.f_contiguous()?)
}

/// dlog_decay `[H]` in the kind of the decay.
fn decay_grad(grad: Option<&Tensor>, decay: &Decay) -> Result<Option<Tensor>> {
    match (grad, decay.tensor()) {
        (Some(grad), Some(decay)) => Ok(Some(in_kind(grad, decay)?)),
        _ => Ok(None),
    }
}
