//! Tensors of a sequence of any length, each number a function of (seed, token, place) alone: every rank makes its own
//! tokens, and what all ranks have together is the same whatever their number and layout.

use std::ops::Range;

use anyhow::Result;
use kernels::linear::accumulation_kind;
use runtime::config::DecayKind;
use runtime::model::constant_decay;
use runtime::sequence::Plan;
use tch::{Device, Kind, Tensor};

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
    pub fn shallow_clone(&self) -> Self {
        Self {
            q: self.q.shallow_clone(),
            k: self.k.shallow_clone(),
            v: self.v.shallow_clone(),
            d_o: self.d_o.shallow_clone(),
            log_decay: self.log_decay.as_ref().map(Tensor::shallow_clone),
        }
    }

    /// Those of the plan's rank, with heads of `dim` numbers.
    pub fn of_rank(plan: &Plan, options: &Options, dim: i64) -> Result<Self> {
        let ranges = plan.layout.held(plan.rank).into_iter().map(|segment| plan.layout.segment(segment));
        Self::new(&ranges.collect::<Vec<_>>(), options, dim)
    }

    /// Those of the given runs of tokens.
    pub fn new(ranges: &[Range<i64>], options: &Options, dim: i64) -> Result<Self> {
        let (model, kind, device) = (&options.config.model, options.config.train.dtype.kind(), options.device);
        let kv_heads = match options.mixer {
            Mixer::Linear => model.heads,
            Mixer::Softmax => model.kv_heads,
        };
        let make = |seed, heads: i64| numbers(seed, ranges, &[heads, dim], (kind, device));
        // Up to 0.1: half of what a token leaves is gone after about 14.
        let decay = |rest: &[i64]| -> Result<Tensor> {
            Ok(numbers(5, ranges, rest, (Kind::Double, device))?
                .f_sub_scalar(ROOT3)?
                .f_mul_scalar(0.05 / ROOT3)?
                .f_to_kind(kind)?)
        };
        let log_decay = match (options.mixer, model.decay) {
            (Mixer::Softmax, _) | (_, DecayKind::None) => None,
            (_, DecayKind::Token) => Some(decay(&[model.heads])?),
            (_, DecayKind::Channel) => Some(decay(&[model.heads, dim])?),
            (_, constant) => constant_decay(constant, model.heads, 0, model.layers)?
                .map(|g| g.f_to_kind(accumulation_kind(kind))?.f_to_device(device))
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

/// Numbers made at once: a share of a cache, or enough to fill a GPU.
const AT_ONCE: [i64; 2] = [1 << 16, 1 << 24];

/// `[1, T, ..rest]` for the T tokens of `ranges`: uniform, of variance 1. The same numbers on every device.
pub(super) fn numbers(seed: u64, ranges: &[Range<i64>], rest: &[i64], options: (Kind, Device)) -> Result<Tensor> {
    let (_guard, device) = (tch::no_grad_guard(), options.1);
    let width = rest.iter().product::<i64>();
    let rows = (AT_ONCE[usize::from(device.is_cuda())] / width.max(1)).max(1);
    let places = Tensor::f_arange(width, (Kind::Int64, device))?.f_mul_scalar(GOLDEN as i64)?;
    let tokens: i64 = ranges.iter().map(|range| range.end - range.start).sum();
    let all = Tensor::f_empty([tokens, width], options)?;
    let mut done = 0;
    for range in ranges {
        for start in range.clone().step_by(rows as usize) {
            let end = range.end.min(start + rows);
            let token = Tensor::f_arange_start(start, end, (Kind::Int64, device))?;
            let key = mix(token.f_bitwise_xor(hash(seed) as i64)?)?;
            let bits = shifted(&mix(key.f_unsqueeze(-1)?.f_add(&places)?)?, 40)?;
            let unit = bits.f_to_kind(Kind::Float)?.f_mul_scalar(1.0 / f64::from(1 << 24))?;
            let spread = unit.f_mul_scalar(2.0)?.f_sub_scalar(1.0)?.f_mul_scalar(ROOT3)?;
            all.f_narrow(0, done, end - start)?.f_copy_(&spread)?;
            done += end - start;
        }
    }
    Ok(all.f_reshape([&[1, tokens], rest].concat())?)
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
const FACTORS: [u64; 2] = [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb];

/// splitmix64.
fn hash(x: u64) -> u64 {
    let z = x.wrapping_add(GOLDEN);
    let z = (z ^ (z >> 30)).wrapping_mul(FACTORS[0]);
    let z = (z ^ (z >> 27)).wrapping_mul(FACTORS[1]);
    z ^ (z >> 31)
}

/// [`hash`] of each element.
fn mix(mut z: Tensor) -> Result<Tensor> {
    let _ = z.f_add_scalar_(GOLDEN as i64)?;
    for (shift, factor) in [(30, Some(FACTORS[0])), (27, Some(FACTORS[1])), (31, None)] {
        let _ = z.f_bitwise_xor_tensor_(&shifted(&z, shift)?)?;
        if let Some(factor) = factor {
            let _ = z.f_mul_scalar_(factor as i64)?;
        }
    }
    Ok(z)
}

/// Unsigned numbers shifted right; libtorch's shift is that of signed ones.
fn shifted(x: &Tensor, by: i64) -> Result<Tensor> {
    let mut shifted = x.f_bitwise_right_shift_tensor_scalar(by)?;
    let _ = shifted.f_bitwise_and_((1i64 << (64 - by)) - 1)?;
    Ok(shifted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_the_same_wherever_it_lies() {
        let options = (Kind::Double, Device::Cpu);
        let whole = numbers(3, std::slice::from_ref(&(0..1000)), &[5], options).unwrap();
        let parts = numbers(3, &[700..703, 10..12], &[5], options).unwrap();
        let expected = Tensor::cat(&[whole.narrow(1, 700, 3), whole.narrow(1, 10, 2)], 1);
        assert!(parts.equal(&expected));
        let (mean, variance) = (whole.mean(Kind::Double).double_value(&[]), whole.var(true).double_value(&[]));
        assert!(mean.abs() < 0.05 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
    }

    /// A token's number, one by one.
    fn number(seed: u64, token: i64, place: u64) -> f32 {
        let key = hash(hash(seed) ^ token as u64);
        let unit = (hash(key.wrapping_add(place.wrapping_mul(GOLDEN))) >> 40) as f32 / (1u32 << 24) as f32;
        (2.0 * unit - 1.0) * ROOT3 as f32
    }

    fn same_as_one_by_one(device: Device) {
        // In several portions.
        let (ranges, width) = ([3..5, 1 << 40..(1 << 40) + 70], 2000);
        let found = numbers(7, &ranges, &[width], (Kind::Float, device)).unwrap().to_device(Device::Cpu);
        let tokens = ranges.into_iter().flatten();
        let expected: Vec<f32> =
            tokens.flat_map(|token| (0..width as u64).map(move |place| number(7, token, place))).collect();
        assert!(found.equal(&Tensor::from_slice(&expected).reshape([1, 72, width])));
    }

    #[test]
    fn all_at_once_are_those_one_by_one() {
        // The first number of the generator's author's own implementation, seeded with 0.
        assert_eq!(hash(0), 0xe220_a839_7b1d_cdaf);
        same_as_one_by_one(Device::Cpu);
    }

    #[test]
    fn a_gpu_makes_the_same_numbers() {
        if let Some(gpu) = kernels::testing::cuda() {
            same_as_one_by_one(gpu);
        }
    }
}
