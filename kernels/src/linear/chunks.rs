//! A segment cut into chunks of C tokens, the layout in which every product is one batched matrix product, and the
//! recurrence over chunks that gives each its entry state.
//!
//! Layout: `[n, G, C, ..]` with n chunks, G = B H; the tail is padded with k = v = 0 and log a = 0, which add nothing.
//! The decays `b` are cumulative inside a chunk, inclusive; only numbers at most 0 are exponentiated. They are kept in f64:
//! after a strong decay, `b_i - b_j` of two late tokens is a small difference of large numbers, and in f32 it would be wrong
//! by more than the results may be.

use tch::{Kind, Tensor};

use super::{Decay, Inputs, Transition, accumulation_kind};
use crate::Result;

/// Numbers in the largest temporary of a part: 1 MiB in f32 on the CPU, for its cache; 512 MiB on a GPU, for few launches.
const PART: i64 = 1 << 18;
const PART_CUDA: i64 = 1 << 27;

/// Sizes of a chunked segment. `g` = B H.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub b: i64,
    pub t: i64,
    pub h: i64,
    pub dk: i64,
    pub dv: i64,
    pub n: i64,
    pub c: i64,
}

impl Shape {
    /// Chunks of `chunk` tokens, or of the next power of two that holds a shorter segment.
    pub fn new(x: &Inputs, chunk: i64) -> Result<Self> {
        let (b, t, h, dk) = x.q.size4()?;
        let c = chunk.min(u64::try_from(t).unwrap_or(1).next_power_of_two() as i64).max(1);
        Ok(Self { b, t, h, dk, dv: x.v.size()[3], n: (t + c - 1) / c, c })
    }

    pub fn g(&self) -> i64 {
        self.b * self.h
    }

    /// `[B, T, H, ..]` -> `[n G, C, ..]`, in kind `kind`, padded with zeros.
    pub fn cut(&self, x: &Tensor, kind: Kind) -> Result<Tensor> {
        let tail = &x.size()[3..];
        let padding = self.n * self.c - self.t;
        let mut x = x.f_to_kind(kind)?;
        if padding > 0 {
            // Pairs run from the last dimension to T.
            let mut pad = vec![0; 2 * (tail.len() + 1)];
            pad.extend([0, padding]);
            x = x.f_constant_pad_nd(pad)?;
        }
        let split: Vec<i64> = [self.b, self.n, self.c, self.h].iter().chain(tail).copied().collect();
        let order: Vec<i64> = [1, 0, 3, 2].into_iter().chain(4..4 + tail.len() as i64).collect();
        let flat: Vec<i64> = [self.n * self.g(), self.c].iter().chain(tail).copied().collect();
        Ok(x.f_reshape(split)?.f_permute(order)?.f_contiguous()?.f_view(flat.as_slice())?)
    }

    /// The inverse of [`Shape::cut`]: `[n G, C, ..]` -> `[B, T, H, ..]`, in kind `kind`, contiguous.
    pub fn join(&self, x: &Tensor, kind: Kind) -> Result<Tensor> {
        let tail = &x.size()[2..];
        let split: Vec<i64> = [self.n, self.b, self.h, self.c].iter().chain(tail).copied().collect();
        let order: Vec<i64> = [1, 0, 3, 2].into_iter().chain(4..4 + tail.len() as i64).collect();
        let whole: Vec<i64> = [self.b, self.n * self.c, self.h].iter().chain(tail).copied().collect();
        let x = x.f_view(split.as_slice())?.f_permute(order)?;
        Ok(x.f_reshape(whole)?.f_narrow(1, 0, self.t)?.f_to_kind(kind)?.f_contiguous()?)
    }

    /// A state `[B, H, K, V]` as `[G, K, V]`.
    pub fn flat_state(&self, state: &Tensor, kind: Kind) -> Result<Tensor> {
        Ok(state.f_to_kind(kind)?.f_reshape([self.g(), self.dk, self.dv])?)
    }
}

/// `e^log` in kind `kind`, from a logarithm in f64.
pub(super) fn factor(log: Tensor, kind: Kind) -> Result<Tensor> {
    if kind == Kind::Double {
        return Ok(log.f_exp()?);
    }
    Ok(log.f_to_kind(kind)?.f_exp_()?)
}

