//! Where the tokens of packed documents lie, as numbers: `runtime::sequence`'s plan, from which follow what each rank attends to and
//! between which segments states travel. A sequence that is not packed is one document.

use std::cmp::Ordering;

use runtime::config::LayoutKind;
use runtime::sequence::scan::Reach;
use runtime::sequence::{Chain, Layout, Piece, Plan};

use super::costs::Pass;
use super::{Result, Workload};

#[derive(Clone, Debug)]
pub struct Packing {
    /// Of rank 0.
    plan: Plan,
    /// As forward meets it, and backward.
    chains: [Chain; 2],
    segments: Vec<Segment>,
    /// Of each rank.
    held: Vec<Vec<usize>>,
    pieces: Vec<Vec<Piece>>,
}

/// The pieces of one segment; pairs are of a query and a key that it sees.
#[derive(Clone, Copy, Debug, Default)]
struct Segment {
    /// The first and the last document, with their tokens here.
    ends: Option<[(usize, f64); 2]>,
    /// Pairs inside the segment.
    own: f64,
}

impl Packing {
    pub fn new(work: &Workload, layout: LayoutKind) -> Result<Packing> {
        let layout = Layout::new(layout, work.seq_len as i64, work.gpus)?;
        let plan = Plan::new(layout, work.cu_seqlens, 0)?;
        let pieces: Vec<Vec<Piece>> = (0..work.gpus).map(|rank| plan.pieces_of(rank)).collect();
        let segment = |&(rank, slot): &(usize, usize)| {
            let of: Vec<&Piece> = pieces[rank].iter().filter(|piece| piece.slot == slot).collect();
            let end = |piece: &&Piece| (piece.document, piece.tokens() as f64);
            Segment {
                ends: of.first().zip(of.last()).map(|(first, last)| [end(first), end(last)]),
                own: of.iter().map(|piece| triangle(piece.tokens())).sum(),
            }
        };
        let segments = plan.chain.owners.iter().map(segment).collect();
        let chains = [plan.chain.clone(), plan.chain.reversed()];
        let held = (0..work.gpus).map(|rank| plan.layout.held(rank)).collect();
        Ok(Packing { plan, chains, segments, held, pieces })
    }

    /// Documents with tokens.
    pub fn documents(&self) -> usize {
        self.plan.cu_seqlens.windows(2).filter(|ends| ends[0] < ends[1]).count()
    }

    /// The segments as states, or in backward their gradients, meet them.
    pub fn chain(&self, pass: Pass) -> &Chain {
        &self.chains[usize::from(pass == Pass::Backward)]
    }

    pub fn plan(&self, rank: usize) -> Plan {
        let mut plan = self.plan.clone();
        self.turn(&mut plan, rank);
        plan
    }

    /// Makes the plan of one rank that of another.
    pub fn turn(&self, plan: &mut Plan, rank: usize) {
        (plan.rank, plan.pieces) = (rank, self.pieces[rank].clone());
        plan.chain.held.clone_from(&self.held[rank]);
    }

    pub fn pieces(&self, rank: usize) -> &[Piece] {
        &self.pieces[rank]
    }

    /// Pairs of `rank`'s queries and `owner`'s keys.
    pub fn pairs(&self, rank: usize, owner: usize) -> f64 {
        let (queries, keys) = (&self.held[rank], &self.held[owner]);
        let seen = |(&q, &k): (&usize, &usize)| match (k.cmp(&q), self.segments[q].ends, self.segments[k].ends) {
            (Ordering::Equal, ..) => self.segments[q].own,
            // Of two segments only the document can see itself that ends the one and begins the other.
            (Ordering::Less, Some([first, _]), Some([_, last])) if first.0 == last.0 => first.1 * last.1,
            _ => 0.0,
        };
        queries.iter().flat_map(|q| keys.iter().map(move |k| (q, k))).map(seen).sum()
    }

    /// Pairs of `rank`'s queries and all keys.
    pub fn all_pairs(&self, rank: usize) -> f64 {
        let seen = |piece: &Piece| {
            let before = piece.global.start - self.plan.cu_seqlens[piece.document];
            piece.tokens() as f64 * before as f64 + triangle(piece.tokens())
        };
        self.pieces[rank].iter().map(seen).sum()
    }

    /// Pairs of the whole sequence.
    pub fn whole_pairs(&self) -> f64 {
        self.plan.cu_seqlens.windows(2).map(|ends| triangle(ends[1] - ends[0])).sum()
    }

    /// Tokens of `rank` to which what comes from other segments is added.
    pub fn entered(&self, rank: usize, pass: Pass) -> f64 {
        self.pieces[rank].iter().filter(|piece| enters(piece, pass)).map(|piece| piece.tokens() as f64).sum()
    }

    /// Segments from whose states `rank` folds those that enter its own.
    pub fn folded(&self, rank: usize, pass: Pass, reach: &Reach) -> usize {
        let chain = self.chain(pass);
        let last = chain.owners.len().saturating_sub(1);
        let mut held = self.held[rank].clone();
        if pass == Pass::Backward {
            held.iter_mut().for_each(|segment| *segment = last - *segment);
            held.reverse();
        }
        let (mut count, mut at) = (0, 0);
        for segment in held {
            if let Some(first) = reach.back(chain, segment) {
                count += segment - first.max(at);
            }
            at = segment;
        }
        count
    }
}

/// Whether what comes from other segments is added to a piece.
pub fn enters(piece: &Piece, pass: Pass) -> bool {
    if pass == Pass::Forward { piece.enters } else { piece.leaves }
}

