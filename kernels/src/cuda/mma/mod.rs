//! Linear attention on GPUs of compute capability 8.0 and later: bf16, f16 and f32, with any diagonal decay, in the passes of
//! `kernels/cuda/linear_mma.cu`. What Hopper's own kernels ([`super::linear`]) take is quicker there.
//!
//! [`Fused`] is a mixer that uses these kernels where [`supports`] says so and another mixer where not; [`families`] says
//! which kernels a model takes.

mod backward;
mod forward;
mod passes;

use std::sync::Arc;

use tch::{Kind, Tensor};

use super::{gpu, linear, runs_on};
use crate::linear::{BackwardSegment, Decay, ForwardSegment, Inputs, Piece, StateMixer, Summary, Transition};
use crate::linear::{check, check_grad};
use crate::{Error, Result};
use passes::{Call, tileable};
pub use passes::{Form, LINEAR_MMA, Variant};

/// Whether models use these kernels without being told to.
pub const BY_DEFAULT: bool = false;

/// The kernels that models use: Hopper's own for what they take, then those of this module if [`BY_DEFAULT`], then `other`.
pub fn families<M: StateMixer + 'static>(other: M) -> Arc<dyn StateMixer> {
    if BY_DEFAULT { Arc::new(linear::Fused::new(Fused::new(other))) } else { Arc::new(linear::Fused::new(other)) }
}

/// Whether the kernels take these inputs: bf16, f16 or f32 on compute capability 8.0 or later, sizes that are multiples of 8.
pub fn supports(x: &Inputs) -> bool {
    let device = x.q.device();
    let sizes = [x.q.size(), x.v.size()];
    runs_on(device)
        && matches!(x.q.kind(), Kind::BFloat16 | Kind::Half | Kind::Float)
        && sizes.iter().all(|s| s.iter().all(|&n| n > 0) && s[3] % 8 == 0)
        && gpu(device).is_ok_and(|gpu| gpu.major >= 8)
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
    let (form, log_decay) = match &x.decay {
        Decay::None => (Form::None, None),
        Decay::Head(g) => {
            let g = g.f_to_kind(Kind::Float)?.f_view([1, 1, h])?.f_expand([b, t, h], false)?;
            (Form::Scalar, Some(g))
        }
        Decay::Token(g) => (Form::Scalar, Some(g.f_to_kind(Kind::Float)?)),
        Decay::Channel(g) => {
            let kind = if g.kind() == x.q.kind() { g.kind() } else { Kind::Float };
            (Form::Channel, Some(tiles(&g.f_to_kind(kind)?)?))
        }
    };
    Call::new(&x.k, &x.v, pieces, form, log_decay)
}

/// The transition of a piece with its row of `states` `[rows, K, V]`, which leave in this direction.
fn summary(call: &Call, reverse: bool, piece: usize, states: &Tensor) -> Result<Summary> {
    let transition = match &call.log_decay {
        None => Transition::Identity,
        Some(g) => {
            let (start, length) = call.range(piece);
            let sum = g.f_narrow(1, start, length)?.f_sum_dim_intlist(1, false, Kind::Float)?;
            if call.form == Form::Channel { Transition::Channel(sum) } else { Transition::Scalar(sum) }
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

fn clones(states: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
    states.iter().map(|state| state.as_ref().map(Tensor::shallow_clone)).collect()
}

/// Channels of one launch: `(first, number)` in K and in V.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    k: (i64, i64),
    v: (i64, i64),
}

/// Heads wider than `widest` in parts. Scores are sums over parts of K, and so is everything linear in them.
fn parts((dk, dv): (i64, i64), widest: (i64, i64)) -> Vec<Part> {
    let cut = |d: i64, most: i64| (0..d).step_by(most as usize).map(move |start| (start, most.min(d - start)));
    cut(dk, widest.0).flat_map(|k| cut(dv, widest.1).map(move |v| Part { k, v })).collect()
}

impl Part {
    fn keys(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_narrow(3, self.k.0, self.k.1)?)
    }

    fn values(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_narrow(3, self.v.0, self.v.1)?)
    }

    fn log_decay(&self, call: &Call) -> Result<Option<Tensor>> {
        let of = |g: &Tensor| if call.form == Form::Channel { self.keys(g) } else { Ok(g.shallow_clone()) };
        call.log_decay.as_ref().map(of).transpose()
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
    /// `[slots, K]`, if there is a decay.
    decays: Option<Tensor>,
    /// Of segments that another follows; of those at the chains' ends.
    known: (bool, bool),
}

impl Sums {
    fn new(call: &Call, part: Part, reverse: bool) -> Result<Self> {
        let slots = call.plan.slots;
        let sums = call.empty(&[slots, part.k.1, part.v.1])?;
        let decays = call.log_decay.is_some().then(|| call.empty(&[slots, part.k.1])).transpose()?;
        Ok(Self { part, reverse, sums, decays, known: (false, false) })
    }

    fn all(call: &Call, dk: i64, dv: i64, reverse: bool) -> Result<Vec<Self>> {
        parts((dk, dv), call.widest()).into_iter().map(|part| Self::new(call, part, reverse)).collect()
    }

    /// Sums `scale key^T value`, of all channels' tensors, where that is not done yet; at the chains' ends only if `ends`.
    fn ensure(&mut self, call: &Call, (keys, values): (&Tensor, &Tensor), scale: f64, ends: bool) -> Result<()> {
        let missing = (!self.known.0, ends && !self.known.1);
        if missing != (false, false) {
            let of = (&self.part.keys(keys)?, &self.part.values(values)?);
            let log_decay = self.part.log_decay(call)?;
            let decays = self.decays.as_ref();
            call.summarize(self.reverse, missing, of, log_decay.as_ref(), scale, &self.sums, decays)?;
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
        let here = there.as_ref().map(|there| match there.is_contiguous() {
            true => Ok(there.shallow_clone()),
            false => call.empty(&there.size()),
        });
        let here = here.transpose()?;
        let (sums, decays) = (Some(&self.sums), self.decays.as_ref());
        call.combine(self.reverse, sums, decays, external.as_ref(), &entries, here.as_ref())?;
        if let (Some(mut there), Some(here)) = (there.filter(|there| !there.is_contiguous()), here) {
            there.f_copy_(&here)?;
        }
        Ok(entries)
    }
}

/// States that forward has saved, if they are as many as the parts; an error where they have another shape.
fn checked(saved: Option<Vec<Tensor>>, sums: &[Sums]) -> Result<Option<Vec<Tensor>>> {
    for (i, saved) in saved.iter().flatten().enumerate() {
        let expected = sums.get(i).map(|sums| sums.sums.size());
        if expected.as_ref() != Some(&saved.size()) {
            let expected = format!("{expected:?}, the states that forward has saved");
            return Err(Error::Shape { tensor: "saved", found: saved.size(), expected });
        }
    }
    Ok(saved.filter(|saved| saved.len() == sums.len()))
}
