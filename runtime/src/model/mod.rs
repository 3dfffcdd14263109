//! Linear-Llama3: a Llama-3 body (RMSNorm, SwiGLU, tied or untied embeddings) whose layers mix tokens by linear or by
//! softmax attention, in the order of a pattern such as `LLLN`. LASP-2 (arXiv 2502.07563), section 4.
//!
//! Read from [`Model::forward`] downwards: a sequence's context, the blocks, the loss. The body is ordinary tensor code
//! under libtorch's autograd, or on GPUs the nodes of `fused`; only the mixers know that a sequence lies on several ranks.

mod block;
mod context;
mod decay;
mod fused;
mod linear_layer;
pub mod loss;
mod params;
mod softmax_layer;

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

pub use block::Block;
pub(crate) use context::HIDDEN_AT_ONCE;
pub use context::{Context, rotary};
pub use decay::{constant_decay, constant_log_decay};
pub use fused::Unwritten;
pub(crate) use linear_layer::DECAY_RANK;
pub use params::{Init, Params, Spec};
pub use softmax_layer::KvCache;

use crate::config::{LayerKind, ModelConfig};
use crate::sequence;

pub type Result<T> = std::result::Result<T, Error>;

/// Called in backward with the number of a layer when the gradients of its parameters, and of all layers behind it, are complete.
pub type LayerDone = Arc<dyn Fn(usize) -> kernels::Result<()> + Send + Sync>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no parameter {0} in this model")]
    NoParameter(String),
    #[error("parameter {name}: found shape {found:?}, expected {expected:?}")]
    ParameterShape { name: String, found: Vec<i64>, expected: Vec<i64> },
    #[error(transparent)]
    Sequence(#[from] sequence::Error),
    #[error(transparent)]
    Kernels(#[from] kernels::Error),
    #[error(transparent)]
    Tch(#[from] tch::TchError),
}

impl Error {
    /// As [`sequence::Error::into_kernels`].
    fn into_kernels(self) -> kernels::Error {
        match self {
            Self::Kernels(error) => error,
            other => kernels::Error::Unsupported(other.to_string()),
        }
    }
}

/// The whole model, its parameters in one flat buffer that the optimizer owns together with it.
pub struct Model {
    pub config: ModelConfig,
    pub params: Params,
    embedding: Tensor,
    blocks: Vec<Block>,
    norm: Tensor,
    head: Tensor,
}

/// Every parameter of the model, in order: what `lasp plan` counts, what [`Model::new`] allocates.
pub fn specs(config: &ModelConfig) -> Vec<Spec> {
    let small = (0.4 / config.dim as f64).sqrt();
    let mut specs = vec![Spec::new("embedding", &[config.vocab, config.dim], Init::Normal(small), true)];
    for (layer, kind) in config.layer_kinds().into_iter().enumerate() {
        specs.extend(block::specs(config, layer, kind));
    }
    specs.push(Spec::new("norm", &[config.dim], Init::Constant(1.0), false));
    if !config.tied {
        specs.push(Spec::new("lm_head", &[config.vocab, config.dim], Init::Normal(small), true));
    }
    specs
}

impl Model {
    /// Parameters of kind `kind` from `seed` alone: the same on every rank.
    pub fn new(config: &ModelConfig, kind: Kind, seed: u64, device: Device) -> Result<Self> {
        let params = Params::new(&specs(config), kind, seed, device)?;
        let kinds: Vec<LayerKind> = config.layer_kinds();
        let blocks = kinds.iter().enumerate().map(|(layer, &kind)| Block::new(config, &params, layer, kind));
        Ok(Self {
            config: config.clone(),
            embedding: params.get("embedding")?,
            blocks: blocks.collect::<Result<_>>()?,
            norm: params.get("norm")?,
            head: params.get(if config.tied { "embedding" } else { "lm_head" })?,
            params,
        })
    }

    /// tokens `[B, T]`, this rank's, in local order -> hidden states after the last norm, `[B, T, D]`.
    ///
    /// `checkpoint`: whether blocks compute their activations again in backward instead of keeping them ([`Block::checkpointed`]).
    pub fn forward(
        &self,
        context: &Context,
        tokens: &Tensor,
        checkpoint: bool,
        done: Option<&LayerDone>,
    ) -> Result<Tensor> {
        let mut x = Tensor::f_embedding(&self.embedding, tokens, -1, false, false)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            if let Some(done) = done {
                x = announced(&x, layer, done)?;
            }
            x = if checkpoint && tch::Tensor::requires_grad(&x) {
                block.checkpointed(context, &x)?
            } else {
                block.forward(context, &x)?
            };
        }
        rms_norm(&x, &self.norm, self.config.norm_eps)
    }

    /// Gradients that a backward in this context writes as a whole, and need not be zeroed before: views of what
    /// [`Params::share_grads`] was given. For [`Context::unwritten`].
    pub fn unwritten(&self, context: &Context) -> Result<Vec<Tensor>> {
        let weights = self.blocks.iter().flat_map(|block| block.weights_of_nodes(context));
        let grads = weights.map(Tensor::f_grad).collect::<std::result::Result<Vec<_>, _>>()?;
        Ok(grads.into_iter().filter(Tensor::defined).collect())
    }

    /// The layers, the first one first.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The sum of the cross-entropies of `hidden` `[B, T, D]` against `labels` `[B, T]`, in nats; scalar, f32 or f64.
    pub fn loss(&self, hidden: &Tensor, labels: &Tensor) -> Result<Tensor> {
        loss::linear_cross_entropy(hidden, &self.head, labels)
    }

    /// `[B, T, D]` -> logits `[B, T, vocab]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(hidden.f_linear(&self.head, None::<&Tensor>)?)
    }

    /// One step of decoding, of one token or of a whole prompt: tokens `[B, T]` -> hidden states `[B, T, D]`; `caches`, one a
    /// block, carry what the tokens before have left.
    pub fn decode(&self, tokens: &Tensor, caches: &mut [Cache]) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let mut x = Tensor::f_embedding(&self.embedding, tokens, -1, false, false)?;
        for (block, cache) in self.blocks.iter().zip(caches) {
            x = block.decode(&x, cache)?;
        }
        rms_norm(&x, &self.norm, self.config.norm_eps)
    }

    /// What decoding starts from.
    pub fn caches(&self) -> Vec<Cache> {
        self.blocks.iter().map(Block::cache).collect()
    }
}

/// x, the input of a layer. Backward comes here when it has been through the layer: what adds to the gradients of parameters goes
/// before everything else that could run.
fn announced(x: &Tensor, layer: usize, done: &LayerDone) -> Result<Tensor> {
    let same = {
        let _guard = tch::no_grad_guard();
        x.f_detach()?
    };
    let done = done.clone();
    kernels::bridge::attach(&[x], &[&same], move |grads: Vec<Option<Tensor>>| {
        done(layer)?;
        Ok(grads)
    })?;
    Ok(same)
}

/// What one layer remembers while decoding: a state of constant size, or all keys and values.
pub enum Cache {
    /// `[B, H, K, V]` once there was a token.
    State(Option<Tensor>),
    Kv(KvCache),
}

/// `x / rms(x) * weight` over the last dimension. RMSNorm (arXiv 1910.07467).
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    Ok(x.f_rms_norm(weight.size(), Some(weight), eps)?)
}
