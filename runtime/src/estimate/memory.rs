//! Memory of one rank, in bytes, counted tensor by tensor: what lives through a step, what forward keeps for backward, and
//! what an operator, the loss, a method's messages and the update need besides, only one of them at a time.
//!
//! With `train.device = "cuda"` it is what `model::fused` keeps and works with, on a GPU of compute capability 9.0, where
//! kernels compute linear attention in bf16.

use serde::Serialize;

use super::{Parameters, Sizes};
use crate::config::{Config, DataKind, DecayKind, DeviceKind, Dtype};
use crate::model::{DECAY_RANK, HIDDEN_AT_ONCE, loss};
use crate::sequence::method;
use crate::train::gradients;

/// Multiprocessors of the largest such GPU: a state in f32 is kept for each, see [`states_inside`].
const MULTIPROCESSORS: i64 = 132;

/// Queries, and keys, of a block of scores of the left products.
const SCORES: i64 = 512;

/// Of the rank with the most tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Memory {
    pub weights: i64,
    /// Into which every backward of a step adds.
    pub gradients: i64,
    /// Two moments and, for bf16 weights, the master weights; on a GPU only the half of these that the weights are not.
    pub optimizer: i64,
    pub master_weights: bool,
    pub activations: Activations,
    /// The largest of the operators at work in backward.
    pub operator: i64,
    /// What the larger of the two methods holds for and of other ranks, with its sums.
    pub gathers: i64,
    /// One chunk of logits, and the gradient of the output projection.
    pub loss: i64,
    /// Sums of the gradient over ranks, under way beside backward.
    pub sums: i64,
    /// What AdamW computes with, and the sums that come after backward.
    pub update: i64,
    /// The most at any time.
    pub total: i64,
}

/// What forward keeps for backward, of one pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Activations {
    pub linear_layer: i64,
    pub softmax_layer: i64,
    pub without_checkpointing: i64,
    pub with_checkpointing: i64,
    /// Whether `train.activation_checkpointing` is set.
    pub checkpointing: bool,
}

pub(super) fn count(config: &Config, s: &Sizes, parameters: &Parameters) -> Memory {
    let (p, gpu) = (parameters.total, gpu(config));
    let gradient = gradient_width(config, s);
    let fused_update = gpu && config.train.dtype == Dtype::Bf16;
    let master = match s.width < s.wide {
        true if fused_update => s.wide - s.width,
        true => s.wide,
        false => 0,
    };
    // The square of the gradient, the root, the step.
    let steps = if fused_update { 0 } else { 3 * s.wide };
    let (sums, last_sums) = sums(config, s);
    let activations = activations(config, s);
    let mut memory = Memory {
        weights: p * s.width,
        gradients: p * gradient,
        optimizer: p * (2 * s.wide + master),
        master_weights: master > 0,
        operator: operator(config, s),
        gathers: gathers(config, s),
        loss: loss(config, s),
        sums,
        update: p * steps + last_sums,
        activations,
        total: 0,
    };
    let kept = if memory.activations.checkpointing {
        memory.activations.with_checkpointing
    } else {
        memory.activations.without_checkpointing
    };
    let pass = kept + memory.sums + memory.loss.max(memory.operator + memory.gathers);
    memory.total = memory.weights + memory.gradients + memory.optimizer + pass.max(memory.update);
    memory
}

/// Bytes of a number of the gradient. As in `train::step`: a rank adds nothing to the gradient of its one backward.
pub(super) fn gradient_width(config: &Config, s: &Sizes) -> i64 {
    let one_backward = config.train.batch / config.parallel.dp.max(1) <= config.train.micro_batch;
    if gpu(config) && one_backward { s.width } else { s.wide }
}

/// The gradient's sums over ranks beside backward, and those after it. On a GPU they take the place of what is summed, unless they
/// are wider: those of bf16 over more than two ranks.
fn sums(config: &Config, s: &Sizes) -> (i64, i64) {
    let (ranks, gradient) = (config.parallel.sp * config.parallel.dp, gradient_width(config, s));
    let in_place = gpu(config) && (ranks <= 2 || gradient == s.wide);
    if ranks == 1 || in_place {
        return (0, 0);
    }
    let largest = |beside: bool| {
        let buckets = gradients::buckets(config).into_iter().filter(|bucket| bucket.after.is_some() == beside);
        let mut numbers: Vec<i64> = buckets.map(|bucket| bucket.range.end - bucket.range.start).collect();
        numbers.sort_unstable();
        numbers.iter().rev().take(gradients::UNDER_WAY).sum::<i64>() * s.wide
    };
    (largest(true), largest(false))
}

