//! What the families of linear-attention kernels, [`super::linear`] and [`super::mma`], share: how a call is cut, the order of
//! its passes, and the states between them.
//!
//! Each family's source has the same kernels: `summarize` sums up segments, `combine` turns the sums into the states that enter
//! them, `run` starts from these and makes o, dq, or dk and dv. Where a family can, and nobody else asks for the states, `run`
//! does it all ([`Family::looks_back`]). [`Family`] is how a family launches its own. [`plan`] cuts the
//! tokens of all documents among the multiprocessors, [`states`] has what passes leave for each other, [`forward`] and
//! [`backward`] call them, for all documents at once. States leave a pass only between segments, never every few tokens.

mod backward;
mod forward;
mod params;
pub mod plan;
mod states;

use std::marker::PhantomData;

use tch::{Device, Kind, Tensor};

use super::{Kernel, gpu, runs_on, stream};
use crate::linear::{BackwardSegment, Decay, ForwardSegment, Inputs, Piece, StateMixer, Summary, Transition};
use crate::linear::{check, check_grad};
use crate::{Error, Result};
pub use params::Params;
use plan::{Cut, Plan};
pub use states::{Made, Part};

/// The header of all families' sources.
pub const SEGMENTS: (&str, &str) = ("segments.cuh", include_str!("../../../cuda/segments.cuh"));

/// Tokens of a chunk.
const CHUNK: i64 = 64;

/// Kernels that come as one, and what they want to know of a call.
pub trait Family: Sized + Send + 'static {
    fn supports(x: &Inputs) -> bool;
    fn call(x: &Inputs, pieces: &[Piece]) -> Result<Call<Self>>;
    /// Whether the kernels can read a `[B, T, H, D]` tensor where it lies.
    fn tileable(x: &Tensor) -> bool;
    /// The largest key and value sizes of one launch.
    fn widest(call: &Call<Self>) -> (i64, i64);
    /// The sizes of the segments' sums of log-decays, for `dk` channels; `None`: there are none.
    fn decays(call: &Call<Self>, dk: i64) -> Option<Vec<i64>>;
    fn summarize(call: &Call<Self>, x: &Summing) -> Result<()>;
    /// The kernel `combine`, and how its parameters give the sizes of a state.
    fn combine(call: &Call<Self>, dk: i64, dv: i64) -> Result<(Kernel, Vec<i64>)>;
    /// Whether [`Family::output`] and [`Family::keys`] can make the entries themselves ([`Enters::Unknown`]) where no state comes
    /// from outside, and are quicker then.
    fn looks_back(call: &Call<Self>) -> bool;
    /// o. `late`: only what entering states add, to the tokens of pieces that one enters.
    fn output(call: &Call<Self>, x: &Pass, late: bool, o: Out) -> Result<()>;
    /// Room for what dq's pass leaves of a part's dlog_decay, for that of dk; `all`: dlog_decay.
    fn dots(call: &Call<Self>, part: Part, all: &Tensor) -> Result<Tensor>;
    fn queries(call: &Call<Self>, x: &Pass, d_o: &Tensor, dq: Out, dots: Option<&Tensor>) -> Result<()>;
    /// dk, dv and dlog_decay.
    fn keys(call: &Call<Self>, x: &Pass, d_o: &Tensor, dk: Out, dv: Out, decay: Option<DecayGrad>) -> Result<()>;
}

/// Sums of `scale key^T value`, and of the log-decays, for the segments with a flag of `which`.
pub struct Summing<'a> {
    /// k and v or, in reverse, q and do: of a part of a head, as are the decays.
    pub key: Tensor,
    pub value: Tensor,
    pub log_decay: Option<Tensor>,
    pub reverse: bool,
    pub scale: f64,
    pub which: i32,
    pub to: &'a Made,
}

/// What a pass over the tokens reads: a part of a head, and the states that enter its segments.
pub struct Pass<'a> {
    pub part: Part,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub log_decay: Option<Tensor>,
    /// Or in reverse their gradients, which enter at the ends: `[slots, K, V]`.
    pub entries: &'a Tensor,
    pub enters: Enters,
    pub scale: f64,
}

/// What is known of the states that enter a pass's segments.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Enters {
    /// All of them, and they come from other segments.
    Known,
    /// All of them, and some come from outside.
    FromOutside,
    /// Only that they come from other segments. [`Pass::entries`] is room for them: the pass makes them of sums that it makes too.
    Unknown,
}

impl Enters {
    fn known(from_outside: bool) -> Self {
        if from_outside { Self::FromOutside } else { Self::Known }
    }
}

