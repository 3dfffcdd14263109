//! The softmax-attention layer: projections with grouped KV heads (GQA, arXiv 2305.13245), rotary angles, attention, output.

use kernels::softmax::{self, Tile};
use tch::Tensor;

use super::context::angles;
use super::{Context, Init, Params, Result, Spec, rotary};
use crate::config::ModelConfig;
use crate::sequence;
use crate::sequence::attention::Attended;

pub(super) fn specs(config: &ModelConfig, prefix: &str, residual: Init) -> Vec<Spec> {
    let (d, kv) = (config.dim, config.kv_heads * config.head_dim());
    let small = Init::Normal((0.4 / d as f64).sqrt());
    let spec = |name: &str, shape: &[i64], init| Spec::new(format!("{prefix}.{name}"), shape, init, true);
    vec![
        spec("wq", &[d, d], small),
        spec("wk", &[kv, d], small),
        spec("wv", &[kv, d], small),
        spec("wo", &[d, d], residual),
    ]
}

pub struct SoftmaxLayer {
    pub(super) wq: Tensor,
    pub(super) wk: Tensor,
    pub(super) wv: Tensor,
    pub(super) wo: Tensor,
    pub(super) head_dim: i64,
    rope_base: f64,
}

/// Keys and values of all tokens so far, `[B, T, Hkv, K]`; and how many they are.
#[derive(Default)]
pub struct KvCache {
    kv: Option<(Tensor, Tensor)>,
    tokens: i64,
}

impl SoftmaxLayer {
    pub(super) fn new(config: &ModelConfig, params: &Params, prefix: &str) -> Result<Self> {
        let get = |name: &str| params.get(&format!("{prefix}.{name}"));
        Ok(Self {
            wq: get("wq")?,
            wk: get("wk")?,
            wv: get("wv")?,
            wo: get("wo")?,
            head_dim: config.head_dim(),
            rope_base: config.rope_base,
        })
    }

    pub(super) fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    /// x `[B, T, D]`, this rank's tokens -> `[B, T, D]`; and what attention need not compute again, or has `before`.
    pub(super) fn forward(
        &self,
        context: &Context,
        x: &Tensor,
        before: Option<Attended>,
    ) -> Result<(Tensor, Option<Attended>)> {
        let (q, k, v) = self.project(x, &context.cos, &context.sin)?;
        let (o, attended) = sequence::softmax_attention(&context.shard, &q, &k, &v, self.scale(), before)?;
        Ok((self.output(x, &o)?, attended))
    }

    /// The same for tokens that follow those in `cache`, to which they are added.
    pub(super) fn decode(&self, x: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let new = x.size()[1];
        let positions: Vec<i64> = (cache.tokens..cache.tokens + new).collect();
        let (cos, sin) = angles(&positions, self.head_dim, self.rope_base, x.kind(), x.device())?;
        let (q, k, v) = self.project(x, &cos, &sin)?;
        let (k, v) = match cache.kv.take() {
            Some((before_k, before_v)) => (Tensor::f_cat(&[before_k, k], 1)?, Tensor::f_cat(&[before_v, v], 1)?),
            None => (k, v),
        };
        cache.tokens += new;
        let tile = Tile { q: 0..new, k: 0..cache.tokens, causal: true };
        let (o, _) = softmax::forward(&q, &k, &v, &[tile], self.scale())?;
        cache.kv = Some((k, v));
        self.output(x, &o)
    }

    /// q `[B, T, H, K]`, k, v `[B, T, Hkv, K]`; q and k turned.
    fn project(&self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let (b, t, _) = x.size3()?;
        let project = |w: &Tensor| -> Result<Tensor> {
            let heads = w.size()[0] / self.head_dim;
            Ok(x.f_linear(w, None::<&Tensor>)?.f_view([b, t, heads, self.head_dim])?)
        };
        Ok((rotary(&project(&self.wq)?, cos, sin)?, rotary(&project(&self.wk)?, cos, sin)?, project(&self.wv)?))
    }

    fn output(&self, x: &Tensor, o: &Tensor) -> Result<Tensor> {
        Ok(o.f_reshape(x.size())?.f_linear(&self.wo, None::<&Tensor>)?)
    }

    pub(super) fn shallow_clone(&self) -> Self {
        Self {
            wq: self.wq.shallow_clone(),
            wk: self.wk.shallow_clone(),
            wv: self.wv.shallow_clone(),
            wo: self.wo.shallow_clone(),
            ..*self
        }
    }
}
