//! The backward of some pieces: sum up the gradients of states, compute dq, which waits for nobody, and in the end dk and dv
//! with whatever came in at the pieces' ends.

use tch::Tensor;

use super::states::{Sums, add, checked, clones};
use super::{Call, DecayGrad, Enters, Family, Out, Tokens, tiles};
use crate::Result;
use crate::linear::{BackwardSegment, Grads, Inputs, Piece, Summary};

pub struct Backward<F> {
    call: Call<F>,
    tokens: Tokens,
    d_o: Tensor,
    /// Of the decay, where that wants one: `[B, T, H]` or `[B, T, H, K]`, f32.
    dlog_decay: Option<Tensor>,
    /// Of each piece.
    entries: Vec<Option<Tensor>>,
    exits: Vec<Option<Tensor>>,
    /// Of each part the states at the segments' starts `[slots, K, V]`, if forward has saved them.
    saved: Option<Vec<Tensor>>,
    /// Of k^T v and of q^T do, a part each.
    states: Vec<Sums>,
    grads: Vec<Sums>,
    /// The gradients of the states that enter pieces as far as their outputs make them, `[rows, K, V]`; and, of each part, those
    /// of the states at the segments' ends `[slots, K, V]`.
    summed: Option<(Tensor, Vec<Tensor>)>,
    dq: Option<Queries>,
}

/// dq; and of each part the states at the segments' starts `[slots, K, V]` and [`Family::dots`].
struct Queries {
    dq: Tensor,
    entries: Vec<Tensor>,
    dots: Vec<Option<Tensor>>,
}

impl<F: Family> Backward<F> {
    pub fn new(
        x: &Inputs,
        pieces: &[Piece],
        entries: &[Option<Tensor>],
        d_o: &Tensor,
        saved: Option<Vec<Tensor>>,
        scale: f64,
    ) -> Result<Self> {
        let call = F::call(x, pieces)?;
        let (states, grads) = (Sums::all(&call, false), Sums::all(&call, true));
        let log_decay = call.log_decay.as_ref().filter(|_| x.decay_grad);
        Ok(Self {
            tokens: Tokens::new::<F>(x, scale)?,
            d_o: tiles::<F>(&d_o.f_to_kind(call.kind)?)?,
            dlog_decay: log_decay.map(|g| call.empty(&g.size())).transpose()?,
            call,
            entries: clones(entries),
            exits: entries.iter().map(|_| None).collect(),
            saved: checked(saved, &states)?,
            states,
            grads,
            summed: None,
            dq: None,
        })
    }

    /// The gradients of the states at the segments' ends of each part, with `exits` entering at the pieces' ends; into
    /// `at_entry` those that leave at their starts.
    fn gradients(&mut self, exits: &[Option<Tensor>], at_entry: Option<&Tensor>) -> Result<Vec<Tensor>> {
        let of = |sums: &mut Sums| {
            sums.ensure(&self.call, (&self.tokens.q, &self.d_o), self.tokens.scale, at_entry.is_some())?;
            sums.entries(&self.call, exits, at_entry)
        };
        self.grads.iter_mut().map(of).collect()
    }

    fn summed(&mut self) -> Result<&(Tensor, Vec<Tensor>)> {
        let summed = match self.summed.take() {
            Some(summed) => summed,
            None => {
                let at_entry = self.call.empty(&[self.call.rows(false), self.call.dk, self.call.dv])?;
                let exits = self.gradients(&[], Some(&at_entry))?;
                (at_entry, exits)
            }
        };
        Ok(self.summed.insert(summed))
    }

