//! How long communication takes, in seconds, from the machine's links and NCCL's own model of its protocols: a base latency, a
//! latency for every hop of the ring, and the bytes over the bus bandwidth; the protocol is the quickest of the three.
//! Messages between two ranks use the protocol Simple, as NCCL's do. Ranks lie on nodes in order.

use super::machine::{Machine, Protocol};

const MICRO: f64 = 1e-6;
const GIGA: f64 = 1e9;

#[derive(Clone, Copy, Debug)]
pub struct Network<'a> {
    machine: &'a Machine,
    /// Whether communication takes no time, to find out what it costs.
    free: bool,
}

/// A message between two ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hop {
    pub latency: f64,
    pub transfer: f64,
}

impl Hop {
    pub fn seconds(self) -> f64 {
        self.latency + self.transfer
    }
}

impl<'a> Network<'a> {
    pub fn new(machine: &'a Machine) -> Self {
        Self { machine, free: false }
    }

    pub fn free(machine: &'a Machine) -> Self {
        Self { machine, free: true }
    }

    /// Whether All-Scan's and LASP-1's states wait for the host of each rank.
    pub fn host_chains(&self) -> bool {
        self.machine.network.host_chains
    }

    /// AllGather of `bytes` of each of `ranks`; a ReduceScatter that leaves `bytes` on each takes as long.
    pub fn all_gather(&self, ranks: usize, bytes: f64) -> f64 {
        self.unless_free(ranks, || self.ring(ranks, 1.0, (ranks - 1) as f64 * bytes))
    }

    /// The same for one more message right behind another: its way around the ring overlaps with that of the one before.
    pub fn all_gather_behind(&self, ranks: usize, bytes: f64) -> f64 {
        let received = (ranks - 1) as f64 * bytes;
        let time =
            |protocol: &Protocol| protocol.base_us * MICRO + received / (self.bus(ranks) * protocol.bandwidth_share);
        self.unless_free(ranks, || self.quickest(time))
    }

    /// AllReduce of `bytes`: around the ring twice, or, if that is quicker, up and down a tree over the nodes.
    pub fn all_reduce(&self, ranks: usize, bytes: f64) -> f64 {
        let travelled = 2.0 * (ranks - 1) as f64 / ranks as f64 * bytes;
        let tree = |protocol: &Protocol| {
            let depth = (self.nodes(ranks) as f64).log2().ceil();
            let inside = (self.machine.gpus_per_node.min(ranks) - 1) as f64;
            (protocol.base_us + 2.0 * (inside * protocol.intra_us + depth * protocol.inter_us)) * MICRO
                + travelled / (self.bus(ranks) * protocol.bandwidth_share)
        };
        self.unless_free(ranks, || self.ring(ranks, 2.0, travelled).min(self.call() + self.quickest(tree)))
    }

    /// AllReduce of `bytes` between `replicas`, as many groups of ranks, each rank with its counterparts in the others: all hops
    /// leave the node, and the ranks of a node share its NICs.
    pub fn all_reduce_replicas(&self, replicas: usize, bytes: f64) -> f64 {
        let network = &self.machine.network;
        let share = network.across_gbps / self.machine.gpus_per_node as f64;
        let bus = share.min(network.inter_gbps) * network.collective_efficiency * GIGA;
        let travelled = 2.0 * (replicas - 1) as f64 / replicas as f64 * bytes;
        let time = |protocol: &Protocol| {
            (protocol.base_us + 2.0 * (replicas - 1) as f64 * protocol.inter_us) * MICRO
                + travelled / (bus * protocol.bandwidth_share)
        };
        self.unless_free(replicas, || self.call() + self.quickest(time))
    }

    /// All-to-all in which each rank sends `bytes` in all to others: the part for other nodes through its NIC, the rest inside.
    pub fn all_to_all(&self, ranks: usize, bytes: f64) -> f64 {
        let network = &self.machine.network;
        let near = self.machine.gpus_per_node.min(ranks);
        let outside = bytes * (ranks - near) as f64 / (ranks - 1).max(1) as f64;
        let time = |protocol: &Protocol| {
            let hop = if ranks > near { protocol.inter_us } else { protocol.intra_us };
            let slower = (outside / network.inter_gbps).max((bytes - outside) / network.intra_gbps);
            (protocol.base_us + hop) * MICRO
                + slower / (GIGA * network.collective_efficiency * protocol.bandwidth_share)
        };
        self.unless_free(ranks, || self.call() + time(&network.simple))
    }

