//! Methods beside each other on the same work: the operator alone, one layer of the model, or whole training steps. Read
//! from [`Comparison::new`] (methods are built and must agree with the f64 oracle on every rank, or there is no figure) to
//! [`Comparison::at`] (one length: all methods on the same tensors, in turn, round by round). [`table`] and [`report`] show
//! what came out. Starting ranks is left to the caller.

#[cfg(test)]
mod faults;
mod inputs;
mod lanes;
mod measure;
mod memory;
mod method;
mod operator;
mod parity;
pub mod report;
mod row;
pub mod table;
mod timeline;
mod traffic;
mod work;

use std::time::Duration;

use anyhow::{Result, bail};
use collectives::{Group, Mesh};
use runtime::config::{Config, DecayKind, LayerKind};
use serde::{Deserialize, Serialize};
use tch::Device;

pub use lanes::Lanes;
pub use method::Method;
pub use row::{Measured, Row};

use method::Entrant;

/// Which layers are compared: their methods differ, and so never share a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mixer {
    Linear,
    Softmax,
}

impl Mixer {
    pub fn name(self) -> &'static str {
        match self {
            Mixer::Linear => "linear",
            Mixer::Softmax => "softmax",
        }
    }

    /// The kind of its layers.
    pub fn layer(self) -> LayerKind {
        match self {
            Mixer::Linear => LayerKind::Linear,
            Mixer::Softmax => LayerKind::Softmax,
        }
    }

    /// As in `model.pattern`.
    pub fn letter(self) -> &'static str {
        match self {
            Mixer::Linear => "L",
            Mixer::Softmax => "N",
        }
    }
}

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The sharded attention operator, forward and backward.
    Operator,
    /// One layer of the model, forward and backward.
    Layer,
    /// Optimizer steps of the model.
    Train,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Mode::Operator => "operator",
            Mode::Layer => "layer",
            Mode::Train => "train",
        }
    }
}

#[derive(Clone, Debug)]
pub struct Options {
    pub mixer: Mixer,
    pub mode: Mode,
    pub methods: Vec<Method>,
    /// Timed rounds of each method, at least 1.
    pub rounds: usize,
    /// Where this rank computes.
    pub device: Device,
    /// The sizes: `[model]` and `train.dtype`; for training everything but the mesh, the length, the layout and the method.
    pub config: Config,
}

impl Options {
    /// What a row cannot show: sizes and kind of the tensors, in one line.
    pub fn about(&self) -> String {
        let model = &self.config.model;
        let dtype = format!("{:?}", self.config.train.dtype).to_lowercase();
        let decay = format!("{:?}", model.decay).to_lowercase();
        let (kv_heads, linear) = match self.mixer {
            Mixer::Linear => (String::new(), format!(", decay {decay}, chunk {}", model.chunk)),
            Mixer::Softmax => (format!(", {} KV heads", model.kv_heads), String::new()),
        };
        let what = match self.mode {
            Mode::Operator => "the operator".to_owned(),
            Mode::Layer => format!("a layer of width {}", model.dim),
            Mode::Train => format!(
                "a training step of {} layers ({}) of width {}, batch {}, random tokens",
                model.layers, model.pattern, model.dim, self.config.train.batch
            ),
        };
        format!("{what}, causal, {} heads{kv_heads} of K = V = {}{linear}, {dtype}", model.heads, model.head_dim())
    }

    /// Whether the log-decay is learned, so that backward computes its gradient.
    fn learns_decay(&self) -> bool {
        matches!(self.config.model.decay, DecayKind::Token | DecayKind::Channel)
    }
}

/// All methods on the ranks of one world, ready to be timed.
pub struct Comparison<'a> {
    options: &'a Options,
    mesh: Mesh,
    entrants: Vec<Entrant>,
}

impl<'a> Comparison<'a> {
    /// Collective over `world`. An error if a method that was asked for cannot run, or if one differs from the oracle.
    pub fn new(world: &Group, options: &'a Options) -> Result<Self> {
        if options.rounds == 0 || options.methods.is_empty() {
            bail!("found {} rounds of {} methods, expected 1 or more of each", options.rounds, options.methods.len());
        }
        if options.mode == Mode::Train && !options.config.model.layer_kinds().contains(&options.mixer.layer()) {
            bail!(
                "the model has no {} layer to compare methods of: found pattern {:?}, expected one with {} (model.pattern)",
                options.mixer.name(),
                options.config.model.pattern,
                options.mixer.letter()
            );
        }
        let mesh = Mesh::new(world.clone(), 1, world.size())?;
        let methods = options.methods.iter();
        let entrants = methods.map(|m| Entrant::new(m, options, &mesh.sp)).collect::<Result<Vec<_>>>()?;
        parity::check(options, &mesh.sp, &entrants)?;
        Ok(Self { options, mesh, entrants })
    }

    /// Rows of all methods at sequences of `tokens` tokens, the same on every rank. Collective. After the warm-up `announce`
    /// is told how long the rounds will take, as far as this rank can tell.
    pub fn at(&self, tokens: i64, announce: &dyn Fn(Duration)) -> Result<Vec<Row>> {
        measure::rows(self.options, &self.mesh, &self.entrants, tokens, announce)
    }
}
