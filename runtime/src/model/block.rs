//! One layer of the model: norm, mixer, residual; norm, SwiGLU (arXiv 2002.05202), residual.

use tch::Tensor;

use super::linear_layer::{self, LinearLayer};
use super::softmax_layer::{self, SoftmaxLayer};
use super::{Cache, Context, Error, Init, KvCache, Params, Result, Spec, fused, rms_norm};
use crate::config::{LayerKind, ModelConfig};
use crate::sequence::LinearMethod;
use crate::sequence::attention::Attended;

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
    mlp: Mlp,
    eps: f64,
}

/// `x + down(silu(gate(norm(x))) * up(norm(x)))`.
pub(super) struct Mlp {
    pub norm: Tensor,
    pub w_gate: Tensor,
    pub w_up: Tensor,
    pub w_down: Tensor,
    pub eps: f64,
}

impl Mlp {
    pub fn shallow_clone(&self) -> Self {
        let [norm, w_gate, w_up, w_down] =
            [&self.norm, &self.w_gate, &self.w_up, &self.w_down].map(Tensor::shallow_clone);
        Self { norm, w_gate, w_up, w_down, eps: self.eps }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let normed = rms_norm(x, &self.norm, self.eps)?;
        let project = |w: &Tensor| normed.f_linear(w, None::<&Tensor>);
        let hidden = project(&self.w_gate)?.f_silu()?.f_mul(&project(&self.w_up)?)?;
        Ok(x.f_add(&hidden.f_linear(&self.w_down, None::<&Tensor>)?)?)
    }
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
            mlp: Mlp {
                norm: get("mlp_norm")?,
                w_gate: get("mlp.w_gate")?,
                w_up: get("mlp.w_up")?,
                w_down: get("mlp.w_down")?,
                eps: config.norm_eps,
            },
            eps: config.norm_eps,
        })
    }

    /// x `[B, T, D]`, this rank's tokens -> `[B, T, D]`.
    pub fn forward(&self, context: &Context, x: &Tensor) -> Result<Tensor> {
        let (x, _) = self.mix(context, x, None)?;
        if self.fused(context) { fused::mlp(&self.mlp, context, &x) } else { self.mlp.forward(&x) }
    }

    /// [`Block::forward`] that keeps x, and of softmax layers [`Attended`], and computes the rest again in backward.
    pub fn checkpointed(&self, context: &Context, x: &Tensor) -> Result<Tensor> {
        let (block, at) = (self.shallow_clone(), context.shallow_clone());
        let first = |x: &Tensor| self.first(context, x).map_err(Error::into_kernels);
        let again = move |x: &Tensor, kept, dy| block.again(&at, x, kept, dy).map_err(Error::into_kernels);
        Ok(kernels::bridge::checkpoint(x, first, again)?)
    }

    /// The output, and what to keep.
    fn first(&self, context: &Context, x: &Tensor) -> Result<(Tensor, Option<Attended>)> {
        let (x, kept) = self.mix(context, x, None)?;
        let fused = self.fused(context);
        let y = if fused { fused::mlp_in_parts(&self.mlp, context, &x) } else { self.mlp.forward(&x) }?;
        Ok((y, kept))
    }

    /// A tensor of the graph and its gradient, from which backward comes to what it would from the output and dy.
    fn again(&self, context: &Context, x: &Tensor, kept: Option<Attended>, dy: Tensor) -> Result<(Tensor, Tensor)> {
        let (x, _) = self.mix(context, x, kept)?;
        if self.fused(context) { fused::mlp_again(&self.mlp, context, &x, dy) } else { Ok((self.mlp.forward(&x)?, dy)) }
    }

    /// Whether halves of this block are the nodes of `fused`.
    fn fused(&self, context: &Context) -> bool {
        let linear = matches!(self.mixer, Mixer::Linear(_));
        context.fused && (!linear || matches!(context.shard.linear, LinearMethod::Scan(_)))
    }

    /// The weights whose gradients the nodes of `fused` compute, if it consists of these.
    pub(super) fn weights_of_nodes(&self, context: &Context) -> Vec<&Tensor> {
        if !self.fused(context) {
            return vec![];
        }
        let mut weights = match &self.mixer {
            Mixer::Linear(LinearLayer { wq, wk, wv, wo, .. }) | Mixer::Softmax(SoftmaxLayer { wq, wk, wv, wo, .. }) => {
                vec![wq, wk, wv, wo]
            }
        };
        if let Mixer::Linear(LinearLayer { wg: Some(wg), .. }) = &self.mixer {
            weights.push(wg);
        }
        weights.extend([&self.mlp.w_gate, &self.mlp.w_up, &self.mlp.w_down]);
        weights
    }

    /// The first half: x and what the mixer makes of it; and what of softmax attention need not be computed again, or was `before`.
    fn mix(&self, context: &Context, x: &Tensor, before: Option<Attended>) -> Result<(Tensor, Option<Attended>)> {
        let normed = || rms_norm(x, &self.attn_norm, self.eps);
        Ok(match (&self.mixer, self.fused(context)) {
            (Mixer::Linear(layer), true) => (fused::linear(layer, &self.attn_norm, context, x)?, None),
            (Mixer::Softmax(layer), true) => fused::softmax(layer, (&self.attn_norm, self.eps), context, x, before)?,
            (Mixer::Linear(layer), false) => (x.f_add(&layer.forward(context, &normed()?)?)?, None),
            (Mixer::Softmax(layer), false) => {
                let (mixed, attended) = layer.forward(context, &normed()?, before)?;
                (x.f_add(&mixed)?, attended)
            }
        })
    }

    pub(super) fn decode(&self, x: &Tensor, cache: &mut Cache) -> Result<Tensor> {
        let normed = rms_norm(x, &self.attn_norm, self.eps)?;
        let mixed = match (&self.mixer, cache) {
            (Mixer::Linear(layer), Cache::State(state)) => layer.decode(&normed, state)?,
            (Mixer::Softmax(layer), Cache::Kv(cache)) => layer.decode(&normed, cache)?,
            _ => return Err(kernels::Error::Unsupported("a cache of another kind of layer".to_owned()).into()),
        };
        self.mlp.forward(&x.f_add(&mixed)?)
    }

    pub(super) fn cache(&self) -> Cache {
        match self.mixer {
            Mixer::Linear(_) => Cache::State(None),
            Mixer::Softmax(_) => Cache::Kv(KvCache::default()),
        }
    }

    pub(super) fn shallow_clone(&self) -> Self {
        Self {
            mixer: match &self.mixer {
                Mixer::Linear(layer) => Mixer::Linear(layer.shallow_clone()),
                Mixer::Softmax(layer) => Mixer::Softmax(layer.shallow_clone()),
            },
            attn_norm: self.attn_norm.shallow_clone(),
            mlp: self.mlp.shallow_clone(),
            eps: self.eps,
        }
    }
}
