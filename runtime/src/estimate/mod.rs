//! What a configuration would need, by formulas: parameters, memory, messages and floating-point operations of one rank
//! and one optimizer step. Nothing is allocated and no rank is started; `lasp plan` prints it.
//!
//! Parameters and traffic are exact (tests hold them against the model and the flight recorder), but for the messages of a
//! truncated scan, counted as if nothing decayed away. Memory is what the
//! formulas of `memory` count, which leaves out libraries and what an allocator leaves unused: peaks measured on the CPU,
//! with malloc kept from hoarding, grew with the tokens as estimated within 6 %, checkpointed within 16 %; on an H200 the
//! peaks of a pure linear model of 1.3 B parameters were as estimated within 0.5 % where kernels computed linear attention, within
//! 2 % where tensor operations did (a test has the figures), and within 4 % with its layers checkpointed. Documents, if sequences
//! have them, lower the work of softmax layers, which is counted as if each sequence were one; of the states that a GPU's kernels
//! save for them, the most that they can be is counted.

mod flops;
mod memory;
mod parameters;
mod traffic;

use serde::Serialize;

use crate::config::{Config, DeviceKind, LayerKind};
use crate::model::loss;
use crate::sequence::{self, Layout, Plan};

pub use flops::Flops;
pub use memory::{Activations, Memory};
pub use parameters::Parameters;
pub use traffic::{Message, Traffic};

/// All of it. Bytes, numbers and operations are counts, not units of thousands.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Estimate {
    pub mesh: MeshSizes,
    pub tokens: Tokens,
    pub shapes: Vec<Shape>,
    pub parameters: Parameters,
    pub memory: Memory,
    pub traffic: Traffic,
    pub flops: Flops,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MeshSizes {
    pub ranks: usize,
    pub sp: usize,
    pub dp: usize,
    pub layout: String,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tokens {
    pub sequence: i64,
    /// Of each rank of the sp axis, in rank order.
    pub per_rank: Vec<i64>,
    /// Optimizer step, over all ranks.
    pub step: i64,
    /// Forward passes of one rank in one step.
    pub passes: i64,
    /// Sequences of one pass.
    pub micro_batch: i64,
}

/// A tensor of one rank.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Shape {
    /// What has such a tensor: `every layer`, `linear layers`, ..
    pub place: &'static str,
    pub tensor: &'static str,
    pub letters: &'static str,
    pub sizes: Vec<i64>,
    pub kind: String,
}

/// The numbers that all formulas are made of, in the letters of algorithms.md.
#[derive(Debug, Clone)]
pub(crate) struct Sizes {
    pub b: i64,
    /// Tokens of the rank that has the most.
    pub t: i64,
    /// That rank's index on the sp axis.
    pub rank: usize,
    pub l: i64,
    pub w: i64,
    pub slots: i64,
    pub d: i64,
    pub h: i64,
    pub kv: i64,
    /// K = V.
    pub k: i64,
    pub mlp: i64,
    pub vocab: i64,
    pub chunk: i64,
    pub passes: i64,
    /// Bytes of a parameter or activation, and of a state, sum or moment.
    pub width: i64,
    pub wide: i64,
    pub linear_layers: i64,
    pub softmax_layers: i64,
}

/// Estimates a configuration whose mesh is resolved ([`Config::resolve_ranks`]).
pub fn estimate(config: &Config) -> sequence::Result<Estimate> {
    let (train, parallel) = (&config.train, &config.parallel);
    let layout = Layout::new(parallel.layout, train.seq_len as i64, parallel.sp)?;
    let per_rank = layout.tokens_per_rank();
    let sizes = Sizes::new(config, &layout);
    let parameters = Parameters::count(&config.model);
    Ok(Estimate {
        mesh: MeshSizes {
            ranks: parallel.sp * parallel.dp,
            sp: parallel.sp,
            dp: parallel.dp,
            layout: format!("{:?}", parallel.layout).to_lowercase(),
        },
        tokens: Tokens {
            sequence: sizes.l,
            per_rank,
            step: (train.batch * train.seq_len) as i64,
            passes: sizes.passes,
            micro_batch: sizes.b,
        },
        shapes: shapes(config, &sizes),
        memory: memory::count(config, &sizes, &parameters),
        traffic: traffic::count(config, &sizes, &Plan::new(layout, None, sizes.rank)?)?,
        flops: flops::count(config, &sizes, &parameters),
        parameters,
    })
}

