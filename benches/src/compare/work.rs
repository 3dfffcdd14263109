//! What a round runs: the phases of one step of a method, timed one by one. What the methods of one length can share, they
//! share: inputs, a layer, a trainer; so memory is that of one of them.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use collectives::Mesh;
use runtime::config::{DataKind, LayoutKind};
use runtime::data::{RandomSource, Source};
use runtime::model::{Context, Model};
use runtime::sequence::attention::Attention;
use runtime::sequence::{Layout, LinearMethod, Plan, method};
use runtime::train::Trainer;
use tch::Tensor;

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

/// What the methods of one length share, each part made when the first of them needs it.
pub(super) struct Scene<'a> {
    options: &'a Options,
    mesh: &'a Mesh,
    tokens: i64,
    operands: Vec<(LayoutKind, Tokens)>,
    activations: Vec<(LayoutKind, [Tensor; 2])>,
    model: Option<Rc<OneLayer>>,
    trainer: Option<Rc<RefCell<Trainer>>>,
}

impl<'a> Scene<'a> {
    pub fn new(options: &'a Options, mesh: &'a Mesh, tokens: i64) -> Self {
        Self { options, mesh, tokens, operands: vec![], activations: vec![], model: None, trainer: None }
    }

    /// Collective over the mesh.
    pub fn work(&mut self, entrant: &Entrant) -> Result<Box<dyn Work>> {
        let options = self.options;
        let plan = plan(self.mesh, entrant.method.layout, self.tokens)?;
        Ok(match options.mode {
            Mode::Operator => {
                let x = self.operands(&plan, entrant.method.layout)?;
                Box::new(Operator::new(entrant.shard(&self.mesh.sp, plan), options, x, options.learns_decay())?)
            }
            Mode::Layer => {
                let [x, d_y] = self.activations(&plan, entrant.method.layout)?;
                let (layer, model) = (self.layer()?, &options.config.model);
                let (shard, kind) = (entrant.shard(&self.mesh.sp, plan), options.config.train.dtype.kind());
                let context = Context::new(shard, model.head_dim(), model.rope_base, kind, options.device)?;
                Box::new(Layer { layer, context, x, d_y, y: None })
            }
            Mode::Train => Box::new(Training {
                trainer: self.trainer()?,
                share: (entrant.linear.clone(), entrant.attention.clone(), entrant.method.layout),
            }),
        })
    }

    fn operands(&mut self, plan: &Plan, layout: LayoutKind) -> Result<Tokens> {
        let options = self.options;
        let made = of(&mut self.operands, layout, || Tokens::of_rank(plan, options, options.config.model.head_dim()))?;
        Ok(made.shallow_clone())
    }

    /// x, a leaf of the graph, and dy.
    fn activations(&mut self, plan: &Plan, layout: LayoutKind) -> Result<[Tensor; 2]> {
        let (config, device) = (&self.options.config, self.options.device);
        let ranges: Vec<_> = plan.layout.held(plan.rank).into_iter().map(|s| plan.layout.segment(s)).collect();
        let make = |seed| numbers(seed, &ranges, &[config.model.dim], (config.train.dtype.kind(), device));
        let made = of(&mut self.activations, layout, || Ok([make(1)?.f_set_requires_grad(true)?, make(2)?]))?;
        Ok(made.each_ref().map(Tensor::shallow_clone))
    }

    fn layer(&mut self) -> Result<Rc<OneLayer>> {
        let layer = match self.model.take() {
            Some(layer) => layer,
            None => Rc::new(OneLayer::new(self.options)?),
        };
        Ok(self.model.insert(layer).clone())
    }

    fn trainer(&mut self) -> Result<Rc<RefCell<Trainer>>> {
        let trainer = match self.trainer.take() {
            Some(trainer) => trainer,
            None => Rc::new(RefCell::new(trainer(self.options, self.mesh, self.tokens)?)),
        };
        Ok(self.trainer.insert(trainer).clone())
    }
}

/// What was made for a layout, or is made now.
fn of<T>(all: &mut Vec<(LayoutKind, T)>, layout: LayoutKind, make: impl FnOnce() -> Result<T>) -> Result<&T> {
    let at = match all.iter().position(|(of, _)| *of == layout) {
        Some(at) => at,
        None => {
            all.push((layout, make()?));
            all.len() - 1
        }
    };
    Ok(&all[at].1)
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

/// A model of one layer.
struct OneLayer {
    model: Model,
    /// Where backward adds up the parameters' gradients.
    grads: Tensor,
}

impl OneLayer {
    fn new(options: &Options) -> Result<Self> {
        let mut config = options.config.model.clone();
        (config.layers, config.pattern) = (1, options.mixer.letter().to_owned());
        let model = Model::new(&config, options.config.train.dtype.kind(), 0, options.device)?;
        let grads = model.params.flat.f_zeros_like()?;
        model.params.share_grads(&grads)?;
        Ok(Self { model, grads })
    }
}

/// The first block of a model: norm, mixer, residual; norm, MLP, residual.
struct Layer {
    layer: Rc<OneLayer>,
    context: Context,
    x: Tensor,
    d_y: Tensor,
    y: Option<Tensor>,
}

impl Work for Layer {
    fn phases(&self) -> &'static [&'static str] {
        BOTH
    }

    fn run(&mut self, phase: usize) -> Result<()> {
        if phase == 0 {
            let block = self.layer.model.blocks().first().context("a model without layers")?;
            self.y = Some(block.forward(&self.context, &self.x)?);
        } else if let Some(y) = self.y.take() {
            kernels::bridge::backward(&y, &self.d_y)?;
        }
        Ok(())
    }

    fn tidy(&mut self) -> Result<()> {
        self.x.zero_grad();
        let _ = self.layer.grads.shallow_clone().f_zero_()?;
        Ok(())
    }
}

/// The trainer of `lasp train` on random tokens.
fn trainer(options: &Options, mesh: &Mesh, tokens: i64) -> Result<Trainer> {
    let mut config = options.config.clone();
    config.data.kind = DataKind::Random;
    config.train.seq_len = tokens as usize;
    // The methods are each step's own. The mesh is that of all ranks, whatever the configuration was made for; and the schedule
    // must not end.
    match options.mixer {
        Mixer::Linear => config.parallel.linear_method = method::SCANS[0].to_owned(),
        Mixer::Softmax => config.parallel.softmax_method = method::ATTENTIONS[0].to_owned(),
    }
    (config.parallel.sp, config.parallel.dp) = (0, 1);
    config.train.steps = u64::MAX / 2;
    config.resolve_ranks(mesh.world.size())?;
    let source = Source::Random(RandomSource::new(config.model.vocab, config.train.seq_len, config.train.seed));
    Ok(Trainer::on(options.device, mesh.clone(), config, source, None)?)
}

/// Its steps, shared among the ranks by one method.
struct Training {
    trainer: Rc<RefCell<Trainer>>,
    share: (LinearMethod, Arc<dyn Attention>, LayoutKind),
}

impl Work for Training {
    fn phases(&self) -> &'static [&'static str] {
        STEP
    }

    fn run(&mut self, _phase: usize) -> Result<()> {
        let mut trainer = self.trainer.borrow_mut();
        let (linear, attention, layout) = self.share.clone();
        trainer.share_by(linear, attention, layout);
        trainer.step(false)?;
        Ok(())
    }
}
