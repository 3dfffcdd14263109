//! The cost model of the comparison harness: what a training step takes, and what memory, on a machine that is not here. A
//! [`Machine`] and a [`Method`] make a [`Prediction`] of a [`Workload`]; `fit` holds the model against `published`, and `report`
//! writes down how far off it is. No tensor of a layer is made.
//!
//! Every rank's compute stream and links are simulated (`timeline`): collectives start with the last rank, chains pass from
//! rank to rank, so that overlap, chains and causal imbalance come out instead of being put in. What each piece of work takes
//! is in `costs` and `network`; `step` issues them in the order of the trainer.

pub mod against;
mod attention;
pub mod choose;
mod costs;
mod exchange;
pub mod fit;
pub mod host;
pub mod machine;
mod memory;
pub mod method;
mod network;
pub mod packing;
pub mod published;
pub mod report;
mod step;
pub mod sweep;
mod timeline;

use runtime::config::{self, Config};
use runtime::{model, sequence};
use serde::Serialize;

pub use costs::Pass;
pub use machine::Machine;
pub use memory::MemoryUse;
pub use method::Method;
pub use step::{
    attention_share, exchange_seconds, layer_seconds, operator_on_host, operator_seconds, predict, step_seconds,
};

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("machine {name}: {message}")]
    Machine { name: String, message: String },
    #[error(
        "method `{found}`: expected LINEAR, SOFTMAX or LINEAR+SOFTMAX, then @zigzag or @contiguous if not as configured; \
         LINEAR one of {} (then :released for the released code's order), SOFTMAX one of {}",
        method::LINEAR.join(", "), method::SOFTMAX.join(", ")
    )]
    Method { found: String },
    #[error(
        "ulysses needs the number of GPUs to divide the heads: {heads} heads, {ranks} GPUs; use lasp2h, or fewer GPUs"
    )]
    Ulysses { heads: usize, ranks: usize },
    #[error(
        "{method} with a decay per token: expected none or a constant per head (model.decay = none, lightning or retention); \
         or use lasp2"
    )]
    LeftProduct { method: String },
    #[error("a point needs at least one GPU and one token each: {seq_len} tokens, {gpus} GPUs (--gpus, --seq-lens)")]
    Point { gpus: usize, seq_len: usize },
    #[error(
        "{gpus} GPUs and {batch} sequences cannot be shared out over {dp} groups: expected multiples of the groups (--dp, --batch)"
    )]
    Groups { gpus: usize, dp: usize, batch: usize },
    #[error("{option}: found `{found}`, expected {expected}")]
    Range { option: &'static str, found: String, expected: &'static str },
    #[error("kernel {name:?} was not measured: run lasp calibrate anew for a machine with host.kernels")]
    Kernel { name: String },
    #[error("--against: {message}")]
    Against { message: String },
    #[error("published figures: {0}")]
    Published(String),
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error(transparent)]
    Sequence(#[from] sequence::Error),
    #[error(transparent)]
    Model(#[from] model::Error),
}

/// A step: `dp` groups of GPUs, in each of which all share one sequence after another.
#[derive(Clone, Debug)]
pub struct Workload<'a> {
    pub config: &'a Config,
    /// That share a sequence.
    pub gpus: usize,
    /// Tokens of the sequence.
    pub seq_len: usize,
    /// Groups, each with sequences of its own.
    pub dp: usize,
    /// Sequences of a group in a step.
    pub passes: usize,
    /// `[N + 1]`: where the documents packed into each of them begin and end; none: each is one.
    pub cu_seqlens: Option<&'a [i64]>,
}

impl<'a> Workload<'a> {
    /// One sequence a step, of one document, on all GPUs.
    pub fn one(config: &'a Config, gpus: usize, seq_len: usize) -> Self {
        Workload { config, gpus, seq_len, dp: 1, passes: 1, cu_seqlens: None }
    }

    /// All GPUs.
    pub fn world(&self) -> usize {
        self.gpus * self.dp
    }
}

/// Times in seconds, amounts in bytes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    pub machine: String,
    pub method: String,
    /// In all.
    pub gpus: usize,
    pub seq_len: usize,
    /// Of a sequence.
    pub documents: usize,
    pub dp: usize,
    pub step_s: f64,
    pub tokens_per_s: f64,
    pub tokens_per_s_per_gpu: f64,
    /// By how much the step would be shorter if communication took no time.
    pub exposed_s: f64,
    /// Time that compute streams stand still for other ranks, the mean of all: communication and imbalance.
    pub waited_s: f64,
    /// By exchanges of layers, the mean of all ranks.
    pub received: f64,
    /// Collectives, sends and receives of a rank for layers, by the formulas of `runtime::sequence`: the mean of all ranks.
    pub messages: f64,
    /// Messages and bytes may be fewer: they are those of a truncated scan that reaches everywhere, as its decays depend on the data.
    pub at_most: bool,
    pub memory: MemoryUse,
    pub out_of_memory: bool,
}
