//! The forward of some pieces: sum up, run with what is known to enter, add what comes late.

use tch::Tensor;

use super::states::{Sums, add, clones};
use super::{Call, Enters, Family, Out, Part, Tokens};
use crate::Result;
use crate::linear::{ForwardSegment, Inputs, Piece, Summary};

pub struct Forward<F> {
    call: Call<F>,
    tokens: Tokens,
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

impl<F: Family> Forward<F> {
    pub fn new(x: &Inputs, pieces: &[Piece], entries: &[Option<Tensor>], scale: f64) -> Result<Self> {
        let call = F::call(x, pieces)?;
        Ok(Self {
            tokens: Tokens::new::<F>(x, scale)?,
            entries: clones(entries),
            late: entries.iter().map(|_| None).collect(),
            sums: Sums::all(&call, false),
            call,
            states: None,
            end: None,
            o: None,
        })
    }

    /// The states at the segments' starts, with `entries` entering pieces, and into `finals` `[rows, K, V]` those that leave them.
    fn states(&mut self, entries: &[Option<Tensor>], finals: Option<&Tensor>) -> Result<Vec<Tensor>> {
        let of = |sums: &mut Sums| {
            sums.ensure(&self.call, (&self.tokens.k, &self.tokens.v), 1.0, finals.is_some())?;
            sums.entries(&self.call, entries, finals)
        };
        self.sums.iter_mut().map(of).collect()
    }

    fn end(&mut self) -> Result<Tensor> {
        if let Some(end) = &self.end {
            return Ok(end.shallow_clone());
        }
        let end = self.call.empty(&[self.call.rows(true), self.call.dk, self.call.dv])?;
        let entries = clones(&self.entries);
        self.states = Some(self.states(&entries, Some(&end))?);
        Ok(self.end.insert(end).shallow_clone())
    }

    /// One pass into `o`, from the states at the segments' starts. `late`: adds to it what those give.
    fn pass(&self, part: Part, o: &Tensor, entries: &Tensor, enters: Enters, late: bool) -> Result<()> {
        let pass = self.tokens.pass(&self.call, part, entries, enters)?;
        F::output(&self.call, &pass, late, Out { to: &part.values(o)?, add: late || part.k.0 > 0 })
    }

    fn output(&mut self) -> Result<Tensor> {
        if let Some(o) = &self.o {
            return Ok(o.shallow_clone());
        }
        let from_outside = self.entries.iter().any(Option::is_some);
        let (states, enters) = match self.states.take() {
            Some(states) => (states, Enters::known(from_outside)),
            // What comes late wants the segments' decays.
            None if self.call.rows(false) == 0 && F::looks_back(&self.call) => {
                (self.sums.iter().map(|sums| sums.room(&self.call)).collect::<Result<_>>()?, Enters::Unknown)
            }
            None => {
                let entries = clones(&self.entries);
                (self.states(&entries, None)?, Enters::known(from_outside))
            }
        };
        let o = self.call.like(&self.tokens.v)?;
        for (sums, states) in self.sums.iter().zip(&states) {
            self.pass(sums.part, &o, states, enters, false)?;
        }
        self.states = Some(states);
        Ok(self.o.insert(o).shallow_clone())
    }

    fn is_late(&self) -> bool {
        self.late.iter().any(Option::is_some)
    }
}

impl<F: Family> ForwardSegment for Forward<F> {
    fn summarize(&mut self, piece: usize) -> Result<Summary> {
        let end = self.end()?;
        self.call.summary(false, piece, &end)
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
        self.states(&all, None).map(Some)
    }

    fn finish(mut self: Box<Self>) -> Result<Tensor> {
        let o = self.output()?;
        if self.is_late() {
            for sums in &self.sums {
                let entries = sums.entries_of(&self.call, &self.late)?;
                self.pass(sums.part, &o, &entries, Enters::FromOutside, true)?;
            }
        }
        Ok(o)
    }
}
