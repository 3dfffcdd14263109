//! How long the work of one rank takes and how many bytes it exchanges, per layer: the operations of `runtime::estimate` over
//! what the machine reaches. All ranks hold the same number of tokens, L / W, which need not be whole.
//!
//! Matrix products take their operations over `peak x matmul_efficiency`. What else a layer does, norms, activations and sums, is
//! bound by memory: each byte kept for backward is written and read once in forward, and in backward read, with its gradient
//! written and read. Linear attention takes the bytes of its tensors over `bandwidth x linear_efficiency`, or its operations,
//! whichever is longer.

use runtime::config::{Config, DecayKind, LayerKind, LayoutKind};
use runtime::estimate::{Activations, Parameters};
use runtime::model::constant_log_decay;
use runtime::sequence::LayerSizes;
use runtime::sequence::attention::Lasp2h;
use runtime::sequence::scan::{DecayForm, Reach, StateSize};

use super::machine::Machine;
use super::packing::Packing;
use super::{Result, Workload};

/// Numbers of f32: states, and sums over ranks.
pub const WIDE: f64 = 4.0;
/// Backward of attention, in forwards: five products instead of two.
pub const ATTENTION_BACKWARD: f64 = 2.5;
/// The part of a mixer that makes the segment's summary: reading k and v of q, k, v twice and o; in backward q and do of nine.
const SUMMARIZE: [f64; 2] = [1.0 / 3.0, 0.25];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    Forward,
    Backward,
}

/// Of one rank.
#[derive(Clone, Debug)]
pub struct Costs<'a> {
    machine: &'a Machine,
    /// Tokens of the sequence, and of one rank.
    pub whole: f64,
    pub tokens: f64,
    pub ranks: usize,
    /// Ranks of all groups.
    pub world: usize,
    pub slots: f64,
    pub packing: Packing,
    /// D = H K.
    pub dim: f64,
    pub heads: f64,
    pub kv_heads: f64,
    head_dim: f64,
    /// For each rank, of its pieces the tokens times those of a chunk, which is no longer than its piece.
    chunked: Vec<f64>,
    vocab: f64,
    /// Bytes of a number.
    pub width: f64,
    pub decay: DecayKind,
    /// Of a linear layer.
    pub size: StateSize,
    parameters: Parameters,
    layers: [f64; 2],
    activations: Activations,
}

impl<'a> Costs<'a> {
    pub fn new(
        machine: &'a Machine,
        work: &Workload,
        layout: LayoutKind,
        parameters: Parameters,
        activations: Activations,
    ) -> Result<Self> {
        let model = &work.config.model;
        let packing = Packing::new(work, layout)?;
        let chunked = |rank: usize| {
            packing.pieces(rank).iter().map(|piece| (piece.tokens() * piece.tokens().min(model.chunk)) as f64).sum()
        };
        let count = |kind| model.layer_kinds().iter().filter(|found| **found == kind).count() as f64;
        Ok(Self {
            machine,
            whole: work.seq_len as f64,
            tokens: work.seq_len as f64 / work.gpus as f64,
            ranks: work.gpus,
            world: work.world(),
            slots: if layout == LayoutKind::Zigzag { 2.0 } else { 1.0 },
            dim: model.dim as f64,
            heads: model.heads as f64,
            kv_heads: model.kv_heads as f64,
            head_dim: model.head_dim() as f64,
            chunked: (0..work.gpus).map(chunked).collect(),
            packing,
            vocab: model.vocab as f64,
            width: work.config.train.dtype.kind().elt_size_in_bytes() as f64,
            decay: model.decay,
            size: StateSize::of_layer(&layer_sizes(work.config, LayerKind::Linear), DecayForm::of(model.decay)),
            parameters,
            layers: [count(LayerKind::Linear), count(LayerKind::Softmax)],
            activations,
        })
    }

    /// Norm and projections before the mixer; output projection, norm and MLP after it.
    pub fn dense(&self, kind: LayerKind, pass: Pass) -> [f64; 2] {
        let mixer = self.mixer_parameters(kind);
        let kept = match kind {
            LayerKind::Linear => self.activations.linear_layer,
            LayerKind::Softmax => self.activations.softmax_layer,
        };
        let around = self.bytes(kept as f64 * self.machine.training.activation_factor) / 2.0;
        let mlp = self.parameters.mlp as f64 / (self.layers[0] + self.layers[1]);
        let output = self.dim * self.dim;
        let (products, passes) = if pass == Pass::Forward { (1.0, 2.0) } else { (2.0, 3.0) };
        let part = |parameters: f64| products * self.products(2.0 * parameters * self.tokens) + passes * around;
        let launch = self.machine.overhead.layer_us * 1e-6;
        [part(mixer - output) + launch, part(output + mlp)]
    }

    pub fn machine(&self) -> &Machine {
        self.machine
    }

    fn mixer_parameters(&self, kind: LayerKind) -> f64 {
        let (all, layers) = match kind {
            LayerKind::Linear => (self.parameters.linear_attention, self.layers[0]),
            LayerKind::Softmax => (self.parameters.softmax_attention, self.layers[1]),
        };
        all as f64 / layers.max(1.0)
    }

    pub fn parameters(&self) -> f64 {
        self.parameters.total as f64
    }

