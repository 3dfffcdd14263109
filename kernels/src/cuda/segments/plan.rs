//! How the tokens of a call are cut among blocks of threads: the tables that `kernels/cuda/linear.cu` and
//! `linear_mma.cu` walk by, and that any kernel could whose state goes from chunk to chunk.
//!
//! A call is `[B, T, H]` whose T tokens are [`Piece`]s, one after another, of different documents. One head of one piece is a
//! chain. Laid end to end in chunks (which begin anew with every piece), sequence by sequence and head by head, the chains are
//! cut into equal runs of chunks, one a block of threads; a run is cut again where it crosses into another chain. These cuts
//! are segments, `segments[first[i]] .. segments[first[i + 1]]` those of block i. Of a segment, [`FOLLOWS`] and [`FOLLOWED`]
//! say that its chain has others before and after it, [`FIRST`] and [`LAST`] that it is where a state enters or leaves the
//! chain from or to outside. Only chains of several segments, and those that a state enters or leaves, have slots: rows of the
//! sums and states `[slots, K, V]` that passes leave for each other, consecutive in a chain. All others start from zero, and
//! nobody asks for their sum: flags 0, slot and chain -1. States from outside are `[rows, K, V]`, `B H` rows a piece that one enters (or
//! leaves), in the order of pieces, then of sequences, then of heads.

use std::sync::{Mutex, OnceLock};

use tch::{Device, Kind, Tensor};

use super::super::lock;
use crate::Result;
use crate::linear::Piece;

/// Bits of a segment's `flags`.
pub const FOLLOWS: i32 = 1;
pub const FOLLOWED: i32 = 2;
pub const FIRST: i32 = 4;
pub const LAST: i32 = 8;

/// The flags of segments that a state, or in `reverse` a gradient, enters: from a neighbour, from outside, or both.
pub fn entered(reverse: bool, (neighbour, outside): (bool, bool)) -> i32 {
    let [inner, end] = if reverse { [FOLLOWED, LAST] } else { [FOLLOWS, FIRST] };
    (inner * i32::from(neighbour)) | (end * i32::from(outside))
}

/// What a call is cut for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// B and H.
    pub sequences: i64,
    pub heads: i64,
    /// Tokens of a chunk.
    pub chunk: i64,
    /// Blocks of threads, at most: those that a GPU runs at once.
    pub blocks: i64,
}

/// Segments and, `[blocks + 1]`, the first one of each block of threads: `struct Segment` of linear.cu in 8 numbers.
#[derive(Debug)]
pub struct Work {
    pub segments: Tensor,
    pub first: Tensor,
    pub count: u32,
    pub blocks: u32,
}

/// The tables of one cut, on the device.
#[derive(Debug)]
pub struct Plan {
    pub all: Work,
    /// The segments of pieces that a state enters.
    pub entered: Work,
    /// The chains that have slots: `struct Chain` of linear.cu in 4 numbers.
    pub chains: Tensor,
    pub chain_count: u32,
    pub slots: i64,
    /// All segments' flags.
    pub flags: i32,
    /// Segments of the longest chain.
    pub longest: i64,
    /// By which the blocks of one launch tell each other how far they are: a counter of 64 bits, and 32 bits a slot. Zeros at
    /// first, and never reset: every launch that uses them is of all segments, with as many blocks, on `stream`.
    pub signals: Tensor,
    pub stream: usize,
}

/// The tables before they are sent to a device.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tables {
    segments: Vec<[i32; 8]>,
    first: Vec<i32>,
    entered: Vec<[i32; 8]>,
    entered_first: Vec<i32>,
    chains: Vec<[i32; 4]>,
    slots: i32,
}

