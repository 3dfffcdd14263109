//! What a round runs: the phases of one step of a method, timed one by one.

use anyhow::{Context as _, Result};
use collectives::Mesh;
use runtime::config::{DataKind, LayoutKind};
use runtime::data::{RandomSource, Source};
use runtime::model::{Context, Model};
use runtime::sequence::{Layout, Plan};
use runtime::train::Trainer;
use tch::{Device, Tensor};

use super::inputs::{Tokens, numbers};
use super::method::Entrant;
use super::operator::Operator;
use super::{Mixer, Mode, Options};

/// One method at one length on one rank.
pub(super) trait Work {
    /// Names of the phases, in order.
    fn phases(&self) -> &'static [&'static str];

    fn run(&mut self, phase: usize) -> Result<()>;

    /// After the phases, untimed.
    fn tidy(&mut self) -> Result<()> {
        Ok(())
    }
}

const BOTH: &[&str] = &["forward", "backward"];
const STEP: &[&str] = &["step"];

/// How a sequence lies on the ranks of the sp axis.
pub(super) fn plan(mesh: &Mesh, layout: LayoutKind, tokens: i64) -> Result<Plan> {
    Ok(Plan::new(Layout::new(layout, tokens, mesh.sp.size())?, None, mesh.sp.rank())?)
}

/// Collective over the mesh.
pub(super) fn new(options: &Options, mesh: &Mesh, entrant: &Entrant, tokens: i64) -> Result<Box<dyn Work>> {
    let plan = plan(mesh, entrant.method.layout, tokens)?;
    Ok(match options.mode {
        Mode::Operator => {
            let x = Tokens::of_rank(&plan, options, options.config.model.head_dim())?;
            Box::new(Operator::new(entrant.shard(&mesh.sp, plan), options, x, options.learns_decay())?)
        }
        Mode::Layer => Box::new(Layer::new(options, mesh, entrant, plan)?),
        Mode::Train => Box::new(Training::new(options, mesh, entrant, tokens)?),
    })
}

impl Work for Operator {
    fn phases(&self) -> &'static [&'static str] {
        BOTH
    }

    fn run(&mut self, phase: usize) -> Result<()> {
        match phase {
            0 => drop(self.forward()?),
            _ => drop(self.backward()?),
        }
        Ok(())
    }
}

/// The first block of a model: norm, mixer, residual; norm, MLP, residual.
struct Layer {
    model: Model,
    context: Context,
    x: Tensor,
    d_y: Tensor,
    y: Option<Tensor>,
    /// Where the parameters' gradients go.
    grads: Tensor,
}

impl Layer {
    fn new(options: &Options, mesh: &Mesh, entrant: &Entrant, plan: Plan) -> Result<Self> {
        let mut config = options.config.model.clone();
        (config.layers, config.pattern) = (1, options.mixer.letter().to_owned());
        let kind = options.config.train.dtype.kind();
        let model = Model::new(&config, kind, 0, Device::Cpu)?;
        let ranges: Vec<_> = plan.layout.held(plan.rank).into_iter().map(|s| plan.layout.segment(s)).collect();
        let make = |seed| numbers(seed, &ranges, &[config.dim], kind);
        let (x, d_y) = (make(1)?.f_set_requires_grad(true)?, make(2)?);
        let shard = entrant.shard(&mesh.sp, plan);
        let context = Context::new(shard, config.head_dim(), config.rope_base, kind, Device::Cpu)?;
        let grads = model.params.flat.f_zeros_like()?;
        Ok(Self { model, context, x, d_y, y: None, grads })
    }
}

impl Work for Layer {
    fn phases(&self) -> &'static [&'static str] {
        BOTH
    }

    fn run(&mut self, phase: usize) -> Result<()> {
        if phase == 0 {
            let block = self.model.blocks().first().context("a model without layers")?;
            self.y = Some(block.forward(&self.context, &self.x)?);
        } else if let Some(y) = self.y.take() {
            kernels::bridge::backward(&y, &self.d_y)?;
        }
        Ok(())
    }

    fn tidy(&mut self) -> Result<()> {
        self.x.zero_grad();
        Ok(self.model.params.take_grads(&self.grads)?)
    }
}

/// The trainer of `lasp train` on random tokens.
struct Training {
    trainer: Trainer,
}

impl Training {
    fn new(options: &Options, mesh: &Mesh, entrant: &Entrant, tokens: i64) -> Result<Self> {
        let mut config = options.config.clone();
        config.parallel.layout = entrant.method.layout;
        config.data.kind = DataKind::Random;
        config.train.seq_len = tokens as usize;
        match options.mixer {
            Mixer::Linear => config.parallel.linear_method = entrant.method.name.clone(),
            Mixer::Softmax => config.parallel.softmax_method = entrant.method.name.clone(),
        }
        // The mesh is that of all ranks, whatever the configuration was made for; and the schedule must not end.
        (config.parallel.sp, config.parallel.dp) = (0, 1);
        config.train.steps = u64::MAX / 2;
        config.resolve_ranks(mesh.world.size())?;
        let source = Source::Random(RandomSource::new(config.model.vocab, config.train.seq_len, config.train.seed));
        Ok(Self { trainer: Trainer::new(mesh.clone(), config, source, None)? })
    }
}

impl Work for Training {
    fn phases(&self) -> &'static [&'static str] {
        STEP
    }

    fn run(&mut self, _phase: usize) -> Result<()> {
        self.trainer.step(false)?;
        Ok(())
    }
}
