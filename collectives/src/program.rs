//! What each operation means, as steps that a back end can carry out by moving flat runs of elements.
//!
//! A back end knows five steps (gather, exchange, broadcast, meet, send/recv) and nothing of shapes or reductions; those
//! are here, once. Reductions therefore add in rank order on every back end: `reduce_scatter` is an exchange followed by a
//! local sum, and `all_reduce` is that followed by a gather, which moves what the ring algorithms move, 2 (W-1)/W.

use crate::{
    Reduce, Result,
    op::{Call, Op},
};
use tch::{Device, Kind, Tensor};

/// Below this many elements one gather and W-1 redundant additions are quicker than two dependent steps.
const SMALL: i64 = 2048;

/// One movement of data. Tensors are flat, contiguous and on the CPU; counts are elements, one for each rank.
pub(crate) enum Step {
    /// Everyone gets everyone's `x`, joined in rank order.
    Gather {
        x: Tensor,
        counts: Vec<i64>,
    },
    /// Run r of `x` goes to rank r; the runs received are joined in rank order.
    Exchange {
        x: Tensor,
        send: Vec<i64>,
        recv: Vec<i64>,
    },
    /// Everyone gets a copy of the root's `x`.
    Broadcast {
        x: Tensor,
        root: usize,
    },
    /// Nobody goes on before everyone has come.
    Meet,
    Send {
        x: Tensor,
        to: usize,
    },
    Recv {
        from: usize,
    },
}

pub(crate) enum Next {
    Step(Step),
    Done(Tensor),
}

/// An operation under way on one rank.
pub(crate) struct Program {
    call: Call,
    rank: usize,
    size: usize,
    reduced: bool,
}

impl Program {
    pub(crate) fn new(call: Call, rank: usize, size: usize) -> Program {
        Program { call, rank, size, reduced: false }
    }

    pub(crate) fn first(&self, x: Tensor) -> Result<Step> {
        let call = &self.call;
        let n = call.numel();
        let each = |count: i64| vec![count; self.size];
        let share = n / self.size as i64;
        let of_rows = |rows: &[i64]| -> Vec<i64> { rows.iter().map(|r| r * call.row()).collect() };
        let x = match call.op {
            Op::Recv { .. } | Op::Barrier => x,
            _ => x.f_reshape([n])?,
        };
        Ok(match call.op {
            Op::AllGather | Op::Split => Step::Gather { x, counts: each(n) },
            Op::AllGatherV => Step::Gather { x, counts: of_rows(&call.send_rows) },
            Op::ReduceScatter | Op::AllToAll => Step::Exchange { x, send: each(share), recv: each(share) },
            Op::ReduceScatterV => {
                let send = of_rows(&call.send_rows);
                let recv = each(send[self.rank]);
                Step::Exchange { x, send, recv }
            }
            Op::AllReduce(_) if n <= SMALL => Step::Gather { x, counts: each(n) },
            Op::AllReduce(_) => {
                let send = slices(n, self.size);
                let recv = each(send[self.rank]);
                Step::Exchange { x, send, recv }
            }
            Op::AllToAllV => Step::Exchange { x, send: of_rows(&call.send_rows), recv: of_rows(&call.recv_rows) },
            Op::Broadcast { root } => Step::Broadcast { x, root },
            Op::Barrier => Step::Meet,
            Op::Send { to } => Step::Send { x, to },
            Op::Recv { from } => Step::Recv { from },
        })
    }

    /// Given the flat result of the step before, the next one or the operation's result.
    pub(crate) fn then(&mut self, arrived: Tensor) -> Result<Next> {
        let call = &self.call;
        let rows = |count: i64| -> Vec<i64> { [&[count], call.shape.get(1..).unwrap_or_default()].concat() };
        let shape = match call.op {
            Op::AllGather | Op::Split => [&[self.size as i64], call.shape.as_slice()].concat(),
            Op::AllGatherV => rows(call.send_rows.iter().sum()),
            Op::ReduceScatter => {
                let sum = self.combine(&arrived, Reduce::Sum)?;
                return Ok(Next::Done(sum.f_reshape(&call.shape[1..])?));
            }
            Op::ReduceScatterV => {
                let sum = self.combine(&arrived, Reduce::Sum)?;
                return Ok(Next::Done(sum.f_reshape(rows(call.send_rows[self.rank]))?));
            }
            Op::AllReduce(op) if !self.reduced => {
                let x = self.combine(&arrived, op)?;
                if call.numel() <= SMALL {
                    return Ok(Next::Done(x.f_reshape(call.shape.as_slice())?));
                }
                let counts = slices(call.numel(), self.size);
                self.reduced = true;
                return Ok(Next::Step(Step::Gather { x, counts }));
            }
            Op::AllToAllV => rows(call.recv_rows.iter().sum()),
            Op::AllReduce(_) | Op::AllToAll | Op::Broadcast { .. } | Op::Recv { .. } => call.shape.clone(),
            Op::Barrier | Op::Send { .. } => return Ok(Next::Done(arrived)),
        };
        Ok(Next::Done(arrived.f_reshape(shape)?))
    }

    /// `runs`: `[W * n]`, one run from each rank. Returns `[n]`, combined in rank order.
    fn combine(&self, runs: &Tensor, op: Reduce) -> Result<Tensor> {
        let n = runs.numel() as i64 / self.size as i64;
        let run = |rank: usize| runs.f_narrow(0, rank as i64 * n, n);
        let wide = match runs.f_kind()? {
            Kind::BFloat16 if op == Reduce::Sum => Kind::Float,
            same => same,
        };
        let mut total = Tensor::f_empty([n], (wide, Device::Cpu))?;
        total.f_copy_(&run(0)?)?;
        for rank in 1..self.size {
            total = match op {
                Reduce::Sum => total.f_add_(&run(rank)?)?,
                Reduce::Max => total.f_maximum(&run(rank)?)?,
                Reduce::Min => total.f_minimum(&run(rank)?)?,
            };
        }
        Ok(total.f_to_kind(runs.f_kind()?)?)
    }
}

/// `n` elements in `size` runs of nearly the same length.
fn slices(n: i64, size: usize) -> Vec<i64> {
    let w = size as i64;
    (0..w).map(|r| n * (r + 1) / w - n * r / w).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn slices_cover_everything_evenly(n in 0i64..100_000, size in 1usize..65) {
            let runs = slices(n, size);
            prop_assert_eq!(runs.len(), size);
            prop_assert_eq!(runs.iter().sum::<i64>(), n);
            prop_assert!(runs.iter().all(|run| run - n / size as i64 <= 1 && *run >= n / size as i64));
        }
    }

    #[test]
    fn bf16_sums_are_rounded_once() {
        let call = Call {
            op: Op::AllReduce(Reduce::Sum),
            number: 0,
            kind: Kind::BFloat16,
            shape: vec![1],
            send_rows: vec![],
            recv_rows: vec![],
        };
        let program = Program::new(call, 0, 4);
        // 256 + 1 is 256 in bf16, so rounding after each addition would lose all three.
        let runs = Tensor::from_slice(&[256f32, 1.0, 1.0, 1.0]).to_kind(Kind::BFloat16);
        let sum = program.combine(&runs, Reduce::Sum).unwrap();
        assert_eq!((sum.kind(), sum.double_value(&[0])), (Kind::BFloat16, 260.0));
    }
}
