//! How states reach the ranks that need them, on the timeline: the methods of `runtime::sequence::scan`, message by message.
//! The bytes are those of algorithms.md, section 3; when they arrive follows from who is ready when.

use runtime::sequence::Chain;
use runtime::sequence::scan::{DecayForm, Reach, Route, StateSize};

use super::costs::Pass;
use super::method::Linear;
use super::network::Network;
use super::timeline::Timeline;

/// One scan over the summaries of all segments.
pub struct Exchange<'a> {
    pub network: Network<'a>,
    /// As the pass meets it: backward goes against the sequence. State flows through it.
    pub chain: &'a Chain,
    pub pass: Pass,
    pub size: StateSize,
    /// How far back a truncated scan listens.
    pub reach: Reach,
    /// Seconds for a byte when states are combined.
    pub per_byte: f64,
}

impl Exchange<'_> {
    /// When each rank can go on after the summaries: where a truncated scan must first learn the decays of all, once all have them.
    pub fn learn(&self, timeline: &mut Timeline, method: Linear, ready: &[f64]) -> Vec<f64> {
        let (ranks, decays) = (timeline.ranks(), self.slots() * self.decays());
        if ranks == 1 || decays == 0.0 || !matches!(method, Linear::Truncated { .. }) {
            return ready.to_vec();
        }
        let seconds = self.network.all_gather(ranks, decays);
        vec![timeline.collective(0..ranks, ready, seconds, (ranks - 1) as f64 * decays); ranks]
    }

    /// When each rank has what its entry states are folded from. `ready`: each rank's summaries; `idle`: its intra-rank work,
    /// before which a host that drives chains passes nothing on.
    pub fn run(&self, timeline: &mut Timeline, method: Linear, ready: &[f64], idle: &[f64]) -> Vec<f64> {
        let ranks = timeline.ranks();
        if ranks == 1 {
            return ready.to_vec();
        }
        match method {
            Linear::Lasp2 { splits } => vec![self.gather(timeline, splits, ready); ranks],
            Linear::Truncated { splits } if self.size.decay == DecayForm::None => {
                vec![self.gather(timeline, splits, ready); ranks]
            }
            Linear::Truncated { .. } => self.truncated(timeline, ready),
            Linear::Lasp1 => self.relay(timeline, 1, true, ready, idle),
            Linear::AllScan { blocks } => self.relay(timeline, blocks, self.network.host_chains(), ready, idle),
            Linear::Hierarchical { node } => self.hierarchical(timeline, node.min(ranks), ready),
            Linear::None | Linear::RingLeftProduct | Linear::MegatronSpLeftProduct => ready.to_vec(),
        }
    }

    /// Bytes of one segment's state, and of the log-decays that a gather carries too.
    fn state(&self) -> f64 {
        self.size.state() as f64
    }

    fn decays(&self) -> f64 {
        if self.pass == Pass::Forward { self.size.decays() as f64 } else { 0.0 }
    }

    /// Bytes that a rank contributes to a gather.
    fn summaries(&self) -> f64 {
        self.slots() * (self.state() + self.decays())
    }

    fn slots(&self) -> f64 {
        self.chain.slots() as f64
    }

    fn owner(&self, segment: usize) -> usize {
        self.chain.owners[segment].0
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

    /// Each state to each rank to which it matters, one message after the other.
    fn truncated(&self, timeline: &mut Timeline, ready: &[f64]) -> Vec<f64> {
        let mut entries = ready.to_vec();
        let start = self.network.chain_start();
        for segment in 0..self.chain.owners.len() {
            let from = self.owner(segment);
            for to in self.reach.heard_by(self.chain, segment).into_iter().filter(|&to| to != from) {
                let hop = self.network.host_hop(from, to, self.state());
                let arrived = timeline.message(from, to, ready[from] + start, hop.seconds(), self.state());
                entries[to] = entries[to].max(arrived);
            }
        }
        entries
    }

    /// From segment to segment of a document, in blocks. A message is a step's latency and a block's transfer; so is the next on the
    /// same link.
    fn relay(&self, timeline: &mut Timeline, blocks: usize, by_host: bool, ready: &[f64], idle: &[f64]) -> Vec<f64> {
        let mut entries = ready.to_vec();
        let block = self.state() / blocks as f64;
        let combine = 3.0 * block * self.per_byte;
        let start = self.network.chain_start();
        // When each block of the state that leaves a segment is there.
        let mut leaving: Vec<Vec<f64>> = Vec::with_capacity(self.chain.owners.len());
        for segment in 0..self.chain.owners.len() {
            let to = self.owner(segment);
            let mut passed = vec![ready[to] + start; blocks];
            if let Some(before) = self.chain.before(segment) {
                let from = self.owner(before);
                let hop = match by_host {
                    true => self.network.host_hop(from, to, block),
                    false => self.network.hop(from, to, block),
                };
                let pass_on = if self.network.host_chains() { ready[to].max(idle[to]) } else { ready[to] } + start;
                for (&leaves, passed) in leaving[before].iter().zip(&mut passed) {
                    let arrived = match from == to {
                        true => leaves,
                        false => timeline.message(from, to, leaves, hop.seconds(), block),
                    };
                    entries[to] = entries[to].max(arrived);
                    if self.chain.links[segment].through {
                        *passed = arrived.max(pass_on) + combine;
                    }
                }
            }
            leaving.push(passed);
        }
        entries
    }

    /// Gather inside each node; then slices, one a local rank, by Hillis and Steele's scan over the nodes' runs of segments;
    /// then gather the slices: who sends what to whom is the runtime's route.
    fn hierarchical(&self, timeline: &mut Timeline, node: usize, ready: &[f64]) -> Vec<f64> {
        let ranks = timeline.ranks();
        let route = Route::new(self.chain, node, self.size.key as i64);
        let nodes: Vec<_> = (0..ranks.div_ceil(node)).map(|node| route.members(node)).collect();
        let mut there = vec![0.0; ranks];
        for of in &nodes {
            let seconds = self.network.all_gather(of.len(), self.summaries());
            let bytes = (of.len() - 1) as f64 * self.summaries();
            let end = timeline.collective(of.clone(), ready, seconds, bytes);
            there[of.clone()].fill(end);
        }
        let slices = route.slices.len();
        let carrier = |run: usize, slice: usize| route.scans(route.runs[run].node, slice);
        let mut sums: Vec<Vec<f64>> = route.runs.iter().map(|run| vec![there[nodes[run.node].start]; slices]).collect();
        for distance in route.steps() {
            let before = sums.clone();
            for to in (distance..route.runs.len()).filter(|&to| route.takes(to, distance)) {
                let from = to - distance;
                for slice in 0..slices {
                    let (sender, receiver) = (carrier(from, slice), carrier(to, slice));
                    let bytes = route.bytes(from, distance, slice, &self.size) as f64;
                    let arrived = if sender == receiver {
                        before[from][slice]
                    } else {
                        let hop = self.network.host_hop(sender, receiver, bytes);
                        timeline.message(sender, receiver, before[from][slice], hop.seconds(), bytes)
                    };
                    sums[to][slice] = arrived.max(before[to][slice]) + 3.0 * bytes * self.per_byte;
                    there[receiver] = there[receiver].max(sums[to][slice]);
                }
            }
        }
        for (number, of) in nodes.iter().enumerate() {
            let entered = route.runs_of(number).into_iter().filter(|&run| route.enters(run)).count() as f64;
            if entered > 0.0 {
                let own = entered * self.state() / of.len() as f64;
                let seconds = self.network.all_gather(of.len(), own);
                let end = timeline.collective(of.clone(), &there, seconds, (of.len() - 1) as f64 * own);
                there[of.clone()].fill(end);
            }
        }
        there
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulate::Workload;
    use crate::simulate::machine::Machine;
    use crate::simulate::packing::Packing;
    use runtime::config::{Config, LayoutKind};

    const MIB: f64 = 1048576.0;

    fn packing(layout: LayoutKind, ranks: usize, cu_seqlens: Option<&[i64]>) -> Packing {
        let config = Config::from_toml_str("", "test", &[]).unwrap();
        Packing::new(&Workload { cu_seqlens, ..Workload::one(&config, ranks, 64 * ranks) }, layout).unwrap()
    }

    /// With states of 1 MiB.
    fn exchange<'a>(machine: &'a Machine, packing: &'a Packing, pass: Pass) -> Exchange<'a> {
        let size = StateSize { heads: 16, key: 128, value: 128, width: 4, decay: DecayForm::Head };
        let (network, chain) = (Network::new(machine), packing.chain(pass));
        Exchange { network, chain, pass, size, reach: Reach::full(), per_byte: 0.0 }
    }

    fn run(method: Linear, layout: LayoutKind, pass: Pass, ranks: usize) -> (Vec<f64>, Vec<f64>) {
        run_packed(method, layout, pass, ranks, None)
    }

    fn run_packed(
        method: Linear,
        layout: LayoutKind,
        pass: Pass,
        ranks: usize,
        cu_seqlens: Option<&[i64]>,
    ) -> (Vec<f64>, Vec<f64>) {
        let (machine, packing) = (Machine::load("h100-dgx").unwrap(), packing(layout, ranks, cu_seqlens));
        let mut timeline = Timeline::new(ranks, 0.0);
        let exchange = exchange(&machine, &packing, pass);
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
        let packing = packing(LayoutKind::Contiguous, 4, None);
        let exchange = exchange(&machine, &packing, Pass::Forward);
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
            // (w - 1) + (w - 1) / w states inside the node, the latter where any enters, and of the others at most one slice a step.
            let (_, received) = run(Linear::Hierarchical { node: 8 }, LayoutKind::Contiguous, pass, 64);
            let (least, most) = (7.0, 7.0 + 7.0 / 8.0 + 3.0 / 8.0);
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
    #[test]
    fn documents_cut_a_chain() {
        // Two documents of four ranks each: three hops in place of seven, and nothing from the fourth rank to the fifth.
        let halves = [0, 4 * 64, 8 * 64];
        let (entries, received) = run_packed(Linear::Lasp1, LayoutKind::Contiguous, Pass::Forward, 8, Some(&halves));
        let (whole, _) = run(Linear::Lasp1, LayoutKind::Contiguous, Pass::Forward, 8);
        assert_eq!((entries[3], entries[7], entries[4]), (whole[3], whole[3], 0.0));
        assert_eq!(received, [0.0, MIB, MIB, MIB, 0.0, MIB, MIB, MIB]);
    }

    #[test]
    fn a_truncated_scan_hears_of_its_neighbours() {
        let (machine, packing) = (Machine::load("h100-dgx").unwrap(), packing(LayoutKind::Contiguous, 32, None));
        let scan = |log_decay: f64| {
            let mut exchange = exchange(&machine, &packing, Pass::Forward);
            exchange.reach = Reach::constant(&[log_decay], packing.chain(Pass::Forward), 4);
            let mut timeline = Timeline::new(32, 0.0);
            let entries = exchange.run(&mut timeline, Linear::Truncated { splits: 1 }, &[0.0; 32], &[0.0; 32]);
            (entries[31], timeline.received().to_vec())
        };
        // Segments of 64 tokens: half of a state is left after three tokens, and nothing after one segment.
        let (near, received) = scan(-0.3);
        assert_eq!(received, [vec![0.0], vec![MIB; 31]].concat());
        let (far, received) = scan(-1e-4);
        assert_eq!(received, (0..32).map(|rank| f64::from(rank) * MIB).collect::<Vec<_>>());
        let (gather, _) = run(Linear::Lasp2 { splits: 1 }, LayoutKind::Contiguous, Pass::Forward, 32);
        assert!(near < gather[31] && gather[31] < far, "{near} {} {far}", gather[31]);
    }
}
