//! The backward of some pieces: sum up the gradients of states, compute dq, which waits for nobody, and in the end dk and dv
//! with whatever came in at the pieces' ends.

use tch::{Kind, Tensor};

use super::passes::{Call, Dots, Out, Run};
use super::{Sums, add, call, parts, summary, tiles};
use crate::linear::{BackwardSegment, Grads, Inputs, Piece, Summary};
use crate::{Error, Result};

pub(super) struct Backward {
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_o: Tensor,
    scale: f64,
    decay_grad: bool,
    /// Of each piece.
    entries: Vec<Option<Tensor>>,
    exits: Vec<Option<Tensor>>,
    /// Of each part the states at the segments' starts `[slots, K, V]`, if forward has saved them.
    saved: Option<Vec<Tensor>>,
    /// Of y^T z = k^T v and of q^T do, a part each.
    states: Vec<Sums>,
    grads: Vec<Sums>,
    /// The gradients of the states that enter pieces as far as their outputs make them, `[rows, K, V]`; and, of each part, those
    /// of the states at the segments' ends `[slots, K, V]`.
    summed: Option<(Tensor, Vec<Tensor>)>,
    dq: Option<Queries>,
}

/// dq; and of each part the states at the segments' starts `[slots, K, V]` and, for the decay, q dq `[B, H, T]`.
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
        let sums =
            |reverse| parts(dk, dv).into_iter().map(|p| Sums::new(&call, p, reverse)).collect::<Result<Vec<_>>>();
        let (states, grads) = (sums(false)?, sums(true)?);
        for (i, saved) in saved.iter().flatten().enumerate() {
            let expected = states.get(i).map(|sums: &Sums| sums.sums.size());
            if expected.as_ref() != Some(&saved.size()) {
                let expected = format!("{expected:?}, the states that forward has saved");
                return Err(Error::Shape { tensor: "saved", found: saved.size(), expected });
            }
        }
        let saved = saved.filter(|saved| saved.len() == states.len());
        Ok(Self {
            q: tiles(&x.q)?,
            k: tiles(&x.k)?,
            v: tiles(&x.v)?,
            d_o: tiles(&d_o.f_to_kind(Kind::BFloat16)?)?,
            scale,
            decay_grad: x.decay_grad && call.log_decay.is_some(),
            call,
            entries: entries.iter().map(|entry| entry.as_ref().map(Tensor::shallow_clone)).collect(),
            exits: entries.iter().map(|_| None).collect(),
            saved,
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
                    let part = sums.part;
                    sums.ensure(&self.call, &part.keys(&self.q)?, &part.values(&self.d_o)?, self.scale, true)?;
                    exits.push(sums.entries(&self.call, &[], Some(&at_entry))?);
                }
                (at_entry, exits)
            }
        };
        Ok(self.summed.insert(summed))
    }

    fn queries(&mut self) -> Result<Queries> {
        if let Some(done) = self.dq.take() {
            return Ok(done);
        }
        let Call { b, t, h, device, .. } = self.call;
        let dq = Tensor::f_empty(self.q.size(), (Kind::BFloat16, device))?;
        let (mut all_entries, mut all_dots) = (Vec::new(), Vec::new());
        let mut saved = self.saved.take().map(Vec::into_iter);
        for sums in &mut self.states {
            let part = sums.part;
            let (q, k) = (part.keys(&self.q)?, part.keys(&self.k)?);
            let (v, d_o) = (part.values(&self.v)?, part.values(&self.d_o)?);
            let entries = match saved.as_mut().and_then(Iterator::next) {
                Some(entries) => entries,
                None => {
                    sums.ensure(&self.call, &k, &v, 1.0, false)?;
                    sums.entries(&self.call, &self.entries, None)?
                }
            };
            let dots = if self.decay_grad { Some(self.call.empty(&[b, h, t])?) } else { None };
            self.call.run(
                false,
                false,
                &Run {
                    x: &d_o,
                    y: &v,
                    z: &k,
                    out: Out { to: &part.keys(&dq)?, add: part.v.0 > 0 },
                    x2: dots.is_some().then_some(&q),
                    out2: None,
                    entries: &entries,
                    transposed: true,
                    ends: self.entries.iter().any(Option::is_some),
                    scale: self.scale,
                    entry_scale: 1.0,
                    dots: dots.as_ref(),
                    pairs: None,
                },
            )?;
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
            let part = sums.part;
            sums.ensure(&self.call, &part.keys(&self.q)?, &part.values(&self.d_o)?, self.scale, false)?;
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
        sums.ensure(&self.call, &range.keys(&self.k)?, &range.values(&self.v)?, 1.0, true)?;
        let ends = self.call.empty(&[self.call.rows(true), range.k.1, range.v.1])?;
        let entries = self.call.empty(&sums.sums.size())?;
        let external = range.external(&self.call, false, &self.entries)?;
        self.call.combine(false, Some(&sums.sums), &sums.decays, external.as_ref(), &entries, Some(&ends))?;
        Ok(Some(ends))
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
        let Call { b, t, h, device, .. } = self.call;
        let dk = Tensor::f_empty(self.k.size(), (Kind::BFloat16, device))?;
        let dv = Tensor::f_empty(self.v.size(), (Kind::BFloat16, device))?;
        let dlog_decay = if self.decay_grad { Some(self.call.empty(&[b, t, h])?) } else { None };
        for (i, exits) in exits.iter().enumerate() {
            let part = self.grads[i].part;
            let of_tokens = || if self.decay_grad { self.call.empty(&[b, h, t]).map(Some) } else { Ok(None) };
            let (keys, pairs) = (of_tokens()?, of_tokens()?);
            self.call.run(
                true,
                false,
                &Run {
                    x: &part.keys(&self.k)?,
                    y: &part.keys(&self.q)?,
                    z: &part.values(&self.d_o)?,
                    out: Out { to: &part.values(&dv)?, add: part.k.0 > 0 },
                    x2: Some(&part.values(&self.v)?),
                    out2: Some(Out { to: &part.keys(&dk)?, add: part.v.0 > 0 }),
                    entries: exits,
                    transposed: false,
                    ends: self.has_exit(),
                    scale: self.scale,
                    entry_scale: 1.0 / self.scale,
                    dots: keys.as_ref(),
                    pairs: pairs.as_ref(),
                },
            )?;
            if let (Some(out), Some(of_queries), Some(keys), Some(pairs)) =
                (&dlog_decay, &queries.dots[i], &keys, &pairs)
            {
                let ends = self.end_states(i)?;
                let states = (&queries.entries[i], ends.as_ref());
                let dots = Dots { queries: of_queries, keys, pairs };
                self.call.decay_gradient(&dots, states, exits, out, i > 0)?;
            }
        }
        Ok(Grads { dq: queries.dq, dk, dv, dlog_decay })
    }
}
