//! How many bytes a method moves for one layer: what its file says in formulas, as numbers. Bytes are payload, counted as
//! [`collectives::Totals`] counts them, so that a rank's flight recorder must agree.

use std::ops::Add;

use kernels::linear::accumulation_kind;
use tch::Kind;

use super::Plan;

/// What one rank sends and receives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bytes {
    pub sent: u64,
    pub received: u64,
}

impl Add for Bytes {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { sent: self.sent + other.sent, received: self.received + other.received }
    }
}

/// The bytes of one layer on one rank, for one forward and for one backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub forward: Bytes,
    pub backward: Bytes,
}

/// The sizes of one layer: q `[B, T, H, K]`, k `[B, T, Hkv, K]`, v `[B, T, Hkv, V]`, all of one kind.
#[derive(Clone, Copy, Debug)]
pub struct LayerSizes {
    pub b: i64,
    pub heads: i64,
    pub kv_heads: i64,
    pub dk: i64,
    pub dv: i64,
    pub kind: Kind,
}

impl LayerSizes {
    /// Bytes of one token of q, or dq.
    pub fn q(&self) -> i64 {
        self.b * self.heads * self.dk * width(self.kind)
    }

    /// Bytes of one token of o, or do.
    pub fn o(&self) -> i64 {
        self.b * self.heads * self.dv * width(self.kind)
    }

    /// Bytes of one token of k and v.
    pub fn kv(&self) -> i64 {
        self.b * self.kv_heads * (self.dk + self.dv) * width(self.kind)
    }

    /// Bytes of one token of dk and dv while they are summed over ranks: f64 for f64, else f32.
    pub fn kv_sums(&self) -> i64 {
        self.kv() / width(self.kind) * width(accumulation_kind(self.kind))
    }
}

/// Bytes of one number.
pub(super) fn width(kind: Kind) -> i64 {
    kind.elt_size_in_bytes() as i64
}

/// L, the tokens of this rank, and W - 1.
fn counts(plan: &Plan) -> (i64, i64, i64) {
    (plan.layout.tokens(), plan.tokens(), plan.layout.ranks() as i64 - 1)
}

/// One rank alone moves nothing.
fn bytes(plan: &Plan, sent: i64, received: i64) -> Bytes {
    if plan.layout.ranks() == 1 { Bytes::default() } else { Bytes { sent: sent as u64, received: received as u64 } }
}

/// An AllGather of `token` bytes a token over the sequence.
pub(super) fn gather(plan: &Plan, token: i64) -> Bytes {
    let (whole, mine, _) = counts(plan);
    bytes(plan, mine * token, (whole - mine) * token)
}

/// A ReduceScatter of `token` bytes a token of the whole sequence.
pub(super) fn scatter(plan: &Plan, token: i64) -> Bytes {
    let (whole, mine, others) = counts(plan);
    bytes(plan, (whole - mine) * token, others * mine * token)
}

/// An all-to-all from tokens to heads, `token` bytes a token and rank of heads; its way back is the same reversed.
pub(super) fn to_heads(plan: &Plan, token: i64) -> Bytes {
    let (whole, mine, others) = counts(plan);
    bytes(plan, others * mine * token, (whole - mine) * token)
}

pub(super) fn to_tokens(plan: &Plan, token: i64) -> Bytes {
    let Bytes { sent, received } = to_heads(plan, token);
    Bytes { sent: received, received: sent }
}

/// Blocks of `token` bytes a token that go round the ring, [`super::ring::go_round`]: all but the next rank's are sent on,
/// all but the own received.
pub(super) fn go_round(plan: &Plan, token: i64) -> Bytes {
    let (whole, mine, others) = counts(plan);
    let rows = plan.layout.tokens_per_rank();
    let next = rows[(plan.rank + 1) % (others as usize + 1)];
    bytes(plan, (whole - next) * token, (whole - mine) * token)
}

/// Sums of `token` bytes a token that come home from the ring, [`super::ring::go_round_and_home`]: all but the own are sent
/// on, all but those of the rank before received.
pub(super) fn come_home(plan: &Plan, token: i64) -> Bytes {
    let (whole, mine, others) = counts(plan);
    let rows = plan.layout.tokens_per_rank();
    let before = rows[(plan.rank + others as usize) % (others as usize + 1)];
    bytes(plan, (whole - mine) * token, (whole - before) * token)
}
