//! One layer of the model: norm, mixer, residual; norm, SwiGLU (arXiv 2002.05202), residual.

use tch::Tensor;

use super::linear_layer::{self, LinearLayer};
use super::softmax_layer::{self, SoftmaxLayer};
use super::{Cache, Context, Init, KvCache, Params, Result, Spec, rms_norm};
use crate::config::{LayerKind, ModelConfig};

/// Parameters of one block. What writes into the residual stream starts smaller, by the root of how many do (GPT-2).
pub(super) fn specs(config: &ModelConfig, layer: usize, kind: LayerKind) -> Vec<Spec> {
    let (d, mlp) = (config.dim, config.mlp_dim);
    let std = (0.4 / d as f64).sqrt();
    let residual = Init::Normal(std / (2.0 * config.layers as f64).sqrt());
    let spec =
        |name: &str, shape: &[i64], init, decayed| Spec::new(format!("layers.{layer}.{name}"), shape, init, decayed);
    let mut specs = vec![spec("attn_norm", &[d], Init::Constant(1.0), false)];
    specs.extend(match kind {
        LayerKind::Linear => linear_layer::specs(config, &format!("layers.{layer}.attn"), residual),
        LayerKind::Softmax => softmax_layer::specs(config, &format!("layers.{layer}.attn"), residual),
    });
    specs.push(spec("mlp_norm", &[d], Init::Constant(1.0), false));
    specs.push(spec("mlp.w_gate", &[mlp, d], Init::Normal(std), true));
    specs.push(spec("mlp.w_up", &[mlp, d], Init::Normal(std), true));
    specs.push(spec("mlp.w_down", &[d, mlp], residual, true));
    specs
}

enum Mixer {
    Linear(LinearLayer),
    Softmax(SoftmaxLayer),
}

pub struct Block {
    mixer: Mixer,
    attn_norm: Tensor,
    mlp_norm: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    eps: f64,
}

impl Block {
    pub(super) fn new(config: &ModelConfig, params: &Params, layer: usize, kind: LayerKind) -> Result<Self> {
        let prefix = format!("layers.{layer}");
        let get = |name: &str| params.get(&format!("{prefix}.{name}"));
        let attn = format!("{prefix}.attn");
        Ok(Self {
            mixer: match kind {
                LayerKind::Linear => Mixer::Linear(LinearLayer::new(config, params, &attn, layer)?),
                LayerKind::Softmax => Mixer::Softmax(SoftmaxLayer::new(config, params, &attn)?),
            },
            attn_norm: get("attn_norm")?,
            mlp_norm: get("mlp_norm")?,
            w_gate: get("mlp.w_gate")?,
            w_up: get("mlp.w_up")?,
            w_down: get("mlp.w_down")?,
            eps: config.norm_eps,
        })
    }

    /// x `[B, T, D]`, this rank's tokens -> `[B, T, D]`.
    pub fn forward(&self, context: &Context, x: &Tensor) -> Result<Tensor> {
        let normed = rms_norm(x, &self.attn_norm, self.eps)?;
        let mixed = match &self.mixer {
            Mixer::Linear(layer) => layer.forward(context, &normed)?,
            Mixer::Softmax(layer) => layer.forward(context, &normed)?,
        };
        self.mlp(&x.f_add(&mixed)?)
    }

    pub(super) fn decode(&self, x: &Tensor, cache: &mut Cache) -> Result<Tensor> {
        let normed = rms_norm(x, &self.attn_norm, self.eps)?;
        let mixed = match (&self.mixer, cache) {
            (Mixer::Linear(layer), Cache::State(state)) => layer.decode(&normed, state)?,
            (Mixer::Softmax(layer), Cache::Kv(cache)) => layer.decode(&normed, cache)?,
            _ => return Err(kernels::Error::Unsupported("a cache of another kind of layer".to_owned()).into()),
        };
        self.mlp(&x.f_add(&mixed)?)
    }

    pub(super) fn cache(&self) -> Cache {
        match self.mixer {
            Mixer::Linear(_) => Cache::State(None),
            Mixer::Softmax(_) => Cache::Kv(KvCache::default()),
        }
    }

    fn mlp(&self, x: &Tensor) -> Result<Tensor> {
        let normed = rms_norm(x, &self.mlp_norm, self.eps)?;
        let project = |w: &Tensor| normed.f_linear(w, None::<&Tensor>);
        let hidden = project(&self.w_gate)?.f_silu()?.f_mul(&project(&self.w_up)?)?;
        Ok(x.f_add(&hidden.f_linear(&self.w_down, None::<&Tensor>)?)?)
    }

    pub(super) fn shallow_clone(&self) -> Self {
        Self {
            mixer: match &self.mixer {
                Mixer::Linear(layer) => Mixer::Linear(layer.shallow_clone()),
                Mixer::Softmax(layer) => Mixer::Softmax(layer.shallow_clone()),
            },
            attn_norm: self.attn_norm.shallow_clone(),
            mlp_norm: self.mlp_norm.shallow_clone(),
            w_gate: self.w_gate.shallow_clone(),
            w_up: self.w_up.shallow_clone(),
            w_down: self.w_down.shallow_clone(),
            eps: self.eps,
        }
    }
}
