//! Which rank of the sp axis holds which tokens. Nothing has to divide anything: segments differ by at most one token,
//! and with fewer tokens than segments some are empty.

use std::ops::Range;

use tch::Tensor;

use super::{Error, Result};
use crate::config::LayoutKind;

/// A sequence of L tokens cut into segments, each owned by one rank.
///
/// Contiguous: W segments, segment r on rank r. Zigzag: 2W segments, r and 2W-1-r on rank r, so that under a causal mask
/// every rank has the same work. A rank holds its segments in sequence order: that order is called local.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    kind: LayoutKind,
    tokens: i64,
    ranks: usize,
}

impl Layout {
    pub fn new(kind: LayoutKind, tokens: i64, ranks: usize) -> Result<Self> {
        if ranks == 0 || tokens < 0 {
            return Err(Error::Layout { tokens, ranks });
        }
        Ok(Self { kind, tokens, ranks })
    }

    /// L.
    pub fn tokens(&self) -> i64 {
        self.tokens
    }

    /// W.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    pub fn segments(&self) -> usize {
        self.ranks * self.slots()
    }

    /// Segments of one rank: 1 or 2.
    pub fn slots(&self) -> usize {
        match self.kind {
            LayoutKind::Contiguous => 1,
            LayoutKind::Zigzag => 2,
        }
    }

    /// The tokens of a segment, in positions of the whole sequence. The first L mod S segments have one token more.
    pub fn segment(&self, index: usize) -> Range<i64> {
        let (count, index) = (self.segments() as i64, index as i64);
        let (base, longer) = (self.tokens / count, self.tokens % count);
        let start = index * base + index.min(longer);
        start..start + base + i64::from(index < longer)
    }

    /// The rank that holds a segment, and its place there.
    pub fn owner(&self, segment: usize) -> (usize, usize) {
        match self.kind {
            LayoutKind::Contiguous => (segment, 0),
            LayoutKind::Zigzag if segment < self.ranks => (segment, 0),
            LayoutKind::Zigzag => (2 * self.ranks - 1 - segment, 1),
        }
    }

    /// The segments of a rank, in sequence order.
    pub fn held(&self, rank: usize) -> Vec<usize> {
        match self.kind {
            LayoutKind::Contiguous => vec![rank],
            LayoutKind::Zigzag => vec![rank, 2 * self.ranks - 1 - rank],
        }
    }

    /// Tokens of every rank, in rank order: `[W]`.
    pub fn tokens_per_rank(&self) -> Vec<i64> {
        let length = |range: Range<i64>| range.end - range.start;
        (0..self.ranks).map(|rank| self.held(rank).into_iter().map(|s| length(self.segment(s))).sum()).collect()
    }

    /// A rank's tokens of `x`, whose dimension `dim` is the whole sequence, in local order.
    pub fn shard(&self, x: &Tensor, dim: i64, rank: usize) -> Result<Tensor> {
        let parts = self.held(rank).into_iter().map(|segment| {
            let range = self.segment(segment);
            x.f_narrow(dim, range.start, range.end - range.start)
        });
        Ok(Tensor::f_cat(&parts.collect::<std::result::Result<Vec<_>, _>>()?, dim)?)
    }

    /// The whole sequence from the ranks' tokens laid one after the other along `dim`: undoes the zigzag.
    pub fn in_sequence_order(&self, gathered: &Tensor, dim: i64) -> Result<Tensor> {
        self.reorder(gathered, dim, self.rank_order_offsets())
    }

    /// The inverse of [`Layout::in_sequence_order`].
    pub fn in_rank_order(&self, whole: &Tensor, dim: i64) -> Result<Tensor> {
        let order = (0..self.ranks).flat_map(|rank| self.held(rank)).map(|segment| self.segment(segment)).collect();
        self.reorder(whole, dim, order)
    }

    fn reorder(&self, x: &Tensor, dim: i64, order: Vec<Range<i64>>) -> Result<Tensor> {
        if self.kind == LayoutKind::Contiguous {
            return Ok(x.shallow_clone());
        }
        let parts = order.into_iter().map(|range| x.f_narrow(dim, range.start, range.end - range.start));
        Ok(Tensor::f_cat(&parts.collect::<std::result::Result<Vec<_>, _>>()?, dim)?)
    }

    /// For each segment in sequence order, where it lies in the ranks' tokens laid one after the other.
    fn rank_order_offsets(&self) -> Vec<Range<i64>> {
        let mut places = vec![0..0; self.segments()];
        let mut offset = 0;
        for segment in (0..self.ranks).flat_map(|rank| self.held(rank)) {
            let range = self.segment(segment);
            places[segment] = offset..offset + range.end - range.start;
            offset = places[segment].end;
        }
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tch::{Device, Kind};

    fn kinds() -> impl Strategy<Value = LayoutKind> {
        prop_oneof![Just(LayoutKind::Contiguous), Just(LayoutKind::Zigzag)]
    }

    proptest! {
        #[test]
        fn every_token_has_one_place(kind in kinds(), tokens in 0i64..200, ranks in 1usize..9) {
            let layout = Layout::new(kind, tokens, ranks).unwrap();
            let mut end = 0;
            for segment in 0..layout.segments() {
                let range = layout.segment(segment);
                prop_assert_eq!(range.start, end);
                end = range.end;
                let (rank, slot) = layout.owner(segment);
                prop_assert_eq!(layout.held(rank)[slot], segment);
            }
            prop_assert_eq!(end, tokens);
        }

        #[test]
        fn gathering_the_shards_gives_the_sequence(kind in kinds(), tokens in 1i64..100, ranks in 1usize..9) {
            let layout = Layout::new(kind, tokens, ranks).unwrap();
            let whole = Tensor::arange(tokens, (Kind::Int64, Device::Cpu));
            let shards: Vec<_> = (0..ranks).map(|r| layout.shard(&whole, 0, r).unwrap()).collect();
            let lengths: Vec<_> = shards.iter().map(|s| s.size()[0]).collect();
            prop_assert_eq!(lengths, layout.tokens_per_rank());
            let gathered = Tensor::cat(&shards, 0);
            prop_assert!(layout.in_sequence_order(&gathered, 0).unwrap().equal(&whole));
            prop_assert!(layout.in_rank_order(&whole, 0).unwrap().equal(&gathered));
        }
    }
}
