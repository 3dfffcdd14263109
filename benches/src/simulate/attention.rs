//! Attention whose keys and values meet queries of other ranks, on the timeline: the methods of softmax layers as
//! `runtime::sequence::attention` runs them, and the two left-product methods of linear layers. Imbalance needs no formula:
//! each rank's work is its own visible pairs, inside documents.

use super::costs::{Costs, Pass, WIDE};
use super::method::Softmax;
use super::network::Network;
use super::timeline::{Timeline, latest};
use super::{Error, Result};

/// One layer's attention in one pass.
pub struct Attend<'a> {
    pub costs: &'a Costs<'a>,
    pub network: Network<'a>,
    pub pass: Pass,
    /// Whether it is linear attention as `(Q K^T) V`.
    pub left_product: bool,
}

impl Attend<'_> {
    pub fn run(&self, timeline: &mut Timeline, method: Softmax, ready: &[f64]) -> Result<()> {
        match method {
            _ if timeline.ranks() == 1 => {
                timeline.compute(0, ready[0], self.seconds(self.costs.packing.all_pairs(0)));
            }
            Softmax::Lasp2h { stages } => self.lasp2h(timeline, ready, stages),
            Softmax::Ring => self.ring(timeline, ready),
            Softmax::Ulysses => return self.ulysses(timeline, ready),
            Softmax::MegatronSp => self.megatron_sp(timeline, ready),
        }
        Ok(())
    }

    fn seconds(&self, pairs: f64) -> f64 {
        match self.left_product {
            true => self.costs.left_product(pairs, self.pass),
            false => self.costs.softmax(pairs, self.pass),
        }
    }

    /// K and V of one rank; a linear layer has as many KV heads as heads.
    fn keys(&self) -> f64 {
        if self.left_product { 2.0 * self.costs.rows() } else { self.costs.keys() }
    }

    /// Bytes of sums where there are `bytes` of numbers.
    fn sums(&self, bytes: f64) -> f64 {
        bytes * WIDE / self.costs.width
    }

    fn gather(&self, timeline: &mut Timeline, ready: &[f64], bytes: f64) -> f64 {
        let ranks = timeline.ranks();
        let seconds = self.network.all_gather(ranks, bytes);
        timeline.collective(0..ranks, ready, seconds, (ranks - 1) as f64 * bytes)
    }

    /// Stage g + 1 is gathered while stage g attends; in backward its gradients are summed meanwhile too.
    fn lasp2h(&self, timeline: &mut Timeline, ready: &[f64], stages: usize) {
        let stages = self.costs.stages(stages);
        let mut arrived = self.gather(timeline, ready, stages[0] * self.keys());
        let mut summed = 0.0f64;
        for (stage, share) in stages.iter().enumerate() {
            let here: Vec<f64> = timeline.computed().iter().zip(ready).map(|(t, r)| t.max(*r).max(arrived)).collect();
            let next = stages.get(stage + 1).map(|share| self.gather(timeline, &here, share * self.keys()));
            let done: Vec<f64> = (0..timeline.ranks())
                .map(|rank| {
                    timeline.compute(rank, here[rank], share * self.seconds(self.costs.packing.all_pairs(rank)))
                })
                .collect();
            if self.pass == Pass::Backward {
                summed = self.gather(timeline, &done, share * self.sums(self.keys()));
            }
            arrived = next.unwrap_or(arrived);
        }
        let ends = vec![summed; timeline.ranks()];
        timeline.compute_all(&ends, 0.0);
    }

    /// Step s: the block of the rank s back is worked on while it goes to the next rank; in backward the sums of its dk and dv
    /// follow it from the second step on, and come home one hop after the last. A hop starts when both of its ranks have begun
    /// the step.
    fn ring(&self, timeline: &mut Timeline, ready: &[f64]) {
        let ranks = timeline.ranks();
        let backward = self.pass == Pass::Backward;
        let before = |rank: usize| (rank + ranks - 1) % ranks;
        let hops: Vec<_> = (0..ranks).map(|to| self.network.host_hop(before(to), to, self.keys())).collect();
        let homing: Vec<_> =
            (0..ranks).map(|to| self.network.host_hop(before(to), to, self.sums(self.keys()))).collect();
        let mut starts: Vec<f64> = timeline.computed().iter().zip(ready).map(|(t, r)| t.max(*r)).collect();
        let first = starts.clone();
        let mut link = vec![0.0f64; ranks]; // into each rank
        let mut sums = vec![0.0f64; ranks]; // arrival of what is added to the block's gradients
        let mut ends = starts.clone();
        let mut worked = vec![0.0f64; ranks];
        for step in 0..ranks {
            for rank in 0..ranks {
                let seconds = self.seconds(self.costs.packing.pairs(rank, (rank + ranks - step) % ranks));
                worked[rank] += seconds;
                ends[rank] = (starts[rank] + seconds).max(sums[rank]);
            }
            let last = step + 1 == ranks;
            let begun = starts.clone();
            for rank in 0..ranks {
                let from = before(rank);
                if !last {
                    let hop = hops[rank];
                    link[rank] = link[rank].max(begun[rank]).max(begun[from]) + hop.transfer;
                    starts[rank] = ends[rank].max(link[rank] + hop.latency);
                }
                // What a rank adds for its own block stays there.
                if backward && step > 0 {
                    let hop = homing[rank];
                    link[rank] = link[rank].max(ends[from]) + hop.transfer;
                    sums[rank] = link[rank] + hop.latency;
                }
            }
        }
        let (others, sum_bytes) = ((ranks - 1) as f64, if backward { self.sums(self.keys()) } else { 0.0 });
        let sums_home = if backward { others } else { 0.0 };
        let busy = hops.iter().zip(&homing).map(|(hop, home)| others * hop.transfer + sums_home * home.transfer);
        timeline.give_way(latest(&first), busy.fold(0.0, f64::max));
        for rank in 0..ranks {
            let end = ends[rank].max(sums[rank]);
            let waited = end - timeline.computed()[rank] - worked[rank];
            timeline.advance(rank, end, waited, others * (self.keys() + sum_bytes));
        }
    }

    /// Heads for tokens and back. Of KV heads each rank gets those that its query heads use, at least one.
    fn ulysses(&self, timeline: &mut Timeline, ready: &[f64]) -> Result<()> {
        let (ranks, heads) = (timeline.ranks(), self.costs.heads as usize);
        if !heads.is_multiple_of(ranks) {
            return Err(Error::Ulysses { heads, ranks });
        }
        let away = (ranks - 1) as f64 / ranks as f64;
        let rows = away * self.costs.rows();
        let repeated = (ranks as f64 / self.costs.kv_heads).max(1.0);
        let keys = away * self.keys() * repeated;
        let sums = if repeated > 1.0 { self.sums(keys) } else { keys };
        let (there, back) = match self.pass {
            Pass::Forward => (rows + keys, rows),
            Pass::Backward => (rows, rows + sums),
        };
        let exchange = |timeline: &mut Timeline, ready: &[f64], bytes: f64| {
            vec![timeline.collective(0..ranks, ready, self.network.all_to_all(ranks, bytes), bytes); ranks]
        };
        let whole = exchange(timeline, ready, there);
        let pairs = self.costs.packing.whole_pairs() / ranks as f64;
        let done = timeline.compute_all(&whole, self.seconds(pairs));
        let home = exchange(timeline, &done, back);
        timeline.compute_all(&home, 0.0);
        Ok(())
    }

    /// The layer's input gathered, a share of the heads on each rank, the output reduce-scattered; backward gathers the
    /// input once more, for the gradients of the weights. More ranks than heads leave some without work.
    fn megatron_sp(&self, timeline: &mut Timeline, ready: &[f64]) {
        let gathers = if self.pass == Pass::Forward { 1 } else { 2 };
        let arrived = (0..gathers).map(|_| self.gather(timeline, ready, self.costs.rows())).fold(0.0, f64::max);
        let pairs = self.costs.packing.whole_pairs() / self.costs.heads;
        let (ranks, heads) = (timeline.ranks(), self.costs.heads as usize);
        let done: Vec<f64> = (0..ranks)
            .map(|rank| {
                let share = (rank + 1) * heads / ranks - rank * heads / ranks;
                timeline.compute(rank, arrived, self.seconds(share as f64 * pairs))
            })
            .collect();
        let end = self.gather(timeline, &done, self.costs.rows());
        timeline.compute_all(&vec![end; ranks], 0.0);
    }
}

