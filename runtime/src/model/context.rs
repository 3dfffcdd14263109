//! What all layers need to know of the sequence at hand: how it is sharded, and its rotary angles. Made once per sequence.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::{Result, Unwritten};
use crate::sequence::Shard;

/// As [`Context::hidden_at_once`]: 2 GiB in bf16. Large, as a gradient in bf16 is rounded once for each part.
pub(crate) const HIDDEN_AT_ONCE: i64 = 1 << 30;

pub struct Context {
    pub shard: Arc<Shard>,
    /// `[T, 1, K / 2]`: cosine and sine of each local token's angles, in the kind of the activations.
    pub cos: Tensor,
    pub sin: Tensor,
    /// Whether blocks are computed by the nodes of `fused`: on a GPU.
    pub fused: bool,
    /// Numbers of the hidden layer that an MLP of these nodes has at a time, where activations are computed again.
    pub hidden_at_once: i64,
    /// Gradients that the backward of this sequence is the first to write to ([`super::Model::unwritten`]).
    pub unwritten: Unwritten,
}

impl Context {
    /// Angles count from the start of each token's own document.
    pub fn new(shard: Arc<Shard>, head_dim: i64, rope_base: f64, kind: Kind, device: Device) -> Result<Self> {
        let (cos, sin) = angles(&shard.plan.positions(), head_dim, rope_base, kind, device)?;
        let (fused, unwritten) = (device.is_cuda(), Unwritten::default());
        Ok(Self { shard, cos, sin, fused, hidden_at_once: HIDDEN_AT_ONCE, unwritten })
    }

    pub fn shallow_clone(&self) -> Self {
        Self {
            shard: self.shard.clone(),
            cos: self.cos.shallow_clone(),
            sin: self.sin.shallow_clone(),
            unwritten: self.unwritten.clone(),
            ..*self
        }
    }
}

/// cos, sin `[T, 1, K / 2]` of `position * base^{-2i / K}`. RoPE (arXiv 2104.09864).
pub fn angles(positions: &[i64], head_dim: i64, base: f64, kind: Kind, device: Device) -> Result<(Tensor, Tensor)> {
    let half = Tensor::f_arange(head_dim / 2, (Kind::Double, device))?;
    let frequencies = half.f_mul_scalar(-2.0 / head_dim as f64 * base.ln())?.f_exp()?;
    let positions = kernels::bridge::upload(&Tensor::f_from_slice(positions)?, device)?.f_to_kind(Kind::Double)?;
    let angles = positions.f_unsqueeze(1)?.f_mul(&frequencies)?.f_unsqueeze(1)?;
    Ok((angles.f_cos()?.f_to_kind(kind)?, angles.f_sin()?.f_to_kind(kind)?))
}

/// Rotates the halves of x `[B, T, H, K]` against each other by the angles `[T, 1, K / 2]`.
pub fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = x.size()[3] / 2;
    let (a, b) = (x.f_narrow(-1, 0, half)?, x.f_narrow(-1, half, half)?);
    let turned = [a.f_mul(cos)?.f_sub(&b.f_mul(sin)?)?, b.f_mul(cos)?.f_add(&a.f_mul(sin)?)?];
    Ok(Tensor::f_cat(&turned, -1)?)
}
