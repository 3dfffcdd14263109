//! What one rank has to do with one sequence: its pieces (runs of tokens of one document in one segment), and how state
//! flows between the segments of all ranks. Made once per sequence; every layer uses it.

use std::ops::Range;

use super::{Error, Layout, Result};

/// A run of tokens of one document inside one segment of this rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// In this rank's local tokens.
    pub local: Range<i64>,
    /// In the whole sequence.
    pub global: Range<i64>,
    pub document: usize,
    /// The segment's place on this rank, 0 or 1.
    pub slot: usize,
    /// The document began in an earlier segment: a state enters.
    pub enters: bool,
    /// The document goes on in a later segment: a state leaves.
    pub leaves: bool,
}

impl Piece {
    pub fn tokens(&self) -> i64 {
        self.local.end - self.local.start
    }
}

/// What happens to the state at one segment of the sequence. Every rank knows this of every segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its first document began before it.
    pub enters: bool,
    /// Its last document goes on after it.
    pub leaves: bool,
    /// It lies inside one document: what enters, leaves.
    pub through: bool,
    /// It has no tokens.
    pub empty: bool,
    /// Tokens of its last document, over which what leaves has decayed.
    pub tail: i64,
}

/// The segments of a sequence in order, with their owners.
#[derive(Clone, Debug)]
pub struct Chain {
    pub links: Vec<Link>,
    /// The rank and the place there of each segment.
    pub owners: Vec<(usize, usize)>,
    /// This rank's segments, by their place on it.
    pub held: Vec<usize>,
}

impl Chain {
    /// Whether any state crosses from one segment to another.
    pub fn flows(&self) -> bool {
        self.links.iter().any(|link| link.enters)
    }

    /// Segments of one rank: 1 or 2.
    pub fn slots(&self) -> usize {
        self.owners.len() / self.ranks().max(1)
    }

    /// W.
    pub fn ranks(&self) -> usize {
        self.owners.iter().map(|(rank, _)| rank + 1).max().unwrap_or(0)
    }

    /// The segment whose state enters `segment`: the last one before it that has tokens.
    pub fn before(&self, segment: usize) -> Option<usize> {
        (0..segment).rev().find(|&s| !self.links[s].empty).filter(|_| self.links[segment].enters)
    }

    /// The segment that the state of `segment` enters.
    pub fn after(&self, segment: usize) -> Option<usize> {
        (segment + 1..self.links.len()).find(|&s| !self.links[s].empty).filter(|_| self.links[segment].leaves)
    }

    /// The same segments as gradients meet them: the last one first, and what left now enters.
    pub fn reversed(&self) -> Self {
        let links = self.links.iter().rev();
        let last = self.links.len().saturating_sub(1);
        Self {
            links: links.map(|link| Link { enters: link.leaves, leaves: link.enters, ..*link }).collect(),
            owners: self.owners.iter().rev().copied().collect(),
            held: self.held.iter().map(|segment| last - segment).collect(),
        }
    }
}

/// One sequence as one rank sees it.
#[derive(Clone, Debug)]
pub struct Plan {
    pub layout: Layout,
    pub rank: usize,
    pub pieces: Vec<Piece>,
    pub chain: Chain,
    /// `[N + 1]`.
    pub cu_seqlens: Vec<i64>,
}

impl Plan {
    /// `cu_seqlens` `[N+1]`: document boundaries from 0 to L, ascending; empty documents are allowed. `None`: one document.
    pub fn new(layout: Layout, cu_seqlens: Option<&[i64]>, rank: usize) -> Result<Self> {
        let tokens = layout.tokens();
        let cu_seqlens = cu_seqlens.map_or_else(|| vec![0, tokens], <[i64]>::to_vec);
        let ascends = cu_seqlens.windows(2).position(|w| w[0] > w[1]);
        if cu_seqlens.len() < 2
            || cu_seqlens.first() != Some(&0)
            || cu_seqlens.last() != Some(&tokens)
            || ascends.is_some()
        {
            return Err(Error::CuSeqlens { found: cu_seqlens, tokens, descends_at: ascends });
        }
        let links = (0..layout.segments()).map(|s| link(&layout.segment(s), &cu_seqlens)).collect();
        let owners = (0..layout.segments()).map(|s| layout.owner(s)).collect();
        let held = layout.held(rank);
        let pieces = pieces(&layout, &cu_seqlens, rank);
        Ok(Self { layout, rank, pieces, chain: Chain { links, owners, held }, cu_seqlens })
    }

    /// The pieces of any rank, in its local order.
    pub fn pieces_of(&self, rank: usize) -> Vec<Piece> {
        if rank == self.rank { self.pieces.clone() } else { pieces(&self.layout, &self.cu_seqlens, rank) }
    }

    /// Tokens of this rank.
    pub fn tokens(&self) -> i64 {
        self.layout.tokens_per_rank().get(self.rank).copied().unwrap_or(0)
    }

    /// N.
    pub fn documents(&self) -> usize {
        self.cu_seqlens.len() - 1
    }

    pub fn document(&self, document: usize) -> Range<i64> {
        self.cu_seqlens[document]..self.cu_seqlens[document + 1]
    }