#[cfg(test)]
mod tests {
    use runtime::config::Config;

    use crate::simulate::{Machine, Method, Workload, attention_share, step_seconds};

    const MODEL: &str = "[model]\nvocab = 256\ndim = 2048\nlayers = 1\nheads = 16\nkv_heads = 4\npattern = \"N\"\n\
                         [train]\ndtype = \"bf16\"\n";

    fn share(method: &str, gpus: usize, free: bool) -> f64 {
        let config = Config::from_toml_str(MODEL, "test", &[]).unwrap();
        let mut machine = Machine::load("h100-dgx").unwrap();
        if free {
            machine = without_network(machine);
        }
        let work = Workload::one(&config, gpus, 65536 * gpus);
        attention_share(&machine, &Method::parse(method).unwrap(), &work).unwrap()
    }

    fn without_network(mut machine: Machine) -> Machine {
        let network = &mut machine.network;
        for protocol in [&mut network.simple, &mut network.ll128, &mut network.ll] {
            (protocol.base_us, protocol.intra_us, protocol.inter_us) = (0.0, 0.0, 0.0);
        }
        (network.intra_gbps, network.inter_gbps, network.across_gbps) = (1e15, 1e15, 1e15);
        machine
    }

    #[test]
    fn contiguous_shards_cost_what_the_last_rank_has_more() {
        let close = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-6, "{found} {expected}");
        for gpus in [2, 8, 32] {
            // The last rank sees W - 1/2 blocks, the mean rank W / 2.
            let w = gpus as f64;
            for method in ["lasp2h", "ring"] {
                close(share(&format!("{method}@contiguous"), gpus, true), (w / 2.0) / (w - 0.5));
                close(share(&format!("{method}@zigzag"), gpus, true), 1.0);
            }
        }
        close(share("ulysses", 8, true), 1.0);
        close(share("megatron_sp", 16, true), 1.0);
        // 16 heads on 32 ranks: half of them have none.
        close(share("megatron_sp", 32, true), 0.5);
        assert!(share("ring@zigzag", 8, false) > 1.7 * share("ring@contiguous", 8, false));
    }

    #[test]
    fn ulysses_needs_heads_that_the_ranks_divide() {
        let config = Config::from_toml_str(MODEL, "test", &[]).unwrap();
        let (machine, method) = (Machine::load("h100-dgx").unwrap(), Method::parse("ulysses").unwrap());
        let work = Workload::one(&config, 32, 65536);
        let error = step_seconds(&machine, &method, &work).unwrap_err().to_string();
        assert!(error.contains("16 heads, 32 GPUs"), "{error}");
    }
}