    /// A message of `bytes` between two ranks, without the host's part.
    pub fn hop(&self, from: usize, to: usize, bytes: f64) -> Hop {
        let network = &self.machine.network;
        let node = |rank: usize| rank / self.machine.gpus_per_node;
        let (latency, bandwidth) = match node(from) == node(to) {
            true => (network.simple.intra_us, network.intra_gbps),
            false => (network.simple.inter_us, network.inter_gbps),
        };
        let link = bandwidth * GIGA * network.simple.bandwidth_share;
        let hop = Hop { latency: latency * MICRO, transfer: bytes / link };
        if self.free { Hop { latency: 0.0, transfer: 0.0 } } else { hop }
    }

    /// As `hop`, with what the host adds when it drives each hop.
    pub fn host_hop(&self, from: usize, to: usize, bytes: f64) -> Hop {
        let hop = self.hop(from, to, bytes);
        let host = if self.free { 0.0 } else { self.machine.network.hop_us * MICRO };
        Hop { latency: hop.latency + host, ..hop }
    }

    /// What starting a chain costs before its first message.
    pub fn chain_start(&self) -> f64 {
        if self.free { 0.0 } else { self.call() + self.machine.network.simple.base_us * MICRO }
    }

    fn ring(&self, ranks: usize, rounds: f64, bytes: f64) -> f64 {
        let across = self.nodes(ranks) - 1;
        let inside = ranks - 1 - across;
        let time = |protocol: &Protocol| {
            let hops = inside as f64 * protocol.intra_us + across as f64 * protocol.inter_us;
            (protocol.base_us + rounds * hops) * MICRO + bytes / (self.bus(ranks) * protocol.bandwidth_share)
        };
        self.call() + self.quickest(time)
    }

    fn quickest(&self, time: impl Fn(&Protocol) -> f64) -> f64 {
        self.machine.network.protocols().into_iter().map(time).fold(f64::INFINITY, f64::min)
    }

    /// Bytes a second that pass each rank of a ring.
    fn bus(&self, ranks: usize) -> f64 {
        let network = &self.machine.network;
        let bus = if self.nodes(ranks) > 1 { network.across_gbps.min(network.intra_gbps) } else { network.intra_gbps };
        bus * network.collective_efficiency * GIGA
    }

    fn nodes(&self, ranks: usize) -> usize {
        ranks.div_ceil(self.machine.gpus_per_node)
    }

    fn call(&self) -> f64 {
        self.machine.network.call_us * MICRO
    }

    fn unless_free(&self, ranks: usize, seconds: impl FnOnce() -> f64) -> f64 {
        if self.free || ranks < 2 { 0.0 } else { seconds() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_all_gather_reaches_the_bus_bandwidth_and_a_small_one_the_latency() {
        let machine = Machine::load("h100-dgx").unwrap();
        let network = Network::new(&machine);
        let bytes = 1e9;
        let busbw = |ranks: usize| (ranks - 1) as f64 * bytes / network.all_gather(ranks, bytes) / GIGA;
        assert!((busbw(8) - 350.0).abs() < 1.0, "{}", busbw(8));
        assert!((busbw(256) - 200.0).abs() < 1.0, "{}", busbw(256));
        let small = network.all_reduce(8, 8.0) / MICRO;
        assert!((13.0..18.0).contains(&small), "8 H100, small AllReduce: 13 to 17 us published, {small} found");
        assert_eq!(Network::free(&machine).all_gather(8, bytes), 0.0);
        assert_eq!(network.all_gather(1, bytes), 0.0);
    }

    #[test]
    fn hops_know_their_nodes() {
        let machine = Machine::load("h100-dgx").unwrap();
        let network = Network::new(&machine);
        assert_eq!(network.hop(6, 7, 0.0).seconds(), 3.4 * MICRO);
        assert_eq!(network.hop(7, 8, 0.0).seconds(), 14.0 * MICRO);
        assert_eq!(network.hop(7, 8, 47e9).transfer, 1.0);
    }
}