    fn queries(&mut self) -> Result<Queries> {
        if let Some(done) = self.dq.take() {
            return Ok(done);
        }
        let dq = self.call.like(&self.tokens.q)?;
        let (mut all_entries, mut all_dots) = (Vec::new(), Vec::new());
        let mut saved = self.saved.take().map(Vec::into_iter);
        let enters = Enters::known(self.entries.iter().any(Option::is_some));
        for sums in &mut self.states {
            let part = sums.part;
            let dots = self.dlog_decay.as_ref().map(|all| F::dots(&self.call, part, all)).transpose()?;
            let entries = match saved.as_mut().and_then(Iterator::next) {
                Some(entries) => entries,
                None => {
                    sums.ensure(&self.call, (&self.tokens.k, &self.tokens.v), 1.0, false)?;
                    sums.entries(&self.call, &self.entries, None)?
                }
            };
            let pass = self.tokens.pass(&self.call, part, &entries, enters)?;
            let out = Out { to: &part.keys(&dq)?, add: part.v.0 > 0 };
            F::queries(&self.call, &pass, &part.values(&self.d_o)?, out, dots.as_ref())?;
            all_entries.push(entries);
            all_dots.push(dots);
        }
        Ok(Queries { dq, entries: all_entries, dots: all_dots })
    }

    fn has_exit(&self) -> bool {
        self.exits.iter().any(Option::is_some)
    }

    /// The gradients of the states at the segments' ends, with those that came in at the pieces' ends; or room for them.
    fn exits(&mut self) -> Result<(Vec<Tensor>, Enters)> {
        if self.has_exit() {
            let exits = clones(&self.exits);
            return Ok((self.gradients(&exits, None)?, Enters::FromOutside));
        }
        if let Some((_, exits)) = self.summed.take() {
            return Ok((exits, Enters::Known));
        }
        if F::looks_back(&self.call) {
            return Ok((self.grads.iter().map(|sums| sums.room(&self.call)).collect::<Result<_>>()?, Enters::Unknown));
        }
        Ok((self.gradients(&[], None)?, Enters::Known))
    }

    /// The states that leave pieces `[rows, K, V]`, for a part whose decay wants the gradients that came in there.
    fn end_states(&mut self, part: usize) -> Result<Option<Tensor>> {
        if !self.has_exit() {
            return Ok(None);
        }
        let sums = &mut self.states[part];
        sums.ensure(&self.call, (&self.tokens.k, &self.tokens.v), 1.0, true)?;
        sums.finals(&self.call, &self.entries).map(Some)
    }
}

impl<F: Family> BackwardSegment for Backward<F> {
    fn summarize_grad(&mut self, piece: usize) -> Result<Summary> {
        let at_entry = self.summed()?.0.shallow_clone();
        self.call.summary(true, piece, &at_entry)
    }

    /// dq. What dk and dv cost is spent once, in [`BackwardSegment::finish`], when all that enters them is known.
    fn run_grad(&mut self) -> Result<()> {
        self.dq = Some(self.queries()?);
        Ok(())
    }

    fn add_exit(&mut self, piece: usize, exit: &Tensor) -> Result<()> {
        self.call.row(true, piece)?;
        add(&mut self.exits, piece, exit)
    }

    fn finish(mut self: Box<Self>) -> Result<Grads> {
        let queries = self.queries()?;
        let (dk, dv) = (self.call.like(&self.tokens.k)?, self.call.like(&self.tokens.v)?);
        let (exits, enters) = self.exits()?;
        for (i, exits) in exits.iter().enumerate() {
            let dots = queries.dots[i].as_ref();
            let finals = if dots.is_some() { self.end_states(i)? } else { None };
            let decay = self.dlog_decay.as_ref().zip(dots).map(|(to, dots)| DecayGrad {
                dots,
                states: &queries.entries[i],
                finals: finals.as_ref(),
                out: Out { to, add: i > 0 },
            });
            let part = self.grads[i].part;
            let pass = self.tokens.pass(&self.call, part, exits, enters)?;
            let of_k = Out { to: &part.keys(&dk)?, add: part.v.0 > 0 };
            let of_v = Out { to: &part.values(&dv)?, add: part.k.0 > 0 };
            F::keys(&self.call, &pass, &part.values(&self.d_o)?, of_k, of_v, decay)?;
        }
        Ok(Grads { dq: queries.dq, dk, dv, dlog_decay: self.dlog_decay })
    }
}
