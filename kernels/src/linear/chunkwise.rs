//! Chunkwise linear attention in batched matrix products: quadratic inside chunks of C tokens, the recurrence between
//! them. GLA (arXiv 2312.06635), section 4, with the stable scores of `scores`; backward as in algorithms.md, section 2,
//! applied to chunks.
//!
//! Nothing of the forward is kept for backward but its inputs: chunk states are computed again.

use tch::{Kind, Tensor};

use super::chunks::{ChunkDecay, Chunked};
use super::scores::{add_score_grads, scores};
use super::{BackwardSegment, ForwardSegment, Grads, Inputs, Piece, StateMixer, Summary, pieces};
use crate::{Error, Result};

/// `scale` multiplies o. `chunk` is a power of two; states and sums are f32 (f64 for f64 inputs), bf16 is widened on entry.
#[derive(Clone, Copy, Debug)]
pub struct Chunkwise {
    chunk: i64,
    scale: f64,
}

impl Chunkwise {
    pub fn new(chunk: i64, scale: f64) -> Result<Self> {
        if chunk < 1 || chunk & (chunk - 1) != 0 || chunk > 1024 {
            return Err(Error::Unsupported(format!("chunk length {chunk}: expected a power of two from 1 to 1024")));
        }
        Ok(Self { chunk, scale })
    }
}

impl StateMixer for Chunkwise {
    fn scale(&self) -> f64 {
        self.scale
    }

    fn forward_pieces(
        &self,
        x: &Inputs,
        pieces: &[Piece],
        entries: &[Option<Tensor>],
    ) -> Result<Box<dyn ForwardSegment>> {
        pieces::forward(x, pieces, entries, |x, entry| {
            let entry = entry.map(Tensor::shallow_clone);
            let kind = x.q.kind();
            Ok(ForwardChunks { x: Chunked::new(x, self.chunk, self.scale)?, kind, entry, states: None, o: None })
        })
    }

    fn backward_pieces(
        &self,
        x: &Inputs,
        pieces: &[Piece],
        entries: &[Option<Tensor>],
        d_o: &Tensor,
        _saved: Option<Vec<Tensor>>,
    ) -> Result<Box<dyn BackwardSegment>> {
        pieces::backward(x, pieces, entries, d_o, |x, entry, d_o| {
            let chunked = Chunked::new(x, self.chunk, self.scale)?;
            Ok(BackwardChunks {
                d_o: chunked.shape.cut(d_o, chunked.kind)?,
                kind: x.q.kind(),
                scale: self.scale,
                decay_grad: x.decay_grad,
                entry: entry.map(Tensor::shallow_clone),
                x: chunked,
                state_grads: None,
                done: None,
            })
        })
    }
}

/// Of one piece.
struct ForwardChunks {
    x: Chunked,
    kind: Kind,
    entry: Option<Tensor>,
    /// `[n+1, G, K, V]`, once needed.
    states: Option<Tensor>,
    /// `[n G, C, V]`.
    o: Option<Tensor>,
}

impl ForwardChunks {
    fn states(&mut self) -> Result<Tensor> {
        let states = match self.states.take() {
            Some(states) => states,
            None => self.x.states(self.entry.as_ref())?,
        };
        Ok(self.states.insert(states).shallow_clone())
    }

    fn output(&mut self) -> Result<Tensor> {
        if self.o.is_none() {
            self.run()?;
        }
        self.o.as_ref().map(Tensor::shallow_clone).ok_or_else(|| Error::Unsupported("no output".to_owned()))
    }
}

impl ForwardSegment for ForwardChunks {
    fn summarize(&mut self, _piece: usize) -> Result<Summary> {
        let states = self.states()?;
        let transition = self.x.decay.transition(&self.x.shape, self.x.kind)?;
        Ok(Summary { transition, state: self.x.slot(&states, self.x.shape.n)? })
    }

