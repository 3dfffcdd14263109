//! Chunkwise linear attention in batched matrix products: quadratic inside chunks of C tokens, the recurrence between
//! them. GLA (arXiv 2312.06635), section 4, with the stable scores of `scores`; backward as in algorithms.md, section 2,
//! applied to chunks.
//!
//! Nothing of the forward is kept for backward but its inputs: chunk states are computed again.

use tch::{Kind, Tensor};

use super::chunks::{ChunkDecay, Chunked};
use super::scores::{add_score_grads, scores};
use super::{BackwardSegment, Decay, ForwardSegment, Grads, Inputs, StateMixer, Summary};
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
    fn forward(&self, x: &Inputs, entry: Option<&Tensor>) -> Result<Box<dyn ForwardSegment>> {
        let entry = entry.map(Tensor::shallow_clone);
        Ok(Box::new(ForwardChunks {
            x: Chunked::new(x, self.chunk, self.scale)?,
            kind: x.q.kind(),
            entry,
            states: None,
            o: None,
        }))
    }

    fn backward(&self, x: &Inputs, entry: Option<&Tensor>, d_o: &Tensor) -> Result<Box<dyn BackwardSegment>> {
        let expected = x.v.size();
        if d_o.size() != expected {
            return Err(Error::Shape { tensor: "do", found: d_o.size(), expected: format!("that of v, {expected:?}") });
        }
        let chunked = Chunked::new(x, self.chunk, self.scale)?;
        let d_o = chunked.shape.cut(d_o, chunked.kind)?;
        Ok(Box::new(BackwardChunks {
            d_o,
            kind: x.q.kind(),
            scale: self.scale,
            has_decay: !matches!(x.decay, Decay::None),
            entry: entry.map(Tensor::shallow_clone),
            x: chunked,
            state_grads: None,
            done: None,
        }))
    }
}

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
    fn summarize(&mut self) -> Result<Summary> {
        let states = self.states()?;
        let transition = self.x.decay.transition(&self.x.shape, self.x.kind)?;
        Ok(Summary { transition, state: self.x.slot(&states, self.x.shape.n)? })
    }

    fn run(&mut self) -> Result<()> {
        let states = self.states()?;
        let x = &self.x;
        let mut o = scores(x)?.f_bmm(&x.v)?;
        let _ = o.f_baddbmm_(&x.decay.from_start(&x.q)?, &x.per_chunk(&states, 0)?)?;
        self.o = Some(o);
        Ok(())
    }

    fn add_entry(&mut self, entry: &Tensor) -> Result<()> {
        let mut o = self.output()?;
        let x = &self.x;
        let entries = x.decay.spread(&x.shape.flat_state(entry, x.kind)?, &x.shape, false)?;
        let _ = o.f_baddbmm_(&x.decay.from_start(&x.q)?, &entries)?;
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<Tensor> {
        let o = self.output()?;
        self.x.shape.join(&o, self.kind)
    }
}

struct BackwardChunks {
    x: Chunked,
    kind: Kind,
    scale: f64,
    has_decay: bool,
    entry: Option<Tensor>,
    /// `[n G, C, V]`.
    d_o: Tensor,
    /// `[n+1, G, K, V]`, once needed.
    state_grads: Option<Tensor>,
    done: Option<ChunkGrads>,
}

/// dq, dk `[n G, C, K]`, dv `[n G, C, V]`, dlog_decay `[n G, C]` or `[n G, C, K]`; and, with a decay, the state at the
/// start of every chunk, `[n G, K, V]`, which the exit gradient meets.
struct ChunkGrads {
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dg: Option<Tensor>,
    entries: Option<Tensor>,
}

impl BackwardChunks {
    fn state_grads(&mut self) -> Result<Tensor> {
        let grads = match self.state_grads.take() {
            Some(grads) => grads,
            None => self.x.state_grads(&self.d_o)?,
        };
        Ok(self.state_grads.insert(grads).shallow_clone())
    }

