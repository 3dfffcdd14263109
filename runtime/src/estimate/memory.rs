//! Memory of one rank, in bytes, counted tensor by tensor: what lives through a step, what forward keeps for backward, and
//! what an operator, the loss, a gather and the update need besides, only one of them at a time.

use serde::Serialize;

use super::{Parameters, Sizes};
use crate::config::{Config, DecayKind};
use crate::model::{DECAY_RANK, loss};
use crate::sequence::attention::Lasp2h;

/// Of the rank with the most tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Memory {
    pub weights: i64,
    /// Those of the last backward, and their sum over a step's passes.
    pub gradients: i64,
    /// Two moments and, for bf16 weights, the master weights.
    pub optimizer: i64,
    pub activations: Activations,
    /// The largest of the mixers at work in backward.
    pub operator: i64,
    /// Keys, values and states of other ranks, with their gradients.
    pub gathers: i64,
    /// One chunk of logits, and the gradient of the output projection.
    pub loss: i64,
    /// What AdamW computes with, and the gradient summed over ranks.
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
    let p = parameters.total;
    let master = if s.width < s.wide { 1 } else { 0 };
    let ranks = config.parallel.sp * config.parallel.dp;
    let reduced = i64::from(ranks > 1);
    let activations = activations(config, s);
    let mut memory = Memory {
        weights: p * s.width,
        gradients: p * (s.width + s.wide),
        optimizer: p * s.wide * (2 + master),
        operator: operator(s),
        gathers: gathers(config, s),
        loss: loss(s),
        // The square of the gradient, the root, the step.
        update: p * s.wide * (3 + reduced),
        activations,
        total: 0,
    };
    let kept = if memory.activations.checkpointing {
        memory.activations.with_checkpointing
    } else {
        memory.activations.without_checkpointing
    };
    let pass = kept + memory.loss.max(memory.operator + memory.gathers);
    memory.total = memory.weights + memory.gradients + memory.optimizer + pass.max(memory.update);
    memory
}

fn activations(config: &Config, s: &Sizes) -> Activations {
    let tokens = s.b * s.t;
    // An RMS norm of n numbers keeps them, widened, and normalised; and gives n numbers, kept as an input.
    let norm = |n: i64| n * (s.wide + 2 * s.width);
    let mlp = norm(s.d) + 4 * s.mlp * s.width;
    let decay = match config.model.decay {
        DecayKind::None | DecayKind::Lightning | DecayKind::Retention => 0,
        DecayKind::Token => 2 * s.h,
        DecayKind::Channel => 2 * s.d + DECAY_RANK,
    };
    // The gate before and after SiLU, and its product with o.
    let gate = if config.model.output_gate { 3 * s.d } else { 0 };
    // q and k before and after SiLU, v.
    let linear = tokens * (norm(s.d) + (5 * s.d + decay + gate) * s.width + norm(s.d) + mlp)
        + s.slots * s.b * s.h * s.k * s.k * s.wide;
    // q, k, v, o and the log-sum-exp.
    let softmax = tokens * (norm(s.d) + 2 * (s.d + s.kv * s.k) * s.width + s.h * s.wide + mlp);
    let last = tokens * (norm(s.d) + s.d * s.width);
    Activations {
        linear_layer: linear,
        softmax_layer: softmax,
        without_checkpointing: s.linear_layers * linear + s.softmax_layers * softmax + last,
        with_checkpointing: (s.linear_layers + s.softmax_layers) * tokens * s.d * s.width
            + largest(s, linear, softmax)
            + last,
        checkpointing: config.train.activation_checkpointing,
    }
}

fn operator(s: &Sizes) -> i64 {
    let chunk = s.chunk.min(s.t.max(1));
    // Widened q, k, v, do and the gradients; a state and its gradient a chunk. Scores exist for a few chunks at a time.
    let states = s.t.div_euclid(chunk) * s.h * s.k * s.k;
    let linear = s.b * s.wide * (7 * s.t * s.d + 2 * states);
    // Of one stage: q, o, do, dq, and k, v of the whole sequence with their gradients.
    let heads = stage(s);
    let softmax = s.b * s.wide * heads * s.k * (4 * s.t * (s.h / s.kv) + 4 * s.l);
    largest(s, linear, softmax)
}

fn gathers(config: &Config, s: &Sizes) -> i64 {
    if s.w == 1 {
        return 0;
    }
    let decay = match config.model.decay {
        DecayKind::Token => s.h,
        DecayKind::Channel => s.h * s.k,
        DecayKind::None | DecayKind::Lightning | DecayKind::Retention => 0,
    };
    let linear = (s.w + 1) * s.slots * s.b * (s.h * s.k * s.k + decay) * s.wide;
    // Two stages under way, and the gradients of all that wait for their sum.
    let softmax = s.b * s.l * 2 * s.k * (2 * stage(s) * s.width + s.kv * s.wide);
    largest(s, linear, softmax)
}

/// The larger of what a linear and a softmax layer need, of the kinds that the model has.
fn largest(s: &Sizes, linear: i64, softmax: i64) -> i64 {
    let of = |layers: i64, bytes: i64| if layers > 0 { bytes } else { 0 };
    of(s.linear_layers, linear).max(of(s.softmax_layers, softmax))
}

/// KV heads of the largest stage of LASP-2H.
fn stage(s: &Sizes) -> i64 {
    Lasp2h::default().stages(s.kv).into_iter().map(|(_, heads)| heads).max().unwrap_or(0)
}

fn loss(s: &Sizes) -> i64 {
    let chunk = loss::chunk(s.vocab, s.b * s.t);
    let narrow = if s.width < s.wide { s.width } else { 0 };
    // Logits, their log-softmax and gradient; the gradient of the projection; that of the hidden states.
    chunk * s.vocab * (s.width + 2 * s.wide) + s.vocab * s.d * (s.wide + narrow) + s.b * s.t * s.d * s.width
}
