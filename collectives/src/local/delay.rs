//! When a step's data arrives in an emulated network.
//!
//! `n` is bytes, L and B a link's latency and bandwidth, W the size of the group; "longest": of the links in a round.
//!
//! | operation | algorithm | takes |
//! |---|---|---|
//! | all_gather | Bruck's: in round i rank r passes on the m = min(2^i, W - 2^i) inputs that r + 2^i lacks | sum of the longest L + m n/B of ceil(log2 W) rounds, n of one input; `_v`: of the longest |
//! | reduce_scatter | its mirror | the same, n of one rank's result; `_v`: of the longest |
//! | all_reduce | reduce_scatter, then all_gather | twice the same, n a W-th of the input |
//! | all_to_all | W-1 rounds, in round i rank r sends to r+i | sum over rounds of the longest L + n/B, n of one slice |
//! | broadcast | chain from the root in ring order, finely pipelined | sum of the chain's L, + n over its smallest B |
//! | barrier, split | dissemination: in round i rank r tells r + 2^i | sum of the longest L of ceil(log2 W) rounds |
//! | send to recv | cut-through | L + n/B once both ends are free; see [`Delays::message`] |
//!
//! Bruck's algorithm (Bruck et al., 1997) has a ring's bytes in fewer rounds; libraries take it, or one like it, for messages
//! as short as states. Where every rank has a link of its own, as here, long ones lose nothing by it.
//!
//! A collective starts when the last rank has issued it and is through with the one before. Collectives and messages do
//! not slow each other. What this machine does itself, copies above all, happens meanwhile: it shows only where it takes
//! longer than the network, and where it follows the arrival, as the sums of reductions do.

use super::{board::Post, network::Network};
use crate::{op::Op, pending::lock};
use std::{
    sync::Mutex,
    time::{Duration, Instant},
};
use tch::Tensor;

/// The longest that anything takes, so that times can be added: about 30 years.
const FOREVER: f64 = 1e9;

fn seconds(time: f64) -> Duration {
    // A NaN, from a bandwidth that no text gives, takes no time.
    if time > 0.0 { Duration::from_secs_f64(time.min(FOREVER)) } else { Duration::ZERO }
}

fn bytes(x: &Tensor) -> f64 {
    (x.numel() * width(x)) as f64
}

fn width(x: &Tensor) -> usize {
    x.kind().elt_size_in_bytes()
}

/// The network of a run, and until when its links are taken.
pub(super) struct Delays {
    network: Network,
    /// By rank in the world.
    ends: Mutex<Vec<Ends>>,
}

/// A rank's link, each way: since when it is free, if it was ever used.
#[derive(Clone, Copy, Default)]
struct Ends {
    outgoing: Option<Instant>,
    incoming: Option<Instant>,
}

impl Delays {
    pub(super) fn new(network: Network, ranks: usize) -> Delays {
        Delays { network, ends: Mutex::new(vec![Ends::default(); ranks]) }
    }

    /// When a message arrives whole. It leaves when those that its sender sent before have left, and comes in when those
    /// to its receiver that left before have come in. What a rank sends to itself is there at once.
    pub(super) fn message(&self, from: usize, to: usize, x: &Tensor, since: Instant) -> Instant {
        if from == to {
            return since;
        }
        let link = self.network.link(from, to);
        let passing = seconds(bytes(x) / link.bytes_per_s);
        let mut ends = lock(&self.ends);
        let leaves = ends[from].outgoing.map_or(since, |free| free.max(since));
        ends[from].outgoing = Some(leaves + passing);
        let reaches = leaves + link.latency;
        let arrives = ends[to].incoming.map_or(reaches, |free| free.max(reaches)) + passing;
        ends[to].incoming = Some(arrives);
        arrives
    }

    /// When a step ends whose posts, those of `members` in group order, have all been made.
    pub(super) fn collective(&self, members: &[usize], posts: &[&Post]) -> Option<Instant> {
        let start = posts.iter().map(|post| post.since).max()?;
        Some(start + seconds(Ranks { network: &self.network, members }.takes(posts)))
    }
}

/// The ranks of a group, in its order. Times are seconds.
struct Ranks<'a> {
    network: &'a Network,
    members: &'a [usize],
}

