//! A mixer that takes one piece, made one that takes several: one after another.

use tch::Tensor;

use super::{BackwardSegment, Decay, ForwardSegment, Grads, Inputs, Piece, Summary, accumulation_kind};
use crate::{Error, Result};

/// Whether `pieces`, with as many `entries`, are the tokens of `x`.
pub(crate) fn check(x: &Inputs, pieces: &[Piece], entries: &[Option<Tensor>]) -> Result<()> {
    let lengths = || pieces.iter().map(|piece| piece.tokens).collect::<Vec<_>>();
    if lengths().iter().sum::<i64>() != x.tokens() || pieces.iter().any(|piece| piece.tokens < 1) {
        let expected = format!("q [B, T, H, K] with the tokens of the pieces, each at least 1: {:?}", lengths());
        return Err(Error::Shape { tensor: "q", found: x.q.size(), expected });
    }
    if pieces.len() != entries.len() {
        let (found, expected) = (entries.len(), pieces.len());
        return Err(Error::Unsupported(format!(
            "entry states of {found} pieces; expected one, or none, for each of {expected}"
        )));
    }
    let given = |(piece, entry): (&Piece, &Option<Tensor>)| entry.is_some() && !piece.enters;
    match pieces.iter().zip(entries).position(given) {
        Some(piece) => Err(Error::Unsupported(format!("an entry state for piece {piece}, which no state enters"))),
        None => Ok(()),
    }
}

/// Whether do has the shape of v.
pub(crate) fn check_grad(x: &Inputs, d_o: &Tensor) -> Result<()> {
    let (found, expected) = (d_o.size(), x.v.size());
    if found != expected {
        return Err(Error::Shape { tensor: "do", found, expected: format!("that of v, {expected:?}") });
    }
    Ok(())
}

/// Each piece's first token and their number.
fn ranges(pieces: &[Piece]) -> impl Iterator<Item = (i64, i64)> {
    pieces.iter().scan(0, |start, piece| {
        *start += piece.tokens;
        Some((*start - piece.tokens, piece.tokens))
    })
}

/// `one`: the forward of one piece, given its entry.
pub(super) fn forward<S: ForwardSegment + 'static>(
    x: &Inputs,
    pieces: &[Piece],
    entries: &[Option<Tensor>],
    one: impl Fn(&Inputs, Option<&Tensor>) -> Result<S>,
) -> Result<Box<dyn ForwardSegment>> {
    check(x, pieces, entries)?;
    if let [entry] = entries {
        return Ok(Box::new(one(x, entry.as_ref())?));
    }
    let of = |((start, length), entry): ((i64, i64), &Option<Tensor>)| one(&x.narrow(start, length)?, entry.as_ref());
    let each = ranges(pieces).zip(entries).map(of).collect::<Result<Vec<_>>>()?;
    Ok(Box::new(Forward { each, v: x.v.shallow_clone() }))
}

/// `one`: the backward of one piece, given its entry and do.
pub(super) fn backward<S: BackwardSegment + 'static>(
    x: &Inputs,
    pieces: &[Piece],
    entries: &[Option<Tensor>],
    d_o: &Tensor,
    one: impl Fn(&Inputs, Option<&Tensor>, &Tensor) -> Result<S>,
) -> Result<Box<dyn BackwardSegment>> {
    check(x, pieces, entries)?;
    check_grad(x, d_o)?;
    if let [entry] = entries {
        return Ok(Box::new(one(x, entry.as_ref(), d_o)?));
    }
    let of = |((start, length), entry): ((i64, i64), &Option<Tensor>)| {
        one(&x.narrow(start, length)?, entry.as_ref(), &d_o.f_narrow(1, start, length)?)
    };
    let each = ranges(pieces).zip(entries).map(of).collect::<Result<Vec<_>>>()?;
    Ok(Box::new(Backward { each, x: x.shallow_clone() }))
}

struct Forward<S> {
    each: Vec<S>,
    v: Tensor,
}

impl<S: ForwardSegment> ForwardSegment for Forward<S> {
    fn summarize(&mut self, piece: usize) -> Result<Summary> {
        self.each[piece].summarize(0)
    }

    fn run(&mut self) -> Result<()> {
        self.each.iter_mut().try_for_each(|segment| segment.run())
    }

    fn add_entry(&mut self, piece: usize, entry: &Tensor) -> Result<()> {
        self.each[piece].add_entry(0, entry)
    }

    fn finish(self: Box<Self>) -> Result<Tensor> {
        let parts = self.each.into_iter().map(|segment| Box::new(segment).finish()).collect::<Result<Vec<_>>>()?;
        join(&parts, || Ok(self.v.f_zeros_like()?))
    }
}

struct Backward<S> {
    each: Vec<S>,
    x: Inputs,
}

impl<S: BackwardSegment> BackwardSegment for Backward<S> {
    fn summarize_grad(&mut self, piece: usize) -> Result<Summary> {
        self.each[piece].summarize_grad(0)
    }

    fn run_grad(&mut self) -> Result<()> {
        self.each.iter_mut().try_for_each(|segment| segment.run_grad())
    }

    fn add_exit(&mut self, piece: usize, exit: &Tensor) -> Result<()> {
        self.each[piece].add_exit(0, exit)
    }

    fn finish(self: Box<Self>) -> Result<Grads> {
        let x = self.x;
        let (mut dq, mut dk, mut dv, mut dg) = (vec![], vec![], vec![], vec![]);
        for segment in self.each {
            let grads = Box::new(segment).finish()?;
            dq.push(grads.dq);
            dk.push(grads.dk);
            dv.push(grads.dv);
            dg.extend(grads.dlog_decay);
        }
        let kind = accumulation_kind(x.q.kind());
        let no_decays = || match &x.decay {
            Decay::Token(g) | Decay::Channel(g) => Ok(g.f_zeros_like()?.f_to_kind(kind)?),
            Decay::None | Decay::Head(_) => Ok(x.q.f_select(-1, 0)?.f_zeros_like()?.f_to_kind(kind)?),
        };
        let has_decay = x.decay_grad && x.decay.tensor().is_some();
        Ok(Grads {
            dq: join(&dq, || Ok(x.q.f_zeros_like()?))?,
            dk: join(&dk, || Ok(x.k.f_zeros_like()?))?,
            dv: join(&dv, || Ok(x.v.f_zeros_like()?))?,
            dlog_decay: has_decay.then(|| join(&dg, no_decays)).transpose()?,
        })
    }
}

/// Along the tokens; `empty` where there are none.
fn join(parts: &[Tensor], empty: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
    if parts.is_empty() { empty() } else { Ok(Tensor::f_cat(parts, 1)?) }
}