    /// Of one layer, the MLP's included.
    pub fn layer_parameters(&self, kind: LayerKind) -> f64 {
        self.mixer_parameters(kind) + self.parameters.mlp as f64 / (self.layers[0] + self.layers[1])
    }

    /// Linear attention of one rank by itself: its summaries, and the rest of the intra-rank work.
    pub fn linear(&self, rank: usize, pass: Pass) -> [f64; 2] {
        let of_head = 4.0 * self.head_dim * (self.chunked[rank] + self.head_dim * self.tokens);
        let (tensors, times, share) = match pass {
            Pass::Forward => (4.0, 1.0, SUMMARIZE[0]),
            Pass::Backward => (7.0, 2.0, SUMMARIZE[1]),
        };
        let decay = if self.decay == DecayKind::Channel { self.machine.compute.channel_decay_factor } else { 1.0 };
        let memory = self.bytes(tensors * self.rows()) / self.machine.compute.linear_efficiency;
        let products = self.products(times * self.heads * of_head);
        let seconds = decay * memory.max(products);
        [share * seconds, (1.0 - share) * seconds]
    }

    /// What entry states add: to o, or to dk and dv, of the tokens of documents that go on from other segments.
    pub fn add_entry(&self, rank: usize, pass: Pass) -> f64 {
        let (tensors, times) = if pass == Pass::Forward { (3.0, 1.0) } else { (6.0, 2.0) };
        let tokens = self.packing.entered(rank, pass);
        let bytes = tensors * tokens * self.dim * self.width;
        self.bytes(bytes).max(self.products(times * 2.0 * self.dim * self.head_dim * tokens))
    }

    /// How far back states of linear layer `layer` matter to a truncated scan. Where decays depend on the data, or it is not said
    /// which layer: everywhere.
    pub fn reach(&self, layer: Option<usize>, layers: usize, pass: Pass) -> Reach {
        match layer.and_then(|layer| constant_log_decay(self.decay, self.heads as i64, layer, layers)) {
            Some(log_decay) => Reach::constant(&log_decay, self.packing.chain(pass), self.size.width),
            None => Reach::full(),
        }
    }

    /// A pass over `bytes` of memory.
    pub fn bytes(&self, bytes: f64) -> f64 {
        bytes / (self.machine.memory.bandwidth_gbps * 1e9)
    }

    /// q of one rank, or any tensor of its size.
    pub fn rows(&self) -> f64 {
        self.tokens * self.dim * self.width
    }

    /// K and V of one rank in a softmax layer.
    pub fn keys(&self) -> f64 {
        self.tokens * self.kv_heads * 2.0 * self.head_dim * self.width
    }

    /// Bytes of a segment's state.
    pub fn state(&self) -> f64 {
        self.size.state() as f64
    }

    /// Bytes of the log-decays that travel with it: in forward, where they depend on the data.
    pub fn decays(&self, pass: Pass) -> f64 {
        if pass == Pass::Forward { self.size.decays() as f64 } else { 0.0 }
    }

    /// Softmax attention over `pairs` of a query and a key, with all heads.
    pub fn softmax(&self, pairs: f64, pass: Pass) -> f64 {
        self.attention(pairs, pass, self.machine.compute.softmax_efficiency)
    }

    /// The same of linear attention as `(Q K^T) V`.
    pub fn left_product(&self, pairs: f64, pass: Pass) -> f64 {
        self.attention(pairs, pass, self.machine.compute.left_product_efficiency)
    }

    fn attention(&self, pairs: f64, pass: Pass, efficiency: f64) -> f64 {
        let times = if pass == Pass::Forward { 1.0 } else { ATTENTION_BACKWARD };
        times * 4.0 * self.dim * pairs / (self.machine.compute.peak_tflops * 1e12 * efficiency)
    }

    /// Logits and cross-entropy, forward and backward: three products, and four passes over f32 logits.
    pub fn loss(&self) -> f64 {
        3.0 * self.products(2.0 * self.vocab * self.dim * self.tokens)
            + self.bytes(4.0 * WIDE * self.tokens * self.vocab)
    }

    /// AdamW: all that a parameter has is read and written.
    pub fn optimizer(&self, bytes: f64) -> f64 {
        self.bytes(2.0 * bytes) / self.machine.memory.optimizer_efficiency
    }

    fn products(&self, operations: f64) -> f64 {
        operations / (self.machine.compute.peak_tflops * 1e12 * self.machine.compute.matmul_efficiency)
    }

    pub fn vocab(&self) -> f64 {
        self.vocab
    }

    /// KV heads of each stage of LASP-2H's pipeline, as shares of all: at most so many stages.
    pub fn stages(&self, stages: usize) -> Vec<f64> {
        let stages = Lasp2h { stages }.stages(self.kv_heads as i64);
        stages.into_iter().map(|(_, heads)| heads as f64 / self.kv_heads).collect()
    }
}

/// Sizes of a layer, of one sequence.
pub fn layer_sizes(config: &Config, kind: LayerKind) -> LayerSizes {
    let model = &config.model;
    LayerSizes {
        b: 1,
        heads: model.heads,
        kv_heads: if kind == LayerKind::Linear { model.heads } else { model.kv_heads },
        dk: model.head_dim(),
        dv: model.head_dim(),
        kind: config.train.dtype.kind(),
    }
}
