//! What a method moves for one layer: what its file says in formulas, as numbers. Bytes are payload, counted as
//! [`collectives::Totals`] counts them, so that a rank's flight recorder must agree. No rank and no group is needed.

use std::collections::BTreeMap;
use std::ops::{Add, AddAssign};

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

/// Operations of one sort on one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub messages: u64,
    pub bytes: Bytes,
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        *self = Self { messages: self.messages + other.messages, bytes: self.bytes + other.bytes };
    }
}

/// The operations of one rank, by group (`sp`, or `node` for part of it) and by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Messages(BTreeMap<(&'static str, &'static str), Count>);

impl Messages {
    /// Adds operations on the sp group; none if there are no messages.
    pub fn count(&mut self, op: &'static str, messages: u64, sent: u64, received: u64) {
        self.count_on("sp", op, messages, sent, received);
    }

    pub fn count_on(&mut self, group: &'static str, op: &'static str, messages: u64, sent: u64, received: u64) {
        if messages > 0 {
            *self.0.entry((group, op)).or_default() += Count { messages, bytes: Bytes { sent, received } };
        }
    }

    /// `((group, operation), count)`.
    pub fn iter(&self) -> impl Iterator<Item = ((&'static str, &'static str), Count)> + '_ {
        self.0.iter().map(|(key, count)| (*key, *count))
    }

    /// Of all of them.
    pub fn bytes(&self) -> Bytes {
        self.0.values().fold(Bytes::default(), |sum, count| sum + count.bytes)
    }

    /// The same bytes, each operation in `parts` of its kind.
    pub(super) fn in_parts(mut self, parts: u64) -> Self {
        self.0.values_mut().for_each(|count| count.messages *= parts);
        self
    }
}

impl Add for Messages {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        for (key, count) in other.0 {
            *self.0.entry(key).or_default() += count;
        }
        self
    }
}

/// What one layer moves on one rank, in one forward and in one backward.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub forward: Messages,
    pub backward: Messages,
    /// It may be less: what has decayed away is not sent, and no formula knows the decays.
    pub at_most: bool,
}

impl Traffic {
    pub(super) fn exactly(forward: Messages, backward: Messages) -> Self {
        Self { forward, backward, at_most: false }
    }
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
fn collective(plan: &Plan, op: &'static str, sent: i64, received: i64) -> Messages {
    let mut messages = Messages::default();
    if plan.layout.ranks() > 1 {
        messages.count(op, 1, sent as u64, received as u64);
    }
    messages
}

/// Hops on the ring, a send and a receive each.
fn hops(hops: i64, sent: i64, received: i64) -> Messages {
    let mut messages = Messages::default();
    messages.count("send", hops as u64, sent as u64, 0);
    messages.count("recv", hops as u64, 0, received as u64);
    messages
}

/// An AllGather of `token` bytes a token over the sequence.
pub(super) fn gather(plan: &Plan, token: i64) -> Messages {
    let (whole, mine, _) = counts(plan);
    collective(plan, "all_gather_v", mine * token, (whole - mine) * token)
}

/// A ReduceScatter of `token` bytes a token of the whole sequence.
pub(super) fn scatter(plan: &Plan, token: i64) -> Messages {
    let (whole, mine, others) = counts(plan);
    collective(plan, "reduce_scatter_v", (whole - mine) * token, others * mine * token)
}

/// An all-to-all from tokens to heads, `token` bytes a token and rank of heads; its way back is the same reversed.
pub(super) fn to_heads(plan: &Plan, token: i64) -> Messages {
    let (whole, mine, others) = counts(plan);
    collective(plan, "all_to_all_v", others * mine * token, (whole - mine) * token)
}

pub(super) fn to_tokens(plan: &Plan, token: i64) -> Messages {
    let (whole, mine, others) = counts(plan);
    collective(plan, "all_to_all_v", (whole - mine) * token, others * mine * token)
}

/// Blocks of `token` bytes a token that go round the ring, [`super::ring::go_round`]: all but the next rank's are sent on,
/// all but the own received.
pub(super) fn go_round(plan: &Plan, token: i64) -> Messages {
    let (whole, mine, others) = counts(plan);
    let rows = plan.layout.tokens_per_rank();
    let next = rows[(plan.rank + 1) % (others as usize + 1)];
    hops(others, (whole - next) * token, (whole - mine) * token)
}

/// Sums of `token` bytes a token that come home from the ring, [`super::ring::go_round_and_home`]: all but the own are sent
/// on, all but those of the rank before received.
pub(super) fn come_home(plan: &Plan, token: i64) -> Messages {
    let (whole, mine, others) = counts(plan);
    let rows = plan.layout.tokens_per_rank();
    let before = rows[(plan.rank + others as usize) % (others as usize + 1)];
    hops(others, (whole - mine) * token, (whole - before) * token)
}
