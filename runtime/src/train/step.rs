//! One training step, top down: the sequences of this step, their shards, forward, backward, the sum of all gradients, the
//! update.

use std::sync::Arc;
use std::time::{Duration, Instant};

use collectives::{Mesh, Reduce};
use tch::{Device, Kind, Tensor};

use super::gradients::{self, Bucket, Summing};
use super::optimizer::AdamW;
use super::schedule::learning_rate;
use super::{Error, Result, sum};
use crate::checkpoint::{Loaded, TrainState};
use crate::config::{Config, LayoutKind};
use crate::data::{IGNORE_INDEX, Sequence, Source};
use crate::model::{Context, LayerDone, Model, Unwritten};
use crate::sequence::attention::Attention;
use crate::sequence::{Layout, LinearMethod, Plan, Shard, method};

/// Everything that a rank trains with.
pub struct Trainer {
    pub mesh: Mesh,
    pub config: Config,
    pub model: Model,
    pub optimizer: AdamW,
    pub steps_done: u64,
    source: Source,
    validation: Option<Source>,
    linear: LinearMethod,
    attention: Arc<dyn Attention>,
    device: Device,
    /// `[P]`: where backward adds up gradients.
    grad: Tensor,
    /// How they are summed over ranks.
    buckets: Vec<Bucket>,
    /// Of the last step, since it said how long it had waited for communication.
    untold: Untold,
    /// The coming step and its first micro-batch, made ready while a GPU still computed the last step.
    next: Option<(u64, Batch)>,
}

/// How long this rank has waited for communication since it last told others, in how much time.
#[derive(Default)]
struct Untold {
    waiting: Duration,
    time: Duration,
}

/// Sequences of equal length that go through the model together: this rank's tokens and labels of them `[B, T]`, on its device.
struct Batch {
    context: Context,
    tokens: Tensor,
    labels: Tensor,
    /// How many labels count.
    counted: f64,
}

/// What is known after a step, the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Nats a token.
    pub loss: f64,
    /// Before clipping.
    pub grad_norm: f64,
    pub lr: f64,
    /// The share of the time in which a rank waited for communication, mean over ranks, from 0 to 1: of the time from where the step
    /// before took this sum to where this one did, as soon as its backward was enqueued. What waiting is longer than that, as a GPU tells of
    /// it when it ends, counts in the next step.
    pub exposed: f64,
    /// Rank 0 said before this step that the time is up.
    pub out_of_time: bool,
}

impl Trainer {
    /// A trainer on the CPU. Collective over `mesh.world`. The validation source may be missing.
    pub fn new(mesh: Mesh, config: Config, source: Source, validation: Option<Source>) -> Result<Self> {
        Self::on(Device::Cpu, mesh, config, source, validation)
    }

    /// A trainer on a device.
    pub fn on(device: Device, mesh: Mesh, config: Config, source: Source, validation: Option<Source>) -> Result<Self> {
        let kind = config.train.dtype.kind();
        let model = Model::new(&config.model, kind, config.train.seed, device)?;
        let optimizer = AdamW::new(config.optimizer.clone(), &model.params)?;
        mesh.world.connect(&[], &[])?;
        let linear = method::linear(&config.parallel.linear_method, &mesh.sp)?;
        let attention = method::softmax(&config.parallel.softmax_method, &mesh.sp)?;
        // Where a rank adds nothing to the gradient of its one backward, a wider sum would not be more exact: that over ranks is
        // rounded once.
        let adds_up = config.train.batch / mesh.dp.size() > config.train.micro_batch;
        let grad_kind = if device.is_cuda() && !adds_up { kind } else { optimizer.kind() };
        let grad = Tensor::f_zeros([model.params.numel()], (grad_kind, device))?;
        model.params.share_grads(&grad)?;
        let buckets = gradients::buckets(&config);
        Ok(Self {
            mesh,
            config,
            model,
            optimizer,
            steps_done: 0,
            source,
            validation,
            linear,
            attention,
            device,
            grad,
            buckets,
            untold: Untold::default(),
            next: None,
        })
    }

    /// Tokens seen so far, over all ranks.
    pub fn tokens(&self) -> u64 {
        self.steps_done * (self.config.train.batch * self.config.train.seq_len) as u64
    }

    pub fn device(&self) -> Device {
        self.device
    }

    /// From the next step on sequences lie on the ranks in this layout, and layers share them by these methods, which must be of
    /// the trainer's sp group. The configuration goes on naming the methods that it was made with.
    pub fn share_by(&mut self, linear: LinearMethod, attention: Arc<dyn Attention>, layout: LayoutKind) {
        (self.linear, self.attention, self.config.parallel.layout) = (linear, attention, layout);
        self.next = None;
    }