/// Cumulative log-decays of every chunk, in f64.
pub(super) enum ChunkDecay {
    None,
    /// b `[n G, C]`, total `[n, G]`; `constant`: `[H]`, where the decay is one number per head.
    Scalar {
        b: Tensor,
        total: Tensor,
        constant: Option<Tensor>,
    },
    /// b `[n G, C, K]`, total `[n, G, K]`.
    Channel {
        b: Tensor,
        total: Tensor,
    },
}

impl ChunkDecay {
    pub fn new(decay: &Decay, shape: &Shape) -> Result<Self> {
        let scalar = |g: &Tensor, constant: Option<Tensor>| -> Result<Self> {
            let b = shape.cut(g, Kind::Double)?.f_cumsum(1, Kind::Double)?;
            let total = b.f_select(1, shape.c - 1)?.f_contiguous()?.f_view([shape.n, shape.g()])?;
            Ok(Self::Scalar { b, total, constant })
        };
        match decay {
            Decay::None => Ok(Self::None),
            Decay::Head(g) => {
                let g = g.f_to_kind(Kind::Double)?;
                scalar(&g.f_view([1, 1, -1])?.f_expand([shape.b, shape.t, shape.h], false)?, Some(g))
            }
            Decay::Token(g) => scalar(g, None),
            Decay::Channel(g) => {
                let b = shape.cut(g, Kind::Double)?.f_cumsum(1, Kind::Double)?;
                let total = b.f_select(1, shape.c - 1)?.f_contiguous()?.f_view([shape.n, shape.g(), shape.dk])?;
                Ok(Self::Channel { b, total })
            }
        }
    }

