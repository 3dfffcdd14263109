//! How fast this job's ranks communicate, in the terms of nccl-tests (its doc/PERFORMANCE.md), so that figures compare.
//!
//! algbw = bytes / time. busbw = algbw * factor is what the busiest link has to carry, whatever W; it compares with the
//! bandwidth of the hardware. GB are 10^9 bytes.
//!
//! | operation | bytes | factor |
//! |---|---|---|
//! | all_gather | result of a rank, W times its input | (W-1)/W |
//! | reduce_scatter | input of a rank, W times its result | (W-1)/W |
//! | all_reduce | input of a rank | 2(W-1)/W |
//! | all_to_all | input of a rank | (W-1)/W |
//! | send_recv | what a rank sends to the next one of a ring | 1 |
//!
//! The time of an iteration is that of the slowest rank, from a barrier to its result, on a GPU until the GPU has it. Results
//! are checked in the same run; if one is wrong there are no figures.

mod collective;

pub use collective::{COLLECTIVES, Collective};

use crate::{Error, Group, Reduce, Result};
use collective::input;
use std::time::{Duration, Instant};
use tch::{Cuda, Device, Kind, Tensor};

const FEWEST: usize = 5;

#[derive(Debug, Clone)]
pub struct Options {
    pub collectives: Vec<&'static Collective>,
    /// In bytes, as in the table above. Rounded down to whole elements of f32 for each rank, but to one at least.
    pub sizes: Vec<u64>,
    /// Untimed iterations before; at least 1.
    pub warmup: usize,
    /// Timed iterations, unless they would last longer than `budget`; at least 5 in any case.
    pub iterations: usize,
    /// Of one row.
    pub budget: Duration,
    /// Where the tensors are.
    pub device: Device,
}

impl Default for Options {
    /// All collectives, 1 KiB to 16 MiB; 50 iterations, and no fewer than 20 while one takes up to 50 ms.
    fn default() -> Options {
        Options {
            collectives: COLLECTIVES.iter().collect(),
            sizes: sizes(1 << 10, 16 << 20, 4),
            warmup: 3,
            iterations: 50,
            budget: Duration::from_secs(1),
            device: Device::Cpu,
        }
    }
}

/// From `min` to at most `max`, each `factor` times the one before; `factor` less than 2: `min` only.
pub fn sizes(min: u64, max: u64, factor: u64) -> Vec<u64> {
    let next = |size: &u64| size.checked_mul(factor).filter(|next| next > size);
    std::iter::successors(Some(min), next).take_while(|&size| size <= max).collect()
}

/// One collective at one size, the same on every rank.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub collective: &'static str,
    pub backend: &'static str,
    pub ranks: usize,
    pub bytes: u64,
    pub iterations: usize,
    pub median_us: f64,
    pub p10_us: f64,
    pub p90_us: f64,
    /// Of the median, in GB/s.
    pub algbw: f64,
    pub busbw: f64,
}

/// Collective over `group`. Rows by collective, then by size.
pub fn run(group: &Group, options: &Options) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for collective in &options.collectives {
        for &size in &options.sizes {
            rows.push(row(group, collective, size, options)?);
        }
    }
    Ok(rows)
}

fn row(group: &Group, collective: &'static Collective, size: u64, options: &Options) -> Result<Row> {
    let w = group.size() as i64;
    let part = collective.part(size, w);
    let bytes = collective.bytes(part, w);
    let of_rank = |rank: usize| input(rank, &(collective.shape)(w, part));
    let x = of_rank(group.rank())?.f_to_device(options.device)?;
    let expected = (collective.expected)(&of_rank, group.rank(), group.size())?.f_to_device(options.device)?;
    let ended = || {
        if let Device::Cuda(gpu) = options.device {
            Cuda::synchronize(gpu as i64);
        }
    };
    let once = || -> Result<(f64, Tensor)> {
        ended();
        group.barrier()?.wait()?;
        let start = Instant::now();
        let result = (collective.run)(group, &x)?;
        ended();
        Ok((start.elapsed().as_secs_f64(), result))
    };
    let check = |result: &Tensor| -> Result<()> {
        let right = result.size() == expected.size() && result.f_equal(&expected)?;
        let all = group.all_gather(&Tensor::f_from_slice(&[i64::from(right)])?)?.wait()?;
        let all = numbers(&all.f_to_kind(Kind::Double)?)?;
        let wrong: Vec<usize> = (0..all.len()).filter(|&rank| all[rank] == 0.0).collect();
        if wrong.is_empty() {
            return Ok(());
        }
        Err(Error::WrongResult { op: collective.name, bytes, group: group.name().into(), ranks: wrong })
    };

    let mut last = once()?;
    check(&last.1)?;
    for _ in 1..options.warmup {
        last = once()?;
    }
    let longest = slowest(group, &[last.0])?.into_iter().fold(1e-9, f64::max);
    let affordable = options.budget.as_secs_f64() / longest;
    let iterations = options.iterations.min(affordable as usize).max(FEWEST);

    let mut times = Vec::with_capacity(iterations);
    for _ in 0..iterations {
        last = once()?;
        times.push(last.0);
    }
    check(&last.1)?;
    Ok(Row::new(collective, group, options.device, bytes, slowest(group, &times)?))
}

/// Of each iteration the time of the slowest rank.
fn slowest(group: &Group, times: &[f64]) -> Result<Vec<f64>> {
    numbers(&group.all_reduce(&Tensor::f_from_slice(times)?, Reduce::Max)?.wait()?)
}

fn numbers(x: &Tensor) -> Result<Vec<f64>> {
    let mut numbers = vec![0.0; x.numel()];
    x.f_copy_data(&mut numbers, x.numel())?;
    Ok(numbers)
}

impl Row {
    fn new(collective: &Collective, group: &Group, device: Device, bytes: u64, mut seconds: Vec<f64>) -> Row {
        seconds.sort_by(f64::total_cmp);
        let last = seconds.len() as f64 - 1.0;
        let at = |share: f64| seconds.get((last * share).round() as usize).copied().unwrap_or(f64::NAN);
        let algbw = bytes as f64 / at(0.5) / 1e9;
        Row {
            collective: collective.name,
            backend: group.backend_on(device),
            ranks: group.size(),
            bytes,
            iterations: seconds.len(),
            median_us: at(0.5) * 1e6,
            p10_us: at(0.1) * 1e6,
            p90_us: at(0.9) * 1e6,
            algbw,
            busbw: algbw * (collective.factor)(group.size() as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local;

    #[test]
    fn a_wrong_result_gives_no_figures() {
        static WRONG: Collective = Collective { expected: |input, rank, _| input(rank), ..collective::SEND_RECV };
        let options = Options { collectives: vec![&WRONG], sizes: vec![40], ..Options::default() };
        let found = local::run(3, |group| run(&group, &options)).unwrap_err().to_string();
        assert_eq!(
            found,
            "send_recv of 40 bytes on group world: ranks [0, 1, 2] got a wrong result, so there are no figures"
        );
    }

    #[test]
    fn sizes_end_at_the_largest() {
        assert_eq!(sizes(1024, 16 << 10, 4), [1 << 10, 4 << 10, 16 << 10]);
        assert_eq!(sizes(1000, 3999, 2), [1000, 2000]);
        assert_eq!(sizes(8, 64, 1), [8]);
        assert_eq!(sizes(0, 64, 4), [0]);
        assert_eq!(sizes(9, 8, 2), [0u64; 0]);
        assert_eq!(sizes(1 << 62, u64::MAX, 4), [1 << 62]);
    }
}
