//! The backward of some pieces: sum up the gradients of states, compute dq, which waits for nobody, and in the end dk and dv
//! with whatever came in at the pieces' ends.

use tch::{Kind, Tensor};

use super::passes::{Call, DecayGrad, Out, Run, SLICE};
use super::{Form, Part, Sums, add, call, checked, clones, summary, tiles};
use crate::Result;
use crate::linear::{BackwardSegment, Grads, Inputs, Piece, Summary};

pub(super) struct Backward {
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_o: Tensor,
    scale: f64,
    /// Of the decay, where that wants one: `[B, T, H, K]` or `[B, T, H]`, f32.
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

/// dq; and of each part the states at the segments' starts `[slots, K, V]` and what dlog_decay needs of dq's pass.
struct Queries {
    dq: Tensor,
    entries: Vec<Tensor>,
    dots: Vec<Option<Tensor>>,
}

impl Backward {
    pub fn new(
        x: &Inputs,
        pieces: &[Piece],
        entries: &[Option<Tensor>],
        d_o: &Tensor,
        saved: Option<Vec<Tensor>>,
        scale: f64,
    ) -> Result<Self> {
        let (dk, dv) = (x.k.size()[3], x.v.size()[3]);
        let call = call(x, pieces)?;
        let (states, grads) = (Sums::all(&call, dk, dv, false)?, Sums::all(&call, dk, dv, true)?);
        let dlog_decay = match call.form {
            Form::Channel if x.decay_grad => Some(call.empty(&[call.b, call.t, call.h, dk])?),
            Form::Scalar if x.decay_grad => Some(call.empty(&[call.b, call.t, call.h])?),
            _ => None,
        };
        Ok(Self {
            q: tiles(&x.q)?,
            k: tiles(&x.k)?,
            v: tiles(&x.v)?,
            d_o: tiles(&d_o.f_to_kind(call.kind)?)?,
            scale,
            dlog_decay,
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

    fn summed(&mut self) -> Result<&(Tensor, Vec<Tensor>)> {
        let summed = match self.summed.take() {
            Some(summed) => summed,
            None => {
                let (dk, dv) = (self.k.size()[3], self.v.size()[3]);
                let at_entry = self.call.empty(&[self.call.rows(false), dk, dv])?;
                let mut exits = Vec::new();
                for sums in &mut self.grads {
                    sums.ensure(&self.call, (&self.q, &self.d_o), self.scale, true)?;
                    exits.push(sums.entries(&self.call, &[], Some(&at_entry))?);
                }
                (at_entry, exits)
            }
        };
        Ok(self.summed.insert(summed))
    }

    /// What dq's pass leaves of a part's dlog_decay: in the place of the result where that is not wanted for another part too.
    fn dots(&self, part: &Part) -> Result<Option<Tensor>> {
        let Some(dlog_decay) = &self.dlog_decay else { return Ok(None) };
        let Call { b, t, h, .. } = self.call;
        Ok(Some(match self.call.form {
            Form::Channel if part.v.1 == self.v.size()[3] => part.keys(dlog_decay)?,
            Form::Channel => self.call.empty(&[b, t, h, part.k.1])?,
            _ => self.call.empty(&[b, t, h, (part.k.1 + SLICE - 1) / SLICE])?,
        }))
    }

    fn queries(&mut self) -> Result<Queries> {
        if let Some(done) = self.dq.take() {
            return Ok(done);
        }
        let dq = Tensor::f_empty(self.q.size(), (self.call.kind, self.call.device))?;
        let (mut all_entries, mut all_dots) = (Vec::new(), Vec::new());
        let mut saved = self.saved.take().map(Vec::into_iter);
        for i in 0..self.states.len() {
            let part = self.states[i].part;
            let dots = self.dots(&part)?;
            let sums = &mut self.states[i];
            let entries = match saved.as_mut().and_then(Iterator::next) {
                Some(entries) => entries,
                None => {
                    sums.ensure(&self.call, (&self.k, &self.v), 1.0, false)?;
                    sums.entries(&self.call, &self.entries, None)?
                }
            };
            let log_decay = part.log_decay(&self.call)?;
            let run = Run {
                q: &part.keys(&self.q)?,
                k: &part.keys(&self.k)?,
                v: &part.values(&self.v)?,
                d_o: Some(&part.values(&self.d_o)?),
                log_decay: log_decay.as_ref(),
                inner: None,
                outer: Some(Out { to: &part.keys(&dq)?, add: part.v.0 > 0 }),
                entries: &entries,
                ends: self.entries.iter().any(Option::is_some),
                scale: self.scale,
                entry_scale: 1.0,
                decay_grad: dots.as_ref().map(|dots| DecayGrad { dots, out: None, states: None, finals: None }),
            };
            self.call.run(false, false, &run)?;
            all_entries.push(entries);
            all_dots.push(dots);
        }
        Ok(Queries { dq, entries: all_entries, dots: all_dots })
    }

    fn has_exit(&self) -> bool {
        self.exits.iter().any(Option::is_some)
    }

    /// The gradients of the states at the segments' ends, with those that came in at the pieces' ends.
    fn exits(&mut self) -> Result<Vec<Tensor>> {
        if !self.has_exit()
            && let Some((_, exits)) = self.summed.take()
        {
            return Ok(exits);
        }
        let mut exits = Vec::new();
        for sums in &mut self.grads {
            sums.ensure(&self.call, (&self.q, &self.d_o), self.scale, false)?;
            exits.push(sums.entries(&self.call, &self.exits, None)?);
        }
        Ok(exits)
    }

    /// The states that leave pieces `[rows, K, V]`, for a part whose decay wants the gradients that came in there.
    fn end_states(&mut self, part: usize) -> Result<Option<Tensor>> {
        if !self.has_exit() {
            return Ok(None);
        }
        let sums = &mut self.states[part];
        let range = sums.part;
        sums.ensure(&self.call, (&self.k, &self.v), 1.0, true)?;
        let ends = self.call.empty(&[self.call.rows(true), range.k.1, range.v.1])?;
        let entries = self.call.empty(&sums.sums.size())?;
        let external = range.external(&self.call, false, &self.entries)?;
        let (sums, decays) = (Some(&sums.sums), sums.decays.as_ref());
        self.call.combine(false, sums, decays, external.as_ref(), &entries, Some(&ends))?;
        Ok(Some(ends))
    }

    /// dk, dv and dlog_decay of one part, into those of all.
    fn keys(&mut self, i: usize, exits: &Tensor, queries: &Queries, dk: &Tensor, dv: &Tensor) -> Result<()> {
        let part = self.grads[i].part;
        let dots = queries.dots[i].as_ref();
        let finals = if dots.is_some() { self.end_states(i)? } else { None };
        let scalar = self.call.form == Form::Scalar;
        let out = match &self.dlog_decay {
            Some(all) if !scalar => Some(part.keys(all)?),
            // In place: every number is read before it is written, by the same thread.
            _ => dots.map(Tensor::shallow_clone),
        };
        let add = !scalar && part.v.0 > 0;
        let (q, k) = (part.keys(&self.q)?, part.keys(&self.k)?);
        let (v, d_o) = (part.values(&self.v)?, part.values(&self.d_o)?);
        let (dk, dv, log_decay) = (part.keys(dk)?, part.values(dv)?, part.log_decay(&self.call)?);
        let run = |inner: bool, outer: bool| {
            let decay_grad = dots.zip(out.as_ref()).filter(|_| outer).map(|(dots, out)| DecayGrad {
                dots,
                out: Some(Out { to: out, add }),
                states: Some(&queries.entries[i]),
                finals: finals.as_ref(),
            });
            let run = Run {
                q: &q,
                k: &k,
                v: &v,
                d_o: Some(&d_o),
                log_decay: log_decay.as_ref(),
                inner: inner.then_some(Out { to: &dv, add: part.k.0 > 0 }),
                outer: outer.then_some(Out { to: &dk, add: part.v.0 > 0 }),
                entries: exits,
                ends: self.has_exit(),
                scale: self.scale,
                entry_scale: 1.0 / self.scale,
                decay_grad,
            };
            self.call.run(true, false, &run)
        };
        if self.call.dual() {
            run(true, true)?;
        } else {
            run(true, false)?;
            run(false, true)?;
        }
        if let (true, Some(all), Some(slices)) = (scalar, &self.dlog_decay, &out) {
            let sum = slices.f_sum_dim_intlist(-1, false, Kind::Float)?;
            self.dlog_decay = Some(if i > 0 { all.f_add(&sum)? } else { sum });
        }
        Ok(())
    }
}

impl BackwardSegment for Backward {
    fn summarize_grad(&mut self, piece: usize) -> Result<Summary> {
        let at_entry = self.summed()?.0.shallow_clone();
        summary(&self.call, true, piece, &at_entry)
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
        let exits = self.exits()?;
        let dk = Tensor::f_empty(self.k.size(), (self.call.kind, self.call.device))?;
        let dv = Tensor::f_empty(self.v.size(), (self.call.kind, self.call.device))?;
        for (i, exits) in exits.iter().enumerate() {
            self.keys(i, exits, &queries, &dk, &dv)?;
        }
        Ok(Grads { dq: queries.dq, dk, dv, dlog_decay: self.dlog_decay })
    }
}
