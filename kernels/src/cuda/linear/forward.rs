//! One segment's forward: sum up, run with what is known to enter, add what comes late.

use tch::{Kind, Tensor};

use super::passes::{Call, Out, Run};
use super::{Sums, call, parts, tiles, transition};
use crate::Result;
use crate::linear::{ForwardSegment, Inputs, Summary};

pub(super) struct Forward {
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: f64,
    entry: Option<Tensor>,
    sums: Vec<Sums>,
    /// Of each part, `[slots, K, V]`: from the first entry, and what came late.
    entries: Option<Vec<Tensor>>,
    late: Option<Vec<Tensor>>,
    /// `[B, H, K, V]`.
    end: Option<Tensor>,
    o: Option<Tensor>,
}

impl Forward {
    pub fn new(x: &Inputs, entry: Option<&Tensor>, scale: f64) -> Result<Self> {
        let (dk, dv) = (x.k.size()[3], x.v.size()[3]);
        let call = call(x)?;
        let sums = parts(dk, dv).into_iter().map(|part| Sums::new(&call, part, false)).collect::<Result<_>>()?;
        Ok(Self {
            call,
            q: tiles(&x.q)?,
            k: tiles(&x.k)?,
            v: tiles(&x.v)?,
            scale,
            entry: entry.map(Tensor::shallow_clone),
            sums,
            entries: None,
            late: None,
            end: None,
            o: None,
        })
    }

    /// The states at the segments' starts and, into `finals` `[B, H, K, V]`, at the end.
    fn states(&mut self, finals: Option<&Tensor>) -> Result<Vec<Tensor>> {
        let mut entries = Vec::new();
        for sums in &mut self.sums {
            let part = sums.part;
            sums.ensure(&self.call, &part.keys(&self.k)?, &part.values(&self.v)?, 1.0, finals.is_some())?;
            entries.push(sums.entries(&self.call, self.entry.as_ref(), finals)?);
        }
        Ok(entries)
    }

    fn end(&mut self) -> Result<Tensor> {
        if let Some(end) = &self.end {
            return Ok(end.shallow_clone());
        }
        let (dk, dv) = (self.k.size()[3], self.v.size()[3]);
        let end = self.call.empty(&[self.call.b, self.call.h, dk, dv])?;
        self.entries = Some(self.states(Some(&end))?);
        Ok(self.end.insert(end).shallow_clone())
    }

    fn output(&mut self) -> Result<Tensor> {
        if let Some(o) = &self.o {
            return Ok(o.shallow_clone());
        }
        let entries = match self.entries.take() {
            Some(entries) => entries,
            None => self.states(None)?,
        };
        let o = Tensor::f_empty(self.v.size(), (Kind::BFloat16, self.call.device))?;
        for (sums, entries) in self.sums.iter().zip(&entries) {
            let part = sums.part;
            self.call.run(
                false,
                false,
                &Run {
                    x: &part.keys(&self.q)?,
                    y: &part.keys(&self.k)?,
                    z: &part.values(&self.v)?,
                    out: Out { to: &part.values(&o)?, add: part.k.0 > 0 },
                    x2: None,
                    out2: None,
                    entries,
                    transposed: false,
                    ends: self.entry.is_some(),
                    scale: self.scale,
                    entry_scale: 1.0,
                    dots: None,
                    pairs: None,
                },
            )?;
        }
        self.entries = Some(entries);
        Ok(self.o.insert(o).shallow_clone())
    }
}

impl ForwardSegment for Forward {
    fn summarize(&mut self) -> Result<Summary> {
        let state = self.end()?;
        Ok(Summary { transition: transition(&self.call)?, state })
    }

    fn run(&mut self) -> Result<()> {
        self.output().map(drop)
    }

    fn add_entry(&mut self, entry: &Tensor) -> Result<()> {
        let o = self.output()?;
        let mut late = Vec::with_capacity(self.sums.len());
        for sums in &self.sums {
            let part = sums.part;
            let entries = self.call.empty(&sums.sums.size())?;
            let external = part.state(entry)?;
            self.call.combine(false, None, &sums.decays, Some(&external), &entries, None)?;
            let (x, y, z) = (part.keys(&self.q)?, part.keys(&self.k)?, part.values(&self.v)?);
            self.call.run(
                false,
                true,
                &Run {
                    x: &x,
                    y: &y,
                    z: &z,
                    out: Out { to: &part.values(&o)?, add: true },
                    x2: None,
                    out2: None,
                    entries: &entries,
                    transposed: false,
                    ends: true,
                    scale: self.scale,
                    entry_scale: 1.0,
                    dots: None,
                    pairs: None,
                },
            )?;
            late.push(entries);
        }
        if let Some(before) = self.late.replace(late) {
            add(self.late.iter().flatten(), &before)?;
        }
        Ok(())
    }

    /// The states at the segments' starts, `[slots, K, V]` of each part.
    fn take_saved(&mut self) -> Result<Option<Vec<Tensor>>> {
        let Some(entries) = self.entries.take() else { return Ok(None) };
        if let Some(late) = self.late.take() {
            add(entries.iter(), &late)?;
        }
        Ok(Some(entries))
    }

    fn finish(mut self: Box<Self>) -> Result<Tensor> {
        self.output()
    }
}

/// Adds part by part, in place.
fn add<'a>(to: impl Iterator<Item = &'a Tensor>, from: &[Tensor]) -> Result<()> {
    for (to, from) in to.zip(from) {
        let _ = to.shallow_clone().f_add_(from)?;
    }
    Ok(())
}
