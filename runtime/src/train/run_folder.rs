//! What rank 0 writes: the run folder and the terminal.

use std::path::{Path, PathBuf};

use super::trace::Exposed;
use super::{Error, Options, Result, Trainer};
use crate::config::{Config, LayerKind};
use crate::generate;
use crate::metrics::{MetricsLog, StepRecord, format_line, format_si};
use crate::{checkpoint, report};

pub(super) struct RunFolder {
    path: PathBuf,
    log: MetricsLog,
    console: bool,
    config: Config,
    /// Milliseconds of a step, smoothed.
    step_ms: Option<f64>,
    best_val: Option<f64>,
}

impl RunFolder {
    /// Makes the folder, writes the resolved config, and says on the terminal what is about to be trained.
    pub fn open(path: &Path, trainer: &Trainer, options: Options) -> Result<Self> {
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io { action, path, source }
        };
        if !options.resume && (path.join("metrics.jsonl").exists() || path.join("checkpoints").exists()) {
            return Err(Error::Occupied(path.to_owned()));
        }
        std::fs::create_dir_all(path).map_err(io("create", path))?;
        let config_path = path.join("config.toml");
        std::fs::write(&config_path, trainer.config.to_toml()?).map_err(io("write", &config_path))?;
        let log =
            if options.resume { MetricsLog::append(path, trainer.steps_done)? } else { MetricsLog::create(path)? };
        let config = trainer.config.clone();
        let folder =
            Self { path: path.to_owned(), log, console: options.console, config, step_ms: None, best_val: None };
        folder.say(|| folder.headline(trainer));
        Ok(folder)
    }

    fn headline(&self, trainer: &Trainer) -> String {
        let (model, train, parallel) = (&self.config.model, &self.config.train, &self.config.parallel);
        let from = if trainer.steps_done > 0 { format!(", from step {}", trainer.steps_done) } else { String::new() };
        format!(
            "{} parameters, {} layers of {}, decay {}, {}; sequences of {} over sp = {} ({}), dp = {}, ranks by {} on {}; {} steps{from}",
            format_si(trainer.model.params.numel() as f64),
            model.layers,
            model.pattern,
            key(&model.decay),
            key(&train.dtype),
            train.seq_len,
            parallel.sp,
            key(&parallel.layout),
            parallel.dp,
            trainer.mesh.world.backend_on(trainer.device()),
            on(trainer.device()),
            train.steps,
        )
    }

    fn say(&self, text: impl FnOnce() -> String) {
        if self.console {
            println!("{}", text());
        }
    }

    pub fn first_step(&self, seconds: f64) -> Result<()> {
        self.say(|| format!("first step done {seconds:.1} s after the start"));
        Ok(())
    }

    pub fn record(&mut self, record: &StepRecord, print: bool) -> Result<()> {
        self.log.write(record)?;
        let smooth = self.step_ms.map_or(record.step_ms, |ms| 0.9 * ms + 0.1 * record.step_ms);
        self.step_ms = Some(smooth);
        if let Some(loss) = record.val_loss {
            self.best_val = Some(self.best_val.map_or(loss, |best| best.min(loss)));
        }
        if print || record.val_loss.is_some() {
            let steps = self.config.train.steps;
            let left = steps.saturating_sub(record.step) as f64 * smooth / 1e3;
            self.say(|| format_line(record, steps, Some(left)));
        }
        Ok(())
    }

    pub fn traced(&self, trainer: &Trainer, layers: &[Exposed], gradient_us: f64) -> Result<()> {
        for Exposed { kind, forward_us, backward_us } in layers {
            let name = match kind {
                LayerKind::Linear => "linear",
                LayerKind::Softmax => "softmax",
            };
            self.say(|| {
                format!("{name} layers: exposed {forward_us:.0} us a layer forward, {backward_us:.0} us backward")
            });
        }
        if self.config.parallel.sp * self.config.parallel.dp > 1 {
            self.say(|| format!("gradient: exposed {gradient_us:.0} us a step"));
            if trainer.device().is_cuda() && trainer.mesh.sp.size() > 1 {
                self.say(|| format!("all_gather: {}", trainer.mesh.sp.peer_copies()));
            }
        }
        Ok(())
    }

    pub fn save(&mut self, trainer: &Trainer, val_loss: Option<f64>) -> Result<()> {
        let mut state = trainer.state()?;
        state.best_val = self.best_val.or(val_loss);
        let params = &trainer.model.params;
        let (model, optimizer) = (params.split(&params.flat)?, trainer.optimizer.state(params)?);
        checkpoint::save(&self.path, &state, &model, &optimizer, self.config.checkpoint.keep)?;
        report::write(&self.path)?;
        Ok(())
    }

    /// Prints the sample, if one is wanted, and where everything is.
    pub fn close(&mut self, trainer: &Trainer) -> Result<()> {
        let sample = &self.config.sample;
        if sample.tokens > 0 && self.console {
            let options = generate::Options {
                tokens: sample.tokens,
                temperature: sample.temperature,
                top_k: sample.top_k,
                seed: self.config.train.seed,
            };
            let mut text = sample.prompt.clone().into_bytes();
            generate::sample(&trainer.model, sample.prompt.as_bytes(), options, &mut |bytes| {
                text.extend_from_slice(bytes)
            })
            .map_err(Box::new)?;
            println!("\n--- sample ---\n{}\n--------------", String::from_utf8_lossy(&text).trim_end());
        }
        let report = report::write(&self.path)?;
        self.say(|| format!("report: {}\nrun:    {}", report.display(), self.path.display()));
        Ok(())
    }
}

/// A device's name.
fn on(device: tch::Device) -> String {
    match device {
        tch::Device::Cpu => "the CPU".to_owned(),
        gpu => kernels::cuda::name(gpu).unwrap_or_else(|_| format!("{gpu:?}")),
    }
}

/// A setting as it is typed.
fn key(setting: &impl serde::Serialize) -> String {
    serde_json::to_value(setting).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}