/// How many blocks of threads for `heads` of `chunks` each: all, or a little fewer where the heads then run through the same
/// tokens side by side, which memory likes (3 to 5 % on an H200).
fn blocks(most: i64, heads: i64, chunks: i64) -> i64 {
    let even = if heads < most { most / heads * heads } else { (1..=most).rev().find(|n| heads % n == 0).unwrap_or(1) };
    let blocks = if even * 20 >= most * 19 { even } else { most };
    blocks.min(heads * chunks).max(1)
}

fn tables(cut: Cut, pieces: &[Piece]) -> Tables {
    let Cut { sequences, heads, chunk, blocks: most } = cut;
    let chunks_of = |tokens: i64| (tokens + chunk - 1) / chunk;
    let (lines, chunks) = (sequences * heads, pieces.iter().map(|p| chunks_of(p.tokens)).sum::<i64>());
    let blocks = blocks(most, lines, chunks);
    // The first chunk of block `i`.
    let bound = |i: i64| i * (lines * chunks) / blocks;
    let mut tables = Tables { first: vec![0], ..Tables::default() };
    let (mut block, mut at) = (0, 0);
    for line in 0..lines {
        let (mut token, mut entering, mut leaving) = (0, 0, 0);
        for piece in pieces {
            let row = |is: bool, count: &mut i64| {
                *count += i64::from(is);
                if is { ((*count - 1) * lines + line) as i32 } else { -1 }
            };
            let (entry, end) = (row(piece.enters, &mut entering), row(piece.leaves, &mut leaving));
            let (start, until) = (at, at + chunks_of(piece.tokens));
            let chain = tables.segments.len();
            while at < until {
                while bound(block + 1) <= at {
                    block += 1;
                    tables.first.push(tables.segments.len() as i32);
                }
                let next = until.min(bound(block + 1));
                let tokens = ((at - start) * chunk, ((next - start) * chunk).min(piece.tokens));
                let before = if at > start { FOLLOWS } else { FIRST * i32::from(piece.enters) };
                let after = if next < until { FOLLOWED } else { LAST * i32::from(piece.leaves) };
                let place = [line / heads, line % heads, token + tokens.0, token + tokens.1].map(|x| x as i32);
                tables.segments.push([place[0], place[1], place[2], place[3], before | after, -1, 0, -1]);
                at = next;
            }
            tables.keep_states(chain, entry, end);
            token += piece.tokens;
        }
    }
    tables.first.resize(blocks as usize + 1, tables.segments.len() as i32);
    tables.spread(chunk, blocks);
    tables
}

impl Tables {
    /// Gives slots to the chain that begins with segment `first`, if it needs any. `entry`, `end`: rows of the states from
    /// outside, or -1.
    fn keep_states(&mut self, first: usize, entry: i32, end: i32) {
        let segments = &mut self.segments[first..];
        let count = segments.len() as i32;
        if count == 1 && entry < 0 && end < 0 {
            return;
        }
        let chain = self.chains.len() as i32;
        self.chains.push([self.slots, count, entry, end]);
        for (i, segment) in (0..count).zip(&mut *segments) {
            // The state at its end is the next one's entry, or one of those that leave.
            let after = if i + 1 < count { self.slots + i + 1 } else { -1 - end };
            (segment[5], segment[6], segment[7]) = (self.slots + i, after, chain);
        }
        if entry >= 0 {
            self.entered.extend_from_slice(segments);
        }
        self.slots += count;
    }

    /// Gives the segments in `entered`, which are no more to be cut, to as many blocks.
    fn spread(&mut self, chunk: i64, blocks: i64) {
        let chunks = |s: &[i32; 8]| (i64::from(s[3] - s[2]) + chunk - 1) / chunk;
        let total = self.entered.iter().map(chunks).sum::<i64>();
        let blocks = blocks.min(self.entered.len() as i64);
        let few = self.entered.len() as i64 == blocks;
        let mut at = 0;
        for (i, segment) in self.entered.iter().enumerate() {
            let begun = self.entered_first.len() as i64;
            if begun < blocks && (few || begun * total / blocks <= at) {
                self.entered_first.push(i as i32);
            }
            at += chunks(segment);
        }
        self.entered_first.resize(blocks as usize + 1, self.entered.len() as i32);
    }

