//! Floating-point operations, a multiplication and an addition counted as two. Only products of matrices count; a step is
//! forward and twice that for backward, and forward once more where activations are checkpointed: but for softmax attention, where
//! what it gave is kept, and on a GPU but for the MLPs' last products.

use serde::Serialize;

use super::memory::{attends_once, in_parts};
use super::{Parameters, Sizes};
use crate::config::Config;

/// Per token of the sequence, and over all ranks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Flops {
    pub token_projections: f64,
    /// Of all linear layers: scores and values inside chunks of C tokens, states between them.
    pub token_linear: f64,
    /// Of all softmax layers, causal: the mean over the sequence.
    pub token_softmax: f64,
    pub token_logits: f64,
    /// Their sum.
    pub token_forward: f64,
    /// With backward, and what activation checkpointing computes again.
    pub token_step: f64,
    pub forward: f64,
    pub step: f64,
}

pub(super) fn count(config: &Config, s: &Sizes, parameters: &Parameters) -> Flops {
    let layers = |n: i64, each: i64| 2.0 * n as f64 * each as f64;
    let chunk = s.chunk.min(s.t.max(1));
    let projections = layers(1, parameters.matrices);
    let linear = layers(s.linear_layers, s.h * (2 * chunk * s.k + 2 * s.k * s.k));
    let softmax = layers(s.softmax_layers, s.h * s.k * (s.l + 1));
    let logits = layers(1, s.vocab * s.d);
    let forward = projections + linear + softmax + logits;
    let attend_again = if attends_once(config) { 0.0 } else { softmax };
    let mut again = if config.train.activation_checkpointing { projections + linear + attend_again } else { 0.0 };
    if again > 0.0 && in_parts(config) {
        again -= layers(s.linear_layers + s.softmax_layers, s.mlp * s.d);
    }
    let step = 3.0 * forward + again;
    let tokens = config.train.batch as f64 * s.l as f64;
    Flops {
        token_projections: projections,
        token_linear: linear,
        token_softmax: softmax,
        token_logits: logits,
        token_forward: forward,
        token_step: step,
        forward: forward * tokens,
        step: step * tokens,
    }
}
