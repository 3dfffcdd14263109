//! How long the work of one rank takes and how many bytes it exchanges, per layer: the operations of `runtime::estimate` over
//! what the machine reaches. All ranks hold the same number of tokens, L / W, which need not be whole.
//!
//! Matrix products take their operations over `peak x matmul_efficiency`. What else a layer does, norms, activations and sums, is
//! bound by memory: each byte kept for backward is written and read once in forward, and in backward read, with its gradient
//! written and read. Linear attention takes the bytes of its tensors over `bandwidth x linear_efficiency`, or its operations,
//! whichever is longer.

use runtime::config::{DecayKind, LayerKind, LayoutKind};
use runtime::estimate::{Activations, Parameters};

use super::Workload;
use super::machine::Machine;

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
    pub layout: LayoutKind,
    pub slots: f64,
    /// D = H K.
    pub dim: f64,
    pub heads: f64,
    pub kv_heads: f64,
    head_dim: f64,
    chunk: f64,
    vocab: f64,
    /// Bytes of a number.
    pub width: f64,
    decay: DecayKind,
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
    ) -> Self {
        let model = &work.config.model;
        let count = |kind| model.layer_kinds().iter().filter(|found| **found == kind).count() as f64;
        Self {
            machine,
            whole: work.seq_len as f64,
            tokens: work.seq_len as f64 / work.gpus as f64,
            ranks: work.gpus,
            world: work.world(),
            layout,
            slots: if layout == LayoutKind::Zigzag { 2.0 } else { 1.0 },
            dim: model.dim as f64,
            heads: model.heads as f64,
            kv_heads: model.kv_heads as f64,
            head_dim: model.head_dim() as f64,
            chunk: model.chunk as f64,
            vocab: model.vocab as f64,
            width: work.config.train.dtype.kind().elt_size_in_bytes() as f64,
            decay: model.decay,
            parameters,
            layers: [count(LayerKind::Linear), count(LayerKind::Softmax)],
            activations,
        }
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
    pub fn linear(&self, pass: Pass) -> [f64; 2] {
        let per_head = self.head_dim * (4.0 * self.chunk.min(self.tokens) + 4.0 * self.head_dim);
        let (tensors, times, share) = match pass {
            Pass::Forward => (4.0, 1.0, SUMMARIZE[0]),
            Pass::Backward => (7.0, 2.0, SUMMARIZE[1]),
        };
        let decay = if self.decay == DecayKind::Channel { self.machine.compute.channel_decay_factor } else { 1.0 };
        let memory = self.bytes(tensors * self.rows()) / self.machine.compute.linear_efficiency;
        let products = self.products(times * self.tokens * self.heads * per_head);
        let seconds = decay * memory.max(products);
        [share * seconds, (1.0 - share) * seconds]
    }

    /// What entry states add: to o, or to dk and dv.
    pub fn add_entry(&self, pass: Pass) -> f64 {
        let (tensors, times) = if pass == Pass::Forward { (3.0, 1.0) } else { (6.0, 2.0) };
        self.bytes(tensors * self.rows()).max(self.products(times * 2.0 * self.dim * self.head_dim * self.tokens))
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
        self.dim * self.head_dim * WIDE
    }

    /// Bytes of the log-decays that travel with it: in forward, where they depend on the data.
    pub fn decays(&self, pass: Pass) -> f64 {
        match (pass, self.decay) {
            (Pass::Forward, DecayKind::Token) => self.heads * WIDE,
            (Pass::Forward, DecayKind::Channel) => self.dim * WIDE,
            _ => 0.0,
        }
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

    /// Visible pairs of `rank`'s queries and `owner`'s keys under the causal mask.
    pub fn pairs(&self, rank: usize, owner: usize) -> f64 {
        let block = self.tokens * self.tokens;
        match (self.layout, owner.cmp(&rank)) {
            (LayoutKind::Zigzag, _) | (_, std::cmp::Ordering::Equal) => block / 2.0,
            (LayoutKind::Contiguous, std::cmp::Ordering::Less) => block,
            (LayoutKind::Contiguous, std::cmp::Ordering::Greater) => 0.0,
        }
    }

    /// Those with all keys.
    pub fn all_pairs(&self, rank: usize) -> f64 {
        let block = self.tokens * self.tokens;
        match self.layout {
            LayoutKind::Contiguous => (rank as f64 + 0.5) * block,
            LayoutKind::Zigzag => self.ranks as f64 * block / 2.0,
        }
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

    /// KV heads of each stage of LASP-2H's pipeline, as shares of all: at most four stages.
    pub fn stages(&self) -> Vec<f64> {
        let stages = (self.kv_heads as usize).clamp(1, 4);
        let start = |stage: usize| (stage * self.kv_heads as usize / stages) as f64;
        (0..stages).map(|stage| (start(stage + 1) - start(stage)) / self.kv_heads).collect()
    }
}