    fn send(&self, device: Device, stream: usize) -> Result<Plan> {
        // First, as the counter's address is to be a multiple of 8.
        let signals = vec![0; 2 + self.slots as usize];
        let tables = [
            &signals,
            self.segments.as_flattened(),
            self.entered.as_flattened(),
            self.chains.as_flattened(),
            &self.first,
            &self.entered_first,
        ];
        let all = crate::bridge::upload(&Tensor::f_from_slice(&tables.concat())?.f_to_kind(Kind::Int)?, device)?;
        let mut start = 0;
        let mut next = |numbers: &[i32]| -> Result<Tensor> {
            let part = all.f_narrow(0, start, numbers.len() as i64)?;
            start += numbers.len() as i64;
            Ok(part)
        };
        let [signals, segments, entered, chains, first, entered_first] = tables.map(&mut next);
        let work = |segments: Tensor, count: usize, first: Tensor| {
            let blocks = first.size()[0] as u32 - 1;
            Work { segments, first, count: count as u32, blocks }
        };
        Ok(Plan {
            all: work(segments?, self.segments.len(), first?),
            entered: work(entered?, self.entered.len(), entered_first?),
            chains: chains?,
            chain_count: self.chains.len() as u32,
            slots: i64::from(self.slots),
            flags: self.segments.iter().fold(0, |flags, segment| flags | segment[4]),
            longest: self.chains.iter().map(|chain| i64::from(chain[1])).max().unwrap_or(0),
            signals: signals?,
            stream,
        })
    }
}

struct Kept {
    device: Device,
    cut: Cut,
    pieces: Vec<Piece>,
    plan: Plan,
}

/// Plans kept, and numbers in all their tables: 16 MiB. Packed documents make shapes that never come back.
const MOST: usize = 64;
const NUMBERS: usize = 1 << 22;

impl Plan {
    /// For `[B, T, H, ..]` on `device`. Made once for all layers and passes that a sequence goes through: the plans last used
    /// are kept. `stream`: on which all launches with this plan come one after another.
    pub fn of(device: Device, stream: usize, cut: Cut, pieces: &[Piece]) -> Result<Self> {
        static PLANS: OnceLock<Mutex<Vec<Kept>>> = OnceLock::new();
        let plans = PLANS.get_or_init(Mutex::default);
        let take = || {
            let mut plans = lock(plans);
            let same = |kept: &Kept| {
                (kept.device, kept.plan.stream, kept.cut) == (device, stream, cut) && kept.pieces == pieces
            };
            plans.iter().position(same).map(|at| plans.remove(at))
        };
        // Not under the lock: the copy to a device may wait for other ranks, which may be threads that want plans too.
        let kept = match take() {
            Some(kept) => kept,
            None => Kept { device, cut, pieces: pieces.to_vec(), plan: tables(cut, pieces).send(device, stream)? },
        };
        let mut plans = lock(plans);
        let plan = kept.plan.shallow_clone();
        plans.insert(0, kept);
        let mut numbers = 0;
        let most = plans.iter().take_while(|kept| {
            numbers += kept.plan.numbers();
            numbers <= NUMBERS
        });
        let most = most.count().clamp(1, MOST);
        plans.truncate(most);
        Ok(plan)
    }

    fn numbers(&self) -> usize {
        let Self { all, entered, chains, signals, .. } = self;
        [&all.segments, &all.first, &entered.segments, &entered.first, chains, signals]
            .iter()
            .map(|table| table.numel())
            .sum()
    }

