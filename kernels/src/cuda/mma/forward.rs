//! The forward of some pieces: sum up, run with what is known to enter, add what comes late.

use tch::Tensor;

use super::passes::{Call, Out, Run};
use super::{Sums, add, call, clones, summary, tiles};
use crate::Result;
use crate::linear::{ForwardSegment, Inputs, Piece, Summary};

pub(super) struct Forward {
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: f64,
    /// Of each piece the state that came with the call, and what came late.
    entries: Vec<Option<Tensor>>,
    late: Vec<Option<Tensor>>,
    sums: Vec<Sums>,
    /// Of each part, `[slots, K, V]`: what the segments start from, of `entries`.
    states: Option<Vec<Tensor>>,
    /// `[rows, K, V]`.
    end: Option<Tensor>,
    o: Option<Tensor>,
}

impl Forward {
    pub fn new(x: &Inputs, pieces: &[Piece], entries: &[Option<Tensor>], scale: f64) -> Result<Self> {
        let call = call(x, pieces)?;
        let sums = Sums::all(&call, x.k.size()[3], x.v.size()[3], false)?;
        Ok(Self {
            call,
            q: tiles(&x.q)?,
            k: tiles(&x.k)?,
            v: tiles(&x.v)?,
            scale,
            entries: clones(entries),
            late: entries.iter().map(|_| None).collect(),
            sums,
            states: None,
            end: None,
            o: None,
        })
    }

    /// Sums up the segments, those at the pieces' ends only if `ends`. What comes late needs their decays too.
    fn sum_up(&mut self, ends: bool) -> Result<()> {
        self.sums.iter_mut().try_for_each(|sums| sums.ensure(&self.call, (&self.k, &self.v), 1.0, ends))
    }

    /// The states at the segments' starts and, into `finals` `[rows, K, V]`, those that leave pieces.
    fn states(&mut self, finals: Option<&Tensor>) -> Result<Vec<Tensor>> {
        self.sum_up(finals.is_some())?;
        self.sums.iter().map(|sums| sums.entries(&self.call, &self.entries, finals)).collect()
    }

    fn end(&mut self) -> Result<Tensor> {
        if let Some(end) = &self.end {
            return Ok(end.shallow_clone());
        }
        let (dk, dv) = (self.k.size()[3], self.v.size()[3]);
        let end = self.call.empty(&[self.call.rows(true), dk, dv])?;
        self.states = Some(self.states(Some(&end))?);
        Ok(self.end.insert(end).shallow_clone())
    }

    /// One pass into `o`, from the states at the segments' starts. `late`: adds to it what those give.
    fn pass(&self, sums: &Sums, o: &Tensor, entries: &Tensor, late: bool) -> Result<()> {
        let part = sums.part;
        let log_decay = part.log_decay(&self.call)?;
        let run = Run {
            q: &part.keys(&self.q)?,
            k: &part.keys(&self.k)?,
            v: &part.values(&self.v)?,
            d_o: None,
            log_decay: log_decay.as_ref(),
            inner: Some(Out { to: &part.values(o)?, add: late || part.k.0 > 0 }),
            outer: None,
            entries,
            ends: late || self.entries.iter().any(Option::is_some),
            scale: self.scale,
            entry_scale: 1.0,
            decay_grad: None,
        };
        self.call.run(false, late, &run)
    }

    fn output(&mut self) -> Result<Tensor> {
        if let Some(o) = &self.o {
            return Ok(o.shallow_clone());
        }
        let states = match self.states.take() {
            Some(states) => states,
            None => self.states(None)?,
        };
        let o = Tensor::f_empty(self.v.size(), (self.call.kind, self.call.device))?;
        for (sums, states) in self.sums.iter().zip(&states) {
            self.pass(sums, &o, states, false)?;
        }
        self.states = Some(states);
        Ok(self.o.insert(o).shallow_clone())
    }

    fn is_late(&self) -> bool {
        self.late.iter().any(Option::is_some)
    }
}

impl ForwardSegment for Forward {
    fn summarize(&mut self, piece: usize) -> Result<Summary> {
        let end = self.end()?;
        summary(&self.call, false, piece, &end)
    }

    fn run(&mut self) -> Result<()> {
        self.output().map(drop)
    }

    /// Costs a pass in [`ForwardSegment::finish`], one for all pieces.
    fn add_entry(&mut self, piece: usize, entry: &Tensor) -> Result<()> {
        self.call.row(false, piece)?;
        add(&mut self.late, piece, entry)
    }

    /// The states at the segments' starts, `[slots, K, V]` of each part.
    fn take_saved(&mut self) -> Result<Option<Vec<Tensor>>> {
        let Some(states) = self.states.take() else { return Ok(None) };
        if !self.is_late() {
            return Ok(Some(states));
        }
        let mut all = clones(&self.entries);
        for (piece, late) in self.late.iter().enumerate() {
            if let Some(late) = late {
                add(&mut all, piece, late)?;
            }
        }
        Ok(Some(self.sums.iter().map(|sums| sums.entries(&self.call, &all, None)).collect::<Result<_>>()?))
    }

    fn finish(mut self: Box<Self>) -> Result<Tensor> {
        let o = self.output()?;
        if self.is_late() {
            for sums in &self.sums {
                let entries = self.call.empty(&sums.sums.size())?;
                let external = sums.part.external(&self.call, false, &self.late)?;
                self.call.combine(false, None, sums.decays.as_ref(), external.as_ref(), &entries, None)?;
                self.pass(sums, &o, &entries, true)?;
            }
        }
        Ok(o)
    }
}
