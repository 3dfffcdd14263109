//! A machine as the cost model sees it: what a GPU computes and holds, what links carry, what a step costs besides. Read from
//! TOML and written to it, so that measurements can become a machine; unknown keys are errors. A file may start from an embedded
//! machine, `base = "h100-dgx"`, and give only what differs.
//!
//! Bandwidths are in 1e9 bytes a second, memory in 1e9 bytes. Sources of the presets' numbers are in their files; constants
//! that were fitted to published runs are listed in `fit`.

use std::path::Path;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::host::Host;
use super::{Error, Result};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    pub name: String,
    pub gpus_per_node: usize,
    pub compute: Compute,
    pub memory: Memory,
    pub network: Network,
    pub overhead: Overhead,
    pub training: Training,
    /// Where ranks are threads or processes that share cores: what was measured there. None where each has a GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<Host>,
}

/// What one GPU computes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compute {
    /// Of bf16 matrix products.
    pub peak_tflops: f64,
    /// Share of the peak that large matrix products reach.
    pub matmul_efficiency: f64,
    /// Share of the memory bandwidth that linear attention reaches, were each of its tensors read or written once.
    pub linear_efficiency: f64,
    /// How many times as long linear attention takes with a decay of each key channel.
    pub channel_decay_factor: f64,
    /// Share of the peak that softmax attention reaches.
    pub softmax_efficiency: f64,
    /// Share of the peak that linear attention reaches when computed as `(Q K^T) V`.
    pub left_product_efficiency: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// What a copy reaches, read and written.
    pub bandwidth_gbps: f64,
    /// What AdamW reaches of it, were what a parameter has read and written once.
    pub optimizer_efficiency: f64,
    pub capacity_gb: f64,
    /// Held by libraries.
    pub reserved_gb: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Of one GPU to others of its node; bus bandwidth of a ring inside a node.
    pub intra_gbps: f64,
    /// Of one GPU's NIC.
    pub inter_gbps: f64,
    /// Bus bandwidth of a ring that leaves the node, over all NICs.
    pub across_gbps: f64,
    /// What collectives reach of `intra_gbps` and `across_gbps`.
    pub collective_efficiency: f64,
    /// Host's cost of a communication call, on top of the protocol's.
    pub call_us: f64,
    /// Host's cost of a message in a chain or ring whose hops the host drives (LASP-1, Ring Attention).
    pub hop_us: f64,
    /// Whether the host passes states on only when it waits for them, after the intra-rank work, and drives All-Scan's hops too.
    pub host_chains: bool,
    pub simple: Protocol,
    pub ll128: Protocol,
    pub ll: Protocol,
}

/// One of NCCL's protocols, as its tuning tables describe them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Protocol {
    pub base_us: f64,
    /// Latency of a hop inside a node.
    pub intra_us: f64,
    /// Latency of a hop between nodes.
    pub inter_us: f64,
    /// Share of the link that carries payload.
    pub bandwidth_share: f64,
}

/// Time that no other part of the model accounts for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Overhead {
    pub step_ms: f64,
    /// Of a layer, in forward and in backward each.
    pub layer_us: f64,
}

/// How the training program keeps its state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Bytes a parameter.
    pub weight_bytes: f64,
    pub gradient_bytes: f64,
    pub optimizer_bytes: f64,
    pub sharding: Sharding,
    /// Ranks that share what is sharded; 0: all of them.
    pub shards: usize,
    /// Whether a layer's gradient is summed while the layers before it are in backward.
    pub gradient_overlap: bool,
    /// Activations kept for backward, as a multiple of what `lasp plan` counts for this project's model.
    pub activation_factor: f64,
    /// Bytes of logits and their gradients for a token and vocabulary entry; 0: logits exist for one chunk at a time.
    pub logit_bytes: f64,
}

/// What is spread over ranks instead of being on all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharding {
    None,
    /// The optimizer's state (ZeRO, stage 1).
    Optimizer,
    /// Weights and gradients too (ZeRO, stage 3; FSDP).
    Full,
}

const PRESETS: &[(&str, &str)] = &[
    ("a100-dgx", include_str!("machines/a100-dgx.toml")),
    ("h100-dgx", include_str!("machines/h100-dgx.toml")),
    ("h200-dgx", include_str!("machines/h200-dgx.toml")),
    ("epyc-2core", include_str!("machines/epyc-2core.toml")),
    ("lasp2-paper", include_str!("machines/lasp2-paper.toml")),
    ("zeco-paper", include_str!("machines/zeco-paper.toml")),
    ("h800", include_str!("machines/h800.toml")),
    ("h200-fla", include_str!("machines/h200-fla.toml")),
];

