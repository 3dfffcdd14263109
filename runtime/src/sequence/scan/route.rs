//! Who sends what to whom in the hierarchical scan: arithmetic on the chain alone, which every rank does alike.
//!
//! The segments in sequence order fall into runs, each on one node. A state is cut along its key dimension into slices;
//! inside a node each slice has one rank that scans it across nodes. The scan is that of Hillis and Steele (1986): before
//! step d a rank knows the sum of the last d runs up to its own, and takes that of run i - d.

use std::collections::BTreeSet;
use std::ops::Range;

use super::message::{cut, gather_messages};
use super::{Chain, Messages, StateSize};

/// The hierarchical scan over one chain, of states with so many rows, on nodes of so many ranks.
pub struct Route {
    pub chain: Chain,
    pub runs: Vec<Run>,
    /// Rows of the key dimension.
    pub slices: Vec<Range<i64>>,
    ranks: usize,
    node_size: usize,
}

/// Consecutive segments that lie on one node.
pub struct Run {
    pub node: usize,
    pub segments: Range<usize>,
}

fn members(node: usize, node_size: usize, ranks: usize) -> Range<usize> {
    node * node_size..ranks.min((node + 1) * node_size)
}

/// A later slice never has an earlier rank.
fn scans(members: Range<usize>, slice: usize, slices: usize) -> usize {
    members.start + slice * members.len() / slices
}

fn steps(runs: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(1), |d| Some(2 * d)).take_while(move |&d| d < runs)
}

/// The ranks on other nodes that a rank sends to or hears from, forward and backward, on either layout of segments none of which is
/// empty; for states with no fewer rows than a node has ranks.
pub fn partners(rank: usize, node_size: usize, ranks: usize) -> BTreeSet<usize> {
    let (node, nodes) = (rank / node_size, ranks.div_ceil(node_size));
    // The nodes of the runs on the zigzag layout; the contiguous one has the first half of them.
    let runs: Vec<usize> = (0..nodes).chain((0..nodes - 1).rev()).collect();
    let pairs = steps(runs.len()).flat_map(|d| runs.iter().zip(&runs[d..]));
    let others = pairs.filter_map(|(&a, &b)| if a == node { Some(b) } else { (b == node).then_some(a) });
    let mine = || (0..node_size).filter(|&slice| scans(members(node, node_size, ranks), slice, node_size) == rank);
    let on = |other: usize| mine().map(move |slice| scans(members(other, node_size, ranks), slice, node_size));
    others.filter(|&other| other != node).collect::<BTreeSet<_>>().into_iter().flat_map(on).collect()
}

impl Route {
    /// `node_size`: ranks on a node; `key`: rows of a state, which the ranks of a node share out among them.
    pub fn new(chain: &Chain, node_size: usize, key: i64) -> Self {
        let mut runs: Vec<Run> = Vec::new();
        for (segment, &(rank, _)) in chain.owners.iter().enumerate() {
            let node = rank / node_size;
            match runs.last_mut() {
                Some(run) if run.node == node => run.segments.end = segment + 1,
                _ => runs.push(Run { node, segments: segment..segment + 1 }),
            }
        }
        Self { chain: chain.clone(), runs, slices: cut(key, node_size as i64), ranks: chain.ranks(), node_size }
    }

    /// The node on which a rank is.
    pub fn node_of(&self, rank: usize) -> usize {
        rank / self.node_size
    }

    /// The ranks of a node: the last node may have fewer than the others.
    pub fn members(&self, node: usize) -> Range<usize> {
        members(node, self.node_size, self.ranks)
    }

    /// The rank of a node that scans a slice.
    pub fn scans(&self, node: usize, slice: usize) -> usize {
        scans(self.members(node), slice, self.slices.len())
    }

    /// The slices that a rank scans.
    pub fn slices_of(&self, rank: usize) -> Vec<usize> {
        (0..self.slices.len()).filter(|&slice| self.scans(self.node_of(rank), slice) == rank).collect()
    }

    /// The runs that lie on a node, in order.
    pub fn runs_of(&self, node: usize) -> Vec<usize> {
        (0..self.runs.len()).filter(|&run| self.runs[run].node == node).collect()
    }

    /// The distances of the scan's steps.
    pub fn steps(&self) -> impl Iterator<Item = usize> + use<> {
        steps(self.runs.len())
    }

    /// The runs whose sum run `i` has before the step of distance `d`.
    pub fn summed(&self, i: usize, d: usize) -> Range<usize> {
        (i + 1).saturating_sub(d)..i + 1
    }

