//! The linear-attention layer: projections, the mixer, a norm per head, a gate, the output projection.

use std::sync::Arc;

use kernels::linear::{self, Inputs, StateMixer};
use tch::Tensor;

use super::{Context, Init, Params, Result, Spec, constant_decay, rms_norm};
use crate::config::{DecayKind, ModelConfig};
use crate::sequence;

pub(super) fn specs(config: &ModelConfig, prefix: &str, residual: Init) -> Vec<Spec> {
    let (d, h) = (config.dim, config.heads);
    let small = Init::Normal((0.4 / d as f64).sqrt());
    let spec = |name: &str, shape: &[i64], init, decayed| Spec::new(format!("{prefix}.{name}"), shape, init, decayed);
    let mut specs: Vec<Spec> = ["wq", "wk", "wv"].map(|name| spec(name, &[d, d], small, true)).into();
    specs.push(spec("wo", &[d, d], residual, true));
    specs.push(spec("o_norm", &[config.head_dim()], Init::Constant(1.0), false));
    if config.output_gate {
        specs.push(spec("wg", &[d, d], small, true));
    }
    match config.decay {
        DecayKind::Token => {
            specs.push(spec("w_decay", &[h, d], small, true));
            specs.push(spec("b_decay", &[h], Init::DecayRates, false));
        }
        DecayKind::Channel => {
            specs.push(spec("w_decay_down", &[DECAY_RANK, d], small, true));
            specs.push(spec("w_decay_up", &[d, DECAY_RANK], Init::Normal(0.1), true));
            specs.push(spec("b_decay", &[d], Init::DecayRates, false));
        }
        DecayKind::None | DecayKind::Lightning | DecayKind::Retention => {}
    }
    specs
}

/// Width of the bottleneck before a decay per channel, as in GLA (arXiv 2312.06635).
pub(crate) const DECAY_RANK: i64 = 16;

/// Where a layer's log-decay comes from.
enum Gate {
    None,
    /// `[H]`.
    Constant(Tensor),
    /// `-softplus(x w^T + b)`, one number a head.
    Token {
        w: Tensor,
        b: Tensor,
    },
    /// `-softplus((x down^T) up^T + b)`, one number a head and key channel.
    Channel {
        down: Tensor,
        up: Tensor,
        b: Tensor,
    },
}

pub struct LinearLayer {
    pub(super) wq: Tensor,
    pub(super) wk: Tensor,
    pub(super) wv: Tensor,
    pub(super) wo: Tensor,
    pub(super) wg: Option<Tensor>,
    pub(super) o_norm: Tensor,
    gate: Gate,
    pub(super) mixer: Arc<dyn StateMixer>,
    pub(super) heads: i64,
    pub(super) eps: f64,
}

/// q, k, v `[B, T, H, K]` and the log-decay of some tokens.
struct Projected {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Option<Tensor>,
}

impl LinearLayer {
    pub(super) fn new(config: &ModelConfig, params: &Params, prefix: &str, layer: usize) -> Result<Self> {
        let get = |name: &str| params.get(&format!("{prefix}.{name}"));
        let gate = match config.decay {
            DecayKind::None => Gate::None,
            DecayKind::Lightning | DecayKind::Retention => {
                match constant_decay(config.decay, config.heads, layer, config.layers)? {
                    Some(g) => {
                        let kind = linear::accumulation_kind(params.flat.kind());
                        Gate::Constant(g.f_to_kind(kind)?.f_to_device(params.flat.device())?)
                    }
                    None => Gate::None,
                }
            }
            DecayKind::Token => Gate::Token { w: get("w_decay")?, b: get("b_decay")? },
            DecayKind::Channel => {
                Gate::Channel { down: get("w_decay_down")?, up: get("w_decay_up")?, b: get("b_decay")? }
            }
        };
        let scale = 1.0 / (config.head_dim() as f64).sqrt();
        Ok(Self {
            wq: get("wq")?,
            wk: get("wk")?,
            wv: get("wv")?,
            wo: get("wo")?,
            wg: config.output_gate.then(|| get("wg")).transpose()?,
            o_norm: get("o_norm")?,
            gate,
            mixer: linear::mixer(config.chunk, scale)?,
            heads: config.heads,
            eps: config.norm_eps,
        })
    }