    fn run(&mut self) -> Result<()> {
        let states = self.states()?;
        let x = &self.x;
        let o = x.empty(x.shape.dv)?;
        for at in x.parts() {
            let (part, mut o) = (x.part(at)?, x.rows(&o, at)?);
            let _ = scores(&part)?.f_bmm_out(&o, &part.v)?;
            let _ = o.f_baddbmm_(&part.decay.seen_from_start(&part.q)?, &part.per_chunk(&states, at.0)?)?;
        }
        self.o = Some(o);
        Ok(())
    }

    fn add_entry(&mut self, _piece: usize, entry: &Tensor) -> Result<()> {
        let o = self.output()?;
        let x = &self.x;
        let entry = x.shape.flat_state(entry, x.kind)?;
        let distances = x.decay.distances(false)?;
        for at in x.parts() {
            let part = x.part(at)?;
            let here = distances.as_ref().map(|d| d.f_narrow(0, at.0, at.1)).transpose()?;
            let entries = part.decay.spread(&entry, here.as_ref(), at.1)?;
            let _ = x.rows(&o, at)?.f_baddbmm_(&part.decay.seen_from_start(&part.q)?, &entries)?;
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<Tensor> {
        let o = self.output()?;
        self.x.shape.join(&o, self.kind)
    }
}

/// Of one piece.
struct BackwardChunks {
    x: Chunked,
    kind: Kind,
    scale: f64,
    decay_grad: bool,
    entry: Option<Tensor>,
    /// `[n G, C, V]`.
    d_o: Tensor,
    /// `[n+1, G, K, V]`, once needed.
    state_grads: Option<Tensor>,
    done: Option<ChunkGrads>,
}

/// dq, dk `[n G, C, K]`, dv `[n G, C, V]`; and, where the decay wants a gradient, dlog_decay `[n G, C]` or `[n G, C, K]`
/// and the states `[n+1, G, K, V]`, which the exit gradient meets.
struct ChunkGrads {
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dg: Option<(Tensor, Tensor)>,
}

impl BackwardChunks {
    fn state_grads(&mut self) -> Result<Tensor> {
        let grads = match self.state_grads.take() {
            Some(grads) => grads,
            None => self.x.state_grads(&self.d_o)?,
        };
        Ok(self.state_grads.insert(grads).shallow_clone())
    }
}

/// What reaches log a_t through the chunk's end: from the state at its entry, and from the tokens before t, whose share is
/// `k . dk` `[n G, C, K]` with dk the part of the exit gradients `exits` `[n G, K, V]`.
fn exit_decay_grad(x: &Chunked, k_dk: &Tensor, exits: &Tensor, entries: &Tensor) -> Result<Tensor> {
    let carried = exits.f_mul(entries)?.f_sum_dim_intlist(-1, false, x.kind)?; // [n G, K]
    let carried = over_channels(x, &x.decay.carry(&carried)?)?.f_unsqueeze(1)?;
    let k_dk = over_channels(x, k_dk)?;
    Ok(k_dk.f_cumsum(1, x.kind)?.f_sub_(&k_dk)?.f_add_(&carried)?)
}

/// Sums a gradient over K where the decay is a scalar.
fn over_channels(x: &Chunked, grad: &Tensor) -> Result<Tensor> {
    Ok(match x.decay {
        ChunkDecay::Channel { .. } => grad.shallow_clone(),
        _ => grad.f_sum_dim_intlist(-1, false, x.kind)?,
    })
}

impl BackwardSegment for BackwardChunks {
    fn summarize_grad(&mut self, _piece: usize) -> Result<Summary> {
        let grads = self.state_grads()?;
        let transition = self.x.decay.transition(&self.x.shape, self.x.kind)?;
        Ok(Summary { transition, state: self.x.slot(&grads, 0)? })
    }

    fn run_grad(&mut self) -> Result<()> {
        let grads = self.state_grads()?;
        let x = &self.x;
        let states = x.states(self.entry.as_ref())?;
        let (all_dq, all_dk, all_dv) = (x.empty(x.shape.dk)?, x.empty(x.shape.dk)?, x.empty(x.shape.dv)?);
        let mut dgs = Vec::new();
        for at in x.parts() {
            let (x, d_o) = (x.part(at)?, x.rows(&self.d_o, at)?);
            let (entries, exits) = (x.per_chunk(&states, at.0)?, x.per_chunk(&grads, at.0 + 1)?);

            // What comes through the chunk's entry and exit, then what comes from inside it.
            let mut dq = x.decay.seen_from_start(&d_o.f_bmm(&entries.f_transpose(1, 2)?)?)?;
            let mut dk = x.decay.seen_from_end(&x.v.f_bmm(&exits.f_transpose(1, 2)?)?)?;
            let through = if self.decay_grad {
                let entry = over_channels(&x, &x.q.f_mul(&dq)?)?.f_flip([1])?.f_cumsum(1, x.kind)?.f_flip([1])?;
                Some(exit_decay_grad(&x, &x.k.f_mul(&dk)?, &exits, &entries)?.f_add_(&entry)?)
            } else {
                None
            };
            let a = scores(&x)?;
            let mut dv = self.x.rows(&all_dv, at)?;
            let _ = x.decay.seen_from_end(&x.k)?.f_bmm_out(&dv, &exits)?;
            let _ = dv.f_baddbmm_(&a.f_transpose(1, 2)?, &d_o)?;
            let d_a = d_o.f_bmm(&x.v.f_transpose(1, 2)?)?;
            let inside = add_score_grads(&x, &a, d_a, &mut dq, &mut dk, self.decay_grad)?;
            if let (Some(mut through), Some(inside)) = (through, inside) {
                dgs.push(through.f_add_(&inside)?);
            }
            self.x.rows(&all_dq, at)?.f_copy_(&dq)?;
            self.x.rows(&all_dk, at)?.f_copy_(&dk)?;
        }
        let dg = if self.decay_grad { Some((Tensor::f_cat(&dgs, 0)?, states)) } else { None };
        self.done = Some(ChunkGrads { dq: all_dq, dk: all_dk, dv: all_dv, dg });
        Ok(())
    }

    fn add_exit(&mut self, _piece: usize, exit: &Tensor) -> Result<()> {
        if self.done.is_none() {
            self.run_grad()?;
        }
        let Some(done) = &self.done else { return Ok(()) };
        let x = &self.x;
        let exit = x.shape.flat_state(exit, x.kind)?;
        let distances = x.decay.distances(true)?;
        for at in x.parts() {
            let x = x.part(at)?;
            let here = distances.as_ref().map(|d| d.f_narrow(0, at.0, at.1)).transpose()?;
            let exits = x.decay.spread(&exit, here.as_ref(), at.1)?;
            let dk = x.decay.seen_from_end(&x.v.f_bmm(&exits.f_transpose(1, 2)?)?)?;
            let _ = self.x.rows(&done.dv, at)?.f_baddbmm_(&x.decay.seen_from_end(&x.k)?, &exits)?;
            if let Some((dg, states)) = &done.dg {
                let more = exit_decay_grad(&x, &x.k.f_mul(&dk)?, &exits, &x.per_chunk(states, at.0)?)?;
                let _ = self.x.rows(dg, at)?.f_add_(&more)?;
            }
            let _ = self.x.rows(&done.dk, at)?.f_add_(&dk)?;
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<Grads> {
        if self.done.is_none() {
            self.run_grad()?;
        }
        let Some(mut done) = self.done else { return Err(Error::Unsupported("no gradients".to_owned())) };
        if self.scale != 1.0 {
            let _ = done.dq.f_mul_scalar_(self.scale)?;
        }
        let (shape, kind) = (&self.x.shape, self.kind);
        Ok(Grads {
            dq: shape.join(&done.dq, kind)?,
            dk: shape.join(&done.dk, kind)?,
            dv: shape.join(&done.dv, kind)?,
            dlog_decay: done.dg.map(|(dg, _)| shape.join(&dg, self.x.kind)).transpose()?,
        })
    }
}
