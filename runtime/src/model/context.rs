//! What all layers need to know of the sequence at hand: how it is sharded, and its rotary angles. Made once per sequence.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::Result;
use crate::sequence::Shard;

pub struct Context {
    pub shard: Arc<Shard>,
    /// `[T, 1, K / 2]`: cosine and sine of each local token's angles, in the kind of the activations.
    pub cos: Tensor,
    pub sin: Tensor,
}

impl Context {
    /// Angles count from the start of each token's own document.
    pub fn new(shard: Arc<Shard>, head_dim: i64, rope_base: f64, kind: Kind, device: Device) -> Result<Self> {
        let (cos, sin) = angles(&shard.plan.positions(), head_dim, rope_base, kind, device)?;
        Ok(Self { shard, cos, sin })
    }

    pub fn shallow_clone(&self) -> Self {
        Self { shard: self.shard.clone(), cos: self.cos.shallow_clone(), sin: self.sin.shallow_clone() }
    }
}

/// cos, sin `[T, 1, K / 2]` of `position * base^{-2i / K}`. RoPE (arXiv 2104.09864).
pub fn angles(positions: &[i64], head_dim: i64, base: f64, kind: Kind, device: Device) -> Result<(Tensor, Tensor)> {
    let half = Tensor::f_arange(head_dim / 2, (Kind::Double, Device::Cpu))?;
    let frequencies = half.f_mul_scalar(-2.0 / head_dim as f64 * base.ln())?.f_exp()?;
    let positions = Tensor::f_from_slice(positions)?.f_to_kind(Kind::Double)?;
    let angles = positions.f_unsqueeze(1)?.f_mul(&frequencies)?.f_unsqueeze(1)?;
    let of = |x: Tensor| -> Result<Tensor> { Ok(x.f_to_kind(kind)?.f_to_device(device)?) };
    Ok((of(angles.f_cos()?)?, of(angles.f_sin()?)?))
}

/// Rotates the halves of x `[B, T, H, K]` against each other by the angles `[T, 1, K / 2]`.
pub fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = x.size()[3] / 2;
    let (a, b) = (x.f_narrow(-1, 0, half)?, x.f_narrow(-1, half, half)?);
    let turned = [a.f_mul(cos)?.f_sub(&b.f_mul(sin)?)?, b.f_mul(cos)?.f_add(&a.f_mul(sin)?)?];
    Ok(Tensor::f_cat(&turned, -1)?)
}