    /// What reaches log a_i through the chunk's end: from the state at its entry, and from the tokens before i, whose share
    /// is `k . dk` `[n G, C, K]` with dk the part of the exit gradients `exits` `[n G, K, V]`. Only terms that decay has
    /// already scaled are added up, where the formula of algorithms.md, `X - sum_{j >= i} k_j dk_j`, would subtract
    /// nearly equal numbers under a strong decay.
    fn exit_decay_grad(&self, k_dk: &Tensor, exits: &Tensor, entries: &Tensor) -> Result<Tensor> {
        let carried = exits.f_mul(entries)?.f_sum_dim_intlist(-1, false, self.x.kind)?; // [n G, K]
        let carried = self.over_channels(&self.x.decay.carry(&carried)?)?.f_unsqueeze(1)?;
        let k_dk = self.over_channels(k_dk)?;
        Ok(k_dk.f_cumsum(1, self.x.kind)?.f_sub_(&k_dk)?.f_add_(&carried)?)
    }

    /// Sums a gradient over K where the decay is a scalar.
    fn over_channels(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self.x.decay {
            ChunkDecay::Channel { .. } => x.shallow_clone(),
            _ => x.f_sum_dim_intlist(-1, false, self.x.kind)?,
        })
    }
}

impl BackwardSegment for BackwardChunks {
    fn summarize_grad(&mut self) -> Result<Summary> {
        let grads = self.state_grads()?;
        let transition = self.x.decay.transition(&self.x.shape, self.x.kind)?;
        Ok(Summary { transition, state: self.x.slot(&grads, 0)? })
    }

    fn run_grad(&mut self) -> Result<()> {
        let grads = self.state_grads()?;
        let x = &self.x;
        let states = x.states(self.entry.as_ref())?;
        let (entries, exits) = (x.per_chunk(&states, 0)?, x.per_chunk(&grads, 1)?);

        // What comes through the chunk's exit and entry, then what comes from inside it.
        let mut dq = x.decay.from_start(&self.d_o.f_bmm(&entries.f_transpose(1, 2)?)?)?;
        let mut dk = x.decay.from_end(&x.v.f_bmm(&exits.f_transpose(1, 2)?)?)?;
        let mut dv = x.decay.from_end(&x.k)?.f_bmm(&exits)?;
        let through_exit =
            if self.has_decay { Some(self.exit_decay_grad(&x.k.f_mul(&dk)?, &exits, &entries)?) } else { None };

        let _ = dv.f_baddbmm_(&scores(x)?.f_transpose(1, 2)?, &self.d_o)?;
        let d_a = self.d_o.f_bmm(&x.v.f_transpose(1, 2)?)?;
        let Some(through_exit) = through_exit else {
            add_score_grads(x, d_a, &mut dq, &mut dk)?;
            self.done = Some(ChunkGrads { dq, dk, dv, dg: None, entries: None });
            return Ok(());
        };
        // A token's product with itself knows no decay: it is left out until the decay's gradient is taken.
        let itself = d_a.f_diagonal_copy(0, 1, 2)?.f_unsqueeze(-1)?; // [n G, C, 1]
        let mut dk_inside = dk.f_zeros_like()?;
        add_score_grads(x, d_a, &mut dq, &mut dk_inside)?;
        let db = x.q.f_mul(&dq)?.f_addcmul_(&x.k.f_neg()?, &dk_inside)?;
        let dg = self.over_channels(&db)?.f_flip([1])?.f_cumsum(1, x.kind)?.f_flip([1])?.f_add_(&through_exit)?;
        let _ = dq.f_addcmul_(&itself, &x.k)?;
        let _ = dk.f_add_(&dk_inside)?.f_addcmul_(&itself, &x.q)?;
        self.done = Some(ChunkGrads { dq, dk, dv, dg: Some(dg), entries: Some(entries) });
        Ok(())
    }

    fn add_exit(&mut self, exit: &Tensor) -> Result<()> {
        if self.done.is_none() {
            self.run_grad()?;
        }
        let Some(mut done) = self.done.take() else { return Ok(()) };
        let x = &self.x;
        let exits = x.decay.spread(&x.shape.flat_state(exit, x.kind)?, &x.shape, true)?;
        let dk = x.decay.from_end(&x.v.f_bmm(&exits.f_transpose(1, 2)?)?)?;
        let _ = done.dv.f_baddbmm_(&x.decay.from_end(&x.k)?, &exits)?;
        if let (Some(dg), Some(entries)) = (&mut done.dg, &done.entries) {
            let _ = dg.f_add_(&self.exit_decay_grad(&x.k.f_mul(&dk)?, &exits, entries)?)?;
        }
        let _ = done.dk.f_add_(&dk)?;
        self.done = Some(done);
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
            dlog_decay: done.dg.map(|dg| shape.join(&dg, self.x.kind)).transpose()?,
        })
    }
}
