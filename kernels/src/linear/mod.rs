//! Linear attention with a diagonal decay: the recurrence `M_s = diag(a_s) M_{s-1} + k_s^T v_s`, `o_s = scale q_s M_s`.
//!
//! This file has the words that every implementation shares: the decay, the inputs of a run of tokens, the
//! summary `(A, S)` of a segment, and the traits through which segments are computed: a rank's tokens in one call, whatever
//! documents they are of. The slow truth is in [`oracle`], the fast version in tensor operations in [`chunkwise`], the unmasked
//! form in [`full`]. How summaries of several segments meet is the business of whoever calls: nothing here knows of ranks.

mod chunks;
pub mod chunkwise;
pub mod full;
pub mod left_product;
pub mod oracle;
mod pieces;
mod scores;

use std::sync::Arc;

use tch::{Kind, Tensor};

pub(crate) use pieces::{check, check_grad};

use crate::{Error, Result};

/// The logarithm of the decay `a`, at most 0. GLA (arXiv 2312.06635) calls the per-channel form a forget gate.
#[derive(Debug)]
pub enum Decay {
    /// `a = 1`: plain linear attention.
    None,
    /// `[H]`: one constant per head (Lightning attention, Retention).
    Head(Tensor),
    /// `[B, T, H]`: a scalar per token and head (simple GLA, Mamba-2).
    Token(Tensor),
    /// `[B, T, H, K]`: a vector per token and head (GLA, HGRN-2).
    Channel(Tensor),
}

impl Decay {
    /// Tells the form by the number of dimensions and checks it against `k` `[B, T, H, K]`.
    pub fn new(log_decay: Option<&Tensor>, k: &Tensor) -> Result<Self> {
        let Some(g) = log_decay else { return Ok(Self::None) };
        let (b, t, h, dk) = k.size4()?;
        let found = g.size();
        let g = g.shallow_clone();
        if found == [h] {
            Ok(Self::Head(g))
        } else if found == [b, t, h] {
            Ok(Self::Token(g))
        } else if found == [b, t, h, dk] {
            Ok(Self::Channel(g))
        } else {
            let expected = format!("[H] = [{h}], [B, T, H] = [{b}, {t}, {h}] or [B, T, H, K] = [{b}, {t}, {h}, {dk}]");
            Err(Error::Shape { tensor: "log_decay", found, expected })
        }
    }

    pub fn tensor(&self) -> Option<&Tensor> {
        match self {
            Self::None => None,
            Self::Head(g) | Self::Token(g) | Self::Channel(g) => Some(g),
        }
    }

    fn map(&self, f: impl Fn(&Tensor) -> std::result::Result<Tensor, tch::TchError>) -> Result<Self> {
        Ok(match self {
            Self::None => Self::None,
            Self::Head(g) => Self::Head(g.shallow_clone()),
            Self::Token(g) => Self::Token(f(g)?),
            Self::Channel(g) => Self::Channel(f(g)?),
        })
    }

    /// The decay of tokens `start .. start + length`, as a view.
    pub fn narrow(&self, start: i64, length: i64) -> Result<Self> {
        self.map(|g| g.f_narrow(1, start, length))
    }

    pub fn shallow_clone(&self) -> Self {
        match self {
            Self::None => Self::None,
            Self::Head(g) => Self::Head(g.shallow_clone()),
            Self::Token(g) => Self::Token(g.shallow_clone()),
            Self::Channel(g) => Self::Channel(g.shallow_clone()),
        }
    }
}

/// A run of tokens of one layer: q, k `[B, T, H, K]`, v `[B, T, H, V]` and their decay.
#[derive(Debug)]
pub struct Inputs {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub decay: Decay,
    /// Whether backward computes dlog_decay. A constant decay, as Lightning's, wants none.
    pub decay_grad: bool,
}