/// One output of a pass.
pub struct Out<'a> {
    pub to: &'a Tensor,
    /// To what `to` has, rather than in its place.
    pub add: bool,
}

/// What the gradient of a decay is made of beside the tokens, and where it goes.
pub struct DecayGrad<'a> {
    /// What dq's pass has left.
    pub dots: &'a Tensor,
    /// At the segments' starts, `[slots, K, V]`, and, where a gradient comes in at pieces' ends, at those, `[rows, K, V]`.
    pub states: &'a Tensor,
    pub finals: Option<&'a Tensor>,
    /// f32 `[B, T, H]` or, of all channels, `[B, T, H, K]`; `add`: other parts are in it.
    pub out: Out<'a>,
}

/// Whether sizes are multiples of 8, and none is zero, on a device that kernels run on.
pub fn fits(x: &Inputs) -> bool {
    let sizes = [x.q.size(), x.v.size()];
    runs_on(x.q.device()) && sizes.iter().all(|s| s.iter().all(|&n| n > 0) && s[3] % 8 == 0)
}

/// Whether the channels of a `[B, T, H, D]` tensor can be read 16 bytes at a time where they lie, by 32 bits of bytes from token
/// to token, and to that 16 tokens on.
pub fn aligned(x: &Tensor) -> bool {
    let (sizes, strides) = (x.size(), x.stride());
    let numbers = 16 / x.kind().elt_size_in_bytes() as i64;
    let row = strides[3] == 1 || sizes[3] == 1;
    // Addresses of tokens beyond the last are made too, if not read.
    let steps = (0..3).all(|i| (sizes[i] == 1 && i != 1) || strides[i] % numbers == 0);
    let near = sizes[1] == 1 || strides[1] < (1 << 24) * numbers;
    row && (x.data_ptr() as usize).is_multiple_of(16) && steps && near
}

/// Channels in blocks of 64.
pub fn blocks(channels: i64) -> i64 {
    (channels + 63) / 64
}

/// Where it lies if the kernels can read it there, else a copy, also of what is contiguous but begins at an odd address.
fn tiles<F: Family>(x: &Tensor) -> Result<Tensor> {
    if F::tileable(x) {
        return Ok(x.shallow_clone());
    }
    let mut copy = Tensor::f_empty(x.size(), (x.kind(), x.device()))?;
    copy.f_copy_(x)?;
    Ok(copy)
}

/// The kernels of a family, and `other` for what they do not take.
pub struct Fused<F, M> {
    other: M,
    family: PhantomData<fn() -> F>,
}

impl<F: Family, M: StateMixer> Fused<F, M> {
    pub fn new(other: M) -> Self {
        Self { other, family: PhantomData }
    }

    fn takes(&self, x: &Inputs) -> bool {
        F::supports(x) && self.scale() != 0.0
    }
}

impl<F: Family, M: StateMixer> StateMixer for Fused<F, M> {
    fn scale(&self) -> f64 {
        self.other.scale()
    }

    fn forward_pieces(
        &self,
        x: &Inputs,
        pieces: &[Piece],
        entries: &[Option<Tensor>],
    ) -> Result<Box<dyn ForwardSegment>> {
        if !self.takes(x) {
            return self.other.forward_pieces(x, pieces, entries);
        }
        check(x, pieces, entries)?;
        Ok(Box::new(forward::Forward::<F>::new(x, pieces, entries, self.scale())?))
    }

    fn backward_pieces(
        &self,
        x: &Inputs,
        pieces: &[Piece],
        entries: &[Option<Tensor>],
        d_o: &Tensor,
        saved: Option<Vec<Tensor>>,
    ) -> Result<Box<dyn BackwardSegment>> {
        if !self.takes(x) {
            return self.other.backward_pieces(x, pieces, entries, d_o, saved);
        }
        check(x, pieces, entries)?;
        check_grad(x, d_o)?;
        Ok(Box::new(backward::Backward::<F>::new(x, pieces, entries, d_o, saved, self.scale())?))
    }
}

/// What all launches of one call share.
pub struct Call<F> {
    pub family: F,
    pub plan: Plan,
    pub device: Device,
    /// Of q, k, v, do and the outputs.
    pub kind: Kind,
    /// `[B, T, H]` of any strides, f32; or `[B, T, H, K]` that is [`Family::tileable`], f32 or in the inputs' kind.
    pub log_decay: Option<Tensor>,
    pub b: i64,
    pub t: i64,
    pub h: i64,
    pub dk: i64,
    pub dv: i64,
    pieces: Vec<Piece>,
}