    /// One optimizer step. `out_of_time` is what this rank knows; the outcome says what rank 0 knew.
    ///
    /// On a GPU a rank alone waits for nothing before the end, where the loss is read.
    pub fn step(&mut self, out_of_time: bool) -> Result<StepOutcome> {
        let (step, train) = (self.steps_done + 1, self.config.train.clone());
        let world = self.mesh.world.clone();
        let exposed = || world.recorder().totals().exposed_ns;
        let (waited, began) = (exposed(), Instant::now());
        let expected = (train.batch * train.seq_len) as f64;

        let mut loss_sum = Tensor::f_zeros([], (Kind::Double, self.device))?;
        let mut labels = 0.0;
        let mut ready = self.next.take().filter(|(of, _)| *of == step).map(|(_, batch)| batch);
        let summing = (world.size() > 1).then(|| Summing::new(&world, &self.grad, self.buckets.clone()));
        let passes = train.batch / self.mesh.dp.size() / train.micro_batch;
        for at in 0..passes {
            // A GPU still computes the micro-batch before.
            let mut batch = ready.take().map_or_else(|| self.micro_batch(step, at), Ok)?;
            if at == 0 {
                self.clear_gradient(&mut batch.context)?;
            }
            let done = summing.as_ref().filter(|_| at + 1 == passes).map(Summing::follows);
            let loss = self.loss(&batch, train.activation_checkpointing, done.as_ref())?;
            let counted = batch.counted;
            // Gradients of the sum of all losses, over the number of labels that a step normally has.
            let seed = loss.f_ones_like()?.f_mul_scalar(1.0 / expected)?;
            kernels::bridge::backward(&loss, &seed)?;
            let left = batch.context.unwritten.zero_rest()?;
            if left > 0 && done.is_some() {
                // Ranks have added up what was there before.
                let problem =
                    format!("the gradients of {left} weights were summed over ranks before they were written");
                return Err(kernels::Error::Unsupported(problem).into());
            }
            let _ = loss_sum.f_add_(&loss.f_detach()?)?;
            labels += counted;
        }

        let (mut out_of_time, mut share, told) = (out_of_time, 0.0, exposed());
        let (mut met, mut left) = (Duration::ZERO, Duration::ZERO);
        let telling = Instant::now();
        if let Some(summing) = summing {
            // What hosts know meets on hosts, while GPUs are in backward; the loss meets on them.
            let (waiting, time) =
                (self.untold.waiting + Duration::from_nanos(told - waited), self.untold.time + (telling - began));
            let mine = waiting.min(time).as_secs_f64() / time.as_secs_f64();
            let all = sum(&world, &[labels, mine, f64::from(u8::from(out_of_time))])?;
            (met, left) = (telling.elapsed(), waiting.saturating_sub(time));
            (labels, share, out_of_time) = (all[0], all[1] / world.size() as f64, all[2] > 0.0);
            summing.finish()?;
            world.all_reduce_in_place(&loss_sum, Reduce::Sum)?.wait()?;
        }
        let lr = learning_rate(&self.config.optimizer, step, train.steps);
        let scale = expected / labels;
        let mut grad = self.grad.shallow_clone();
        let norm = self.optimizer.update(&mut self.model.params, &mut grad, scale, lr, step)?;
        self.steps_done = step;
        if step < train.steps {
            self.next = Some((step + 1, self.micro_batch(step + 1, 0)?));
        }
        let numbers = [loss_sum.f_to_device(norm.device())?, norm.f_to_kind(Kind::Double)?];
        let numbers = Vec::<f64>::try_from(Tensor::f_stack(&numbers, 0)?)?;
        // But for the time in which hosts met.
        let waiting = left + Duration::from_nanos(exposed() - told).saturating_sub(met);
        self.untold = Untold { waiting, time: telling.elapsed() - met };
        let (loss, grad_norm) = (numbers[0] / labels, numbers[1]);
        finite(step, "training loss", loss)?;
        finite(step, "norm of the gradient", grad_norm)?;
        Ok(StepOutcome { loss, grad_norm, lr, exposed: share, out_of_time })
    }

    /// Zeroes the gradient, but for what the first backward of a step writes anyway: its `context` says which.
    fn clear_gradient(&self, context: &mut Context) -> Result<()> {
        let unwritten = self.model.unwritten(context)?;
        let place = |grad: &Tensor| (grad.data_ptr() as usize - self.grad.data_ptr() as usize) as i64;
        let width = self.grad.kind().elt_size_in_bytes() as i64;
        let mut kept: Vec<_> = unwritten.iter().map(|grad| (place(grad) / width, grad.numel() as i64)).collect();
        kept.sort_unstable();
        let mut zeroed = 0;
        for (start, numbers) in kept.into_iter().chain([(self.grad.size()[0], 0)]) {
            if start > zeroed {
                let _ = self.grad.f_narrow(0, zeroed, start - zeroed)?.f_zero_()?;
            }
            zeroed = start + numbers;
        }
        context.unwritten = Unwritten::new(unwritten);
        Ok(())
    }