    /// `x_i e^{b_i}`: x seen from the chunk's start. `x`: `[n G, C, K]`.
    pub fn seen_from_start(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::None => x.shallow_clone(),
            Self::Scalar { b, .. } => x.f_mul(&factor(b.shallow_clone(), x.kind())?.f_unsqueeze(-1)?)?,
            Self::Channel { b, .. } => x.f_mul(&factor(b.shallow_clone(), x.kind())?)?,
        })
    }

    /// `x_i e^{B - b_i}`: x seen from the chunk's end. `x`: `[n G, C, K]`.
    pub fn seen_from_end(&self, x: &Tensor) -> Result<Tensor> {
        let rest = |b: &Tensor| -> Result<Tensor> {
            let last = b.f_narrow(1, b.size()[1] - 1, 1)?;
            factor(last.f_sub(b)?, x.kind())
        };
        Ok(match self {
            Self::None => x.shallow_clone(),
            Self::Scalar { b, .. } => x.f_mul(&rest(b)?.f_unsqueeze(-1)?)?,
            Self::Channel { b, .. } => x.f_mul(&rest(b)?)?,
        })
    }

    fn total(&self) -> Option<&Tensor> {
        match self {
            Self::None => None,
            Self::Scalar { total, .. } | Self::Channel { total, .. } => Some(total),
        }
    }

    /// `e^{B_c} x` for what every chunk holds per key channel, `x` `[n G, K]`.
    pub fn carry(&self, x: &Tensor) -> Result<Tensor> {
        let Some(total) = self.total() else { return Ok(x.shallow_clone()) };
        Ok(x.f_mul(&factor(total.shallow_clone(), x.kind())?.f_view([x.size()[0], -1])?)?)
    }

    /// Factors that broadcast against states `[n, G, K, V]`.
    fn over_states(&self, log: &Tensor, kind: Kind) -> Result<Tensor> {
        let factor = factor(log.shallow_clone(), kind)?.f_unsqueeze(-1)?;
        Ok(if matches!(self, Self::Scalar { .. }) { factor.f_unsqueeze(-1)? } else { factor })
    }

    /// The transition of the whole segment.
    pub fn transition(&self, shape: &Shape, kind: Kind) -> Result<Transition> {
        let Some(total) = self.total() else { return Ok(Transition::Identity) };
        let sum = total.f_sum_dim_intlist(0, false, Kind::Double)?.f_to_kind(kind)?;
        Ok(match self {
            Self::Channel { .. } => Transition::Channel(sum.f_view([shape.b, shape.h, shape.dk])?),
            _ => Transition::Scalar(sum.f_view([shape.b, shape.h])?),
        })
    }

    /// Runs `M <- e^{B_c} M + S_c` along `states` `[n+1, G, K, V]`, in place: slot 0 holds the entry and slot c+1 holds
    /// `S_c`; afterwards slot c holds the state at the start of chunk c, slot n the one at the segment's end.
    /// `reverse` runs it from slot n down to 0, for gradients.
    pub fn recur(&self, states: &Tensor, reverse: bool) -> Result<()> {
        let n = states.size()[0] - 1;
        if states.device().is_cuda() && matches!(self, Self::None) {
            let kind = states.kind();
            let sums =
                if reverse { states.f_flip([0])?.f_cumsum(0, kind)?.f_flip([0])? } else { states.f_cumsum(0, kind)? };
            states.shallow_clone().f_copy_(&sums)?;
            return Ok(());
        }
        let factors = self.total().map(|total| self.over_states(total, states.kind())).transpose()?;
        for step in 0..n {
            let (chunk, from, to) =
                if reverse { (n - 1 - step, n - step, n - 1 - step) } else { (step, step, step + 1) };
            let mut to = states.f_select(0, to)?;
            let from = states.f_select(0, from)?;
            let _ = match &factors {
                None => to.f_add_(&from)?,
                Some(factors) => to.f_addcmul_(&from, &factors.f_select(0, chunk)?)?,
            };
        }
        Ok(())
    }

    /// The log-decays from the segment's start to the start of each chunk (or, `reverse`, from each chunk's end to the
    /// segment's end): `[n, G]` or `[n, G, K]`.
    pub fn distances(&self, reverse: bool) -> Result<Option<Tensor>> {
        let Some(total) = self.total() else { return Ok(None) };
        // Exclusive cumulative sums over chunks.
        let total = if reverse { total.f_flip([0])? } else { total.shallow_clone() };
        let before = total.f_cumsum(0, total.kind())?.f_sub(&total)?;
        Ok(Some(if reverse { before.f_flip([0])? } else { before }))
    }

    /// What `state` `[G, K, V]` has become over some chunks' distances, `[n G, K, V]`.
    pub fn spread(&self, state: &Tensor, distances: Option<&Tensor>, chunks: i64) -> Result<Tensor> {
        let (g, dk, dv) = state.size3()?;
        let flat = [chunks * g, dk, dv];
        Ok(match distances {
            Some(log) => self.over_states(log, state.kind())?.f_mul(state)?.f_reshape(flat)?,
            None => state.f_unsqueeze(0)?.f_expand([chunks, g, dk, dv], false)?.f_reshape(flat)?,
        })
    }
}

/// A segment's tensors in chunks, all in the accumulation kind. `q` carries the scale.
pub(super) struct Chunked {
    pub shape: Shape,
    pub kind: Kind,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub decay: ChunkDecay,
}

impl Chunked {
    pub fn new(x: &Inputs, chunk: i64, scale: f64) -> Result<Self> {
        let shape = Shape::new(x, chunk)?;
        let kind = accumulation_kind(x.q.kind());
        let mut q = shape.cut(&x.q, kind)?;
        if scale != 1.0 {
            q = q.f_mul_scalar(scale)?;
        }
        let (k, v) = (shape.cut(&x.k, kind)?, shape.cut(&x.v, kind)?);
        Ok(Self { shape, kind, q, k, v, decay: ChunkDecay::new(&x.decay, &shape)? })
    }

    /// The segment in parts of a few chunks, `(first chunk, number)`: what a part needs at once should stay in the cache.
    pub fn parts(&self) -> impl Iterator<Item = (i64, i64)> + use<> {
        let Shape { n, c, dk, dv, .. } = self.shape;
        let most = if self.v.device().is_cuda() { PART_CUDA } else { PART };
        let step = (most / (self.shape.g() * c * c.max(dk).max(dv)).max(1)).clamp(1, n.max(1));
        (0..n).step_by(step as usize).map(move |start| (start, step.min(n - start)))
    }