impl Machine {
    /// Names of the embedded machines: general ones, and those of the published runs.
    pub fn presets() -> impl Iterator<Item = &'static str> {
        PRESETS.iter().map(|(name, _)| *name)
    }

    /// An embedded machine by its name, or one from the TOML file of that path.
    pub fn load(name_or_path: &str) -> Result<Machine> {
        if let Some((name, text)) = PRESETS.iter().find(|(name, _)| *name == name_or_path) {
            return Machine::from_toml(text, name);
        }
        let text = std::fs::read_to_string(Path::new(name_or_path)).map_err(|source| Error::Machine {
            name: name_or_path.to_owned(),
            message: format!("{source}; expected a TOML file, or one of {}", names()),
        })?;
        Machine::from_toml(&text, name_or_path)
    }

    /// Parses and checks; `name` is what errors call the text.
    pub fn from_toml(text: &str, name: &str) -> Result<Machine> {
        let wrong = |message: String| Error::Machine { name: name.to_owned(), message };
        let syntax = |error: toml::de::Error| wrong(error.to_string().trim_end().to_owned());
        let mut table: Table = text.parse().map_err(syntax)?;
        if let Some(base) = table.remove("base") {
            let known = base.as_str().and_then(|base| PRESETS.iter().find(|(name, _)| *name == base));
            let (_, below) = known.ok_or_else(|| wrong(format!("base: found {base}, expected one of {}", names())))?;
            table = laid_over(below.parse().map_err(syntax)?, table);
        }
        let machine: Machine = table.try_into().map_err(syntax)?;
        machine.check().map_err(wrong)?;
        Ok(machine)
    }

    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self)
            .map_err(|error| Error::Machine { name: self.name.clone(), message: format!("cannot be written: {error}") })
    }

    fn check(&self) -> std::result::Result<(), String> {
        let (compute, memory, network) = (&self.compute, &self.memory, &self.network);
        let (training, overhead) = (&self.training, &self.overhead);
        let mut positive = vec![
            ("gpus_per_node", self.gpus_per_node as f64),
            ("compute.peak_tflops", compute.peak_tflops),
            ("compute.matmul_efficiency", compute.matmul_efficiency),
            ("compute.linear_efficiency", compute.linear_efficiency),
            ("compute.channel_decay_factor", compute.channel_decay_factor),
            ("compute.softmax_efficiency", compute.softmax_efficiency),
            ("compute.left_product_efficiency", compute.left_product_efficiency),
            ("memory.bandwidth_gbps", memory.bandwidth_gbps),
            ("memory.optimizer_efficiency", memory.optimizer_efficiency),
            ("memory.capacity_gb", memory.capacity_gb),
            ("network.intra_gbps", network.intra_gbps),
            ("network.inter_gbps", network.inter_gbps),
            ("network.across_gbps", network.across_gbps),
            ("network.collective_efficiency", network.collective_efficiency),
            ("training.activation_factor", training.activation_factor),
        ];
        let mut at_least_zero = vec![
            ("memory.reserved_gb", memory.reserved_gb),
            ("network.call_us", network.call_us),
            ("network.hop_us", network.hop_us),
            ("overhead.step_ms", overhead.step_ms),
            ("overhead.layer_us", overhead.layer_us),
            ("training.weight_bytes", training.weight_bytes),
            ("training.gradient_bytes", training.gradient_bytes),
            ("training.optimizer_bytes", training.optimizer_bytes),
            ("training.logit_bytes", training.logit_bytes),
        ];
        for protocol in network.protocols() {
            positive.push(("bandwidth_share of a protocol", protocol.bandwidth_share));
            let latencies = [protocol.base_us, protocol.intra_us, protocol.inter_us];
            at_least_zero.extend(latencies.map(|latency| ("a latency of a protocol", latency)));
        }
        for (key, found) in positive {
            if !(found.is_finite() && found > 0.0) {
                return Err(format!("{key}: found {found}, expected a number above 0"));
            }
        }
        for (key, found) in at_least_zero {
            if !(found.is_finite() && found >= 0.0) {
                return Err(format!("{key}: found {found}, expected a number of at least 0"));
            }
        }
        self.host.as_ref().map_or(Ok(()), Host::check)
    }
}

impl Training {
    /// Ranks of `gpus` that share one copy of what is sharded.
    pub fn shard_group(&self, gpus: usize) -> usize {
        if self.shards == 0 { gpus } else { self.shards.min(gpus) }
    }
}

fn names() -> String {
    Machine::presets().collect::<Vec<_>>().join(", ")
}

/// `above` where it has a value, `below` elsewhere.
fn laid_over(mut below: Table, above: Table) -> Table {
    for (key, value) in above {
        let value = match (below.remove(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => Value::Table(laid_over(below, above)),
            (_, above) => above,
        };
        below.insert(key, value);
    }
    below
}

impl Network {
    pub(super) fn protocols(&self) -> [&Protocol; 3] {
        [&self.simple, &self.ll128, &self.ll]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_parse_and_survive_writing() {
        for name in Machine::presets() {
            let machine = Machine::load(name).unwrap();
            assert_eq!(machine.name, name);
            assert_eq!(Machine::from_toml(&machine.to_toml().unwrap(), name).unwrap(), machine);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let text = Machine::load("h100-dgx").unwrap().to_toml().unwrap();
        let message = |text: String| Machine::from_toml(&text, "my.toml").unwrap_err().to_string();
        let unknown = message(text.replace("peak_tflops", "peak_flops"));
        assert!(unknown.contains("my.toml") && unknown.contains("unknown field `peak_flops`"), "{unknown}");
        let negative = message(text.replace("hop_us = 0.0", "hop_us = -1.0"));
        assert!(negative.contains("network.hop_us: found -1, expected a number of at least 0"), "{negative}");
        let base = message("base = \"h900\"".to_owned());
        assert!(base.contains("found \"h900\", expected one of a100-dgx"), "{base}");
        let missing = Machine::load("no-such-machine").unwrap_err().to_string();
        assert!(missing.contains("no-such-machine") && missing.contains("h100-dgx"), "{missing}");
    }
}