    /// x `[B, T, D]`, this rank's tokens -> `[B, T, D]`.
    pub(super) fn forward(&self, context: &Context, x: &Tensor) -> Result<Tensor> {
        let p = self.project(x)?;
        let o = sequence::linear_attention(&context.shard, &self.mixer, &p.q, &p.k, &p.v, p.log_decay.as_ref())?;
        self.output(x, &o)
    }

    /// The same for tokens that follow those that left `state` `[B, H, K, V]`, which is replaced.
    pub(super) fn decode(&self, x: &Tensor, state: &mut Option<Tensor>) -> Result<Tensor> {
        let p = self.project(x)?;
        let inputs = Inputs::new(&p.q, &p.k, &p.v, p.log_decay.as_ref())?;
        let mut segment = self.mixer.forward(&inputs, state.as_ref())?;
        *state = Some(segment.summarize(0)?.state);
        self.output(x, &segment.finish()?)
    }

    fn project(&self, x: &Tensor) -> Result<Projected> {
        let (b, t, d) = x.size3()?;
        let project = |w: &Tensor| -> Result<Tensor> {
            Ok(x.f_linear(w, None::<&Tensor>)?.f_view([b, t, self.heads, d / self.heads])?)
        };
        let log_decay = self.log_decay(x)?;
        // SiLU as the feature map of q and k, as Lightning attention has it.
        Ok(Projected {
            q: project(&self.wq)?.f_silu()?,
            k: project(&self.wk)?.f_silu()?,
            v: project(&self.wv)?,
            log_decay,
        })
    }

    /// Of the tokens x `[B, T, D]`: `[H]`, `[B, T, H]` or `[B, T, H, K]`.
    pub(super) fn log_decay(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let (b, t, d) = x.size3()?;
        Ok(match &self.gate {
            Gate::None => None,
            Gate::Constant(g) => Some(g.shallow_clone()),
            Gate::Token { w, b } => Some(x.f_linear(w, Some(b))?.f_softplus()?.f_neg()?),
            Gate::Channel { down, up, b: bias } => {
                let rates = x.f_linear(down, None::<&Tensor>)?.f_linear(up, Some(bias))?.f_softplus()?.f_neg()?;
                Some(rates.f_view([b, t, self.heads, d / self.heads])?)
            }
        })
    }

    /// Whether the decay depends on parameters.
    pub(super) fn learns_decay(&self) -> bool {
        matches!(self.gate, Gate::Token { .. } | Gate::Channel { .. })
    }

    fn output(&self, x: &Tensor, o: &Tensor) -> Result<Tensor> {
        let mut o = rms_norm(o, &self.o_norm, self.eps)?.f_reshape(x.size())?;
        if let Some(wg) = &self.wg {
            o = o.f_mul(&x.f_linear(wg, None::<&Tensor>)?.f_silu()?)?;
        }
        Ok(o.f_linear(&self.wo, None::<&Tensor>)?)
    }

    pub(super) fn shallow_clone(&self) -> Self {
        let clone = Tensor::shallow_clone;
        let gate = match &self.gate {
            Gate::None => Gate::None,
            Gate::Constant(g) => Gate::Constant(clone(g)),
            Gate::Token { w, b } => Gate::Token { w: clone(w), b: clone(b) },
            Gate::Channel { down, up, b } => Gate::Channel { down: clone(down), up: clone(up), b: clone(b) },
        };
        Self {
            wq: clone(&self.wq),
            wk: clone(&self.wk),
            wv: clone(&self.wv),
            wo: clone(&self.wo),
            wg: self.wg.as_ref().map(clone),
            o_norm: clone(&self.o_norm),
            gate,
            mixer: self.mixer.clone(),
            heads: self.heads,
            eps: self.eps,
        }
    }
}