impl Ranks<'_> {
    fn takes(&self, posts: &[&Post]) -> f64 {
        let w = posts.len();
        // Bytes, of one post's run for a rank or of the longest post or run.
        let run = |post: &Post, to: usize| post.runs.get(to).map_or(0.0, |&n| n as f64 * width(&post.x) as f64);
        let longest = || posts.iter().map(|post| bytes(&post.x)).fold(0.0, f64::max);
        let longest_run = || posts.iter().flat_map(|post| (0..w).map(|to| run(post, to))).fold(0.0, f64::max);
        // If ranks disagree on the operation, nobody waits for this time.
        match posts[0].call.as_ref().map(|call| call.op) {
            Some(Op::AllToAll | Op::AllToAllV) => self.rounds(|from, to| run(posts[from], to)),
            // A short one, in one step.
            Some(Op::AllReduce(_)) if posts[0].runs.is_empty() => 2.0 * self.doubling(longest() / w as f64),
            Some(Op::ReduceScatter | Op::ReduceScatterV | Op::AllReduce(_)) => self.doubling(longest_run()),
            Some(Op::Broadcast { root }) => self.chain(root, longest()),
            Some(Op::Barrier | Op::Split) => self.meeting(),
            // No call: the second half of an all_reduce.
            Some(Op::AllGather | Op::AllGatherV | Op::Send { .. } | Op::Recv { .. }) | None => self.doubling(longest()),
        }
    }

    fn latency(&self, from: usize, to: usize) -> f64 {
        self.network.link(self.members[from], self.members[to]).latency.as_secs_f64()
    }

    /// To pass `n` bytes once.
    fn passing(&self, from: usize, to: usize, n: f64) -> f64 {
        n / self.network.link(self.members[from], self.members[to]).bytes_per_s
    }

    /// The longest of what each rank needs towards the one `distance` places on.
    fn slowest(&self, distance: usize, needs: impl Fn(usize, usize) -> f64) -> f64 {
        let w = self.members.len();
        (0..w).map(|from| needs(from, (from + distance) % w)).fold(0.0, f64::max)
    }

    /// Every rank has `n` bytes that all others need.
    fn doubling(&self, n: f64) -> f64 {
        let w = self.members.len();
        let round = |i: usize| {
            let passed_on = i.min(w - i) as f64 * n;
            self.slowest(i, |from, to| self.latency(from, to) + self.passing(from, to, passed_on))
        };
        self.powers().map(round).sum()
    }

    /// 1, 2, 4, ... below W.
    fn powers(&self) -> impl Iterator<Item = usize> {
        let w = self.members.len();
        (0..usize::BITS).map(|i| 1usize << i).take_while(move |&distance| distance < w)
    }

    fn rounds(&self, n: impl Fn(usize, usize) -> f64) -> f64 {
        let round = |i| self.slowest(i, |from, to| self.latency(from, to) + self.passing(from, to, n(from, to)));
        (1..self.members.len()).map(round).sum()
    }

    fn chain(&self, root: usize, n: f64) -> f64 {
        let w = self.members.len();
        let hops = || (1..w).map(|i| ((root + i - 1) % w, (root + i) % w));
        let latencies: f64 = hops().map(|(from, to)| self.latency(from, to)).sum();
        latencies + hops().map(|(from, to)| self.passing(from, to, n)).fold(0.0, f64::max)
    }

    fn meeting(&self) -> f64 {
        self.powers().map(|distance| self.slowest(distance, |from, to| self.latency(from, to))).sum()
    }
}

/// A moment before which what has been read is not there yet.
pub(super) struct Due(Option<Instant>);

impl Due {
    pub(super) const NOW: Due = Due(None);

    pub(super) fn at(moment: Option<Instant>) -> Due {
        Due(moment)
    }

    /// Once it has passed it is forgotten, so that [`Due::awaited`] answers for the last poll and not for the present.
    pub(super) fn has_passed(&mut self) -> bool {
        if self.0.is_some_and(|due| Instant::now() < due) {
            return false;
        }
        self.0 = None;
        true
    }

    pub(super) fn awaited(&self) -> Option<Instant> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reduce;
    use crate::op::Call;
    use tch::{Device, Kind};

    const NETWORK: &str = "node=2,intra=1ms/100B/s,inter=10ms/10B/s";

