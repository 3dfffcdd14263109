//! Text from a trained model: the prompt in chunks, then one token a step. Linear layers carry a state of constant size;
//! only softmax layers keep keys and values.

use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use crate::config::Config;
use crate::data::{SEPARATOR, mix};
use crate::model::{self, Cache, Model};
use crate::{checkpoint, config};

/// Tokens of the prompt that go through the model at once.
const PREFILL: usize = 1024;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{} holds no checkpoint: expected the folder of a training run", .0.display())]
    NoCheckpoint(PathBuf),
    #[error("temperature: found {0}, expected 0 or more")]
    Temperature(f64),
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error(transparent)]
    Model(#[from] model::Error),
    #[error(transparent)]
    Tch(#[from] tch::TchError),
}

#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How many to generate at most; generation also stops where the model ends the document.
    pub tokens: usize,
    /// What the logits are divided by; 0 always takes the likeliest token.
    pub temperature: f64,
    /// How many of the likeliest tokens to draw from; 0: all.
    pub top_k: usize,
    pub seed: u64,
}

/// Continues `prompt` with the newest checkpoint of `run_dir`, on `device`; `on_bytes` gets each token as it is there.
pub fn run(
    run_dir: &Path,
    device: Device,
    prompt: &[u8],
    options: Options,
    on_bytes: &mut dyn FnMut(&[u8]),
) -> Result<()> {
    let path = checkpoint::latest(run_dir)?.ok_or_else(|| Error::NoCheckpoint(run_dir.to_owned()))?;
    let loaded = checkpoint::load(&path, Device::Cpu)?;
    let config = Config::from_toml_str(&loaded.state.config_toml, "the checkpoint's config", &[])?;
    let model = Model::new(&config.model, config.train.dtype.kind(), 0, device)?;
    model.params.fill(&model.params.flat, |name| loaded.model.get(name).map(Tensor::shallow_clone))?;
    sample(&model, prompt, options, on_bytes)
}

/// Continues `prompt` with `model`.
pub fn sample(model: &Model, prompt: &[u8], options: Options, on_bytes: &mut dyn FnMut(&[u8])) -> Result<()> {
    if options.temperature.is_nan() || options.temperature < 0.0 {
        return Err(Error::Temperature(options.temperature));
    }
    let _guard = tch::no_grad_guard();
    let mut decoder = Decoder::new(model);
    let start: Vec<i64> = [SEPARATOR].into_iter().chain(prompt.iter().copied()).map(i64::from).collect();
    let mut logits = decoder.feed(&start)?;
    for step in 0..options.tokens {
        let token = draw(&logits, options, step as u64)?;
        let Some(byte) = u8::try_from(token).ok().filter(|byte| *byte != SEPARATOR) else { break };
        on_bytes(&[byte]);
        if step + 1 < options.tokens {
            logits = decoder.feed(&[token])?;
        }
    }
    Ok(())
}

/// A model with what it remembers of the tokens fed so far.
pub struct Decoder<'a> {
    model: &'a Model,
    caches: Vec<Cache>,
}

impl<'a> Decoder<'a> {
    pub fn new(model: &'a Model) -> Self {
        Self { model, caches: model.caches() }
    }

    /// Takes more tokens (at least one) and gives the logits `[vocab]` of the next, f64.
    pub fn feed(&mut self, tokens: &[i64]) -> Result<Tensor> {
        let mut last = Tensor::new();
        let device = self.model.params.flat.device();
        for chunk in tokens.chunks(PREFILL) {
            let hidden = self
                .model
                .decode(&Tensor::f_from_slice(chunk)?.f_unsqueeze(0)?.f_to_device(device)?, &mut self.caches)?;
            last = hidden.f_select(1, chunk.len() as i64 - 1)?;
        }
        Ok(self.model.logits(&last)?.f_select(0, 0)?.f_to_kind(Kind::Double)?)
    }
}

/// A token drawn by a number that depends on the seed and the step alone.
fn draw(logits: &Tensor, options: Options, step: u64) -> Result<i64> {
    if options.temperature == 0.0 {
        return Ok(logits.f_argmax(0, false)?.int64_value(&[]));
    }
    let vocab = logits.size()[0];
    let kept = if options.top_k == 0 { vocab } else { vocab.min(options.top_k as i64) };
    let (top, tokens) = logits.f_topk(kept, 0, true, true)?;
    let shares = top.f_div_scalar(options.temperature)?.f_softmax(0, Kind::Double)?.f_cumsum(0, Kind::Double)?;
    let uniform = (mix(options.seed ^ mix(step)) >> 11) as f64 / (1u64 << 53) as f64;
    let index = shares.f_le(uniform)?.f_sum(Kind::Int64)?.int64_value(&[]).min(kept - 1);
    Ok(tokens.int64_value(&[index]))
}
