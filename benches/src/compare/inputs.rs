//! Tensors of a sequence of any length, each number a function of (seed, token, place) alone: every rank makes its own
//! tokens, and what all ranks have together is the same whatever their number and layout.

use std::ops::Range;

use anyhow::Result;
use kernels::linear::accumulation_kind;
use runtime::config::DecayKind;
use runtime::model::constant_decay;
use runtime::sequence::Plan;
use tch::{Kind, Tensor};

use super::{Mixer, Options};

/// One rank's tokens: q `[1, T, H, K]`, k `[1, T, Hkv, K]`, v `[1, T, Hkv, V]`, do `[1, T, H, V]`, and the log-decay.
pub(super) struct Tokens {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub d_o: Tensor,
    /// `[H]`, `[1, T, H]` or `[1, T, H, K]`.
    pub log_decay: Option<Tensor>,
}

impl Tokens {
    /// Those of the plan's rank, with heads of `dim` numbers.
    pub fn of_rank(plan: &Plan, options: &Options, dim: i64) -> Result<Self> {
        let ranges = plan.layout.held(plan.rank).into_iter().map(|segment| plan.layout.segment(segment));
        Self::new(&ranges.collect::<Vec<_>>(), options, dim)
    }

    /// Those of the given runs of tokens.
    pub fn new(ranges: &[Range<i64>], options: &Options, dim: i64) -> Result<Self> {
        let (model, kind) = (&options.config.model, options.config.train.dtype.kind());
        let kv_heads = match options.mixer {
            Mixer::Linear => model.heads,
            Mixer::Softmax => model.kv_heads,
        };
        let make = |seed, heads: i64| numbers(seed, ranges, &[heads, dim], kind);
        // Up to 0.1: half of what a token leaves is gone after about 14.
        let decay = |rest: &[i64]| -> Result<Tensor> {
            Ok(numbers(5, ranges, rest, Kind::Double)?
                .f_sub_scalar(ROOT3)?
                .f_mul_scalar(0.05 / ROOT3)?
                .f_to_kind(kind)?)
        };
        let log_decay = match (options.mixer, model.decay) {
            (Mixer::Softmax, _) | (_, DecayKind::None) => None,
            (_, DecayKind::Token) => Some(decay(&[model.heads])?),
            (_, DecayKind::Channel) => Some(decay(&[model.heads, dim])?),
            (_, constant) => constant_decay(constant, model.heads, 0, model.layers)?
                .map(|g| g.f_to_kind(accumulation_kind(kind)))
                .transpose()?,
        };
        Ok(Self {
            q: make(1, model.heads)?,
            k: make(2, kv_heads)?,
            v: make(3, kv_heads)?,
            d_o: make(4, model.heads)?,
            log_decay,
        })
    }
}

const ROOT3: f64 = 1.732_050_807_568_877_2;

/// `[1, T, ..rest]` for the T tokens of `ranges`: uniform, of variance 1.
pub(super) fn numbers(seed: u64, ranges: &[Range<i64>], rest: &[i64], kind: Kind) -> Result<Tensor> {
    let width = rest.iter().product::<i64>().max(0) as u64;
    let tokens: i64 = ranges.iter().map(|range| range.end - range.start).sum();
    let mut all = Vec::with_capacity(tokens as usize * width as usize);
    for token in ranges.iter().cloned().flatten() {
        let key = mix(mix(seed) ^ token as u64);
        all.extend((0..width).map(|place| {
            let unit = (mix(key.wrapping_add(place.wrapping_mul(GOLDEN))) >> 40) as f32 / (1u32 << 24) as f32;
            (2.0 * unit - 1.0) * ROOT3 as f32
        }));
    }
    let shape = [&[1, tokens], rest].concat();
    Ok(Tensor::f_from_slice(&all)?.f_reshape(shape)?.f_to_kind(kind)?)
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// splitmix64.
fn mix(x: u64) -> u64 {
    let z = x.wrapping_add(GOLDEN);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_the_same_wherever_it_lies() {
        let whole = numbers(3, std::slice::from_ref(&(0..1000)), &[5], Kind::Double).unwrap();
        let parts = numbers(3, &[700..703, 10..12], &[5], Kind::Double).unwrap();
        let expected = Tensor::cat(&[whole.narrow(1, 700, 3), whole.narrow(1, 10, 2)], 1);
        assert!(parts.equal(&expected));
        let (mean, variance) = (whole.mean(Kind::Double).double_value(&[]), whole.var(true).double_value(&[]));
        assert!(mean.abs() < 0.05 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
    }
}
