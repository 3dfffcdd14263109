//! Memory of one rank by class: the formulas of `runtime::estimate` for activations and the loss, the machine's bytes a
//! parameter for the rest, and what a method holds of other ranks. Unlike `lasp plan`, which counts this project's trainer, it is
//! about any trainer that the machine's `training` section describes; temporaries of kernels are left out.

use runtime::estimate::Estimate;
use serde::Serialize;

use super::costs::{Costs, Pass, WIDE};
use super::machine::{Machine, Sharding};
use super::method::{Linear, Method, Softmax};

/// Bytes, of the rank with the most tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct MemoryUse {
    pub weights: f64,
    pub gradients: f64,
    pub optimizer: f64,
    pub activations: f64,
    pub logits: f64,
    /// States, keys and values of other ranks, of one layer.
    pub gathered: f64,
    pub reserved: f64,
    pub total: f64,
}

/// Bytes of a parameter on one rank: weight, gradient, optimizer.
pub fn parameter_bytes(machine: &Machine, gpus: usize) -> [f64; 3] {
    let training = &machine.training;
    let shards = training.shard_group(gpus) as f64;
    let [weights, others] = match training.sharding {
        Sharding::None => [1.0, 1.0],
        Sharding::Optimizer => [1.0, shards],
        Sharding::Full => [shards, shards],
    };
    [training.weight_bytes / weights, training.gradient_bytes / weights, training.optimizer_bytes / others]
}

pub fn count(machine: &Machine, costs: &Costs, method: &Method, estimate: &Estimate) -> MemoryUse {
    let training = &machine.training;
    let [weights, gradients, optimizer] = parameter_bytes(machine, costs.world).map(|bytes| bytes * costs.parameters());
    let kept = &estimate.memory.activations;
    let kept = if kept.checkpointing { kept.with_checkpointing } else { kept.without_checkpointing };
    let logits = match training.logit_bytes {
        0.0 => estimate.memory.loss as f64,
        bytes => bytes * costs.vocab() * costs.tokens,
    };
    let gathered = if costs.ranks > 1 { gathered(costs, method, estimate) } else { 0.0 };
    let mut memory = MemoryUse {
        weights,
        gradients,
        optimizer,
        activations: training.activation_factor * kept as f64,
        logits,
        gathered,
        reserved: machine.memory.reserved_gb * 1e9,
        total: 0.0,
    };
    // Logits in chunks are gone before backward gathers anything.
    let beside = if training.logit_bytes == 0.0 { logits.max(gathered) } else { logits + gathered };
    memory.total = weights + gradients + optimizer + memory.activations + beside + memory.reserved;
    memory
}

fn gathered(costs: &Costs, method: &Method, estimate: &Estimate) -> f64 {
    let ranks = costs.ranks as f64;
    let summary = costs.slots * (costs.state() + costs.decays(Pass::Forward));
    let whole = ranks * costs.rows();
    let linear = match method.linear {
        Linear::None => 0.0,
        Linear::Lasp2 { .. } | Linear::Truncated { .. } => ranks * summary,
        Linear::Lasp1 | Linear::AllScan { .. } => 2.0 * summary,
        Linear::Hierarchical { node } => (node as f64 + 2.0) * summary,
        Linear::RingLeftProduct => 2.0 * 2.0 * costs.rows() * (1.0 + WIDE / costs.width),
        Linear::MegatronSpLeftProduct => 2.0 * whole,
    };
    let keys = costs.keys();
    let sums = keys * WIDE / costs.width;
    let softmax = match method.softmax {
        Softmax::Lasp2h { stages } => ranks * (2.0 * keys / costs.stages(stages).len() as f64 + sums),
        Softmax::Ring => 2.0 * (keys + sums),
        Softmax::Ulysses => 4.0 * costs.rows(),
        Softmax::MegatronSp => 2.0 * whole,
    };
    let has = |letter: &str| estimate.shapes.iter().any(|shape| shape.place == letter);
    let linear = if has("linear layers") { linear } else { 0.0 };
    if has("softmax layers") { linear.max(softmax) } else { linear }
}
