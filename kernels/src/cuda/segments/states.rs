//! The states between passes: sums of segments, and from these the states that enter them.

use tch::{Kind, Tensor};

use super::super::{Arg, Launch};
use super::plan::{self, FOLLOWS};
use super::{Call, Family, Params, Summing};
use crate::{Error, Result};

/// Adds a state to that of its piece.
pub fn add(states: &mut [Option<Tensor>], piece: usize, state: &Tensor) -> Result<()> {
    states[piece] = Some(match states[piece].take() {
        Some(before) => before.f_add(state)?,
        None => state.shallow_clone(),
    });
    Ok(())
}

pub fn clones(states: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
    states.iter().map(|state| state.as_ref().map(Tensor::shallow_clone)).collect()
}

/// Channels of one launch: `(first, number)` in K and in V.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub k: (i64, i64),
    pub v: (i64, i64),
}

/// Heads wider than `widest` in parts. Scores are sums over parts of K, and so is everything linear in them.
fn parts((dk, dv): (i64, i64), widest: (i64, i64)) -> Vec<Part> {
    let cut = |d: i64, most: i64| (0..d).step_by(most as usize).map(move |start| (start, most.min(d - start)));
    cut(dk, widest.0).flat_map(|k| cut(dv, widest.1).map(move |v| Part { k, v })).collect()
}

