//! Makes a [`Machine`] of the cost model out of what is measured here: collectives among the ranks, and the kernels on all
//! ranks at once, so that shared cores and memory count. f32 on CPUs, bf16 on GPUs, where what is not measured is a preset's.
//! No figure without parity: the methods whose kernels are timed agree with the f64 oracle first.

mod host;

use std::time::Instant;

use anyhow::{Context, Result, bail};
use collectives::bench::{self, COLLECTIVES};
use collectives::{Group, Reduce};
use kernels::linear::left_product;
use kernels::linear::{Decay, Inputs};
use kernels::softmax::{self, Tile};
use runtime::config::{Config, LayoutKind, OptimizerConfig};
use runtime::model::{Init, Params, Spec};
use runtime::train::optimizer::AdamW;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

pub use host::{KINDS, kernels};

use crate::compare::{Comparison, Method, Mixer, Mode, Options};
use crate::exchange::gather;
use crate::simulate::Machine;
use crate::simulate::host::Host;
use crate::simulate::machine::{Compute, Memory, Network, Overhead, Protocol, Sharding, Training};
use crate::{Timing, settle};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);
const RUNS: usize = 7;
/// Heads, K = V and chunk of the attention kernels on a CPU.
const HEADS: i64 = 8;
const DIM: i64 = 64;
const CHUNK: i64 = 64;

/// How large what is measured is: on a GPU, large enough to fill it.
struct Sizes {
    /// Of the attention kernels; tokens of those whose work grows with the square.
    tokens: i64,
    square_tokens: i64,
    heads: i64,
    dim: i64,
    /// Of the factors of a square matrix product.
    side: i64,
    /// Numbers that are copied, and parameters that are updated.
    copied: i64,
    parameters: i64,
    /// Bytes of messages whose time is all bandwidth.
    message: u64,
}

const ON_CPU: Sizes = Sizes {
    tokens: 2048,
    square_tokens: 1024,
    heads: HEADS,
    dim: DIM,
    side: 1024,
    copied: 8 << 20,
    parameters: 2 << 20,
    message: 8 << 20,
};

const ON_GPU: Sizes = Sizes {
    tokens: 32768,
    square_tokens: 16384,
    heads: 16,
    dim: 128,
    side: 8192,
    copied: 256 << 20,
    parameters: 256 << 20,
    message: 128 << 20,
};

/// Seven products, five of them in backward, in pairs as forward has them: how the cost model counts attention.
const FORWARD_AND_BACKWARD: f64 = 3.5;
/// Bytes of the messages whose time is all latency.
const SMALL: u64 = 64;

/// What must be known of the machine and cannot be measured.
#[derive(Clone, Debug)]
pub struct Setting {
    pub name: String,
    /// What this rank computes on.
    pub device: Device,
    /// Ranks of a node, and GPUs if ranks have GPUs.
    pub node: usize,
    pub gpus: usize,
    /// Bytes of memory of a node, without GPUs'.
    pub memory: u64,
    /// The network, if it is emulated.
    pub network: Option<String>,
    /// Whether to measure the kernels of the host once and at few sizes.
    pub quick: bool,
}

/// A machine, and the measurements behind it as lines to read.
#[derive(Clone, Debug)]
pub struct Calibration {
    pub machine: Machine,
    pub measured: Vec<String>,
}