fn gpu(config: &Config) -> bool {
    config.train.device == DeviceKind::Cuda
}

fn left_product(config: &Config) -> bool {
    method::left_product(&config.parallel.linear_method).is_some()
}

/// Whether the MLP of a checkpointed layer goes through its rows in parts, which computes its output only once. Beside a left
/// product only softmax layers do, and are counted as if they did not.
pub(super) fn in_parts(config: &Config) -> bool {
    gpu(config) && !left_product(config)
}

/// Whether linear layers run in the kernels of linear.cu and linear_mma.cu, which take no f64.
fn kernels(config: &Config, s: &Sizes) -> bool {
    gpu(config) && config.train.dtype != Dtype::F64 && s.k % 8 == 0 && !left_product(config)
}

/// The states that these kernels save of one layer: at each place where two blocks of threads meet, and where a head, or a head
/// of a document that is cut there, begins. Of other documents only those that cross ranks have any.
fn states_inside(config: &Config, s: &Sizes) -> i64 {
    // Of the kernels for a decay per channel two blocks are on a multiprocessor.
    let twice = config.model.decay == DecayKind::Channel && config.train.dtype == Dtype::Bf16;
    let blocks = MULTIPROCESSORS * if twice { 2 } else { 1 };
    if config.data.kind != DataKind::Corpus || !config.data.documents {
        return blocks + s.b * s.h;
    }
    let crossing = if s.w > 1 { 2 * s.slots } else { 0 };
    2 * blocks + crossing * s.b * s.h
}

/// Whether checkpointed softmax layers keep what they have attended to, rather than attend again.
pub(super) fn attends_once(config: &Config) -> bool {
    method::attention(&config.parallel.softmax_method).is_ok_and(|attention| attention.attends_once())
}

/// What one rank's softmax attention computes at once.
struct Attended {
    heads: i64,
    kv_heads: i64,
    queries: i64,
    keys: i64,
}

fn attended(config: &Config, s: &Sizes) -> Attended {
    let per_kv = s.h / s.kv.max(1);
    let share = |rank: i64| (s.h * rank / s.w, s.h * (rank + 1) / s.w);
    match method::name(&config.parallel.softmax_method) {
        "ring" => Attended { heads: s.h, kv_heads: s.kv, queries: s.t, keys: s.t },
        // KV heads are repeated until each serves equally many of a rank's query heads.
        "ulysses" | "megatron_sp" => {
            let kv_heads = |(from, to): (i64, i64)| (to - from) / gcd(gcd(from, to), per_kv);
            let ranks = || (0..s.w).map(share);
            let heads = ranks().map(|(from, to)| to - from).max().unwrap_or(0);
            Attended { heads, kv_heads: ranks().map(kv_heads).max().unwrap_or(0), queries: s.l, keys: s.l }
        }
        _ => {
            let lasp2h = method::lasp2h(&config.parallel.softmax_method).unwrap_or_default();
            let kv_heads = lasp2h.stages(s.kv).into_iter().map(|(_, heads)| heads).max().unwrap_or(0);
            Attended { heads: kv_heads * per_kv, kv_heads, queries: s.t, keys: s.l }
        }
    }
}

/// At least 1.
fn gcd(a: i64, b: i64) -> i64 {
    if b == 0 { a.max(1) } else { gcd(b, a % b) }
}

/// q, k, v, o and the log-sum-exp as a softmax method keeps them: of this rank's tokens, or of this rank's heads.
fn kept_attention(config: &Config, s: &Sizes) -> i64 {
    let at = attended(config, s);
    let o = s.b * s.t * s.h * s.k;
    match method::name(&config.parallel.softmax_method) {
        "ulysses" | "megatron_sp" => {
            let whole = 2 * (at.heads + at.kv_heads) * s.k * s.width + at.heads * s.wide;
            // Beside it o of this rank's tokens.
            s.b * s.l * whole + o * s.width
        }
        _ => {
            let before_rounding = if summed_width(config, s) > s.width { o * summed_width(config, s) } else { 0 };
            s.b * s.t * (2 * (s.h + s.kv) * s.k * s.width + s.h * s.wide) + before_rounding
        }
    }
}

/// o and the log-sum-exp of a layer, where checkpointed ones keep them.
fn kept_attended(config: &Config, s: &Sizes) -> i64 {
    if attends_once(config) { s.b * s.t * s.h * (s.k * summed_width(config, s) + s.wide) } else { 0 }
}

/// Bytes of a number of o as backward has it: the ring's is the sum of its steps, before it is rounded.
fn summed_width(config: &Config, s: &Sizes) -> i64 {
    if config.parallel.softmax_method == "ring" { s.wide } else { s.width }
}