impl Part {
    pub fn keys(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_narrow(3, self.k.0, self.k.1)?)
    }

    pub fn values(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_narrow(3, self.v.0, self.v.1)?)
    }

    pub fn log_decay<F: Family>(&self, call: &Call<F>) -> Result<Option<Tensor>> {
        let of = |g: &Tensor| if g.dim() == 4 { self.keys(g) } else { Ok(g.shallow_clone()) };
        call.log_decay.as_ref().map(of).transpose()
    }

    /// The states `[B, H, K, V]` that enter pieces from outside as the kernels take them, `[rows, K, V]`, if there are any.
    fn external<F: Family>(&self, call: &Call<F>, reverse: bool, states: &[Option<Tensor>]) -> Result<Option<Tensor>> {
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
pub struct Sums {
    pub part: Part,
    pub reverse: bool,
    /// `[slots, K, V]`.
    sizes: [i64; 3],
    made: Option<Made>,
    /// Of segments that another follows; of those at the chains' ends.
    known: (bool, bool),
}

/// What `summarize` writes.
pub struct Made {
    /// `[slots, K, V]`.
    pub sums: Tensor,
    /// What [`Family::decays`] says.
    pub decays: Option<Tensor>,
}

impl Sums {
    /// Of each part of a head.
    pub fn all<F: Family>(call: &Call<F>, reverse: bool) -> Vec<Self> {
        let new = |part: Part| {
            let sizes = [call.plan.slots, part.k.1, part.v.1];
            Self { part, reverse, sizes, made: None, known: (false, false) }
        };
        parts((call.dk, call.dv), F::widest(call)).into_iter().map(new).collect()
    }

    /// Sums `scale key^T value`, of all channels' tensors, where that is not done yet; at the chains' ends only if `ends`.
    pub fn ensure<F: Family>(
        &mut self,
        call: &Call<F>,
        (keys, values): (&Tensor, &Tensor),
        scale: f64,
        ends: bool,
    ) -> Result<()> {
        // What leaves a segment enters it in the opposite direction.
        let missing = plan::entered(!self.reverse, (!self.known.0, ends && !self.known.1));
        if call.plan.flags & missing != 0 {
            let made = match self.made.take() {
                Some(made) => made,
                None => Made {
                    sums: self.room(call)?,
                    decays: F::decays(call, self.part.k.1).map(|sizes| call.empty(&sizes)).transpose()?,
                },
            };
            let summing = Summing {
                key: self.part.keys(keys)?,
                value: self.part.values(values)?,
                log_decay: self.part.log_decay(call)?,
                reverse: self.reverse,
                scale,
                which: missing,
                to: self.made.insert(made),
            };
            F::summarize(call, &summing)?;
        }
        self.known = (true, self.known.1 || ends);
        Ok(())
    }

    /// Room for the states `[slots, K, V]` that enter the segments.
    pub fn room<F: Family>(&self, call: &Call<F>) -> Result<Tensor> {
        call.empty(&self.sizes)
    }

    /// The states `[slots, K, V]` that enter the segments, with those of `external` entering their pieces, and into `finals`
    /// `[rows, K, V]`, of the whole head, those that leave them.
    pub fn entries<F: Family>(
        &self,
        call: &Call<F>,
        external: &[Option<Tensor>],
        finals: Option<&Tensor>,
    ) -> Result<Tensor> {
        let ((k, dk), (v, dv)) = (self.part.k, self.part.v);
        let there = finals.map(|finals| finals.f_narrow(1, k, dk)?.f_narrow(2, v, dv)).transpose()?;
        match there {
            Some(mut there) if !there.is_contiguous() => {
                let aside = call.empty(&there.size())?;
                let entries = self.combine(call, true, external, Some(&aside))?;
                there.f_copy_(&aside)?;
                Ok(entries)
            }
            there => self.combine(call, true, external, there.as_ref()),
        }
    }

    /// What the states of `external` alone make of the entries, as if all sums were zero.
    pub fn entries_of<F: Family>(&self, call: &Call<F>, external: &[Option<Tensor>]) -> Result<Tensor> {
        self.combine(call, false, external, None)
    }

    /// The states that leave pieces, `[rows, K, V]` of this part.
    pub fn finals<F: Family>(&self, call: &Call<F>, external: &[Option<Tensor>]) -> Result<Tensor> {
        let finals = call.empty(&[call.rows(!self.reverse), self.part.k.1, self.part.v.1])?;
        self.combine(call, true, external, Some(&finals)).map(|_| finals)
    }

    /// Of what [`Sums::ensure`] has made. `sums`: whether they count, or are as if zero. `finals`: `[rows, K, V]` of this part, contiguous;
    /// see [`Call::rows`].
    fn combine<F: Family>(
        &self,
        call: &Call<F>,
        sums: bool,
        external: &[Option<Tensor>],
        finals: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (dk, dv) = (self.part.k.1, self.part.v.1);
        let entries = self.room(call)?;
        let external = self.part.external(call, self.reverse, external)?;
        if external.is_none() && finals.is_none() && call.plan.flags & FOLLOWS == 0 {
            return Ok(entries);
        }
        let (kernel, sizes) = F::combine(call, dk, dv)?;
        let params = Params::default()
            .pointer(Some(&call.plan.chains))
            .pointer(self.made.as_ref().filter(|_| sums).map(|made| &made.sums))
            .pointer(self.made.as_ref().and_then(|made| made.decays.as_ref()))
            .pointer(external.as_ref())
            .pointer(Some(&entries))
            .pointer(finals);
        let params = sizes.into_iter().fold(params, Params::i32).i32(i64::from(self.reverse)).words();
        let blocks = (dk * dv + 511) / 512;
        let launch = Launch { grid: [call.plan.chain_count, blocks as u32, 1], block: 128, shared: 0 };
        // SAFETY: CombineParams of the family's source; states of this plan's slots and chains.
        unsafe { kernel.launch(launch, &[Arg::Bytes(&params)])? };
        Ok(entries)
    }
}

/// States that forward has saved, if they are as many as the parts; an error where they have another shape.
pub fn checked(saved: Option<Vec<Tensor>>, sums: &[Sums]) -> Result<Option<Vec<Tensor>>> {
    for (i, saved) in saved.iter().flatten().enumerate() {
        let expected = sums.get(i).map(|sums| sums.sizes.to_vec());
        if expected.as_ref() != Some(&saved.size()) {
            let expected = format!("{expected:?}, the states that forward has saved");
            return Err(Error::Shape { tensor: "saved", found: saved.size(), expected });
        }
    }
    Ok(saved.filter(|saved| saved.len() == sums.len()))
}
