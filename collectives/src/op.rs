//! What one rank brings to an operation, and the check that all ranks of the group brought the same.
//!
//! A [`Call`] travels ahead of the data (MPI), with it (TCP) or beside it (local). [`agree`] is pure: given the calls of all ranks it
//! answers the same on each of them, so that either all ranks go on to the data or all get the same error.

use crate::{Error, Result};
use tch::Kind;

/// More dimensions than any tensor of a model has; it fixes the length of a header.
pub(crate) const MAX_DIMS: usize = 8;

/// How values of different ranks combine. Always in rank order; bf16 sums are taken in f32 and rounded once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduce {
    Sum,
    Max,
    Min,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    AllGather,
    AllGatherV,
    ReduceScatter,
    ReduceScatterV,
    AllReduce(Reduce),
    AllToAll,
    AllToAllV,
    Broadcast { root: usize },
    Barrier,
    Split,
    Send { to: usize },
    Recv { from: usize },
}

impl Op {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Op::AllGather => "all_gather",
            Op::AllGatherV => "all_gather_v",
            Op::ReduceScatter => "reduce_scatter",
            Op::ReduceScatterV => "reduce_scatter_v",
            Op::AllReduce(_) => "all_reduce",
            Op::AllToAll => "all_to_all",
            Op::AllToAllV => "all_to_all_v",
            Op::Broadcast { .. } => "broadcast",
            Op::Barrier => "barrier",
            Op::Split => "split",
            Op::Send { .. } => "send",
            Op::Recv { .. } => "recv",
        }
    }

    pub(crate) fn is_point_to_point(self) -> bool {
        matches!(self, Op::Send { .. } | Op::Recv { .. })
    }

    /// Whether dimension 0 may differ from rank to rank, as the rows say.
    fn has_rows(self) -> bool {
        matches!(self, Op::AllGatherV | Op::ReduceScatterV | Op::AllToAllV)
    }

    fn describe(self) -> String {
        match self {
            Op::AllReduce(reduce) => format!("all_reduce({reduce:?})"),
            Op::Broadcast { root } => format!("broadcast(root {root})"),
            other => other.name().to_string(),
        }
    }

    fn encode(self) -> [i64; 2] {
        match self {
            Op::AllGather => [0, 0],
            Op::AllGatherV => [1, 0],
            Op::ReduceScatter => [2, 0],
            Op::ReduceScatterV => [3, 0],
            Op::AllReduce(Reduce::Sum) => [4, 0],
            Op::AllReduce(Reduce::Max) => [4, 1],
            Op::AllReduce(Reduce::Min) => [4, 2],
            Op::AllToAll => [5, 0],
            Op::AllToAllV => [6, 0],
            Op::Broadcast { root } => [7, root as i64],
            Op::Barrier => [8, 0],
            Op::Split => [9, 0],
            Op::Send { to } => [10, to as i64],
            Op::Recv { from } => [11, from as i64],
        }
    }

    fn decode(code: i64, operand: i64) -> Option<Op> {
        Some(match (code, operand) {
            (0, _) => Op::AllGather,
            (1, _) => Op::AllGatherV,
            (2, _) => Op::ReduceScatter,
            (3, _) => Op::ReduceScatterV,
            (4, 0) => Op::AllReduce(Reduce::Sum),
            (4, 1) => Op::AllReduce(Reduce::Max),
            (4, 2) => Op::AllReduce(Reduce::Min),
            (5, _) => Op::AllToAll,
            (6, _) => Op::AllToAllV,
            (7, root) => Op::Broadcast { root: usize::try_from(root).ok()? },
            (8, _) => Op::Barrier,
            (9, _) => Op::Split,
            (10, to) => Op::Send { to: usize::try_from(to).ok()? },
            (11, from) => Op::Recv { from: usize::try_from(from).ok()? },
            _ => return None,
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Call {
    pub op: Op,
    /// How many operations of this sort came before it on the group; set by the progress thread.
    pub number: u64,
    pub kind: Kind,
    pub shape: Vec<i64>,
    /// The rows of each rank (`all_gather_v`, `reduce_scatter_v`), or those for each rank (`all_to_all_v`); else empty.
    pub send_rows: Vec<i64>,
    /// Those from each rank (`all_to_all_v`); else empty.
    pub recv_rows: Vec<i64>,
}

impl Call {
    pub(crate) fn numel(&self) -> i64 {
        self.shape.iter().product()
    }

    /// Elements in one row of dimension 0.
    pub(crate) fn row(&self) -> i64 {
        self.shape.iter().skip(1).product()
    }

    /// Payload an ideal algorithm sends and receives on this rank, in bytes: see [`crate::Totals`].
    pub(crate) fn bytes(&self, rank: usize, size: usize) -> (u64, u64) {
        let elements = |rows: i64| rows * self.row();
        let total = self.numel();
        let w = size as i64;
        let others = w - 1;
        let (sent, received) = match self.op {
            Op::Send { .. } => (total, 0),
            Op::Recv { .. } => (0, total),
            _ if size == 1 => (0, 0),
            Op::AllGather => (total, others * total),
            Op::AllGatherV => (total, elements(self.send_rows.iter().sum()) - total),
            Op::ReduceScatter | Op::AllToAll => (total / w * others, total / w * others),
            Op::ReduceScatterV => {
                let mine = elements(self.send_rows[rank]);
                (total - mine, others * mine)
            }
            Op::AllReduce(_) => (2 * others * total / w, 2 * others * total / w),
            Op::AllToAllV => {
                let kept = elements(self.send_rows[rank]);
                (total - kept, elements(self.recv_rows.iter().sum()) - kept)
            }
            Op::Broadcast { root } if root == rank => (total, 0),
            Op::Broadcast { .. } => (0, total),
            Op::Barrier | Op::Split => (0, 0),
        };
        let width = self.kind.elt_size_in_bytes() as u64;
        (sent as u64 * width, received as u64 * width)
    }

    /// The part of the shape that every rank must share.
    fn common_shape(&self) -> &[i64] {
        if self.op.has_rows() { &self.shape[1..] } else { &self.shape }
    }

    fn describe_rows(&self) -> String {
        match self.op {
            Op::AllToAllV => format!("sends {:?} and receives {:?}", self.send_rows, self.recv_rows),
            _ => format!("{:?}", self.send_rows),
        }
    }

    fn describe_tensor(&self) -> String {
        format!("{:?} {}", self.shape, kind_name(self.kind))
    }

    /// A message must have the shape and kind that its receiver named.
    pub(crate) fn check_received(&self, group: &str, from: usize, to: usize, expected: &Call) -> Result<()> {
        let what = match (self.kind == expected.kind, self.shape == expected.shape) {
            (true, true) => return Ok(()),
            (false, _) => "kinds",
            (true, false) => "shapes",
        };
        let brought = vec![
            format!("rank {from} sent {}", self.describe_tensor()),
            format!("rank {to} expected {}", expected.describe_tensor()),
        ];
        Err(Error::Mismatch { op: "recv", number: expected.number, group: group.into(), what, brought })
    }

    /// Words of a header on a group of `size` ranks: the same on each rank, whatever the operation.
    pub(crate) fn words(size: usize) -> usize {
        7 + MAX_DIMS + 2 * size
    }

    pub(crate) fn encode(&self, size: usize) -> Vec<i64> {
        let [code, operand] = self.op.encode();
        let lengths = [self.shape.len(), self.send_rows.len(), self.recv_rows.len()].map(|n| n as i64);
        let mut words = vec![self.number as i64, code, operand, kind_code(self.kind)];
        words.extend(lengths);
        words.extend(self.shape.iter().chain(&self.send_rows).chain(&self.recv_rows));
        words.resize(Self::words(size), 0);
        words
    }

    /// `None` for words that no [`Call::encode`] wrote.
    pub(crate) fn decode(words: &[i64]) -> Option<Call> {
        let [number, code, operand, kind, dims, sends, recvs, rest @ ..] = words else { return None };
        let mut rest = rest.iter().copied();
        let mut take = |n: i64| -> Option<Vec<i64>> {
            let n = usize::try_from(n).ok()?;
            let taken: Vec<i64> = rest.by_ref().take(n).collect();
            (taken.len() == n).then_some(taken)
        };
        Some(Call {
            op: Op::decode(*code, *operand)?,
            number: u64::try_from(*number).ok()?,
            kind: *KINDS.get(usize::try_from(*kind).ok()?)?,
            shape: take(*dims)?,
            send_rows: take(*sends)?,
            recv_rows: take(*recvs)?,
        })
    }
}

pub(crate) const KINDS: [Kind; 4] = [Kind::Double, Kind::Float, Kind::BFloat16, Kind::Int64];

fn kind_code(kind: Kind) -> i64 {
    KINDS.iter().position(|&k| k == kind).map_or(-1, |at| at as i64)
}

fn kind_name(kind: Kind) -> String {
    match kind {
        Kind::Double => "f64".into(),
        Kind::Float => "f32".into(),
        Kind::BFloat16 => "bf16".into(),
        Kind::Int64 => "i64".into(),
        other => format!("{other:?}"),
    }
}

/// Checks that the calls of all ranks, in rank order, are one and the same operation.
pub(crate) fn agree(group: &str, calls: &[Call]) -> Result<()> {
    let Some(first) = calls.first() else { return Ok(()) };
    let differ = |what: &'static str, op: &'static str, show: &dyn Fn(&Call) -> String| {
        let brought = calls.iter().enumerate().map(|(rank, call)| format!("rank {rank} {}", show(call))).collect();
        Err(Error::Mismatch { op, number: first.number, group: group.into(), what, brought })
    };
    let op = first.op.name();
    if calls.iter().any(|c| c.op != first.op) {
        return differ("operations", "collective", &|c| c.op.describe());
    }
    if calls.iter().any(|c| c.number != first.number) {
        return differ("sequence numbers", op, &|c| format!("#{}", c.number));
    }
    if calls.iter().any(|c| c.kind != first.kind) {
        return differ("kinds", op, &Call::describe_tensor);
    }
    if calls.iter().any(|c| c.common_shape() != first.common_shape()) {
        return differ("shapes", op, &Call::describe_tensor);
    }
    let rows_fit = match first.op {
        Op::AllToAllV => calls
            .iter()
            .enumerate()
            .all(|(a, from)| calls.iter().enumerate().all(|(b, to)| from.send_rows.get(b) == to.recv_rows.get(a))),
        _ => calls.iter().all(|c| c.send_rows == first.send_rows),
    };
    if rows_fit { Ok(()) } else { differ("rows", op, &Call::describe_rows) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn call(op: Op, kind: Kind, shape: &[i64]) -> Call {
        Call { op, number: 17, kind, shape: shape.into(), send_rows: vec![], recv_rows: vec![] }
    }

    #[test]
    fn a_mismatch_names_what_each_rank_brought() {
        let calls = [call(Op::AllGather, Kind::Float, &[2, 3]), call(Op::AllGather, Kind::Float, &[2, 4])];
        assert_eq!(
            agree("sp", &calls).unwrap_err().to_string(),
            "all_gather #17 on group sp: shapes differ: rank 0 [2, 3] f32, rank 1 [2, 4] f32"
        );
        let calls = [call(Op::Barrier, Kind::Float, &[0]), call(Op::AllReduce(Reduce::Max), Kind::Float, &[0])];
        assert_eq!(
            agree("dp", &calls).unwrap_err().to_string(),
            "collective #17 on group dp: operations differ: rank 0 barrier, rank 1 all_reduce(Max)"
        );
    }

    #[test]
    fn rows_of_all_to_all_v_must_transpose() {
        let with = |send: [i64; 2], recv: [i64; 2]| Call {
            send_rows: send.into(),
            recv_rows: recv.into(),
            ..call(Op::AllToAllV, Kind::Float, &[send[0] + send[1], 5])
        };
        assert!(agree("sp", &[with([1, 2], [1, 4]), with([4, 0], [2, 0])]).is_ok());
        assert!(agree("sp", &[with([1, 2], [1, 3]), with([4, 0], [2, 0])]).is_err());
    }

    #[test]
    fn bytes_follow_the_formulas() {
        let of = |op, shape: &[i64], rank, size| call(op, Kind::Float, shape).bytes(rank, size);
        assert_eq!(of(Op::AllGather, &[10], 0, 4), (40, 120));
        assert_eq!(of(Op::ReduceScatter, &[4, 10], 0, 4), (120, 120));
        assert_eq!(of(Op::AllReduce(Reduce::Sum), &[40], 0, 4), (240, 240));
        assert_eq!(of(Op::AllToAll, &[4, 10], 0, 4), (120, 120));
        assert_eq!(of(Op::Broadcast { root: 1 }, &[10], 0, 4), (0, 40));
        assert_eq!(of(Op::Send { to: 0 }, &[10], 0, 1), (40, 0));
        assert_eq!(of(Op::AllGather, &[10], 0, 1), (0, 0));
    }

    proptest! {
        #[test]
        fn a_header_survives_the_wire(
            code in 0i64..12, operand in 0i64..3, number in 0u64..1 << 40, kind in 0usize..4,
            shape in prop::collection::vec(0i64..1 << 33, 0..=MAX_DIMS),
            rows in (1usize..9).prop_flat_map(|size| prop::collection::vec((0i64..100, 0i64..100), size)),
        ) {
            let op = Op::decode(code, operand).unwrap();
            let (send_rows, recv_rows): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
            let size = send_rows.len();
            let call = Call { op, number, kind: KINDS[kind], shape, send_rows, recv_rows };
            let words = call.encode(size);
            prop_assert_eq!(words.len(), Call::words(size));
            prop_assert_eq!(Call::decode(&words), Some(call));
        }
    }
}