    /// Mean loss over the validation sequences, nats a token; `None` without validation data.
    pub fn validate(&self) -> Result<Option<f64>> {
        let Some(validation) = &self.validation else { return Ok(None) };
        let _guard = tch::no_grad_guard();
        let wanted = self.config.train.validate_sequences as u64;
        let count = validation.windows().map_or(wanted, |windows| windows.min(wanted));
        let (mut loss_sum, mut labels) = (0.0, 0.0);
        for index in (0..count).skip(self.mesh.dp.rank()).step_by(self.mesh.dp.size()) {
            let batch = self.batch(&[validation.sequence(index)])?;
            loss_sum += self.loss(&batch, false, None)?.double_value(&[]);
            labels += batch.counted;
        }
        let all = sum(&self.mesh.world, &[loss_sum, labels])?;
        finite(self.steps_done, "validation loss", all[0] / all[1])?;
        Ok(Some(all[0] / all[1]))
    }

    /// Of the sequences of a step that belong to this rank's dp group, those of one pass. Several of them make a batch only where
    /// none has documents inside.
    fn micro_batch(&self, step: u64, at: usize) -> Result<Batch> {
        let (batch, size) = (self.config.train.batch, self.config.train.micro_batch);
        let before = self.mesh.dp.rank() * (batch / self.mesh.dp.size()) + at * size;
        let first = (step - 1) * batch as u64 + before as u64;
        let sequences: Vec<Sequence> = (first..first + size as u64).map(|index| self.source.sequence(index)).collect();
        self.batch(&sequences)
    }

    /// This rank's share of some sequences, at least one.
    fn batch(&self, sequences: &[Sequence]) -> Result<Batch> {
        let layout = Layout::new(self.config.parallel.layout, sequences[0].inputs().len() as i64, self.mesh.sp.size())?;
        let plan = Plan::new(layout, Some(&sequences[0].cu_seqlens), self.mesh.sp.rank())?;
        let mine = |of: fn(&Sequence) -> &[i64]| -> Result<Tensor> {
            let rows =
                sequences.iter().map(|s| Tensor::f_from_slice(of(s))).collect::<std::result::Result<Vec<_>, _>>()?;
            Ok(plan.layout.shard(&Tensor::f_stack(&rows, 0)?, 1, plan.rank)?)
        };
        let (tokens, labels) = (mine(Sequence::inputs)?, mine(Sequence::labels)?);
        let counted = labels.f_ne(IGNORE_INDEX)?.f_sum(Kind::Double)?.double_value(&[]);
        let on_device = |x| kernels::bridge::upload(x, self.device);
        let (tokens, labels) = (on_device(&tokens)?, on_device(&labels)?);
        let shard = Arc::new(Shard {
            group: self.mesh.sp.clone(),
            plan,
            linear: self.linear.clone(),
            attention: self.attention.clone(),
        });
        let (model, kind) = (&self.config.model, self.config.train.dtype.kind());
        let context = Context::new(shard, model.head_dim(), model.rope_base, kind, self.device)?;
        Ok(Batch { context, tokens, labels, counted })
    }

    /// The sum of the losses of a batch.
    fn loss(&self, batch: &Batch, checkpoint: bool, done: Option<&LayerDone>) -> Result<Tensor> {
        let hidden = self.model.forward(&batch.context, &batch.tokens, checkpoint, done)?;
        Ok(self.model.loss(&hidden, &batch.labels)?)
    }

    /// Where training stands, for a checkpoint.
    pub fn state(&self) -> Result<TrainState> {
        Ok(TrainState {
            step: self.steps_done,
            tokens: self.tokens(),
            sequences: self.steps_done * self.config.train.batch as u64,
            config_toml: self.config.to_toml()?,
            ..TrainState::default()
        })
    }

    /// Goes on from a checkpoint. What the parameters and the order of the data depend on must be as it was.
    pub fn load(&mut self, loaded: Loaded) -> Result<()> {
        let was = Config::from_toml_str(&loaded.state.config_toml, "the checkpoint's config", &[])?;
        let is = &self.config;
        let same = |key: &'static str, was: String, is: String| {
            if was == is { Ok(()) } else { Err(Error::Changed { key, was, is }) }
        };
        same("[model]", format!("{:?}", was.model), format!("{:?}", is.model))?;
        same("train.batch", was.train.batch.to_string(), is.train.batch.to_string())?;
        same("train.seq_len", was.train.seq_len.to_string(), is.train.seq_len.to_string())?;
        same("train.seed", was.train.seed.to_string(), is.train.seed.to_string())?;
        same("train.dtype", format!("{:?}", was.train.dtype), format!("{:?}", is.train.dtype))?;
        let params = &self.model.params;
        params.fill(&params.flat, |name| loaded.model.get(name).map(Tensor::shallow_clone))?;
        self.optimizer.load(params, |name| loaded.optimizer.get(name).map(Tensor::shallow_clone))?;
        self.steps_done = loaded.state.step;
        Ok(())
    }
}

fn finite(step: u64, what: &'static str, value: f64) -> Result<()> {
    if value.is_finite() { Ok(()) } else { Err(Error::NotFinite { step, what, value }) }
}
