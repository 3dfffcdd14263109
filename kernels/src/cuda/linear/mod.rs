//! Linear attention on Hopper GPUs: bf16, without decay or with a scalar one, in the passes of `kernels/cuda/linear.cu`.
//!
//! [`Fused`] is the mixer that a model takes: it uses these kernels where [`supports`] says so and another mixer where not.
//! [`plan`] cuts the tokens of all documents among the multiprocessors, [`passes`] launches, for all of them at once. States
//! leave a pass only between segments, one a multiprocessor, never every few tokens.

mod backward;
mod forward;
mod passes;
pub(crate) mod plan;

use tch::{Kind, Tensor};

use super::{gpu, runs_on};
use crate::linear::{BackwardSegment, Decay, ForwardSegment, Inputs, Piece, StateMixer, Summary, Transition};
use crate::linear::{check, check_grad};
use crate::{Error, Result};
use passes::{Call, WIDEST, tileable};
pub use passes::{LINEAR, Variant};

/// Whether the kernels take these inputs: bf16 on compute capability 9.0, sizes that are multiples of 8, no decay per channel.
pub fn supports(x: &Inputs) -> bool {
    let device = x.q.device();
    let sizes = [x.q.size(), x.v.size()];
    runs_on(device)
        && x.q.kind() == Kind::BFloat16
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

    fn takes(&self, x: &Inputs) -> bool {
        supports(x) && self.scale() != 0.0
    }
}

impl<M: StateMixer> StateMixer for Fused<M> {
    fn scale(&self) -> f64 {
        self.other.scale()
    }

    fn forward_pieces(
        &self,
        x: &Inputs,
        pieces: &[Piece],
        entries: &[Option<Tensor>],
    ) -> Result<Box<dyn ForwardSegment>> {
        if !self.takes(x) {
            return self.other.forward_pieces(x, pieces, entries);
        }
        check(x, pieces, entries)?;
        Ok(Box::new(forward::Forward::new(x, pieces, entries, self.scale())?))
    }

    fn backward_pieces(
        &self,
        x: &Inputs,
        pieces: &[Piece],
        entries: &[Option<Tensor>],
        d_o: &Tensor,
        saved: Option<Vec<Tensor>>,
    ) -> Result<Box<dyn BackwardSegment>> {
        if !self.takes(x) {
            return self.other.backward_pieces(x, pieces, entries, d_o, saved);
        }
        check(x, pieces, entries)?;
        check_grad(x, d_o)?;
        Ok(Box::new(backward::Backward::new(x, pieces, entries, d_o, saved, self.scale())?))
    }
}

/// Where it lies if the kernels can read it there, else a copy.
fn tiles(x: &Tensor) -> Result<Tensor> {
    Ok(if tileable(x) { x.shallow_clone() } else { x.f_contiguous()? })
}

fn call(x: &Inputs, pieces: &[Piece]) -> Result<Call> {
    let (b, t, h, _) = x.k.size4()?;
    let log_decay = match &x.decay {
        Decay::None => None,
        Decay::Head(g) => Some(g.f_to_kind(Kind::Float)?.f_view([1, 1, h])?.f_expand([b, t, h], false)?),
        Decay::Token(g) => Some(g.f_to_kind(Kind::Float)?),
        Decay::Channel(g) => return Err(Error::Unsupported(format!("a decay per channel, {:?}", g.size()))),
    };
    Call::new(&x.k, pieces, log_decay)
}

/// The transition of a piece with its row of `states` `[rows, K, V]`, which leave in this direction.
fn summary(call: &Call, reverse: bool, piece: usize, states: &Tensor) -> Result<Summary> {
    let transition = match &call.log_decay {
        None => Transition::Identity,
        Some(g) => {
            let (start, length) = call.range(piece);
            Transition::Scalar(g.f_narrow(1, start, length)?.f_sum_dim_intlist(1, false, Kind::Float)?)
        }
    };
    let (row, sizes) = (call.row(!reverse, piece)?, states.size());
    let state = states.f_narrow(0, row, call.b * call.h)?.f_view([call.b, call.h, sizes[1], sizes[2]])?;
    Ok(Summary { transition, state })
}

/// Adds a state to that of its piece.
fn add(states: &mut [Option<Tensor>], piece: usize, state: &Tensor) -> Result<()> {
    states[piece] = Some(match states[piece].take() {
        Some(before) => before.f_add(state)?,
        None => state.shallow_clone(),
    });
    Ok(())
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

    /// The states `[B, H, K, V]` that enter pieces from outside as the kernels take them, `[rows, K, V]`, if there are any.
    fn external(&self, call: &Call, reverse: bool, states: &[Option<Tensor>]) -> Result<Option<Tensor>> {
        if states.iter().all(Option::is_none) {
            return Ok(None);
        }
        let sizes = [call.b * call.h, self.k.1, self.v.1];
        let of = |piece: usize| match &states[piece] {
            Some(state) => {
                let part = state.f_narrow(2, self.k.0, self.k.1)?.f_narrow(3, self.v.0, self.v.1)?;
                Ok(part.f_to_kind(Kind::Float)?.f_contiguous()?.f_view(sizes)?)
            }
            None => Ok(Tensor::f_zeros(sizes, (Kind::Float, call.device))?),
        };
        let mut rows = call.entered(reverse).map(of).collect::<Result<Vec<_>>>()?;
        Ok(Some(if rows.len() == 1 { rows.swap_remove(0) } else { Tensor::f_cat(&rows, 0)? }))
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

    /// The states `[slots, K, V]` that enter the segments, with those of `external` entering their pieces, and into `finals`
    /// `[rows, K, V]`, of the whole head, those that leave them.
    fn entries(&self, call: &Call, external: &[Option<Tensor>], finals: Option<&Tensor>) -> Result<Tensor> {
        let entries = call.empty(&self.sums.size())?;
        let external = self.part.external(call, self.reverse, external)?;
        let ((k, dk), (v, dv)) = (self.part.k, self.part.v);
        let there = finals.map(|finals| finals.f_narrow(1, k, dk)?.f_narrow(2, v, dv)).transpose()?;
        // Where the kernel can write it, else aside.
        let here = match &there {
            Some(there) if !there.is_contiguous() => Some(call.empty(&there.size())?),
            there => there.as_ref().map(Tensor::shallow_clone),
        };
        call.combine(self.reverse, Some(&self.sums), &self.decays, external.as_ref(), &entries, here.as_ref())?;
        if let (Some(mut there), Some(here)) = (there.filter(|there| !there.is_contiguous()), here) {
            there.f_copy_(&here)?;
        }
        Ok(entries)
    }
}
