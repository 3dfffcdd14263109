//! What is timed: a section for each operation, with its bytes, its factor, how it is called and what it must give. To
//! add one, add its section and its name in [`COLLECTIVES`].

use crate::{Group, Reduce, Result};
use std::fmt;
use tch::{Device, Kind, Tensor};

pub static COLLECTIVES: [Collective; 5] = [ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE, ALL_TO_ALL, SEND_RECV];

/// An operation to time. W is the size of the group, `n` the elements of a part.
pub struct Collective {
    pub name: &'static str,
    /// In how many equal parts its bytes come.
    pub(super) parts: fn(w: i64) -> i64,
    /// One rank's input.
    pub(super) shape: fn(w: i64, n: i64) -> Vec<i64>,
    /// busbw / algbw.
    pub(super) factor: fn(w: f64) -> f64,
    pub(super) run: fn(&Group, &Tensor) -> Result<Tensor>,
    /// The result on a rank, from the inputs of all.
    pub(super) expected: fn(input: &Inputs, rank: usize, w: usize) -> Result<Tensor>,
}

type Inputs<'a> = dyn Fn(usize) -> Result<Tensor> + 'a;

const ALL_GATHER: Collective = Collective {
    name: "all_gather",
    parts: |w| w,
    shape: |_, n| vec![n],
    factor: |w| (w - 1.0) / w,
    run: |group, x| group.all_gather(x)?.wait(),
    expected: |input, _, w| {
        let inputs = (0..w).map(input).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_stack(&inputs, 0)?)
    },
};

const REDUCE_SCATTER: Collective = Collective {
    name: "reduce_scatter",
    parts: |w| w,
    shape: |w, n| vec![w, n],
    factor: |w| (w - 1.0) / w,
    run: |group, x| group.reduce_scatter(x)?.wait(),
    expected: |input, rank, w| sum(&|from| Ok(input(from)?.f_get(rank as i64)?), w),
};

const ALL_REDUCE: Collective = Collective {
    name: "all_reduce",
    parts: |_| 1,
    shape: |_, n| vec![n],
    factor: |w| 2.0 * (w - 1.0) / w,
    run: |group, x| group.all_reduce(x, Reduce::Sum)?.wait(),
    expected: |input, _, w| sum(input, w),
};

const ALL_TO_ALL: Collective = Collective {
    name: "all_to_all",
    parts: |w| w,
    shape: |w, n| vec![w, n],
    factor: |w| (w - 1.0) / w,
    run: |group, x| group.all_to_all(x)?.wait(),
    expected: |input, rank, w| {
        let slices = (0..w).map(|from| Ok(input(from)?.f_get(rank as i64)?)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_stack(&slices, 0)?)
    },
};

pub(super) const SEND_RECV: Collective = Collective {
    name: "send_recv",
    parts: |_| 1,
    shape: |_, n| vec![n],
    factor: |_| 1.0,
    run: |group, x| {
        let (rank, w) = (group.rank(), group.size());
        let sent = group.send(x, (rank + 1) % w)?;
        let received = group.recv_on(x.device(), &x.size(), x.f_kind()?, (rank + w - 1) % w)?.wait()?;
        sent.wait()?;
        Ok(received)
    },
    expected: |input, rank, w| input((rank + w - 1) % w),
};

fn sum(input: &Inputs, w: usize) -> Result<Tensor> {
    let mut total = input(0)?;
    for rank in 1..w {
        total = total.f_add_(&input(rank)?)?;
    }
    Ok(total)
}

/// Small whole numbers, whose sums are exact, different on each rank.
pub(super) fn input(rank: usize, shape: &[i64]) -> Result<Tensor> {
    let places = Tensor::f_arange(shape.iter().product::<i64>(), (Kind::Int64, Device::Cpu))?;
    Ok(places.f_add_scalar(7 * rank as i64)?.f_remainder(13)?.f_to_kind(Kind::Float)?.f_reshape(shape)?)
}

impl Collective {
    fn part_width(&self, w: i64) -> u64 {
        (self.parts)(w) as u64 * Kind::Float.elt_size_in_bytes() as u64
    }

    /// Elements of a part, for about `size` bytes.
    pub(super) fn part(&self, size: u64, w: i64) -> i64 {
        (size / self.part_width(w)).max(1) as i64
    }

    pub(super) fn bytes(&self, part: i64, w: i64) -> u64 {
        part as u64 * self.part_width(w)
    }
}

impl fmt::Debug for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_factors_are_those_of_nccl_tests() {
        let of = |name: &str, size: u64, w: i64| {
            let found = COLLECTIVES.iter().find(|c| c.name == name).unwrap();
            let part = found.part(size, w);
            let input: i64 = (found.shape)(w, part).iter().product();
            (found.bytes(part, w), input * 4, (found.factor)(w as f64))
        };
        assert_eq!(of("all_gather", 1 << 20, 4), (1 << 20, 1 << 18, 0.75));
        assert_eq!(of("reduce_scatter", 1 << 20, 4), (1 << 20, 1 << 20, 0.75));
        assert_eq!(of("all_reduce", 1 << 20, 4), (1 << 20, 1 << 20, 1.5));
        assert_eq!(of("all_to_all", 1 << 20, 8), (1 << 20, 1 << 20, 0.875));
        assert_eq!(of("send_recv", 1 << 20, 8), (1 << 20, 1 << 20, 1.0));
        assert_eq!(of("all_gather", 1000, 3), (996, 332, 2.0 / 3.0));
        assert_eq!(of("reduce_scatter", 1, 3), (12, 12, 2.0 / 3.0));
    }
}
