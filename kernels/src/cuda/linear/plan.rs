//! How the tokens of a call are cut among a GPU's multiprocessors: the tables that `kernels/cuda/linear.cu` walks by.
//!
//! Every head of every sequence is a chain of tokens. Laid end to end, in chunks of 64, the chains are cut into equal runs,
//! one a block of threads; where a run crosses into another chain it is cut again. The pieces are segments.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

use tch::{Device, Kind, Tensor};

use super::super::lock;
use crate::Result;

/// Tokens of a chunk, as in linear.cu.
const CHUNK: i64 = 64;

/// Bits of a segment's `flags`.
pub const FOLLOWS: i32 = 1;
pub const FOLLOWED: i32 = 2;
pub const FIRST: i32 = 4;
pub const LAST: i32 = 8;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    device: usize,
    b: i64,
    t: i64,
    h: i64,
    most: i64,
}

/// The tables of one shape, on the device. A segment's state is row `slot` of its own among `slots`.
#[derive(Debug)]
pub struct Plan {
    /// `struct Segment` and `struct Chain` of linear.cu, in 8 and 4 numbers.
    pub segments: Tensor,
    pub chains: Tensor,
    /// `[blocks + 1]`: the first segment of each block of threads.
    pub first: Tensor,
    pub slots: i64,
    pub blocks: u32,
    pub chain_count: u32,
}

/// The tables before they are sent to a device.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tables {
    segments: Vec<[i32; 8]>,
    chains: Vec<[i32; 4]>,
    first: Vec<i32>,
}

/// How many blocks of threads for `chains` of `chunks` each: all multiprocessors, or a little fewer where the heads then
/// run through the same tokens side by side, which memory likes (3 to 5 % on an H200).
fn blocks(most: i64, chains: i64, chunks: i64) -> i64 {
    let even =
        if chains < most { most / chains * chains } else { (1..=most).rev().find(|n| chains % n == 0).unwrap_or(1) };
    let blocks = if even * 20 >= most * 19 { even } else { most };
    blocks.min(chains * chunks).max(1)
}

fn tables(b: i64, t: i64, h: i64, most: i64) -> Tables {
    let (chains, chunks) = (b * h, (t + CHUNK - 1) / CHUNK);
    let blocks = blocks(most, chains, chunks);
    // The first chunk of block `i`.
    let bound = |i: i64| i * (chains * chunks) / blocks;
    let mut tables = Tables { first: vec![0], ..Tables::default() };
    let mut block = 0;
    for chain in 0..chains {
        let (start, end) = (chain * chunks, (chain + 1) * chunks);
        let first = tables.segments.len();
        let mut at = start;
        while at < end {
            while bound(block + 1) <= at {
                block += 1;
                tables.first.push(tables.segments.len() as i32);
            }
            let until = end.min(bound(block + 1));
            let follows = if at == start { FIRST } else { FOLLOWS };
            let followed = if until == end { LAST } else { FOLLOWED };
            let slot = tables.segments.len() as i32;
            // The state at its end is the next one's entry, or the chain's final state.
            let after = if until == end { -1 - chain as i32 } else { slot + 1 };
            let (from, to) = ((at - start) * CHUNK, ((until - start) * CHUNK).min(t));
            let place = [(chain / h) as i32, (chain % h) as i32, from as i32, to as i32];
            tables.segments.push([place[0], place[1], place[2], place[3], follows | followed, slot, after, 0]);
            at = until;
        }
        let count = tables.segments.len() - first;
        tables.chains.push([first as i32, count as i32, chain as i32, chain as i32]);
    }
    tables.first.resize(blocks as usize + 1, tables.segments.len() as i32);
    tables
}

impl Plan {
    /// For `[B, T, H, ..]` on a GPU of `multiprocessors`; made once for each shape.
    pub fn of(device: usize, (b, t, h): (i64, i64, i64), multiprocessors: i64) -> Result<Self> {
        static PLANS: OnceLock<Mutex<HashMap<Key, Plan>>> = OnceLock::new();
        let key = Key { device, b, t, h, most: multiprocessors };
        let mut plans = lock(PLANS.get_or_init(Mutex::default));
        if let Some(plan) = plans.get(&key) {
            return Ok(plan.shallow_clone());
        }
        let tables = tables(b, t, h, multiprocessors);
        let send = |numbers: &[i32]| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(numbers)?.f_to_kind(Kind::Int)?.f_to_device(Device::Cuda(device))?)
        };
        let plan = Self {
            segments: send(tables.segments.as_flattened())?,
            chains: send(tables.chains.as_flattened())?,
            first: send(&tables.first)?,
            slots: tables.segments.len() as i64,
            blocks: tables.first.len() as u32 - 1,
            chain_count: tables.chains.len() as u32,
        };
        // Shapes that never come back, as packed documents make them, must not pile up.
        if plans.len() >= 1024 {
            plans.clear();
        }
        let result = plan.shallow_clone();
        plans.insert(key, plan);
        Ok(result)
    }

    pub fn shallow_clone(&self) -> Self {
        Self {
            segments: self.segments.shallow_clone(),
            chains: self.chains.shallow_clone(),
            first: self.first.shallow_clone(),
            ..*self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every token of every head once, in order; equal work; flags and neighbours as the kernels read them.
    #[test]
    fn segments_cover_all_tokens_in_order() {
        for (b, t, h, most) in
            [(1, 16384, 16, 132), (2, 1000, 3, 132), (1, 1, 1, 132), (3, 65, 50, 7), (1, 640, 200, 132)]
        {
            let x = tables(b, t, h, most);
            let chunks = (t + CHUNK - 1) / CHUNK;
            assert!(x.first.len() as i64 <= most + 1);
            assert_eq!((x.first[0], x.first.last().copied()), (0, Some(x.segments.len() as i32)));
            let work: Vec<i64> = (x.first.windows(2))
                .map(|w| {
                    let segments = &x.segments[w[0] as usize..w[1] as usize];
                    segments.iter().map(|s| (i64::from(s[3] - s[2]) + CHUNK - 1) / CHUNK).sum()
                })
                .collect();
            assert_eq!(work.iter().sum::<i64>(), b * h * chunks);
            assert!(work.iter().max().unwrap() - work.iter().min().unwrap() <= 1, "{b} {t} {h}: {work:?}");
            for (chain, c) in x.chains.iter().enumerate() {
                let segments = &x.segments[c[0] as usize..(c[0] + c[1]) as usize];
                assert_eq!((c[2], c[3]), (chain as i32, chain as i32));
                let mut at = 0;
                for (i, s) in segments.iter().enumerate() {
                    assert_eq!(i64::from(s[0]) * h + i64::from(s[1]), chain as i64);
                    assert_eq!((s[2], s[5]), (at, c[0] + i as i32));
                    at = s[3];
                    let last = i + 1 == segments.len();
                    assert_eq!(s[4], if i == 0 { FIRST } else { FOLLOWS } | if last { LAST } else { FOLLOWED });
                    assert_eq!(s[6], if last { -1 - chain as i32 } else { s[5] + 1 });
                }
                assert_eq!(i64::from(at), t);
            }
        }
    }

    #[test]
    fn heads_run_side_by_side_where_that_costs_few_multiprocessors() {
        assert_eq!(blocks(132, 16, 256), 128);
        assert_eq!(blocks(132, 12, 256), 132);
        assert_eq!(blocks(132, 24, 256), 132);
        assert_eq!(blocks(132, 256, 256), 128);
        assert_eq!(blocks(132, 16, 2), 32);
    }
}