/// The traffic of one step as rank `rank` of the sp axis sees it; [`Estimate::traffic`] is that of the one with the most tokens.
pub fn traffic_of(config: &Config, rank: usize) -> sequence::Result<Traffic> {
    let layout = Layout::new(config.parallel.layout, config.train.seq_len as i64, config.parallel.sp)?;
    let sizes = Sizes::new(config, &layout);
    traffic::count(config, &sizes, &Plan::new(layout, None, rank)?)
}

/// The traffic of the rank of the sp axis that moves the most bytes, the first of equals.
pub fn busiest_traffic(config: &Config) -> sequence::Result<Traffic> {
    let mut most = traffic_of(config, 0)?;
    for rank in 1..config.parallel.sp {
        let traffic = traffic_of(config, rank)?;
        if traffic.total.bytes() > most.total.bytes() {
            most = traffic;
        }
    }
    Ok(most)
}

impl Sizes {
    fn new(config: &Config, layout: &Layout) -> Sizes {
        let (model, train, parallel) = (&config.model, &config.train, &config.parallel);
        let kind = train.dtype.kind();
        let per_rank = layout.tokens_per_rank();
        let (rank, t) = per_rank.iter().copied().enumerate().rev().max_by_key(|(_, t)| *t).unwrap_or((0, 0));
        let softmax_layers = model.layer_kinds().iter().filter(|kind| **kind == LayerKind::Softmax).count() as i64;
        Sizes {
            b: train.micro_batch as i64,
            t,
            rank,
            l: layout.tokens(),
            w: parallel.sp as i64,
            slots: layout.slots() as i64,
            d: model.dim,
            h: model.heads,
            kv: model.kv_heads,
            k: model.head_dim(),
            mlp: model.mlp_dim,
            vocab: model.vocab,
            chunk: model.chunk,
            passes: (train.batch / parallel.dp.max(1) / train.micro_batch.max(1)) as i64,
            width: kind.elt_size_in_bytes() as i64,
            wide: kernels::linear::accumulation_kind(kind).elt_size_in_bytes() as i64,
            linear_layers: model.layers as i64 - softmax_layers,
            softmax_layers,
        }
    }
}

fn shapes(config: &Config, s: &Sizes) -> Vec<Shape> {
    let name = |bytes: i64| if bytes == s.width { format!("{:?}", config.train.dtype) } else { "F32".to_owned() };
    let shape = |place, tensor, letters, sizes: &[i64], bytes| {
        let kind = name(bytes).to_lowercase();
        Shape { place, tensor, letters, sizes: sizes.to_vec(), kind }
    };
    let mut shapes = vec![
        shape("every layer", "x", "[B, T, D]", &[s.b, s.t, s.d], s.width),
        shape("every layer", "gate, up", "[B, T, MLP]", &[s.b, s.t, s.mlp], s.width),
    ];
    if s.linear_layers > 0 {
        shapes.push(shape("linear layers", "q, k, v, o", "[B, T, H, K]", &[s.b, s.t, s.h, s.k], s.width));
        shapes.push(shape("linear layers", "state", "[B, H, K, V]", &[s.b, s.h, s.k, s.k], s.wide));
    }
    if s.softmax_layers > 0 {
        shapes.push(shape("softmax layers", "q, o", "[B, T, H, K]", &[s.b, s.t, s.h, s.k], s.width));
        shapes.push(shape("softmax layers", "k, v", "[B, T, Hkv, K]", &[s.b, s.t, s.kv, s.k], s.width));
        if sequence::method::lasp2h(&config.parallel.softmax_method).is_some() {
            shapes.push(shape("softmax layers", "gathered k, v", "[B, L, Hkv, K]", &[s.b, s.l, s.kv, s.k], s.width));
        }
    }
    let (chunk, bytes) = match config.train.device {
        DeviceKind::Cuda => (loss::chunk_cuda(s.vocab, s.b * s.t), s.width),
        DeviceKind::Auto | DeviceKind::Cpu => (loss::chunk(s.vocab, s.b * s.t), s.wide),
    };
    shapes.push(shape("loss", "logits", "[chunk, vocab]", &[chunk, s.vocab], bytes));
    shapes
}