/// Whether other segments need what a piece sums up to.
pub fn leaves(piece: &Piece, pass: Pass) -> bool {
    if pass == Pass::Forward { piece.leaves } else { piece.enters }
}

/// Pairs of so many queries and their own keys, half of them visible.
fn triangle(tokens: i64) -> f64 {
    (tokens * tokens) as f64 / 2.0
}

/// Boundaries of documents of these lengths, one after the other and again, in a sequence of `seq_len` tokens; the last may be
/// cut short. `[N + 1]`.
pub fn repeated(lengths: &[usize], seq_len: usize) -> Vec<i64> {
    let mut boundaries = vec![0];
    let mut end = 0;
    for length in lengths.iter().cycle().filter(|length| **length > 0) {
        if end >= seq_len {
            break;
        }
        end = end.saturating_add(*length).min(seq_len);
        boundaries.push(end as i64);
    }
    boundaries
}

#[cfg(test)]
mod tests {
    use super::*;
    use runtime::config::Config;

    fn packing(layout: LayoutKind, tokens: usize, gpus: usize, cu_seqlens: Option<&[i64]>) -> Packing {
        let config = Config::from_toml_str("", "test", &[]).unwrap();
        Packing::new(&Workload { cu_seqlens, ..Workload::one(&config, gpus, tokens) }, layout).unwrap()
    }

    const BOTH: [LayoutKind; 2] = [LayoutKind::Contiguous, LayoutKind::Zigzag];

    #[test]
    fn lengths_repeat_until_the_sequence_ends() {
        assert_eq!(repeated(&[4], 10), [0, 4, 8, 10]);
        assert_eq!(repeated(&[5, 1], 12), [0, 5, 6, 11, 12]);
        assert_eq!(repeated(&[64], 10), [0, 10]);
    }

    /// Counted pair by pair, but for the half of a token that sees itself.
    #[test]
    fn pairs_are_those_that_see_each_other() {
        for layout in BOTH {
            for cu_seqlens in [None, Some(&[0, 7, 7, 8, 30, 64][..]), Some(&[0, 3, 5, 64]), Some(&[0, 16, 32, 48, 64])]
            {
                let packing = packing(layout, 64, 4, cu_seqlens);
                let whole = [0, 64];
                let boundaries = cu_seqlens.unwrap_or(&whole);
                let document = |token: i64| boundaries.iter().filter(|start| **start <= token).count();
                let tokens =
                    |rank| packing.pieces(rank).iter().flat_map(|piece| piece.global.clone()).collect::<Vec<_>>();
                for rank in 0..4 {
                    let mut sum = 0.0;
                    for owner in 0..4 {
                        let mut expected = 0.0;
                        for q in tokens(rank) {
                            for k in tokens(owner).into_iter().filter(|&k| k <= q && document(k) == document(q)) {
                                expected += if k == q { 0.5 } else { 1.0 };
                            }
                        }
                        assert_eq!(packing.pairs(rank, owner), expected, "{layout:?} {rank} {owner}");
                        sum += expected;
                    }
                    assert_eq!(packing.all_pairs(rank), sum);
                }
                let all: f64 = (0..4).map(|rank| packing.all_pairs(rank)).sum();
                assert_eq!(packing.whole_pairs(), all);
            }
        }
    }

    #[test]
    fn zigzag_balances_one_document_and_not_short_ones() {
        let most = |layout, cu_seqlens| {
            let packing = packing(layout, 4096, 4, cu_seqlens);
            let of: Vec<f64> = (0..4).map(|rank| packing.all_pairs(rank)).collect();
            4.0 * of.iter().copied().fold(0.0, f64::max) / of.iter().sum::<f64>()
        };
        let [contiguous, zigzag] = BOTH;
        assert_eq!((most(contiguous, None), most(zigzag, None)), (1.75, 1.0));
        // As long as a rank's share: equal work wherever they lie whole; cut in two, the half that comes later has three quarters.
        let shares = repeated(&[1024], 4096);
        assert_eq!(most(contiguous, Some(&shares)), 1.0);
        let halves = repeated(&[512], 4096);
        assert_eq!((most(contiguous, Some(&halves)), most(zigzag, Some(&halves))), (1.0, 1.0));
        // One long one and many short ones: the rank with the end of the long one is the busiest, by either layout.
        let mixed: Vec<i64> = [0, 2048].into_iter().chain((2048..4096).step_by(64).skip(1)).chain([4096]).collect();
        assert!(most(contiguous, Some(&mixed)) > 2.5 && most(zigzag, Some(&mixed)) < 2.0);
    }

    #[test]
    fn states_enter_where_documents_go_on() {
        let packing = packing(LayoutKind::Contiguous, 40, 4, Some(&[0, 15, 20, 40]));
        let entered = |pass| (0..4).map(|rank| packing.entered(rank, pass)).collect::<Vec<_>>();
        assert_eq!(entered(Pass::Forward), [0.0, 5.0, 0.0, 10.0]);
        assert_eq!(entered(Pass::Backward), [10.0, 0.0, 10.0, 0.0]);
        let folded = |pass| (0..4).map(|rank| packing.folded(rank, pass, &Reach::full())).collect::<Vec<_>>();
        assert_eq!(folded(Pass::Forward), [0, 1, 0, 1]);
        assert_eq!(folded(Pass::Backward), [1, 0, 1, 0]);
        assert_eq!(packing.documents(), 3);
    }
}