    pub fn shallow_clone(&self) -> Self {
        let work =
            |work: &Work| Work { segments: work.segments.shallow_clone(), first: work.first.shallow_clone(), ..*work };
        let [chains, signals] = [&self.chains, &self.signals].map(Tensor::shallow_clone);
        Self { all: work(&self.all), entered: work(&self.entered), chains, signals, ..*self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CHUNK: i64 = 64;

    fn piece(tokens: i64, enters: bool, leaves: bool) -> Piece {
        Piece { tokens, enters, leaves }
    }

    fn chunks(segments: &[[i32; 8]]) -> i64 {
        segments.iter().map(|s| (i64::from(s[3] - s[2]) + CHUNK - 1) / CHUNK).sum()
    }

    /// Chunks of each block of threads.
    fn work(segments: &[[i32; 8]], first: &[i32]) -> Vec<i64> {
        assert_eq!((first[0], first.last().copied()), (0, Some(segments.len() as i32)));
        first.windows(2).map(|w| chunks(&segments[w[0] as usize..w[1] as usize])).collect()
    }

    /// Every token of every head once, in order, none across a piece's end; equal work; slots where they are needed and
    /// nowhere else; flags, neighbours and rows as the kernels read them.
    fn check(cut: Cut, pieces: &[Piece]) {
        let x = tables(cut, pieces);
        let lines = cut.sequences * cut.heads;
        let per_line: i64 = pieces.iter().map(|p| (p.tokens + CHUNK - 1) / CHUNK).sum();
        let loads = work(&x.segments, &x.first);
        assert!(loads.len() as i64 <= cut.blocks);
        assert_eq!(loads.iter().sum::<i64>(), lines * per_line);
        assert!(loads.iter().max().unwrap() - loads.iter().min().unwrap() <= 1, "{cut:?} {pieces:?}: {loads:?}");

        let mut segments = x.segments.iter();
        let (mut chains, mut entered, mut slots) = (x.chains.iter(), x.entered.iter(), 0);
        for line in 0..lines {
            let mut at = 0;
            for (n, piece) in pieces.iter().enumerate() {
                let end = at + piece.tokens as i32;
                let mut chain = Vec::new();
                while at < end {
                    let s = segments.next().unwrap();
                    assert_eq!((i64::from(s[0]), i64::from(s[1])), (line / cut.heads, line % cut.heads));
                    assert!(s[2] == at && s[3] > at && s[3] <= end, "{s:?} from {at} to {end}");
                    assert!(s[3] == end || (s[3] - at) % CHUNK as i32 == 0);
                    at = s[3];
                    chain.push(s);
                }
                let row = |is: fn(&Piece) -> bool| {
                    let before = pieces[..n].iter().filter(|p| is(p)).count() as i64;
                    if is(piece) { (before * lines + line) as i32 } else { -1 }
                };
                let (entry, leaving) = (row(|p| p.enters), row(|p| p.leaves));
                if chain.len() == 1 && !piece.enters && !piece.leaves {
                    assert_eq!((chain[0][4], chain[0][5], chain[0][7]), (0, -1, -1));
                    continue;
                }
                let number = (x.chains.len() - chains.len()) as i32;
                assert_eq!(chains.next(), Some(&[slots, chain.len() as i32, entry, leaving]));
                for (i, s) in chain.iter().enumerate() {
                    let (first, last) = (i == 0, i + 1 == chain.len());
                    let before = if first { FIRST * i32::from(piece.enters) } else { FOLLOWS };
                    let after = if last { LAST * i32::from(piece.leaves) } else { FOLLOWED };
                    assert_eq!((s[4], s[5], s[7]), (before | after, slots, number));
                    slots += 1;
                    if !last || piece.leaves {
                        assert_eq!(s[6], if last { -1 - leaving } else { slots });
                    }
                    if piece.enters {
                        assert_eq!(entered.next(), Some(*s));
                    }
                }
            }
        }
        assert_eq!((segments.next(), chains.next(), entered.next(), slots), (None, None, None, x.slots));
        // A cut makes two segments of one; all else that has a slot is where a state enters or leaves.
        let marked = pieces.iter().filter(|piece| piece.enters || piece.leaves).count() as i64;
        assert!(i64::from(slots) <= 2 * (loads.len() as i64 - 1) + lines * marked, "{slots} of {cut:?} {pieces:?}");

        let late = work(&x.entered, &x.entered_first);
        let (most, all) = (x.entered.iter().map(|s| chunks(&[*s])).max().unwrap_or(0), chunks(&x.entered));
        assert!(late.len() as i64 <= loads.len() as i64);
        assert!(late.iter().all(|&load| load <= most + all / late.len() as i64), "{late:?} of {all}, at most {most}");
    }

    #[test]
    fn one_piece_is_cut_evenly() {
        for (sequences, t, heads, blocks) in
            [(1, 16384, 16, 132), (2, 1000, 3, 132), (1, 1, 1, 132), (3, 65, 50, 7), (1, 640, 200, 132)]
        {
            for ends in [false, true] {
                check(Cut { sequences, heads, chunk: CHUNK, blocks }, &[piece(t, ends, ends)]);
            }
        }
    }

    #[test]
    fn tokens_by_themselves_beside_a_long_document() {
        let cut = Cut { sequences: 1, heads: 16, chunk: CHUNK, blocks: 132 };
        let mut pieces = vec![piece(1, false, false); 500];
        pieces.push(piece(16384, false, true));
        pieces[0].enters = true;
        check(cut, &pieces);
        // 500 documents of 16 heads, and 16 chains in 112 segments; what enters and leaves is 16 each.
        let x = tables(cut, &pieces);
        assert!(x.slots < 200, "{}", x.slots);
        assert_eq!(x.chains.len(), 32);
        let short = tables(cut, &pieces[1..500]);
        assert_eq!((short.slots, short.chains.len(), short.entered.len()), (0, 0, 0));
    }

    proptest! {
        #[test]
        fn pieces_of_any_length(
            pieces in prop::collection::vec((1i64..300, any::<bool>(), any::<bool>()), 1..20),
            sequences in 1i64..3,
            heads in 1i64..6,
            blocks in 1i64..140,
        ) {
            let pieces: Vec<_> = pieces.into_iter().map(|(tokens, enters, leaves)| piece(tokens, enters, leaves)).collect();
            check(Cut { sequences, heads, chunk: CHUNK, blocks }, &pieces);
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

    /// The same tables for the same pieces, others for others; however many come, few are kept.
    #[test]
    fn plans_are_kept_for_a_while() {
        let cut = Cut { sequences: 1, heads: 2, chunk: CHUNK, blocks: 4 };
        let on = |stream, tokens| {
            let pieces = [piece(tokens, false, false), piece(tokens + 1, false, true)];
            Plan::of(Device::Cpu, stream, cut, &pieces).unwrap()
        };
        let of = |tokens| on(0, tokens);
        let plan = of(100);
        assert_eq!(of(100).chains.data_ptr(), plan.chains.data_ptr());
        assert_eq!(of(100).signals.data_ptr(), plan.signals.data_ptr());
        assert_ne!(on(1, 100).signals.data_ptr(), plan.signals.data_ptr());
        let tables = tables(cut, &[piece(100, false, false), piece(101, false, true)]);
        let numbers = |x: &Tensor| Vec::<i32>::try_from(x).unwrap();
        assert_eq!(numbers(&plan.all.segments), tables.segments.as_flattened());
        assert_eq!(numbers(&plan.all.first), tables.first);
        assert_eq!(numbers(&plan.chains), tables.chains.as_flattened());
        assert_eq!((plan.all.count, plan.slots), (tables.segments.len() as u32, i64::from(tables.slots)));
        for tokens in 200..200 + MOST as i64 {
            assert_ne!(of(tokens).chains.data_ptr(), plan.chains.data_ptr());
        }
        assert_ne!(of(100).chains.data_ptr(), plan.chains.data_ptr());
    }
}