    /// The segments of consecutive runs.
    pub fn segments(&self, runs: Range<usize>) -> Range<usize> {
        if runs.is_empty() { 0..0 } else { self.runs[runs.start].segments.start..self.runs[runs.end - 1].segments.end }
    }

    /// Whether what enters some runs leaves them.
    pub fn passes(&self, runs: Range<usize>) -> bool {
        self.chain.links[self.segments(runs)].iter().all(|link| link.empty || link.through)
    }

    /// Whether run `i` takes the sum of run `i - d` in the step of distance `d`.
    pub fn takes(&self, i: usize, d: usize) -> bool {
        let leaves = |runs: Range<usize>| {
            let last = self.chain.links[self.segments(runs)].iter().rfind(|link| !link.empty);
            last.is_some_and(|link| link.leaves)
        };
        i >= d && self.passes(i + 1 - d..i) && leaves(self.summed(i - d, d))
    }

    /// Whether a state from another run enters run `i`.
    pub fn enters(&self, i: usize) -> bool {
        self.steps().any(|d| self.takes(i, d))
    }

    /// Bytes of a slice of what run `from` sums up to before the step of distance `d`: with its log-decays where they travel.
    pub fn bytes(&self, from: usize, d: usize, slice: usize, size: &StateSize) -> u64 {
        let rows = self.rows(slice);
        size.rows(rows) + if self.passes(self.summed(from, d)) { size.decays_of(rows) } else { 0 }
    }

    fn rows(&self, slice: usize) -> u64 {
        (self.slices[slice].end - self.slices[slice].start) as u64
    }

    /// What a rank sends and receives in one scan: both gathers inside the node, and between them the slices, with their
    /// log-decays where they depend on the data. `again`: the node's are known.
    pub fn messages(&self, rank: usize, size: &StateSize, again: bool) -> Messages {
        let node = self.node_of(rank);
        let members = self.members(node).len();
        let row = size.state() + if again { 0 } else { size.decays() };
        let mut messages = gather_messages("node", members, self.chain.slots(), row, size, 1);

        let mine = self.slices_of(rank);
        let runs = self.runs_of(node);
        for d in self.steps() {
            for (&run, &slice) in runs.iter().flat_map(|run| mine.iter().map(move |slice| (run, slice))) {
                let elsewhere = |other: usize| self.scans(self.runs[other].node, slice) != rank;
                if run + d < self.runs.len() && self.takes(run + d, d) && elsewhere(run + d) {
                    messages.count("send", 1, self.bytes(run, d, slice, size), 0);
                }
                if self.takes(run, d) && elsewhere(run - d) {
                    messages.count("recv", 1, 0, self.bytes(run - d, d, slice, size));
                }
            }
        }

        let entered = runs.iter().filter(|&&run| self.enters(run)).count() as u64;
        if members > 1 && entered > 0 {
            let sent = mine.iter().map(|&slice| size.rows(self.rows(slice))).sum::<u64>();
            messages.count_on("node", "all_gather_v", 1, entered * sent, entered * (size.state() - sent));
        }
        messages
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LayoutKind;
    use crate::sequence::{Layout, Plan};

    /// Whoever exchanges a slice with whom, on either layout, in either direction.
    #[test]
    fn partners_are_all_that_exchange_slices() {
        for (ranks, node_size) in (1..20).flat_map(|ranks| (1..=ranks).map(move |size| (ranks, size))) {
            let partners: Vec<_> = (0..ranks).map(|rank| partners(rank, node_size, ranks)).collect();
            let mut exchanging = vec![BTreeSet::new(); ranks];
            for kind in [LayoutKind::Contiguous, LayoutKind::Zigzag] {
                let chain = Plan::new(Layout::new(kind, 64 * ranks as i64, ranks).unwrap(), None, 0).unwrap().chain;
                let route = Route::new(&chain, node_size, 64);
                for (d, i) in route.steps().flat_map(|d| (d..route.runs.len()).map(move |i| (d, i))) {
                    for slice in 0..route.slices.len() {
                        let [a, b] = [i - d, i].map(|run| route.scans(route.runs[run].node, slice));
                        if a != b {
                            exchanging[a].insert(b);
                            exchanging[b].insert(a);
                        }
                    }
                }
            }
            assert_eq!(partners, exchanging, "{ranks} ranks, {node_size} on a node");
        }
    }
}