impl Inputs {
    /// Checks shapes and kinds; detaches from any autograd graph.
    pub fn new(q: &Tensor, k: &Tensor, v: &Tensor, log_decay: Option<&Tensor>) -> Result<Self> {
        let (b, t, h, dk) = shape4("q", q, "[B, T, H, K]")?;
        if k.size() != [b, t, h, dk] {
            let expected = format!("the shape of q, {:?}: linear attention has as many k heads as q heads", q.size());
            return Err(Error::Shape { tensor: "k", found: k.size(), expected });
        }
        let (vb, vt, vh, _) = shape4("v", v, "[B, T, H, V]")?;
        if (vb, vt, vh) != (b, t, h) {
            return Err(Error::Shape {
                tensor: "v",
                found: v.size(),
                expected: format!("[{b}, {t}, {h}, V], as q has"),
            });
        }
        for (tensor, x) in [("k", k), ("v", v)] {
            if x.kind() != q.kind() {
                return Err(Error::Kind { tensor, found: x.kind(), expected: format!("that of q, {:?}", q.kind()) });
            }
        }
        let decay = Decay::new(log_decay, k)?.map(|g| g.f_detach())?;
        let decay = match decay {
            Decay::Head(g) => Decay::Head(g.f_detach()?),
            other => other,
        };
        let decay_grad = log_decay.is_some();
        Ok(Self { q: q.f_detach()?, k: k.f_detach()?, v: v.f_detach()?, decay, decay_grad })
    }

    pub fn tokens(&self) -> i64 {
        self.q.size()[1]
    }

    /// Tokens `start .. start + length`, as views.
    pub fn narrow(&self, start: i64, length: i64) -> Result<Self> {
        Ok(Self {
            q: self.q.f_narrow(1, start, length)?,
            k: self.k.f_narrow(1, start, length)?,
            v: self.v.f_narrow(1, start, length)?,
            decay: self.decay.narrow(start, length)?,
            decay_grad: self.decay_grad,
        })
    }

    pub fn shallow_clone(&self) -> Self {
        Self {
            q: self.q.shallow_clone(),
            k: self.k.shallow_clone(),
            v: self.v.shallow_clone(),
            decay: self.decay.shallow_clone(),
            decay_grad: self.decay_grad,
        }
    }
}

pub(crate) fn shape4(tensor: &'static str, x: &Tensor, expected: &str) -> Result<(i64, i64, i64, i64)> {
    x.size4().map_err(|_| Error::Shape { tensor, found: x.size(), expected: expected.to_owned() })
}

/// The kind in which states, decays and sums are kept for inputs of kind `kind`: f64 for f64, else f32.
pub fn accumulation_kind(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

/// How a segment carries the state that enters it through to its end: `A` of the monoid, in log space.
#[derive(Debug)]
pub enum Transition {
    Identity,
    /// `[B, H]`: the sum of the segment's scalar log-decays.
    Scalar(Tensor),
    /// `[B, H, K]`: the sum of the segment's log-decay vectors.
    Channel(Tensor),
}

impl Transition {
    /// `A M` for a state or state gradient `M` `[B, H, K, V]` (`A` is diagonal, hence its own transpose).
    pub fn apply(&self, m: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Identity => m.shallow_clone(),
            Self::Scalar(sum) => m.f_mul(&sum.f_exp()?.f_unsqueeze(-1)?.f_unsqueeze(-1)?)?,
            Self::Channel(sum) => m.f_mul(&sum.f_exp()?.f_unsqueeze(-1)?)?,
        })
    }
}

/// A segment summed up: its transition and its end state when started from zero, or, in backward, the gradient
/// that it sends to the state at its entry when none comes in at its end. `state`: `[B, H, K, V]`, accumulation kind.
#[derive(Debug)]
pub struct Summary {
    pub transition: Transition,
    pub state: Tensor,
}

impl Summary {
    /// The state at the segment's end, given the one at its entry; in backward the other way round.
    pub fn after(&self, entry: &Tensor) -> Result<Tensor> {
        Ok(self.transition.apply(entry)?.f_add(&self.state)?)
    }
}

/// Gradients of one run of tokens, in the kinds of the inputs but for `dlog_decay`, which has the accumulation kind.
#[derive(Debug)]
pub struct Grads {
    pub dq: Tensor,
    pub dk: Tensor,
    pub dv: Tensor,
    /// As [`Decay`], but `[B, T, H]` also for a per-head decay, whose gradient is the sum over B and T.
    pub dlog_decay: Option<Tensor>,
}

/// A run of tokens of one document, in a call that may have those of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub tokens: i64,
    /// A state may enter: with the call, or by [`ForwardSegment::add_entry`]. In backward that state's gradient may be asked for.
    pub enters: bool,
    /// The state at its end may be asked for. In backward a gradient may come in there.
    pub leaves: bool,
}

