//! One method at one length on so many ranks: a row of the tables, and a line of `results.jsonl`.

use runtime::config::LayoutKind;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::lanes::Lanes;
use super::memory::Memory;
use super::traffic::Bound;
use super::{Mixer, Mode};
use crate::Timing;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// With its settings and layout.
    pub method: String,
    /// Computed as `(q k^T) v`.
    pub quadratic: bool,
    pub layout: LayoutKind,
    pub mixer: Mixer,
    pub mode: Mode,
    pub ranks: usize,
    /// Of the whole sequence.
    pub tokens: i64,
    /// Why there are no figures.
    pub skipped: Option<String>,
    #[serde(flatten)]
    pub measured: Option<Measured>,
}

/// Times of a round are those of the slowest rank, each phase from a barrier; a step is the sum of its phases.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// None for a training step.
    pub forward: Option<Timing>,
    pub backward: Option<Timing>,
    pub step: Timing,
    /// Of the median step.
    pub tokens_per_s: f64,
    pub tokens_per_s_and_rank: f64,
    pub memory: Option<Memory>,
    /// Counted in a step, by rank.
    pub sent: Vec<u64>,
    pub received: Vec<u64>,
    pub messages: Vec<u64>,
    /// What of `received` the method's layers moved, and what its formula says of that; they agree as `formula` says, or there
    /// would be no row.
    pub layers_received: Vec<u64>,
    pub formula_received: Vec<u64>,
    pub formula: Bound,
    /// Share of the step in which a rank waits for communication, mean over ranks, median over rounds.
    pub exposed: f64,
    /// Share of the time with communication under way in which the rank was not blocked; none where nothing is sent.
    pub hidden: Option<f64>,
    /// The step of median duration.
    #[serde(skip)]
    pub lanes: Option<Lanes>,
}

impl Row {
    /// A line of JSON, without the line's end; `conditions` are the same for all rows: options, machine, versions.
    pub fn json(&self, conditions: &Value) -> serde_json::Result<String> {
        let mut row = serde_json::to_value(self)?;
        if let (Some(row), Some(conditions)) = (row.as_object_mut(), conditions.as_object()) {
            row.extend(conditions.iter().map(|(key, value)| (key.clone(), value.clone())));
        }
        serde_json::to_string(&row)
    }
}
