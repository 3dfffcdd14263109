//! Makes a [`Machine`] of the cost model out of what is measured here: collectives among the ranks, and the kernels on all
//! ranks at once, so that shared cores and memory count. f32 on the CPU. No figure without parity: the methods whose kernels
//! are timed agree with the f64 oracle first.

mod host;

use std::time::Instant;

use anyhow::{Context, Result, bail};
use collectives::bench::{self, COLLECTIVES};
use collectives::{Group, Reduce};
use kernels::linear::chunkwise::Chunkwise;
use kernels::linear::left_product;
use kernels::linear::{Decay, Inputs, StateMixer};
use kernels::softmax::{self, Tile};
use runtime::config::{Config, LayoutKind, OptimizerConfig};
use runtime::model::{Init, Params, Spec};
use runtime::train::optimizer::AdamW;
use tch::{Device, Kind, Tensor};

use crate::Timing;
use crate::compare::{Comparison, Method, Mixer, Mode, Options};
use crate::simulate::Machine;
use crate::simulate::host::Host;
use crate::simulate::machine::{Compute, Memory, Network, Overhead, Protocol, Sharding, Training};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);
const RUNS: usize = 7;
/// Tokens, heads, K = V and chunk of the attention kernels; tokens of those whose work grows with the square.
const TOKENS: i64 = 2048;
const HEADS: i64 = 8;
const DIM: i64 = 64;
const CHUNK: i64 = 64;
const SQUARE_TOKENS: i64 = 1024;
/// Numbers that are copied, and parameters that are updated.
const COPIED: i64 = 8 << 20;
const PARAMETERS: i64 = 2 << 20;
/// Seven products, five of them in backward, in pairs as forward has them: how the cost model counts attention.
const FORWARD_AND_BACKWARD: f64 = 3.5;
/// Bytes of the messages whose time is all latency, and of those whose time is all bandwidth.
const SMALL: u64 = 64;
const LARGE: u64 = 8 << 20;

