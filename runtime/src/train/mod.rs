//! Training, from a configuration to a run folder. Read [`run`] for the life of a run and [`step`] for one step of it.
//!
//! The losses are a function of (configuration, seed) alone: how many ranks share a sequence, and whether they are threads
//! or processes, changes nothing but rounding.

pub(crate) mod gradients;
pub mod mfu;
pub mod optimizer;
mod run_folder;
pub mod schedule;
mod step;
mod trace;

use std::path::{Path, PathBuf};
use std::time::Instant;

use collectives::{Group, Mesh, Reduce};
use tch::{Device, Kind, Tensor};

use crate::config::Config;
use crate::data::Source;
use crate::metrics::{self, StepRecord};
use crate::{checkpoint, config, data, generate, model, report, sequence};
use run_folder::RunFolder;
pub use step::{StepOutcome, Trainer};
use trace::Trace;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "step {step}: the {what} is {value}; lower optimizer.lr or optimizer.clip, or resume from an earlier checkpoint"
    )]
    NotFinite { step: u64, what: &'static str, value: f64 },
    #[error("--resume: {} holds no checkpoint; train without --resume", .0.display())]
    NothingToResume(PathBuf),
    #[error("{} holds an earlier run; go on with it by --resume, or choose another --run-dir", .0.display())]
    Occupied(PathBuf),
    #[error("--resume: {key} was {was} when the checkpoint was written and is {is} now; it must stay as it was")]
    Changed { key: &'static str, was: String, is: String },
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error(transparent)]
    Data(#[from] data::Error),
    #[error(transparent)]
    Model(#[from] model::Error),
    #[error(transparent)]
    Sequence(#[from] sequence::Error),
    #[error(transparent)]
    Kernels(#[from] kernels::Error),
    #[error(transparent)]
    Collectives(#[from] collectives::Error),
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    #[error(transparent)]
    Metrics(#[from] metrics::Error),
    #[error(transparent)]
    Report(#[from] report::Error),
    #[error(transparent)]
    Generate(#[from] Box<generate::Error>),
    #[error(transparent)]
    Tch(#[from] tch::TchError),
}

#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Go on from the newest checkpoint of the run folder.
    pub resume: bool,
    /// Print to standard output, on rank 0.
    pub console: bool,
    /// Record the third and fourth step, to `trace-RANK.json` in the run folder, and say how much communication was exposed.
    pub trace: bool,
    /// What this rank computes on.
    pub device: Device,
    /// When the program began, from which the time to the first step is counted.
    pub started: Instant,
}

impl Default for Options {
    fn default() -> Self {
        Self { resume: false, console: false, trace: false, device: Device::Cpu, started: Instant::now() }
    }
}

/// Where a run ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    pub steps: u64,
    /// Training loss of the last step, nats a token.
    pub loss: f64,
    pub val_loss: Option<f64>,
}

/// Trains as `config` says, on all ranks of `world`; the mesh in it must be resolved ([`Config::resolve_ranks`]). Rank 0
/// alone writes `run_dir`: the resolved config, `metrics.jsonl`, checkpoints, `report.html`.
pub fn run(world: Group, config: Config, run_dir: &Path, options: Options) -> Result<Outcome> {
    let mesh = Mesh::new(world, config.parallel.dp, config.parallel.sp)?;
    let (source, validation) = Source::open(&config)?;
    let mut trainer = Trainer::on(options.device, mesh, config, source, validation)?;
    if options.resume {
        let path = checkpoint::latest(run_dir)?.ok_or_else(|| Error::NothingToResume(run_dir.to_owned()))?;
        trainer.load(checkpoint::load(&path, Device::Cpu)?)?;
    }
    let writes = trainer.mesh.world.rank() == 0;
    let folder = writes.then(|| RunFolder::open(run_dir, &trainer, options)).transpose()?;
    let trace = options.trace.then(|| run_dir.join(format!("trace-{}.json", trainer.mesh.world.rank())));
    Life { trainer, folder, options, trace, tracing: None, started: Instant::now() }.live()
}

/// The steps that a trace has, counted from the start of the program: the first ones are slow.
const TRACED: std::ops::Range<u64> = 2..4;

/// One run on one rank; `folder` is there on rank 0 only.
struct Life {
    trainer: Trainer,
    folder: Option<RunFolder>,
    options: Options,
    /// Where the trace goes, if one is wanted and not begun yet.
    trace: Option<PathBuf>,
    tracing: Option<Trace>,
    /// When training began.
    started: Instant,
}

impl Life {
    fn live(mut self) -> Result<Outcome> {
        let config = self.trainer.config.clone();
        let (train, every) = (&config.train, |n: u64, step: u64| n > 0 && step.is_multiple_of(n));
        let mut outcome = Outcome { steps: self.trainer.steps_done, loss: f64::NAN, val_loss: None };
        let saves = config.checkpoint.keep > 0;
        let mut saved_at = self.options.resume.then_some(self.trainer.steps_done);
        let device = self.trainer.device();
        let flops = mfu::flops_per_token(&config, self.trainer.model.params.numel());
        let peak = mfu::peak(&config, device).map(|peak| peak * self.trainer.mesh.world.size() as f64);
        let mut steps = 0;
        while self.trainer.steps_done < train.steps {
            if steps == TRACED.start
                && let Some(path) = self.trace.take()
            {
                self.tracing = Some(Trace::begin(path, &self.trainer)?);
            }
            steps += 1;
            let before = Instant::now();
            let step = self.trainer.step(self.out_of_time())?;
            let step_ms = before.elapsed().as_secs_f64() * 1e3;
            let done = self.trainer.steps_done;
            if let Some(trace) = &mut self.tracing {
                trace.step(done);
            }
            if (steps == TRACED.end || done == train.steps || step.out_of_time)
                && let Some(trace) = self.tracing.take()
            {
                let (layers, gradient_us) = trace.end(&self.trainer)?;
                self.on_rank_zero(|folder, trainer| folder.traced(trainer, &layers, gradient_us))?;
            }
            if steps == 1 {
                let seconds = self.options.started.elapsed().as_secs_f64();
                self.on_rank_zero(|folder, _| folder.first_step(seconds))?;
            }
            let last = done == train.steps || step.out_of_time;
            outcome.val_loss = if last || every(train.validate_every, done) { self.trainer.validate()? } else { None };
            (outcome.steps, outcome.loss) = (done, step.loss);
            let tokens_per_step = (train.batch * train.seq_len) as f64;
            let record = StepRecord {
                step: done,
                loss: step.loss,
                grad_norm: step.grad_norm,
                lr: step.lr,
                tokens: self.trainer.tokens(),
                tokens_per_s: tokens_per_step / step_ms * 1e3,
                exposed_comm_pct: 100.0 * step.exposed,
                step_ms,
                val_loss: outcome.val_loss,
                mfu: peak.map(|peak| flops * tokens_per_step / step_ms * 1e3 / peak),
                peak_bytes: match device {
                    Device::Cuda(index) => Some(kernels::bridge::device_memory(index)?.peak),
                    _ => None,
                },
            };
            self.on_rank_zero(|folder, _| folder.record(&record, last || every(train.log_every, done)))?;
            if saves && (last || every(config.checkpoint.every, done)) {
                self.on_rank_zero(|folder, trainer| folder.save(trainer, record.val_loss))?;
                saved_at = Some(done);
            }
            if last {
                break;
            }
        }
        if saves && saved_at != Some(self.trainer.steps_done) {
            self.on_rank_zero(|folder, trainer| folder.save(trainer, None))?;
        }
        self.on_rank_zero(|folder, trainer| folder.close(trainer))?;
        Ok(outcome)
    }

    /// Rank 0's clock decides; the step tells the others.
    fn out_of_time(&self) -> bool {
        let minutes = self.trainer.config.train.minutes;
        self.folder.is_some() && minutes > 0.0 && self.started.elapsed().as_secs_f64() >= 60.0 * minutes
    }

    /// Lets rank 0 write while the others go on; its failure ends the job.
    fn on_rank_zero(&mut self, work: impl FnOnce(&mut RunFolder, &Trainer) -> Result<()>) -> Result<()> {
        match &mut self.folder {
            Some(folder) => work(folder, &self.trainer),
            None => Ok(()),
        }
    }
}

/// Sums numbers over the ranks of a group.
fn sum(group: &Group, numbers: &[f64]) -> Result<Vec<f64>> {
    let mine = Tensor::f_from_slice(numbers)?.f_to_kind(Kind::Double)?;
    let all = group.all_reduce(&mine, Reduce::Sum)?.wait()?;
    Ok((0..numbers.len() as i64).map(|i| all.double_value(&[i])).collect())
}