impl<F: Family> Call<F> {
    /// `blocks`: blocks of threads that the device runs at once.
    pub fn new(family: F, x: &Inputs, pieces: &[Piece], blocks: i64) -> Result<Self> {
        let ((b, t, h, dk), dv) = (x.k.size4()?, x.v.size()[3]);
        let (device, kind) = (x.k.device(), x.k.kind());
        let log_decay = match &x.decay {
            Decay::None => None,
            Decay::Head(g) => Some(g.f_to_kind(Kind::Float)?.f_view([1, 1, h])?.f_expand([b, t, h], false)?),
            Decay::Token(g) => Some(g.f_to_kind(Kind::Float)?),
            Decay::Channel(g) => {
                let kind = if g.kind() == kind { kind } else { Kind::Float };
                Some(tiles::<F>(&g.f_to_kind(kind)?)?)
            }
        };
        let cut = Cut { sequences: b, heads: h, chunk: CHUNK, blocks };
        let plan = Plan::of(device, stream(gpu(device)?)? as usize, cut, pieces)?;
        Ok(Self { family, plan, device, kind, log_decay, b, t, h, dk, dv, pieces: pieces.to_vec() })
    }

    /// The pieces that a state enters from outside or, in `reverse`, a gradient, at their ends. What comes out at the other
    /// side is that of the opposite direction.
    pub fn entered(&self, reverse: bool) -> impl Iterator<Item = usize> {
        let is = move |piece: &Piece| if reverse { piece.leaves } else { piece.enters };
        self.pieces.iter().enumerate().filter(move |(_, piece)| is(piece)).map(|(i, _)| i)
    }

    /// Rows of [`Call::entered`], `B H` a piece.
    pub fn rows(&self, reverse: bool) -> i64 {
        self.entered(reverse).count() as i64 * self.b * self.h
    }

    /// The row with which a piece's own begin.
    fn row(&self, reverse: bool, piece: usize) -> Result<i64> {
        let place = self.entered(reverse).position(|entered| entered == piece);
        place.map(|place| place as i64 * self.b * self.h).ok_or_else(|| {
            let mark = if reverse { "leaves" } else { "enters" };
            Error::Unsupported(format!(
                "piece {piece}: its state was asked for, or came; expected a piece with `{mark}` set"
            ))
        })
    }

    /// The first token of a piece, and their number.
    fn range(&self, piece: usize) -> (i64, i64) {
        (self.pieces[..piece].iter().map(|piece| piece.tokens).sum(), self.pieces[piece].tokens)
    }

    pub fn empty(&self, sizes: &[i64]) -> Result<Tensor> {
        Ok(Tensor::f_empty(sizes, (Kind::Float, self.device))?)
    }

    /// Room for an output of `x`'s sizes.
    fn like(&self, x: &Tensor) -> Result<Tensor> {
        Ok(Tensor::f_empty(x.size(), (self.kind, self.device))?)
    }

    /// The transition of a piece with its row of `states` `[rows, K, V]`, which leave in this direction.
    fn summary(&self, reverse: bool, piece: usize, states: &Tensor) -> Result<Summary> {
        let transition = match &self.log_decay {
            None => Transition::Identity,
            Some(g) => {
                let (start, length) = self.range(piece);
                let sum = g.f_narrow(1, start, length)?.f_sum_dim_intlist(1, false, Kind::Float)?;
                if g.dim() == 4 { Transition::Channel(sum) } else { Transition::Scalar(sum) }
            }
        };
        let row = self.row(!reverse, piece)?;
        let state = states.f_narrow(0, row, self.b * self.h)?.f_view([self.b, self.h, self.dk, self.dv])?;
        Ok(Summary { transition, state })
    }
}

/// q, k and v of a call, all channels.
struct Tokens {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: f64,
}

impl Tokens {
    fn new<F: Family>(x: &Inputs, scale: f64) -> Result<Self> {
        Ok(Self { q: tiles::<F>(&x.q)?, k: tiles::<F>(&x.k)?, v: tiles::<F>(&x.v)?, scale })
    }

    fn pass<'a, F: Family>(&self, call: &Call<F>, part: Part, entries: &'a Tensor, enters: Enters) -> Result<Pass<'a>> {
        let (q, k, v) = (part.keys(&self.q)?, part.keys(&self.k)?, part.values(&self.v)?);
        Ok(Pass { part, q, k, v, log_decay: part.log_decay(call)?, entries, enters, scale: self.scale })
    }
}