/// What must be known of the machine and cannot be measured.
#[derive(Clone, Debug)]
pub struct Setting {
    pub name: String,
    /// Ranks of a node.
    pub node: usize,
    /// Bytes of memory of a node.
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

/// Collective over `world`, of at least two ranks; the same on every rank.
pub fn calibrate(world: &Group, setting: &Setting) -> Result<Calibration> {
    if world.size() < 2 {
        bail!("found 1 rank, expected at least 2, or nothing can be learned of the network (--ranks)");
    }
    parity(world)?;
    let mut measured = Vec::new();
    let network = network(world, setting.node, &mut measured)?;
    let (compute, memory) = kernels(world, setting, &mut measured)?;
    let host = Some(Host { network: setting.network.clone(), ..host::host(world, setting.quick, &mut measured)? });
    let machine = Machine {
        name: setting.name.clone(),
        gpus_per_node: setting.node.min(world.size()),
        compute,
        memory,
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

fn parity(world: &Group) -> Result<()> {
    let sizes = format!("[model]\nheads = {HEADS}\nkv_heads = {HEADS}\ndim = {}\nchunk = {CHUNK}\n", HEADS * DIM);
    for (mixer, methods, decay) in [
        (Mixer::Linear, "lasp2,ring_left_product", "none"),
        (Mixer::Linear, "lasp2", "channel"),
        (Mixer::Softmax, "lasp2h", "none"),
    ] {
        let config = Config::from_toml_str(&format!("{sizes}decay = \"{decay}\"\n"), "the sizes of calibrate", &[])?;
        let methods = Method::list(methods, mixer, LayoutKind::Contiguous)?;
        Comparison::new(world, &Options { mixer, mode: Mode::Operator, methods, rounds: 1, config })?;
    }
    Ok(())
}

/// Seconds that `body` takes on the slowest rank: the median of some runs, each from a barrier.
fn seconds(world: &Group, mut body: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut ms = Vec::with_capacity(RUNS);
    for run in 0..RUNS + 2 {
        world.barrier()?.wait()?;
        let start = Instant::now();
        body()?;
        let mine = Tensor::f_from_slice(&[1e3 * start.elapsed().as_secs_f64()])?;
        let slowest = world.all_reduce(&mine, Reduce::Max)?.wait()?.double_value(&[0]);
        if run >= 2 {
            ms.push(slowest);
        }
    }
    Ok(Timing::of(ms).median_ms / 1e3)
}

/// Latency of a hop and bytes a second of a link, and bytes a second and latency of an AllGather, in one group.
struct Links {
    hop_us: f64,
    link_gbps: f64,
    gather_us: f64,
    bus_gbps: f64,
}

fn links(group: &Group) -> Result<Links> {
    let of = |name: &str, size: u64| -> Result<bench::Row> {
        let collectives = COLLECTIVES.iter().filter(|collective| collective.name == name).collect();
        let options = bench::Options { collectives, sizes: vec![size], ..bench::Options::default() };
        bench::run(group, &options)?.pop().with_context(|| format!("no figures of {name}"))
    };
    let (hop, link) = (of("send_recv", SMALL)?, of("send_recv", LARGE)?);
    let (gather, bus) = (of("all_gather", SMALL)?, of("all_gather", LARGE)?);
    Ok(Links { hop_us: hop.median_us, link_gbps: link.busbw, gather_us: gather.median_us, bus_gbps: bus.busbw })
}

/// Inside a node from the ranks of the first one, between nodes from the ring of all ranks, whose slowest link it is. What a
/// small AllGather takes beyond its hops is the base latency.
fn network(world: &Group, node: usize, measured: &mut Vec<String>) -> Result<Network> {
    let say = |where_: &str, links: &Links| {
        format!(
            "{where_}: a hop {:.1} us, a link {:.3} GB/s; AllGather {:.1} us and {:.3} GB/s bus bandwidth",
            links.hop_us, links.link_gbps, links.gather_us, links.bus_gbps
        )
    };
    let of_node = world.split("calibrate", world.rank() / node.max(1), world.rank())?;
    let all = links(world)?;
    let nodes = world.size().div_ceil(node.max(1));
    // Other nodes measure theirs meanwhile, as they would work in a run; what counts is the first one's.
    let inside = if nodes > 1 && of_node.size() > 1 { Some(links(&of_node)?) } else { None };
    let mut numbers = [0.0; 4];
    if let Some(Links { hop_us, link_gbps, gather_us, bus_gbps }) = inside {
        numbers = [hop_us, link_gbps, gather_us, bus_gbps];
    }
    let first = world.broadcast(&Tensor::f_from_slice(&numbers)?, 0)?.wait()?;
    let at = |i: i64| first.double_value(&[i]);
    let several = at(0) > 0.0;
    let inside = match several {
        true => Links { hop_us: at(0), link_gbps: at(1), gather_us: at(2), bus_gbps: at(3) },
        false => Links { ..all },
    };
    let near = (if several { node } else { world.size() }).saturating_sub(1) as f64;
    measured.push(say("inside a node", &inside));
    if nodes > 1 {
        measured.push(say("between nodes", &all));
    } else {
        measured
            .push("between nodes: nothing measured, taken to be as inside; change inter_us and inter_gbps".to_owned());
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

/// What each kernel reaches, as the cost model (`simulate::costs`) counts its work.
fn kernels(world: &Group, setting: &Setting, measured: &mut Vec<String>) -> Result<(Compute, Memory)> {
    let _guard = tch::no_grad_guard();
    let random = |shape: &[i64]| Tensor::f_randn(shape, F32);

    let (from, mut to) = (random(&[COPIED])?, random(&[COPIED])?);
    let copy = seconds(world, || Ok(to.f_copy_(&from)?))?;
    let bandwidth = 2.0 * 4.0 * COPIED as f64 / copy;
    measured.push(format!("a copy: {:.2} GB/s, read and written", bandwidth / 1e9));

    let product = |rows: i64, inner: i64, columns: i64| -> Result<f64> {
        let (a, b) = (random(&[rows, inner])?, random(&[inner, columns])?);
        let s = seconds(world, || {
            let _ = a.f_matmul(&b)?;
            Ok(())
        })?;
        Ok(2.0 * (rows * inner * columns) as f64 / s)
    };
    let square = product(1024, 1024, 1024)?;
    let projection = product(TOKENS / 2, HEADS * DIM, HEADS * DIM)?;
    let peak = square.max(projection);
    measured.push(format!("products: {:.1} GFLOP/s square, {:.1} of a projection", square / 1e9, projection / 1e9));

    let linear = linear(world, None)?;
    let channel = Tensor::f_rand([1, TOKENS, HEADS, DIM], F32)?.f_mul_scalar(-0.1)?;
    let decayed = self::linear(world, Some(&channel))?;
    measured.push(format!(
        "chunkwise linear attention, forward and backward: {:.0} tokens/s, {:.0} with a decay per channel",
        TOKENS as f64 / linear,
        TOKENS as f64 / decayed
    ));
    // q, k, v, o in forward; q, k, v, do, dq, dk, dv in backward.
    let tensors = 11.0 * (TOKENS * HEADS * DIM * 4) as f64;

    let pairs = (SQUARE_TOKENS * SQUARE_TOKENS) as f64 / 2.0;
    let operations = FORWARD_AND_BACKWARD * 4.0 * (HEADS * DIM) as f64 * pairs;
    let softmax = operations / softmax_attention(world)?;
    let left = operations / left_products(world)?;
    measured.push(format!("softmax attention: {:.1} GFLOP/s; as (q k^T) v: {:.1}", softmax / 1e9, left / 1e9));

    let adam = adam(world)?;
    let modelled = 2.0 * 16.0 / bandwidth;
    measured.push(format!(
        "AdamW: {:.2} ns a parameter; its 32 bytes at the bandwidth of a copy would take {:.2}",
        1e9 * adam,
        1e9 * modelled
    ));
    // Of a core: more ranks than cores have measured shares of it.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let shared = (world.size() as f64 / cores as f64).max(1.0);
    let compute = Compute {
        peak_tflops: shared * peak / 1e12,
        matmul_efficiency: projection / peak,
        linear_efficiency: tensors / bandwidth / linear,
        channel_decay_factor: decayed / linear,
        softmax_efficiency: softmax / peak,
        left_product_efficiency: left / peak,
    };
    let ranks = setting.node.clamp(1, world.size()) as f64;
    let memory = Memory {
        bandwidth_gbps: shared * bandwidth / 1e9,
        optimizer_efficiency: modelled / adam,
        capacity_gb: setting.memory as f64 / ranks / 1e9,
        reserved_gb: 0.1,
    };
    Ok((compute, memory))
}

fn qkv(tokens: i64) -> Result<[Tensor; 4]> {
    let random = || Tensor::f_randn([1, tokens, HEADS, DIM], F32);
    Ok([random()?, random()?, random()?, random()?])
}

fn linear(world: &Group, log_decay: Option<&Tensor>) -> Result<f64> {
    let [q, k, v, d_o] = qkv(TOKENS)?;
    let (mixer, x) = (Chunkwise::new(CHUNK, 1.0)?, Inputs::new(&q, &k, &v, log_decay)?);
    seconds(world, || {
        let _ = mixer.forward(&x, None)?.finish()?;
        mixer.backward(&x, None, &d_o)?.finish()?;
        Ok(())
    })
}

fn softmax_attention(world: &Group) -> Result<f64> {
    let [q, k, v, d_o] = qkv(SQUARE_TOKENS)?;
    let tiles = [Tile { q: 0..SQUARE_TOKENS, k: 0..SQUARE_TOKENS, causal: true }];
    seconds(world, || {
        let (o, lse) = softmax::forward(&q, &k, &v, &tiles, 0.125)?;
        let _ = softmax::backward(&q, &k, &v, &o, &lse, &d_o, &tiles, 0.125)?;
        Ok(())
    })
}

fn left_products(world: &Group) -> Result<f64> {
    let [q, k, v, d_o] = qkv(SQUARE_TOKENS)?;
    let tiles = [left_product::Tile { q: 0..SQUARE_TOKENS, k: 0..SQUARE_TOKENS, ahead: 0 }];
    seconds(world, || {
        let _ = left_product::forward(&q, &k, &v, &Decay::None, &tiles, 0.125)?;
        left_product::backward(&q, &k, &v, &Decay::None, false, &d_o, &tiles, 0.125)?;
        Ok(())
    })
}

/// Seconds a parameter.
fn adam(world: &Group) -> Result<f64> {
    let specs = [Spec::new("parameters", &[PARAMETERS], Init::Constant(1.0), true)];
    let mut params = Params::new(&specs, Kind::Float, 0, Device::Cpu)?;
    let mut optimizer = AdamW::new(OptimizerConfig::default(), &params)?;
    let mut grad = Tensor::f_randn([PARAMETERS], F32)?;
    let mut step = 0;
    let update = seconds(world, || {
        step += 1;
        optimizer.step(&mut params, &mut grad, 1e-3, step)?;
        Ok(())
    })?;
    Ok(update / PARAMETERS as f64)
}