    /// Chunks `start .. start + chunks`, as views.
    pub fn part(&self, (start, chunks): (i64, i64)) -> Result<Self> {
        let shape = Shape { n: chunks, t: chunks * self.shape.c, ..self.shape };
        let rows = |x: &Tensor| self.rows(x, (start, chunks));
        let decay = match &self.decay {
            ChunkDecay::None => ChunkDecay::None,
            ChunkDecay::Scalar { b, total, constant } => ChunkDecay::Scalar {
                b: rows(b)?,
                total: total.f_narrow(0, start, chunks)?,
                constant: constant.as_ref().map(Tensor::shallow_clone),
            },
            ChunkDecay::Channel { b, total } => {
                ChunkDecay::Channel { b: rows(b)?, total: total.f_narrow(0, start, chunks)? }
            }
        };
        Ok(Self { shape, kind: self.kind, q: rows(&self.q)?, k: rows(&self.k)?, v: rows(&self.v)?, decay })
    }

    /// The rows of some chunks of `x` `[n G, ..]`, as a view.
    pub fn rows(&self, x: &Tensor, (start, chunks): (i64, i64)) -> Result<Tensor> {
        Ok(x.f_narrow(0, start * self.shape.g(), chunks * self.shape.g())?)
    }

    fn slots(&self) -> Result<Tensor> {
        let Shape { n, dk, dv, .. } = self.shape;
        Ok(Tensor::f_empty([n + 1, self.shape.g(), dk, dv], (self.kind, self.v.device()))?)
    }

    fn flat(&self) -> [i64; 3] {
        [self.shape.n * self.shape.g(), self.shape.dk, self.shape.dv]
    }

    fn put_edge(&self, slot: &mut Tensor, edge: Option<&Tensor>) -> Result<()> {
        match edge {
            Some(edge) => slot.f_copy_(&self.shape.flat_state(edge, self.kind)?)?,
            None => drop(slot.f_zero_()?),
        }
        Ok(())
    }

    /// `[n+1, G, K, V]`: the state at the start of every chunk, and in the last slot the one at the end.
    /// LASP-2 (arXiv 2502.07563), Algorithm 2, lines 4 and 9, at the scale of chunks.
    pub fn states(&self, entry: Option<&Tensor>) -> Result<Tensor> {
        let slots = self.slots()?;
        self.put_edge(&mut slots.f_select(0, 0)?, entry)?;
        let sums = slots.f_narrow(0, 1, self.shape.n)?.f_view(self.flat())?;
        let _ = self.decay.seen_from_end(&self.k)?.f_transpose(1, 2)?.f_bmm_out(&sums, &self.v)?;
        self.decay.recur(&slots, false)?;
        Ok(slots)
    }

    /// `[n+1, G, K, V]`: in slot c the gradient of the state at the start of chunk c, in slot n zero. do: `[n G, C, V]`.
    pub fn state_grads(&self, d_o: &Tensor) -> Result<Tensor> {
        let slots = self.slots()?;
        self.put_edge(&mut slots.f_select(0, self.shape.n)?, None)?;
        let sums = slots.f_narrow(0, 0, self.shape.n)?.f_view(self.flat())?;
        let _ = self.decay.seen_from_start(&self.q)?.f_transpose(1, 2)?.f_bmm_out(&sums, d_o)?;
        self.decay.recur(&slots, true)?;
        Ok(slots)
    }

    /// The slot `index` of [`Chunked::states`] as `[B, H, K, V]`.
    pub fn slot(&self, slots: &Tensor, index: i64) -> Result<Tensor> {
        let Shape { b, h, dk, dv, .. } = self.shape;
        Ok(slots.f_select(0, index)?.f_view([b, h, dk, dv])?)
    }

    /// Slots `first .. first + n`, one for each of this part's chunks, as `[n G, K, V]`.
    pub fn per_chunk(&self, slots: &Tensor, first: i64) -> Result<Tensor> {
        Ok(slots.f_narrow(0, first, self.shape.n)?.f_view(self.flat())?)
    }

    /// An output for every chunk, `[n G, C, width]`.
    pub fn empty(&self, width: i64) -> Result<Tensor> {
        Ok(Tensor::f_empty([self.shape.n * self.shape.g(), self.shape.c, width], (self.kind, self.v.device()))?)
    }
}