    /// The piece whose state leaves a slot, and the one that a state enters.
    pub fn leaving(&self, slot: usize) -> Option<usize> {
        self.pieces.iter().position(|piece| piece.slot == slot && piece.leaves)
    }

    pub fn entered(&self, slot: usize) -> Option<usize> {
        self.pieces.iter().position(|piece| piece.slot == slot && piece.enters)
    }

    /// For each local token, its position in its own document: what rotary embeddings count.
    pub fn positions(&self) -> Vec<i64> {
        let position = |piece: &Piece| {
            let start = self.cu_seqlens[piece.document];
            piece.global.start - start..piece.global.end - start
        };
        self.pieces.iter().flat_map(position).collect()
    }
}

fn pieces(layout: &Layout, cu_seqlens: &[i64], rank: usize) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut offset = 0;
    for (slot, segment) in layout.held(rank).into_iter().enumerate() {
        let range = layout.segment(segment);
        for (document, doc) in documents(&range, cu_seqlens) {
            let global = doc.start.max(range.start)..doc.end.min(range.end);
            let shift = offset - range.start;
            pieces.push(Piece {
                local: global.start + shift..global.end + shift,
                document,
                slot,
                enters: doc.start < global.start,
                leaves: doc.end > global.end,
                global,
            });
        }
        offset += range.end - range.start;
    }
    pieces
}

/// The non-empty documents that share tokens with `range`.
fn documents<'a>(range: &Range<i64>, cu_seqlens: &'a [i64]) -> impl Iterator<Item = (usize, Range<i64>)> + use<'a> {
    let range = range.clone();
    let first = cu_seqlens.partition_point(|&c| c <= range.start).saturating_sub(1);
    let of = move |n: usize| (n, cu_seqlens[n]..cu_seqlens[n + 1]);
    (first..cu_seqlens.len() - 1)
        .map(of)
        .take_while(move |(_, doc)| doc.start < range.end)
        .filter(move |(_, doc)| doc.start < doc.end && doc.end > range.start)
}

fn link(range: &Range<i64>, cu_seqlens: &[i64]) -> Link {
    let mut docs = documents(range, cu_seqlens);
    let Some((_, first)) = docs.next() else {
        return Link { enters: false, leaves: false, through: false, empty: true, tail: 0 };
    };
    let last = docs.last().map_or_else(|| first.clone(), |(_, doc)| doc);
    let (enters, leaves) = (first.start < range.start, last.end > range.end);
    Link {
        enters,
        leaves,
        through: enters && leaves && first == last,
        empty: false,
        tail: range.end - last.start.max(range.start),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LayoutKind;
    use proptest::prelude::*;

    proptest! {
        /// The pieces of all ranks tile the sequence, none crosses a document, and a state leaves exactly where one enters;
        /// seen from either end.
        #[test]
        fn pieces_tile_the_sequence(
            zigzag: bool,
            lengths in prop::collection::vec(0i64..20, 1..8),
            ranks in 1usize..6,
        ) {
            let mut cu = vec![0];
            for length in &lengths {
                cu.push(cu[cu.len() - 1] + length);
            }
            let tokens = cu[cu.len() - 1];
            let kind = if zigzag { LayoutKind::Zigzag } else { LayoutKind::Contiguous };
            let layout = Layout::new(kind, tokens, ranks).unwrap();
            let mut all = Vec::new();
            for rank in 0..ranks {
                let plan = Plan::new(layout.clone(), Some(&cu), rank).unwrap();
                prop_assert_eq!(plan.tokens(), plan.pieces.iter().map(Piece::tokens).sum::<i64>());
                prop_assert_eq!(plan.positions().len() as i64, plan.tokens());
                all.extend(plan.pieces);
            }
            all.sort_by_key(|piece| piece.global.start);
            let mut end = 0;
            for piece in &all {
                prop_assert_eq!(piece.global.start, end);
                end = piece.global.end;
                prop_assert!(cu[piece.document] <= piece.global.start && end <= cu[piece.document + 1]);
            }
            prop_assert_eq!(end, tokens);
            for pair in all.windows(2) {
                prop_assert_eq!(pair[0].leaves, pair[1].enters);
                prop_assert_eq!(pair[0].leaves, pair[0].document == pair[1].document);
            }
            let chain = Plan::new(layout, Some(&cu), 0).unwrap().chain;
            let (back, last) = (chain.reversed(), chain.links.len() - 1);
            prop_assert_eq!(chain.ranks(), ranks);
            for segment in 0..=last {
                let next = chain.after(segment);
                prop_assert_eq!(next.and_then(|next| chain.before(next)), next.map(|_| segment));
                prop_assert_eq!(next, back.before(last - segment).map(|before| last - before));
                prop_assert_eq!(next.is_some(), chain.links[segment].leaves);
            }
        }
    }

    #[test]
    fn boundaries_must_ascend_and_span_the_sequence() {
        let layout = Layout::new(LayoutKind::Contiguous, 10, 2).unwrap();
        for wrong in [&[0, 6, 4, 10][..], &[1, 10], &[0, 9], &[0], &[]] {
            assert!(Plan::new(layout.clone(), Some(wrong), 0).is_err(), "{wrong:?}");
        }
    }
}
