//! How states reach the ranks that need them, on the timeline: the methods of `runtime::sequence::scan`, message by message.
//! The bytes are those of algorithms.md, section 3; when they arrive follows from who is ready when.

use runtime::config::LayoutKind;

use super::costs::Pass;
use super::method::Linear;
use super::network::Network;
use super::timeline::Timeline;

/// One scan over the summaries of all segments.
pub struct Exchange<'a> {
    pub network: Network<'a>,
    pub layout: LayoutKind,
    /// Backward goes against the sequence.
    pub pass: Pass,
    /// Bytes of one segment's summary: its state, and the log-decays that a gather carries too.
    pub state: f64,
    pub decays: f64,
    /// Seconds for a byte when states are combined.
    pub per_byte: f64,
}

impl Exchange<'_> {
    /// When each rank has what its entry states are folded from. `ready`: each rank's summaries; `idle`: its intra-rank work,
    /// before which a host that drives chains passes nothing on.
    pub fn run(&self, timeline: &mut Timeline, method: Linear, ready: &[f64], idle: &[f64]) -> Vec<f64> {
        let ranks = timeline.ranks();
        if ranks == 1 {
            return ready.to_vec();
        }
        match method {
            Linear::Lasp2 { splits } => vec![self.gather(timeline, splits, ready); ranks],
            Linear::Lasp1 => self.chain(timeline, 1, true, ready, idle),
            Linear::AllScan { blocks } => self.chain(timeline, blocks, self.network.host_chains(), ready, idle),
            Linear::Hierarchical { node } => self.hierarchical(timeline, node.min(ranks), ready),
            Linear::None | Linear::RingLeftProduct | Linear::MegatronSpLeftProduct => ready.to_vec(),
        }
    }

    /// Bytes that a rank contributes to a gather.
    fn summaries(&self) -> f64 {
        self.slots() * (self.state + self.decays)
    }

    fn slots(&self) -> f64 {
        if self.layout == LayoutKind::Zigzag { 2.0 } else { 1.0 }
    }

    fn gather(&self, timeline: &mut Timeline, splits: usize, ready: &[f64]) -> f64 {
        let ranks = timeline.ranks();
        let part = self.summaries() / splits as f64;
        let (first, others) = (self.network.all_gather(ranks, part), self.network.all_gather_behind(ranks, part));
        let mut end = 0.0;
        for split in 0..splits {
            let seconds = if split == 0 { first } else { others };
            end = timeline.collective(0..ranks, ready, seconds, (ranks - 1) as f64 * part);
        }
        end
    }

    /// The rank of each segment, in the order in which states travel.
    fn path(&self, ranks: usize) -> Vec<usize> {
        let mut path: Vec<usize> = (0..ranks).collect();
        if self.layout == LayoutKind::Zigzag {
            path.extend((0..ranks).rev());
        }
        if self.pass == Pass::Backward {
            path.reverse();
        }
        path
    }

    /// From segment to segment, in blocks. A message is a step's latency and a block's transfer; so is the next on the same link.
    fn chain(&self, timeline: &mut Timeline, blocks: usize, by_host: bool, ready: &[f64], idle: &[f64]) -> Vec<f64> {
        let mut entries = ready.to_vec();
        let block = self.state / blocks as f64;
        let combine = 3.0 * block * self.per_byte;
        let path = self.path(timeline.ranks());
        let start = self.network.chain_start();
        // When each block of the state that leaves the segment before is there.
        let mut leaving = vec![ready[path[0]] + start; blocks];
        for pair in path.windows(2) {
            let (from, to) = (pair[0], pair[1]);
            let hop = match by_host {
                true => self.network.host_hop(from, to, block),
                false => self.network.hop(from, to, block),
            };
            let pass_on = if self.network.host_chains() { ready[to].max(idle[to]) } else { ready[to] } + start;
            for leaves in &mut leaving {
                if from != to {
                    *leaves = timeline.message(from, to, *leaves, hop.seconds(), block);
                }
                entries[to] = entries[to].max(*leaves);
                *leaves = leaves.max(pass_on) + combine;
            }
        }
        entries
    }

    /// Gather inside each node; then slices, one a local rank, by Hillis and Steele's scan over the nodes' runs of segments;
    /// then gather the slices. The last node may be smaller: its ranks carry as many slices as makes a whole state.
    fn hierarchical(&self, timeline: &mut Timeline, node: usize, ready: &[f64]) -> Vec<f64> {
        let ranks = timeline.ranks();
        let nodes: Vec<_> = (0..ranks).step_by(node).map(|first| first..(first + node).min(ranks)).collect();
        let mut there = vec![0.0; ranks];
        for of in &nodes {
            let seconds = self.network.all_gather(of.len(), self.summaries());
            let bytes = (of.len() - 1) as f64 * self.summaries();
            let end = timeline.collective(of.clone(), ready, seconds, bytes);
            there[of.clone()].fill(end);
        }
        if nodes.len() == 1 {
            return there;
        }

        let mut runs: Vec<usize> = (0..nodes.len()).collect();
        if self.layout == LayoutKind::Zigzag {
            runs.extend((0..nodes.len() - 1).rev());
        }
        if self.pass == Pass::Backward {
            runs.reverse();
        }
        let slice = (self.state + self.decays) / node as f64;
        let mut sums = vec![vec![0.0; node]; runs.len()];
        for (sum, &run) in sums.iter_mut().zip(&runs) {
            sum.fill(there[nodes[run].start]);
        }
        let carrier = |run: usize, part: usize| nodes[run].start + part % nodes[run].len();
        let mut distance = 1;
        while distance < runs.len() {
            let before = sums.clone();
            for to in distance..runs.len() {
                let from = to - distance;
                for part in 0..node {
                    let (sender, receiver) = (carrier(runs[from], part), carrier(runs[to], part));
                    let arrived = if sender == receiver {
                        before[from][part]
                    } else {
                        let hop = self.network.host_hop(sender, receiver, slice);
                        timeline.message(sender, receiver, before[from][part], hop.seconds(), slice)
                    };
                    sums[to][part] = arrived.max(before[to][part]) + 3.0 * slice * self.per_byte;
                    there[receiver] = there[receiver].max(sums[to][part]);
                }
            }
            distance *= 2;
        }
        for of in &nodes {
            let own = self.slots() * (self.state + self.decays) / of.len() as f64;
            let seconds = self.network.all_gather(of.len(), own);
            let end = timeline.collective(of.clone(), &there, seconds, (of.len() - 1) as f64 * own);
            there[of.clone()].fill(end);
        }
        there
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulate::machine::Machine;

    const MIB: f64 = 1048576.0;

    fn run(method: Linear, layout: LayoutKind, pass: Pass, ranks: usize) -> (Vec<f64>, Vec<f64>) {
        let machine = Machine::load("h100-dgx").unwrap();
        let network = Network::new(&machine);
        let exchange = Exchange { network, layout, pass, state: MIB, decays: 0.0, per_byte: 0.0 };
        let mut timeline = Timeline::new(ranks, 0.0);
        let entries = exchange.run(&mut timeline, method, &vec![0.0; ranks], &vec![0.0; ranks]);
        (entries, timeline.received().to_vec())
    }

    fn step(from: usize, to: usize, bytes: f64) -> f64 {
        Network::new(&Machine::load("h100-dgx").unwrap()).hop(from, to, bytes).seconds()
    }

    #[test]
    fn a_chain_takes_its_hops_and_a_pipelined_one_its_blocks() {
        let close = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-12, "{found} {expected}");
        let (inside, across) = (step(0, 1, MIB), step(7, 8, MIB));
        let (entries, received) = run(Linear::Lasp1, LayoutKind::Contiguous, Pass::Forward, 16);
        close(entries[15], 8.4e-6 + 14.0 * inside + across);
        close(entries[3], 8.4e-6 + 3.0 * inside);
        assert_eq!(received, [vec![0.0], vec![MIB; 15]].concat());
        let (entries, _) = run(Linear::Lasp1, LayoutKind::Contiguous, Pass::Backward, 16);
        close(entries[0], 8.4e-6 + 14.0 * inside + across);

        let (inside, across) = (step(0, 1, MIB / 8.0), step(7, 8, MIB / 8.0));
        let (entries, received) = run(Linear::AllScan { blocks: 8 }, LayoutKind::Contiguous, Pass::Forward, 8);
        close(entries[7], 8.4e-6 + (7.0 + 7.0) * inside);
        assert_eq!(received[7], MIB);
        let (entries, _) = run(Linear::AllScan { blocks: 8 }, LayoutKind::Contiguous, Pass::Forward, 16);
        close(entries[15], 8.4e-6 + 14.0 * inside + 8.0 * across);
    }

    #[test]
    fn a_host_passes_on_after_its_own_work() {
        let mut machine = Machine::load("h100-dgx").unwrap();
        machine.network.host_chains = true;
        let (layout, pass) = (LayoutKind::Contiguous, Pass::Forward);
        let network = Network::new(&machine);
        let exchange = Exchange { network, layout, pass, state: MIB, decays: 0.0, per_byte: 0.0 };
        let entries = exchange.run(&mut Timeline::new(4, 0.0), Linear::Lasp1, &[0.0; 4], &[1.0; 4]);
        // The first state leaves at once; what depends on it, with the next rank's work.
        assert!(entries[1] < 1e-3 && entries[2] > 1.0 && entries[3] > entries[2], "{entries:?}");
    }

    #[test]
    fn received_bytes_are_those_of_the_methods() {
        for pass in [Pass::Forward, Pass::Backward] {
            for splits in [1, 4] {
                let (_, received) = run(Linear::Lasp2 { splits }, LayoutKind::Contiguous, pass, 64);
                assert_eq!(received, [63.0 * MIB; 64]);
                let (_, received) = run(Linear::Lasp2 { splits }, LayoutKind::Zigzag, pass, 64);
                assert_eq!(received, [126.0 * MIB; 64]);
            }
            // Up the ranks and down again: two states, but for the ends of the way.
            let (_, received) = run(Linear::Lasp1, LayoutKind::Zigzag, pass, 8);
            assert_eq!(received.iter().sum::<f64>(), 14.0 * MIB);
            // (w - 1) + (w - 1) / w states inside the node, and of the others at most one slice a step.
            let (_, received) = run(Linear::Hierarchical { node: 8 }, LayoutKind::Contiguous, pass, 64);
            let (least, most) = (7.0 + 7.0 / 8.0, 7.0 + 7.0 / 8.0 + 3.0 / 8.0);
            assert!(received.iter().all(|bytes| (least..=most).contains(&(bytes / MIB))), "{received:?}");
            assert_eq!(received.iter().copied().fold(0.0, f64::max), most * MIB);
        }
    }

    #[test]
    fn many_small_steps_lose_to_few() {
        let last = |method| run(method, LayoutKind::Contiguous, Pass::Forward, 1024).0[1023];
        let hierarchical = last(Linear::Hierarchical { node: 8 });
        let chain = last(Linear::AllScan { blocks: 16 });
        let gather = last(Linear::Lasp2 { splits: 1 });
        assert!(hierarchical < chain && chain < gather, "{hierarchical} {chain} {gather}");
    }
}