/// Numbers of the decay for a token.
fn decays(config: &Config, s: &Sizes) -> i64 {
    match config.model.decay {
        DecayKind::None | DecayKind::Lightning | DecayKind::Retention => 0,
        DecayKind::Token => s.h,
        DecayKind::Channel => s.d,
    }
}

/// What a fused MLP keeps: its input, gate and up, and one number of the norm.
fn kept_mlp(s: &Sizes) -> i64 {
    s.b * s.t * ((s.d + 2 * s.mlp) * s.width + s.wide)
}

fn activations(config: &Config, s: &Sizes) -> Activations {
    let tokens = s.b * s.t;
    // An RMS norm of n numbers keeps them, widened, and normalised; and gives n numbers, kept as an input.
    let norm = |n: i64| n * (s.wide + 2 * s.width);
    let mlp = norm(s.d) + 4 * s.mlp * s.width;
    let rank = if config.model.decay == DecayKind::Channel { DECAY_RANK } else { 0 };
    // The gate before and after SiLU, and its product with o.
    let gate = if config.model.output_gate { 3 * s.d } else { 0 };
    let states = s.slots * s.b * s.h * s.k * s.k * s.wide;
    // q and k before and after SiLU, v; the last three of a rank's heads where those are what a left product keeps.
    let qkv = match config.parallel.linear_method.as_str() {
        "megatron_sp_left_product" => 2 * tokens * s.d + 3 * s.b * s.l * (s.h + s.w - 1) / s.w * s.k,
        _ => 5 * tokens * s.d,
    };
    let mut linear = tokens * (norm(s.d) + (2 * decays(config, s) + rank + gate) * s.width + norm(s.d) + mlp)
        + qkv * s.width
        + states;
    let mut softmax = tokens * (norm(s.d) + mlp) + kept_attention(config, s);
    let mut last = tokens * (norm(s.d) + s.d * s.width);
    if gpu(config) {
        let normed = tokens * (s.d * s.width + s.wide);
        if !left_product(config) {
            // q, k, v before their activation, o, the gate.
            let of_token = 4 * s.d + decays(config, s) + if config.model.output_gate { s.d } else { 0 };
            let inner = if kernels(config, s) { states_inside(config, s) * s.k * s.k * s.wide } else { 0 };
            linear = normed + tokens * of_token * s.width + states + inner + kept_mlp(s);
        }
        softmax = normed + kept_attention(config, s) + kept_mlp(s);
        // The input of the last norm, and its output.
        last = normed + tokens * s.d * s.width;
    }
    // Of the layer that backward is in; its o and log-sum-exp are among those kept.
    let (x, layer) = (tokens * s.d * s.width, largest(s, linear, softmax - kept_attended(config, s)));
    // The last norm and the loss are done when backward gets to a layer. Its x is one of those kept, of its MLP it has the input.
    let again = if in_parts(config) { (layer - kept_mlp(s)).max(last) } else { layer + last };
    Activations {
        linear_layer: linear,
        softmax_layer: softmax,
        without_checkpointing: s.linear_layers * linear + s.softmax_layers * softmax + last,
        with_checkpointing: (s.linear_layers + s.softmax_layers) * x
            + s.softmax_layers * kept_attended(config, s)
            + again,
        checkpointing: config.train.activation_checkpointing,
    }
}