    fn posts(w: usize, op: Option<Op>, elements: i64, runs: &[i64]) -> Vec<Post> {
        let call = |op| Call { op, number: 0, kind: Kind::Float, shape: vec![], send_rows: vec![], recv_rows: vec![] };
        let post = |_| Post {
            call: op.map(call),
            x: Tensor::zeros([elements], (Kind::Float, Device::Cpu)),
            runs: runs.to_vec(),
            since: Instant::now(),
        };
        (0..w).map(post).collect()
    }

    #[track_caller]
    fn takes(members: &[usize], op: Option<Op>, elements: i64, runs: &[i64], expected: f64) {
        let network = NETWORK.parse().unwrap();
        let posts = posts(members.len(), op, elements, runs);
        let found = Ranks { network: &network, members }.takes(&posts.iter().collect::<Vec<_>>());
        assert!((found - expected).abs() < 1e-9, "found {found}, expected {expected}");
    }

    #[test]
    fn operations_take_what_the_table_says() {
        let all = [0, 1, 2, 3];
        // 20 elements are 80 bytes: 0.8 s on a link within a node, 8 s on one between nodes.
        takes(&all, Some(Op::AllGather), 20, &[], 8.01 + 16.01);
        takes(&[0, 1, 2, 3, 4], Some(Op::AllGather), 20, &[], 8.01 + 16.01 + 8.01);
        takes(&[0, 1], Some(Op::AllGather), 20, &[], 0.801);
        takes(&[2], Some(Op::AllGather), 20, &[], 0.0);
        takes(&[1, 3], None, 20, &[], 8.01);
        takes(&all, Some(Op::ReduceScatter), 80, &[20; 4], 8.01 + 16.01);
        takes(&all, Some(Op::ReduceScatterV), 35, &[5, 20, 10, 0], 8.01 + 16.01);
        takes(&all, Some(Op::AllReduce(Reduce::Sum)), 80, &[], 2.0 * (8.01 + 16.01));
        takes(&all, Some(Op::AllReduce(Reduce::Sum)), 80, &[20; 4], 8.01 + 16.01);
        // Every round has a pair on two nodes.
        takes(&all, Some(Op::AllToAll), 80, &[20; 4], 3.0 * 8.01);
        // All send to rank 0 only: rank 3 in the first round and 2 in the second, from the other node, 1 in the last.
        takes(&all, Some(Op::AllToAllV), 20, &[20, 0, 0, 0], 8.01 + 8.01 + 0.801);
        takes(&all, Some(Op::Broadcast { root: 1 }), 20, &[], 0.01 + 0.001 + 0.01 + 8.0);
        takes(&[0, 1], Some(Op::Broadcast { root: 1 }), 20, &[], 0.001 + 0.8);
        takes(&all, Some(Op::Barrier), 0, &[], 0.01 + 0.01);
        takes(&[0, 1, 2, 3, 4], Some(Op::Split), 2, &[], 3.0 * 0.01);
    }

    #[test]
    fn messages_queue_at_both_ends() {
        let delays = Delays::new(NETWORK.parse().unwrap(), 4);
        let start = Instant::now();
        let x = Tensor::zeros([20], (Kind::Float, Device::Cpu));
        let ms = |from, to| (delays.message(from, to, &x, start) - start).as_millis();
        assert_eq!(ms(0, 1), 801);
        // Behind the first on rank 0's way out.
        assert_eq!(ms(0, 2), 800 + 8010);
        // Behind the second on rank 2's way in; its own way out was free.
        assert_eq!(ms(3, 2), 800 + 8010 + 800);
        assert_eq!(ms(3, 3), 0);
        // Sending does not slow receiving.
        assert_eq!(ms(2, 0), 8010);
        let none = Tensor::zeros([0], (Kind::Float, Device::Cpu));
        let later = start + Duration::from_secs(100);
        assert_eq!(delays.message(1, 0, &none, later) - later, Duration::from_millis(1));
    }

    #[test]
    fn numbers_out_of_range_end_the_wait_and_not_the_thread() {
        assert_eq!([f64::NAN, -1.0, 0.0].map(seconds), [Duration::ZERO; 3]);
        assert_eq!(seconds(f64::INFINITY), Duration::from_secs(1_000_000_000));
    }
}
