//! The forward of some pieces: sum up, run with what is known to enter, add what comes late.

use tch::{Kind, Tensor};

use super::passes::{Call, Out, Run};
use super::{Sums, add, call, parts, summary, tiles};
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
        let (dk, dv) = (x.k.size()[3], x.v.size()[3]);
        let call = call(x, pieces)?;
        let sums = parts(dk, dv).into_iter().map(|part| Sums::new(&call, part, false)).collect::<Result<_>>()?;
        Ok(Self {
            call,
            q: tiles(&x.q)?,
            k: tiles(&x.k)?,
            v: tiles(&x.v)?,
            scale,
            entries: entries.iter().map(|entry| entry.as_ref().map(Tensor::shallow_clone)).collect(),
            late: entries.iter().map(|_| None).collect(),
            sums,
            states: None,
            end: None,
            o: None,
        })
    }

    /// The states at the segments' starts and, into `finals` `[rows, K, V]`, those that leave pieces.
    fn states(&mut self, finals: Option<&Tensor>) -> Result<Vec<Tensor>> {
        let mut states = Vec::new();
        for sums in &mut self.sums {
            let part = sums.part;
            sums.ensure(&self.call, &part.keys(&self.k)?, &part.values(&self.v)?, 1.0, finals.is_some())?;
            states.push(sums.entries(&self.call, &self.entries, finals)?);
        }
        Ok(states)
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
        self.call.run(
            false,
            late,
            &Run {
                x: &part.keys(&self.q)?,
                y: &part.keys(&self.k)?,
                z: &part.values(&self.v)?,
                out: Out { to: &part.values(o)?, add: late || part.k.0 > 0 },
                x2: None,
                out2: None,
                entries,
                transposed: false,
                ends: late || self.entries.iter().any(Option::is_some),
                scale: self.scale,
                entry_scale: 1.0,
                dots: None,
                pairs: None,
            },
        )
    }

    fn output(&mut self) -> Result<Tensor> {
        if let Some(o) = &self.o {
            return Ok(o.shallow_clone());
        }
        let states = match self.states.take() {
            Some(states) => states,
            None => self.states(None)?,
        };
        let o = Tensor::f_empty(self.v.size(), (Kind::BFloat16, self.call.device))?;
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
        let mut all: Vec<_> = self.entries.iter().map(|entry| entry.as_ref().map(Tensor::shallow_clone)).collect();
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
                self.call.combine(false, None, &sums.decays, external.as_ref(), &entries, None)?;
                self.pass(sums, &o, &entries, true)?;
            }
        }
        Ok(o)
    }
}
