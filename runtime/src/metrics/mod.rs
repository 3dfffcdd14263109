//! What a run records of each step: `metrics.jsonl` in the run folder, one line a step, and the same on the terminal.
//! The file can be read while it is written, and survives being cut off in the middle of a line.

mod terminal;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

pub use terminal::{format_duration, format_line, format_si};

use crate::atomic;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is damaged at line {line}: {message}", path.display())]
    Record { path: PathBuf, line: usize, message: String },
    #[error("cannot record step {step}: {message}")]
    Write { step: u64, message: String },
}

/// One optimizer step. Numbers that are not finite are written as null.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Optimizer steps done, this one included.
    pub step: u64,
    /// Training loss, in nats a token.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// Norm of the gradient of the whole model, before clipping.
    #[serde(deserialize_with = "number")]
    pub grad_norm: f64,
    /// Learning rate of this step.
    #[serde(deserialize_with = "number")]
    pub lr: f64,
    /// Tokens seen since the start of training, over all ranks.
    pub tokens: u64,
    /// Tokens of this step over its time, over all ranks.
    #[serde(deserialize_with = "number")]
    pub tokens_per_s: f64,
    /// Share of the time in which a rank waited for communication, in percent: from the end of the step before's backward to that of
    /// this one's, as a host sees them.
    #[serde(deserialize_with = "number")]
    pub exposed_comm_pct: f64,
    /// Time of this step in milliseconds, validation and checkpoints excluded.
    #[serde(deserialize_with = "number")]
    pub step_ms: f64,
    /// Validation loss after this step, in nats a token, if it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val_loss: Option<f64>,
    /// Model FLOPs utilisation of this step, from 0 to 1, where the devices' peak is known; its formula is in `train::mfu`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Most bytes that tensors have taken on this rank's GPU since the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<u64>,
}

fn number<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

const FILE: &str = "metrics.jsonl";

/// The open `metrics.jsonl` of a run.
#[derive(Debug)]
pub struct MetricsLog {
    file: File,
    path: PathBuf,
}

impl MetricsLog {
    /// Begins the log of a new run, over any earlier one.
    pub fn create(run_dir: &Path) -> Result<Self> {
        let path = run_dir.join(FILE);
        let file = File::create(&path).map_err(failure("create", &path))?;
        Ok(MetricsLog { file, path })
    }

    /// Continues the log of a run resumed at `step`: records of later steps, and a last line cut off, are dropped.
    pub fn append(run_dir: &Path, step: u64) -> Result<Self> {
        let path = run_dir.join(FILE);
        let mut kept = Vec::new();
        if path.exists() {
            for record in read(run_dir)?.iter().filter(|record| record.step <= step) {
                kept.extend(line(record)?);
            }
        }
        atomic::replace_bytes(&path, &kept).map_err(failure("write", &path))?;
        let file = OpenOptions::new().append(true).open(&path).map_err(failure("open", &path))?;
        Ok(MetricsLog { file, path })
    }

    /// Adds one record; when this returns, others can read it.
    pub fn write(&mut self, record: &StepRecord) -> Result<()> {
        let line = line(record)?;
        self.file.write_all(&line).map_err(failure("write", &self.path))
    }
}

/// The records of a run. A last line that was cut off is left out.
pub fn read(run_dir: &Path) -> Result<Vec<StepRecord>> {
    let path = run_dir.join(FILE);
    let bytes = fs::read(&path).map_err(failure("read", &path))?;
    let mut records = Vec::new();
    for (index, line) in bytes.split_inclusive(|&byte| byte == b'\n').enumerate() {
        if line.trim_ascii().is_empty() {
            continue;
        }
        match serde_json::from_slice(line) {
            Ok(record) => records.push(record),
            Err(_) if !line.ends_with(b"\n") => {}
            Err(error) => {
                return Err(Error::Record { path, line: index + 1, message: error.to_string() });
            }
        }
    }
    Ok(records)
}

fn line(record: &StepRecord) -> Result<Vec<u8>> {
    let mut line =
        serde_json::to_vec(record).map_err(|error| Error::Write { step: record.step, message: error.to_string() })?;
    line.push(b'\n');
    Ok(line)
}

fn failure(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}
