//! Linear attention on Hopper GPUs: bf16, without decay or with a scalar one, in the passes of `kernels/cuda/linear.cu`.
//!
//! [`Fused`] is the mixer that a model takes: it uses these kernels where [`supports`] says so and another mixer where not.
//! [`plan`] cuts the tokens among the multiprocessors, [`passes`] launches. States leave a pass only between segments, one a
//! multiprocessor, never every few tokens.

mod backward;
mod forward;
mod passes;
mod plan;

use tch::{Device, Kind, Tensor};

use super::gpu;
use crate::linear::{BackwardSegment, Decay, ForwardSegment, Inputs, StateMixer, Transition};
use crate::{Error, Result};
use passes::{Call, WIDEST, tileable};
pub use passes::{LINEAR, Variant};

/// Whether the kernels take these inputs: bf16 on compute capability 9.0, sizes that are multiples of 8, no decay per channel.
pub fn supports(x: &Inputs) -> bool {
    let device = x.q.device();
    let Device::Cuda(_) = device else { return false };
    let sizes = [x.q.size(), x.v.size()];
    x.q.kind() == Kind::BFloat16
        && !matches!(x.decay, Decay::Channel(_))
        && sizes.iter().all(|s| s.iter().all(|&n| n > 0) && s[3] % 8 == 0)
        && gpu(device).is_ok_and(|gpu| (gpu.major, gpu.minor) == (9, 0))
}

/// These kernels, and `other` for what they do not take.
pub struct Fused<M> {
    other: M,
}

impl<M: StateMixer> Fused<M> {
    pub fn new(other: M) -> Self {
        Self { other }
    }
}

impl<M: StateMixer> StateMixer for Fused<M> {
    fn scale(&self) -> f64 {
        self.other.scale()
    }

    fn forward(&self, x: &Inputs, entry: Option<&Tensor>) -> Result<Box<dyn ForwardSegment>> {
        if supports(x) && self.scale() != 0.0 {
            Ok(Box::new(forward::Forward::new(x, entry, self.scale())?))
        } else {
            self.other.forward(x, entry)
        }
    }

    fn backward(&self, x: &Inputs, entry: Option<&Tensor>, d_o: &Tensor) -> Result<Box<dyn BackwardSegment>> {
        self.backward_with(x, entry, d_o, None)
    }

    fn backward_with(
        &self,
        x: &Inputs,
        entry: Option<&Tensor>,
        d_o: &Tensor,
        saved: Option<Vec<Tensor>>,
    ) -> Result<Box<dyn BackwardSegment>> {
        if supports(x) && self.scale() != 0.0 {
            let expected = x.v.size();
            if d_o.size() != expected {
                return Err(Error::Shape {
                    tensor: "do",
                    found: d_o.size(),
                    expected: format!("that of v, {expected:?}"),
                });
            }
            Ok(Box::new(backward::Backward::new(x, entry, d_o, saved, self.scale())?))
        } else {
            self.other.backward_with(x, entry, d_o, saved)
        }
    }
}

/// Where it lies if the kernels can read it there, else a copy.
fn tiles(x: &Tensor) -> Result<Tensor> {
    Ok(if tileable(x) { x.shallow_clone() } else { x.f_contiguous()? })
}

fn call(x: &Inputs) -> Result<Call> {
    let (b, t, h, _) = x.k.size4()?;
    let log_decay = match &x.decay {
        Decay::None => None,
        Decay::Head(g) => Some(g.f_to_kind(Kind::Float)?.f_view([1, 1, h])?.f_expand([b, t, h], false)?),
        Decay::Token(g) => Some(g.f_to_kind(Kind::Float)?),
        Decay::Channel(g) => return Err(Error::Unsupported(format!("a decay per channel, {:?}", g.size()))),
    };
    Call::new(&x.k, log_decay)
}

fn transition(call: &Call) -> Result<Transition> {
    Ok(match &call.log_decay {
        None => Transition::Identity,
        Some(g) => Transition::Scalar(g.f_sum_dim_intlist(1, false, Kind::Float)?),
    })
}

/// Channels of one launch: `(first, number)` in K and in V.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    k: (i64, i64),
    v: (i64, i64),
}

/// Heads wider than [`WIDEST`] in parts. Scores are sums over parts of K, and so is everything linear in them.
fn parts(dk: i64, dv: i64) -> Vec<Part> {
    let cut = |d: i64| (0..d).step_by(WIDEST as usize).map(move |start| (start, WIDEST.min(d - start)));
    cut(dk).flat_map(|k| cut(dv).map(move |v| Part { k, v })).collect()
}

impl Part {
    fn keys(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_narrow(3, self.k.0, self.k.1)?)
    }

    fn values(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_narrow(3, self.v.0, self.v.1)?)
    }

    /// Of a state `[B, H, K, V]`, as the kernels take it.
    fn state(&self, x: &Tensor) -> Result<Tensor> {
        let part = x.f_narrow(2, self.k.0, self.k.1)?.f_narrow(3, self.v.0, self.v.1)?;
        Ok(part.f_to_kind(Kind::Float)?.f_contiguous()?)
    }
}

/// The sums of one part's segments in one direction, as far as they are known.
struct Sums {
    part: Part,
    reverse: bool,
    /// `[slots, K, V]`.
    sums: Tensor,
    /// `[slots]`.
    decays: Tensor,
    /// Of segments that another follows; of those at the chains' ends.
    known: (bool, bool),
}

impl Sums {
    fn new(call: &Call, part: Part, reverse: bool) -> Result<Self> {
        let slots = call.plan.slots;
        let (sums, decays) = (call.empty(&[slots, part.k.1, part.v.1])?, call.empty(&[slots])?);
        Ok(Self { part, reverse, sums, decays, known: (false, false) })
    }

    /// Sums `scale y^T z` where that is not done yet; at the chains' ends only if `ends`.
    fn ensure(&mut self, call: &Call, y: &Tensor, z: &Tensor, scale: f64, ends: bool) -> Result<()> {
        let missing = (!self.known.0, ends && !self.known.1);
        if missing != (false, false) {
            call.summarize(self.reverse, missing, y, z, scale, &self.sums, &self.decays)?;
            self.known = (true, self.known.1 || ends);
        }
        Ok(())
    }

    /// The states `[slots, K, V]` that enter the segments, with `external` `[B, H, K, V]` entering the chains, and into
    /// `finals`, of the same shape, those that leave them.
    fn entries(&self, call: &Call, external: Option<&Tensor>, finals: Option<&Tensor>) -> Result<Tensor> {
        let entries = call.empty(&self.sums.size())?;
        let external = external.map(|x| self.part.state(x)).transpose()?;
        let Some(finals) = finals else {
            call.combine(self.reverse, Some(&self.sums), &self.decays, external.as_ref(), &entries, None)?;
            return Ok(entries);
        };
        let here = call.empty(&[call.b, call.h, self.part.k.1, self.part.v.1])?;
        call.combine(self.reverse, Some(&self.sums), &self.decays, external.as_ref(), &entries, Some(&here))?;
        let ((k, dk), (v, dv)) = (self.part.k, self.part.v);
        finals.f_narrow(2, k, dk)?.f_narrow(3, v, dv)?.f_copy_(&here)?;
        Ok(entries)
    }
}