fn operator(config: &Config, s: &Sizes) -> i64 {
    let chunk = s.chunk.min(s.t.max(1));
    let tokens = s.b * s.t;
    let linear = if left_product(config) {
        // q, k, v, do and the gradients, widened, of all tokens that this rank's heads see; scores, their gradient and mask.
        let (heads, length) = match config.parallel.linear_method.as_str() {
            "megatron_sp_left_product" => ((s.h + s.w - 1) / s.w, s.l),
            _ => (s.h, s.t),
        };
        let block = SCORES.min(length);
        s.b * heads * s.wide * (7 * length * s.k + 3 * block * block)
    } else if kernels(config, s) {
        // q and k after their activation, dq, dk, dv; the gradient of a decay per channel in f32.
        let decay = if config.model.decay == DecayKind::Channel { s.wide } else { 0 };
        tokens * s.d * (5 * s.width + decay)
    } else {
        // Widened q, k, v, do and the gradients; a state and its gradient a chunk. Scores exist for a few chunks at a time.
        let states = s.t.div_euclid(chunk) * s.h * s.k * s.k;
        s.b * s.wide * (7 * s.t * s.d + 2 * states)
    };
    let at = attended(config, s);
    let softmax = if gpu(config) && config.train.dtype == Dtype::Bf16 {
        // k, v and their gradients for every query head, dq; the sums of dq, dk, dv in f32.
        let narrow = at.heads * (at.queries + 4 * at.keys) * s.width;
        s.b * s.k * (narrow + (at.heads * at.queries + 2 * at.kv_heads * at.keys) * s.wide)
    } else {
        // q, o, do, dq, and k, v with their gradients.
        s.b * s.wide * s.k * (4 * at.queries * at.heads + 4 * at.keys * at.kv_heads)
    };
    if !gpu(config) {
        return largest(s, linear, softmax);
    }
    // Beside a mixer the gradients of the half's output and of o; its layer's MLP is done. At work in the MLP: the gradients
    // of output and hidden values, the norm's output and its gradient; in parts those of output and input, and of a part gate, up,
    // hidden values, the norm's output and its gradient; then of the MLP its input is kept.
    let x = tokens * s.d * s.width;
    let (kept, mlp) = if config.train.activation_checkpointing && in_parts(config) {
        let part = tokens.min(HIDDEN_AT_ONCE / s.mlp.max(1) + 63);
        (x, 2 * x + part * (2 * s.d + 3 * s.mlp) * s.width)
    } else {
        (kept_mlp(s), 3 * x + tokens * s.mlp * s.width)
    };
    mlp.max(largest(s, linear, softmax) + 2 * x - kept)
}

/// What a method holds in backward beside the operator's own tensors.
fn gathers(config: &Config, s: &Sizes) -> i64 {
    if s.w == 1 {
        return 0;
    }
    let summary = s.slots * s.b * (s.h * s.k * s.k + decays(config, s)) * s.wide;
    // A block of keys and values here, one that came and one that comes; their sums: of the own block, of this rank's share,
    // under way, and coming.
    let ring = |heads: i64| s.b * s.t * 2 * heads * s.k * (3 * s.width + 4 * s.wide);
    let (whole, at) = (s.b * s.l * s.h * s.k, attended(config, s));
    let linear = match method::name(&config.parallel.linear_method) {
        // What is on its way here and on to the next rank.
        "lasp1" | "all_scan" => 3 * summary,
        // Those of the node, and what crosses nodes in two directions.
        "hierarchical" => {
            let node = method::node_size(&config.parallel.linear_method).map_or(s.w, |node| s.w.min(node as i64));
            (node + 3) * summary
        }
        "ring_left_product" => ring(s.h),
        // dq, dk, dv with zeros for other ranks' heads, and in rank order.
        "megatron_sp_left_product" => 2 * 3 * whole * s.width,
        // On a GPU the first rank waits for none, while its host is layers ahead.
        _ => (s.w + 1) * summary * if gpu(config) { s.linear_layers.max(1) } else { 1 },
    };
    let softmax = match method::name(&config.parallel.softmax_method) {
        "ring" => ring(s.kv),
        // do, and then dk and dv of this rank's heads: before, while and after they travel.
        "ulysses" => 3 * (s.b * s.t * s.h * s.k * s.width + 2 * s.b * s.l * at.kv_heads * s.k * s.wide),
        // do of all heads; dq with zeros for other ranks' heads, and in rank order; so dk and dv.
        "megatron_sp" => 3 * whole * s.width + 2 * s.b * s.l * 2 * s.kv * s.k * s.wide,
        // Two stages under way, and the gradients of all that wait for their sum.
        _ => s.b * s.l * 2 * s.k * (2 * at.kv_heads * s.width + s.kv * s.wide),
    };
    largest(s, linear, softmax)
}

/// The larger of what a linear and a softmax layer need, of the kinds that the model has.
fn largest(s: &Sizes, linear: i64, softmax: i64) -> i64 {
    let of = |layers: i64, bytes: i64| if layers > 0 { bytes } else { 0 };
    of(s.linear_layers, linear).max(of(s.softmax_layers, softmax))
}

fn loss(config: &Config, s: &Sizes) -> i64 {
    let tokens = s.b * s.t;
    let d_hidden = tokens * s.d * s.width;
    if gpu(config) && config.train.dtype == Dtype::Bf16 {
        return (loss::chunk_cuda(s.vocab, tokens) * s.width + s.d * s.wide) * s.vocab + d_hidden;
    }
    let chunk = if gpu(config) { loss::chunk_cuda(s.vocab, tokens) } else { loss::chunk(s.vocab, tokens) };
    // Logits, their log-softmax and gradient; the gradient of the projection; that of the hidden states.
    chunk * s.vocab * (s.width + 2 * s.wide) + s.vocab * s.d * s.wide + d_hidden
}
