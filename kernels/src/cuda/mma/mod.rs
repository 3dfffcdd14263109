//! Linear attention on GPUs of compute capability 8.0 and later: bf16, f16 and f32, with any diagonal decay, in the passes of
//! `kernels/cuda/linear_mma.cu`. What Hopper's own kernels ([`super::linear`]) take is quicker there.
//!
//! [`Fused`] is a mixer that uses these kernels where [`supports`] says so and another mixer where not; [`families`] says
//! which kernels a model takes. This file says which pass computes what, [`passes`] launches; all else is shared with other
//! kernels, in [`super::segments`].

mod passes;

use std::sync::Arc;

use tch::{Kind, Tensor};

use super::segments::{self, Call, DecayGrad, Family, Out, Part, Pass, Summing, aligned, fits};
use super::{Gpu, Kernel, gpu, linear};
use crate::Result;
use crate::linear::{Decay, Inputs, Piece, StateMixer};
pub use passes::{Form, LINEAR_MMA, Variant};
use passes::{Run, SLICE, WIDEST, widest};

/// The kernels that models use: Hopper's own for what they take, then those of this module, then `other`.
pub fn families<M: StateMixer + 'static>(other: M) -> Arc<dyn StateMixer> {
    Arc::new(linear::Fused::new(Fused::new(other)))
}

/// Whether the kernels take these inputs: bf16, f16 or f32 on compute capability 8.0 or later, sizes that are multiples of 8.
pub fn supports(x: &Inputs) -> bool {
    fits(x)
        && matches!(x.q.kind(), Kind::BFloat16 | Kind::Half | Kind::Float)
        && gpu(x.q.device()).is_ok_and(|gpu| gpu.major >= 8)
}

/// These kernels, and another mixer for what they do not take.
pub type Fused<M> = segments::Fused<Mma, M>;

/// The kernels of `linear_mma.cu`, on a GPU and for a form of decay.
pub struct Mma {
    gpu: Gpu,
    form: Form,
}

impl Family for Mma {
    fn supports(x: &Inputs) -> bool {
        supports(x)
    }

    fn call(x: &Inputs, pieces: &[Piece]) -> Result<Call<Self>> {
        let form = match x.decay {
            Decay::None => Form::None,
            Decay::Head(_) | Decay::Token(_) => Form::Scalar,
            Decay::Channel(_) => Form::Channel,
        };
        let gpu = gpu(x.k.device())?;
        let (dk, dv) = (x.k.size()[3].min(WIDEST), x.v.size()[3].min(WIDEST));
        let forward = Variant { dk, dv, ..Variant::forward(x.k.kind(), form, gpu.major) };
        let blocks = forward.at_once(forward.threads()) * i64::from(gpu.multiprocessors);
        Call::new(Self { gpu, form }, x, pieces, blocks)
    }

    fn tileable(x: &Tensor) -> bool {
        aligned(x)
    }

    fn widest(call: &Call<Self>) -> (i64, i64) {
        let gpu = &call.family.gpu;
        widest(call.kind, gpu.major, i64::from(gpu.shared))
    }

    fn decays(call: &Call<Self>, dk: i64) -> Option<Vec<i64>> {
        call.log_decay.as_ref().map(|_| vec![call.plan.slots, dk])
    }

    fn summarize(call: &Call<Self>, x: &Summing) -> Result<()> {
        call.summarize(x)
    }

    fn combine(call: &Call<Self>, dk: i64, dv: i64) -> Result<(Kernel, Vec<i64>)> {
        Ok((call.combine_kernel(dk, dv)?, vec![dk, dv]))
    }

    fn looks_back(_: &Call<Self>) -> bool {
        false
    }

    fn output(call: &Call<Self>, x: &Pass, late: bool, o: Out) -> Result<()> {
        let run = Run { x, d_o: None, outer: false, out: o, entry_scale: 1.0, dots: None, decay_grad: None };
        call.run(false, late, &run)
    }

    /// In the place of the result where that is not wanted for another part too.
    fn dots(call: &Call<Self>, part: Part, all: &Tensor) -> Result<Tensor> {
        let Call { b, t, h, dv, .. } = *call;
        match call.family.form {
            Form::Channel if part.v.1 == dv => part.keys(all),
            Form::Channel => call.empty(&[b, t, h, part.k.1]),
            _ => call.empty(&[b, t, h, (part.k.1 + SLICE - 1) / SLICE]),
        }
    }

    fn queries(call: &Call<Self>, x: &Pass, d_o: &Tensor, dq: Out, dots: Option<&Tensor>) -> Result<()> {
        let d_o = Some(d_o);
        call.run(false, false, &Run { x, d_o, outer: true, out: dq, entry_scale: 1.0, dots, decay_grad: None })
    }

    fn keys(call: &Call<Self>, x: &Pass, d_o: &Tensor, dk: Out, dv: Out, decay: Option<DecayGrad>) -> Result<()> {
        let scalar = call.family.form == Form::Scalar;
        let to = match &decay {
            // In place: every number is read before it is written, by the same warp and before a barrier.
            Some(decay) if scalar => Some(decay.dots.shallow_clone()),
            Some(decay) => Some(x.part.keys(decay.out.to)?),
            None => None,
        };
        let out = to.as_ref().map(|to| Out { to, add: !scalar && x.part.v.0 > 0 });
        let decay_grad = decay.as_ref().zip(out).map(|(decay, out)| DecayGrad { out, ..*decay });
        for (outer, out) in [(false, dv), (true, dk)] {
            let decay_grad = decay_grad.as_ref().filter(|_| outer);
            let (entry_scale, dots) = (1.0 / x.scale, decay_grad.map(|grad| grad.dots));
            call.run(true, false, &Run { x, d_o: Some(d_o), outer, out, entry_scale, dots, decay_grad })?;
        }
        if let (true, Some(decay), Some(slices)) = (scalar, &decay, &to) {
            let sum = slices.f_sum_dim_intlist(-1, false, Kind::Float)?;
            let mut all = decay.out.to.shallow_clone();
            if decay.out.add {
                let _ = all.f_add_(&sum)?;
            } else {
                all.f_copy_(&sum)?;
            }
        }
        Ok(())
    }
}