/// Collective over `world`, of at least two ranks but on a GPU; the same on every rank.
pub fn calibrate(world: &Group, setting: &Setting) -> Result<Calibration> {
    if setting.device.is_cuda() {
        return on_gpu(world, setting);
    }
    if world.size() < 2 {
        bail!("found 1 rank, expected at least 2, or nothing can be learned of the network (--ranks)");
    }
    let on = On { world, device: Device::Cpu, kind: Kind::Float, sizes: &ON_CPU };
    on.parity()?;
    let mut measured = Vec::new();
    let network = on.network(setting.node, &mut measured)?;
    let (compute, bandwidth_gbps, optimizer_efficiency) = on.kernels(&mut measured)?;
    let ranks = setting.node.clamp(1, world.size()) as f64;
    let host = Some(Host { network: setting.network.clone(), ..host::host(world, setting.quick, &mut measured)? });
    let machine = Machine {
        name: setting.name.clone(),
        gpus_per_node: setting.node.min(world.size()),
        compute,
        memory: Memory {
            bandwidth_gbps,
            optimizer_efficiency,
            capacity_gb: setting.memory as f64 / ranks / 1e9,
            reserved_gb: 0.1,
        },
        network,
        overhead: Overhead { step_ms: 0.0, layer_us: 0.0 },
        // As `runtime::train` keeps them in f32; gradients are summed once, after backward.
        training: Training {
            weight_bytes: 4.0,
            gradient_bytes: 4.0,
            optimizer_bytes: 8.0,
            sharding: Sharding::None,
            shards: 0,
            gradient_overlap: false,
            activation_factor: 1.0,
            logit_bytes: 0.0,
        },
        host,
    };
    Ok(Calibration { machine, measured })
}

/// The preset of this GPU with what can be measured in its place: its kernels, and with several ranks the links between them.
fn on_gpu(world: &Group, setting: &Setting) -> Result<Calibration> {
    if world.size().min(setting.node) > setting.gpus {
        bail!(
            "found {} ranks on {} GPUs of a node, expected no more ranks than GPUs: what ranks take from each other is not a \
             machine's (--ranks)",
            setting.node,
            setting.gpus
        );
    }
    let on = On { world, device: setting.device, kind: Kind::BFloat16, sizes: &ON_GPU };
    let found = kernels::cuda::name(on.device)?;
    let preset = preset(&found);
    let base = Machine::load(preset)?;
    on.parity()?;
    let mut measured = vec![format!("{found}; what is not measured is that of the preset {preset}")];
    let network = match world.size() {
        1 => base.network.clone(),
        ranks => {
            let network = on.network(setting.node, &mut measured)?;
            // Within one node nothing is learned of what lies between nodes.
            if ranks > setting.node { network } else { between_nodes_as(&base.network, network) }
        }
    };
    let network = Network { host_chains: base.network.host_chains, ..network };
    let (compute, bandwidth_gbps, optimizer_efficiency) = on.kernels(&mut measured)?;
    let machine = Machine {
        name: setting.name.clone(),
        gpus_per_node: setting.gpus,
        compute,
        memory: Memory { bandwidth_gbps, optimizer_efficiency, ..base.memory },
        network,
        // As `runtime::train` keeps them: bf16 parameters, the lower half of the master weights, two moments, sums in f32 after
        // backward.
        training: Training {
            weight_bytes: 2.0,
            gradient_bytes: 4.0,
            optimizer_bytes: 10.0,
            gradient_overlap: false,
            ..base.training
        },
        ..base
    };
    Ok(Calibration { machine, measured })
}

/// The preset that is nearest to a GPU of this name.
fn preset(gpu: &str) -> &'static str {
    let known = [("H200", "h200-dgx"), ("H100", "h100-dgx"), ("A100", "a100-dgx")];
    known.iter().find(|(name, _)| gpu.contains(name)).map_or("h100-dgx", |(_, preset)| preset)
}

fn between_nodes_as(base: &Network, inside: Network) -> Network {
    let with = |protocol: Protocol, base: &Protocol| Protocol { inter_us: base.inter_us, ..protocol };
    Network {
        inter_gbps: base.inter_gbps,
        across_gbps: base.across_gbps,
        simple: with(inside.simple, &base.simple),
        ll128: with(inside.ll128, &base.ll128),
        ll: with(inside.ll, &base.ll),
        ..inside
    }
}

/// Latency of a hop and bandwidth of a link, latency and bus bandwidth of an AllGather, in one group.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Links {
    hop_us: f64,
    link_gbps: f64,
    gather_us: f64,
    bus_gbps: f64,
}

/// Ranks at work, and what on.
struct On<'a> {
    world: &'a Group,
    device: Device,
    kind: Kind,
    sizes: &'static Sizes,
}