impl Piece {
    /// All of `x`, which anything may enter and leave.
    pub fn whole(x: &Inputs) -> Self {
        Self { tokens: x.tokens(), enters: true, leaves: true }
    }
}

/// A sequence mixer whose past is a fixed-size state.
pub trait StateMixer: Send + Sync {
    /// What o is multiplied by.
    fn scale(&self) -> f64;
    /// Takes the tokens of `x`, which are those of `pieces`, one after another. Each piece starts, as far as the mixer knows, from
    /// its own of `entries` `[B, H, K, V]`, zero if `None`.
    fn forward_pieces(
        &self,
        x: &Inputs,
        pieces: &[Piece],
        entries: &[Option<Tensor>],
    ) -> Result<Box<dyn ForwardSegment>>;
    /// The same tokens in backward; `entries` are now the whole truth about the states at the pieces' starts. do: `[B, T, H, V]`.
    /// `saved`: what [`ForwardSegment::take_saved`] gave for the same pieces and `entries`, if that was kept.
    fn backward_pieces(
        &self,
        x: &Inputs,
        pieces: &[Piece],
        entries: &[Option<Tensor>],
        d_o: &Tensor,
        saved: Option<Vec<Tensor>>,
    ) -> Result<Box<dyn BackwardSegment>>;
    /// [`StateMixer::forward_pieces`] of one piece.
    fn forward(&self, x: &Inputs, entry: Option<&Tensor>) -> Result<Box<dyn ForwardSegment>> {
        self.forward_pieces(x, &[Piece::whole(x)], &[entry.map(Tensor::shallow_clone)])
    }
    /// [`StateMixer::backward_pieces`] of one piece.
    fn backward(&self, x: &Inputs, entry: Option<&Tensor>, d_o: &Tensor) -> Result<Box<dyn BackwardSegment>> {
        self.backward_pieces(x, &[Piece::whole(x)], &[entry.map(Tensor::shallow_clone)], d_o, None)
    }
}

/// The fastest mixer there is: on GPUs the kernels of [`crate::cuda`] where these take the inputs, else chunkwise. `chunk`,
/// `scale`: as in [`chunkwise::Chunkwise::new`].
pub fn mixer(chunk: i64, scale: f64) -> Result<Arc<dyn StateMixer>> {
    Ok(crate::cuda::mma::families(chunkwise::Chunkwise::new(chunk, scale)?))
}

/// The forward of a rank's tokens in the order in which LASP-2 wants it: first what other ranks wait for, then what waits for
/// nobody, then what had to wait. `piece`: its place among the pieces of the call.
pub trait ForwardSegment: Send {
    /// `(A, S)` of a piece that a state leaves: the transition, and the end state from the entry that came with the call.
    fn summarize(&mut self, piece: usize) -> Result<Summary>;
    /// Computes the outputs as if nothing else entered.
    fn run(&mut self) -> Result<()>;
    /// Adds what a further entry state of a piece contributes to its outputs: `scale (q_i e^{b_i}) P`.
    fn add_entry(&mut self, piece: usize, entry: &Tensor) -> Result<()>;
    /// States inside the pieces, all entries added, that save backward computing them again; in a form of the mixer's own.
    /// Once, after [`ForwardSegment::run`] and the last [`ForwardSegment::add_entry`].
    fn take_saved(&mut self) -> Result<Option<Vec<Tensor>>> {
        Ok(None)
    }
    /// o `[B, T, H, V]`, in the kind of the inputs.
    fn finish(self: Box<Self>) -> Result<Tensor>;
}

/// The backward of a rank's tokens, in the same order.
pub trait BackwardSegment: Send {
    /// `(A, G)` of a piece that a state enters: the transition, and the gradient of that state from the piece's outputs alone.
    fn summarize_grad(&mut self, piece: usize) -> Result<Summary>;
    /// Computes all gradients as if none came in at a piece's end.
    fn run_grad(&mut self) -> Result<()>;
    /// Adds what the exit gradient `R` `[B, H, K, V]` of a piece contributes to its dk, dv and dlog_decay.
    fn add_exit(&mut self, piece: usize, exit: &Tensor) -> Result<()>;
    fn finish(self: Box<Self>) -> Result<Grads>;
}
