//! Linear attention on Hopper GPUs: bf16, without decay or with a scalar one, in the passes of `kernels/cuda/linear.cu`.
//!
//! [`Fused`] is the mixer that a model takes: it uses these kernels where [`supports`] says so and another mixer where not. This
//! file says which pass computes what, [`passes`] launches; all else is shared with other kernels, in [`super::segments`].

mod passes;

use tch::{Kind, Tensor};

use super::segments::{self, Call, DecayGrad, Family, Out, Part, Pass, Summing, fits};
use super::{Kernel, gpu};
use crate::Result;
use crate::linear::{Decay, Inputs, Piece};
pub use passes::{LINEAR, Variant};
use passes::{LONGEST, Run, WIDEST};

/// Whether the kernels take these inputs: bf16 on compute capability 9.0, sizes that are multiples of 8, no decay per channel.
pub fn supports(x: &Inputs) -> bool {
    fits(x)
        && x.q.kind() == Kind::BFloat16
        && !matches!(x.decay, Decay::Channel(_))
        && gpu(x.q.device()).is_ok_and(|gpu| (gpu.major, gpu.minor) == (9, 0))
}

/// Whether one launch makes the outputs of such a call, and one dk and dv, when no state enters a piece and none was asked for.
pub fn looks_back(x: &Inputs, pieces: &[Piece]) -> Result<bool> {
    Ok(Hopper::looks_back(&Hopper::call(x, pieces)?))
}

/// These kernels, and another mixer for what they do not take.
pub type Fused<M> = segments::Fused<Hopper, M>;

/// The kernels of `linear.cu`.
pub struct Hopper;

impl Family for Hopper {
    fn supports(x: &Inputs) -> bool {
        supports(x)
    }

    fn call(x: &Inputs, pieces: &[Piece]) -> Result<Call<Self>> {
        let blocks = gpu(x.q.device())?.multiprocessors;
        Call::new(Self, x, pieces, i64::from(blocks))
    }

    fn tileable(x: &Tensor) -> bool {
        passes::tileable(x)
    }

    fn widest(_: &Call<Self>) -> (i64, i64) {
        (WIDEST, WIDEST)
    }

    fn decays(call: &Call<Self>, _: i64) -> Option<Vec<i64>> {
        Some(vec![call.plan.slots])
    }

    fn summarize(call: &Call<Self>, x: &Summing) -> Result<()> {
        call.summarize(x)
    }

    fn combine(call: &Call<Self>, dk: i64, dv: i64) -> Result<(Kernel, Vec<i64>)> {
        Ok((call.combine_kernel(dk, dv)?, vec![dk * dv]))
    }

    /// Where chains are short: a block adds up the sums of all before it in its chain, which takes about a microsecond each.
    fn looks_back(call: &Call<Self>) -> bool {
        (2..=LONGEST).contains(&call.plan.longest)
    }

    fn output(call: &Call<Self>, x: &Pass, late: bool, o: Out) -> Result<()> {
        let run = Run {
            pass: x,
            x: &x.q,
            y: &x.k,
            z: &x.v,
            out: o,
            x2: None,
            out2: None,
            transposed: false,
            entry_scale: 1.0,
            sum_scale: 1.0,
            dots: None,
            pairs: None,
        };
        call.run(false, late, &run)
    }

    /// q dq `[B, H, T]`.
    fn dots(call: &Call<Self>, _: Part, _: &Tensor) -> Result<Tensor> {
        call.empty(&[call.b, call.h, call.t])
    }

    fn queries(call: &Call<Self>, x: &Pass, d_o: &Tensor, dq: Out, dots: Option<&Tensor>) -> Result<()> {
        let run = Run {
            pass: x,
            x: d_o,
            y: &x.v,
            z: &x.k,
            out: dq,
            x2: dots.map(|_| &x.q),
            out2: None,
            transposed: true,
            entry_scale: 1.0,
            sum_scale: 1.0,
            dots,
            pairs: None,
        };
        call.run(false, false, &run)
    }

    fn keys(call: &Call<Self>, x: &Pass, d_o: &Tensor, dk: Out, dv: Out, decay: Option<DecayGrad>) -> Result<()> {
        let of_tokens = || decay.as_ref().map(|_| call.empty(&[call.b, call.h, call.t])).transpose();
        let (keys, pairs) = (of_tokens()?, of_tokens()?);
        let run = Run {
            pass: x,
            x: &x.k,
            y: &x.q,
            z: d_o,
            out: dv,
            x2: Some(&x.v),
            out2: Some(dk),
            transposed: false,
            entry_scale: 1.0 / x.scale,
            sum_scale: x.scale,
            dots: keys.as_ref(),
            pairs: pairs.as_ref(),
        };
        call.run(true, false, &run)?;
        match (&decay, &keys, &pairs) {
            (Some(decay), Some(keys), Some(pairs)) => call.decay_gradient(decay, keys, pairs, x.entries),
            _ => Ok(()),
        }
    }
}