impl On<'_> {
    fn parity(&self) -> Result<()> {
        let Sizes { heads, dim, .. } = *self.sizes;
        let dtype = if self.kind == Kind::BFloat16 { "bf16" } else { "f32" };
        for (mixer, methods, decay) in [
            (Mixer::Linear, "lasp2,ring_left_product", "none"),
            (Mixer::Linear, "lasp2", "channel"),
            (Mixer::Softmax, "lasp2h", "none"),
        ] {
            let text = format!(
                "[model]\nheads = {heads}\nkv_heads = {heads}\ndim = {}\nchunk = {CHUNK}\ndecay = \"{decay}\"\n\
                 [train]\ndtype = \"{dtype}\"\n",
                heads * dim
            );
            let config = Config::from_toml_str(&text, "the sizes of calibrate", &[])?;
            let methods = Method::list(methods, mixer, LayoutKind::Contiguous)?;
            let mode = Mode::Operator;
            Comparison::new(self.world, &Options { mixer, mode, methods, rounds: 1, device: self.device, config })?;
        }
        Ok(())
    }

    /// Seconds that `body` takes on the slowest rank: the median of some runs, each from a barrier until the device is through.
    fn seconds(&self, mut body: impl FnMut() -> Result<()>) -> Result<f64> {
        let mut ms = Vec::with_capacity(RUNS);
        for run in 0..RUNS + 2 {
            settle(self.device);
            self.world.barrier()?.wait()?;
            let start = Instant::now();
            body()?;
            settle(self.device);
            let mine = Tensor::f_from_slice(&[1e3 * start.elapsed().as_secs_f64()])?;
            let slowest = self.world.all_reduce(&mine, Reduce::Max)?.wait()?.double_value(&[0]);
            if run >= 2 {
                ms.push(slowest);
            }
        }
        Ok(Timing::of(ms).median_ms / 1e3)
    }

    fn links(&self, group: &Group) -> Result<Links> {
        let of = |name: &str, size: u64| -> Result<bench::Row> {
            let collectives = COLLECTIVES.iter().filter(|collective| collective.name == name).collect();
            let (sizes, device) = (vec![size], self.device);
            let options = bench::Options { collectives, sizes, device, ..bench::Options::default() };
            bench::run(group, &options)?.pop().with_context(|| format!("no figures of {name}"))
        };
        let (hop, link) = (of("send_recv", SMALL)?, of("send_recv", self.sizes.message)?);
        let (gather, bus) = (of("all_gather", SMALL)?, of("all_gather", self.sizes.message)?);
        Ok(Links { hop_us: hop.median_us, link_gbps: link.busbw, gather_us: gather.median_us, bus_gbps: bus.busbw })
    }

    /// Inside a node from the ranks of the first one, between nodes from the ring of all ranks, whose slowest link it is. What a
    /// small AllGather takes beyond its hops is the base latency.
    fn network(&self, node: usize, measured: &mut Vec<String>) -> Result<Network> {
        let world = self.world;
        let say = |where_: &str, links: &Links| {
            format!(
                "{where_}: a hop {:.1} us, a link {:.3} GB/s; AllGather {:.1} us and {:.3} GB/s bus bandwidth",
                links.hop_us, links.link_gbps, links.gather_us, links.bus_gbps
            )
        };
        let of_node = world.split("calibrate", world.rank() / node.max(1), world.rank())?;
        let all = self.links(world)?;
        let nodes = world.size().div_ceil(node.max(1));
        // Other nodes measure theirs meanwhile, as they would work in a run; what counts is the first one's.
        let inside = if nodes > 1 && of_node.size() > 1 { Some(self.links(&of_node)?) } else { None };
        let inside = gather(world, &inside)?.swap_remove(0);
        let near = (if inside.is_some() { node } else { world.size() }).saturating_sub(1) as f64;
        let inside = inside.unwrap_or(all);
        measured.push(say("inside a node", &inside));
        if nodes > 1 {
            measured.push(say("between nodes", &all));
        } else {
            measured.push(
                "between nodes: nothing measured, taken to be as inside; change inter_us and inter_gbps".to_owned(),
            );
        }
        let protocol = Protocol {
            base_us: (inside.gather_us - near * inside.hop_us).max(0.0),
            intra_us: inside.hop_us,
            inter_us: all.hop_us,
            bandwidth_share: 1.0,
        };
        Ok(Network {
            intra_gbps: inside.bus_gbps,
            inter_gbps: all.link_gbps,
            across_gbps: all.bus_gbps,
            collective_efficiency: 1.0,
            call_us: 0.0,
            hop_us: 0.0,
            // A chain's states are passed on where they are waited for: `runtime::sequence::scan::relay`.
            host_chains: true,
            simple: protocol.clone(),
            ll128: protocol.clone(),
            ll: protocol,
        })
    }

    /// What each kernel reaches, as the cost model (`simulate::costs`) counts its work; then GB/s of the memory, and what AdamW reaches
    /// of that.
    fn kernels(&self, measured: &mut Vec<String>) -> Result<(Compute, f64, f64)> {
        let _guard = tch::no_grad_guard();
        let Sizes { tokens, square_tokens, heads, dim, side, copied, .. } = *self.sizes;
        let width = self.kind.elt_size_in_bytes() as f64;

        let (from, mut to) = (self.random(&[copied])?, self.random(&[copied])?);
        let copy = self.seconds(|| Ok(to.f_copy_(&from)?))?;
        let bandwidth = 2.0 * width * copied as f64 / copy;
        measured.push(format!("a copy: {:.2} GB/s, read and written", bandwidth / 1e9));

        let product = |rows: i64, inner: i64, columns: i64| -> Result<f64> {
            let (a, b) = (self.random(&[rows, inner])?, self.random(&[inner, columns])?);
            let s = self.seconds(|| {
                let _ = a.f_matmul(&b)?;
                Ok(())
            })?;
            Ok(2.0 * (rows * inner * columns) as f64 / s)
        };
        let square = product(side, side, side)?;
        let projection = product(tokens / 2, heads * dim, heads * dim)?;
        let peak = square.max(projection);
        measured.push(format!("products: {:.1} GFLOP/s square, {:.1} of a projection", square / 1e9, projection / 1e9));

        let linear = self.linear(None)?;
        let channel = Tensor::f_rand([1, tokens, heads, dim], (self.kind, self.device))?.f_mul_scalar(-0.1)?;
        let decayed = self.linear(Some(&channel))?;
        measured.push(format!(
            "chunkwise linear attention, forward and backward: {:.0} tokens/s, {:.0} with a decay per channel",
            tokens as f64 / linear,
            tokens as f64 / decayed
        ));
        // q, k, v, o in forward; q, k, v, do, dq, dk, dv in backward.
        let tensors = 11.0 * width * (tokens * heads * dim) as f64;

        let pairs = (square_tokens * square_tokens) as f64 / 2.0;
        let operations = FORWARD_AND_BACKWARD * 4.0 * (heads * dim) as f64 * pairs;
        let softmax = operations / self.softmax_attention()?;
        let left = operations / self.left_products()?;
        measured.push(format!("softmax attention: {:.1} GFLOP/s; as (q k^T) v: {:.1}", softmax / 1e9, left / 1e9));

        let adam = self.adam()?;
        let modelled = 2.0 * 16.0 / bandwidth;
        measured.push(format!(
            "AdamW: {:.2} ns a parameter; its 32 bytes at the bandwidth of a copy would take {:.2}",
            1e9 * adam,
            1e9 * modelled
        ));
        // Of a core: more ranks than cores have measured shares of it.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let shared = if self.device.is_cuda() { 1.0 } else { (self.world.size() as f64 / cores as f64).max(1.0) };
        let compute = Compute {
            peak_tflops: shared * peak / 1e12,
            matmul_efficiency: projection / peak,
            linear_efficiency: tensors / bandwidth / linear,
            channel_decay_factor: decayed / linear,
            softmax_efficiency: softmax / peak,
            left_product_efficiency: left / peak,
        };
        Ok((compute, shared * bandwidth / 1e9, modelled / adam))
    }

    fn random(&self, shape: &[i64]) -> Result<Tensor> {
        Ok(Tensor::f_randn(shape, (self.kind, self.device))?)
    }

    fn qkv(&self, tokens: i64) -> Result<[Tensor; 4]> {
        let random = || self.random(&[1, tokens, self.sizes.heads, self.sizes.dim]);
        Ok([random()?, random()?, random()?, random()?])
    }

    fn linear(&self, log_decay: Option<&Tensor>) -> Result<f64> {
        let [q, k, v, d_o] = self.qkv(self.sizes.tokens)?;
        let (mixer, x) = (kernels::linear::mixer(CHUNK, 1.0)?, Inputs::new(&q, &k, &v, log_decay)?);
        self.seconds(|| {
            let _ = mixer.forward(&x, None)?.finish()?;
            mixer.backward(&x, None, &d_o)?.finish()?;
            Ok(())
        })
    }

    fn softmax_attention(&self) -> Result<f64> {
        let tokens = self.sizes.square_tokens;
        let [q, k, v, d_o] = self.qkv(tokens)?;
        let tiles = [Tile { q: 0..tokens, k: 0..tokens, causal: true }];
        self.seconds(|| {
            let (o, lse) = softmax::forward(&q, &k, &v, &tiles, 0.125)?;
            let _ = softmax::backward(&q, &k, &v, &o, &lse, &d_o, &tiles, 0.125)?;
            Ok(())
        })
    }

    fn left_products(&self) -> Result<f64> {
        let tokens = self.sizes.square_tokens;
        let [q, k, v, d_o] = self.qkv(tokens)?;
        let tiles = [left_product::Tile { q: 0..tokens, k: 0..tokens, ahead: 0 }];
        self.seconds(|| {
            let _ = left_product::forward(&q, &k, &v, &Decay::None, &tiles, 0.125)?;
            left_product::backward(&q, &k, &v, &Decay::None, false, &d_o, &tiles, 0.125)?;
            Ok(())
        })
    }

    /// Seconds a parameter.
    fn adam(&self) -> Result<f64> {
        let count = self.sizes.parameters;
        let specs = [Spec::new("parameters", &[count], Init::Constant(1.0), true)];
        let mut params = Params::new(&specs, self.kind, 0, self.device)?;
        let mut optimizer = AdamW::new(OptimizerConfig::default(), &params)?;
        let mut grad = Tensor::f_randn([count], (Kind::Float, self.device))?;
        let mut step = 0;
        let update = self.seconds(|| {
            step += 1;
            optimizer.step(&mut params, &mut grad, 1e-3, step)?;
            Ok(())
        })?;
        Ok(update / count as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_node_cannot_tell_is_the_presets() {
        for (gpu, expected) in [("NVIDIA H200", "h200-dgx"), ("NVIDIA A100-SXM4-80GB", "a100-dgx"), ("?", "h100-dgx")] {
            assert_eq!(preset(gpu), expected);
            assert!(Machine::load(preset(gpu)).is_ok());
        }
        let base = Machine::load("h100-dgx").unwrap().network;
        let ours = Protocol { base_us: 1.0, intra_us: 2.0, inter_us: 2.0, bandwidth_share: 1.0 };
        let inside = Network {
            intra_gbps: 400.0,
            inter_gbps: 400.0,
            across_gbps: 400.0,
            simple: ours.clone(),
            ll128: ours.clone(),
            ll: ours,
            ..base.clone()
        };
        let network = between_nodes_as(&base, inside);
        assert_eq!((network.intra_gbps, network.inter_gbps, network.across_gbps), (400.0, 47.0, 200.0));
        assert_eq!((network.ll.intra_us, network.ll.inter_us), (2.0, base.ll.inter_us));
    }
}
