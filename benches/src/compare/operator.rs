//! The sharded attention operator of any method as two phases, forward and backward: what is timed in operator mode, and
//! what must agree with the oracle.

use std::sync::Arc;

use anyhow::{Result, bail};
use kernels::linear::{self as kernel, Inputs, StateMixer};
use runtime::sequence::{LinearMethod, Shard, attention, left_product, linear};
use tch::Tensor;

use super::inputs::Tokens;
use super::{Mixer, Options};

/// Gradients of this rank's tokens.
pub(super) struct Grads {
    pub dq: Tensor,
    pub dk: Tensor,
    pub dv: Tensor,
    /// `[H]`: this rank's part of the sum.
    pub dlog_decay: Option<Tensor>,
}

/// One method on one rank's tokens.
pub(super) struct Operator {
    shard: Arc<Shard>,
    kernel: Kernel,
    d_o: Tensor,
    /// Kept until backward has run, as a model does.
    o: Option<Tensor>,
    saved: Option<Saved>,
}

enum Kernel {
    Linear { mixer: Arc<dyn StateMixer>, x: Inputs, scale: f64 },
    Softmax(attention::Inputs),
}

enum Saved {
    Scan(linear::Saved),
    LeftProduct(left_product::Saved),
    Softmax(attention::Saved),
}

/// `1 / sqrt(K)`, for both kinds of layers, as in the model.
pub(super) fn scale(dim: i64) -> f64 {
    1.0 / (dim as f64).sqrt()
}

impl Operator {
    /// `decay_grad`: whether backward computes dlog_decay.
    pub fn new(shard: Arc<Shard>, options: &Options, x: Tokens, decay_grad: bool) -> Result<Self> {
        let scale = scale(x.q.size()[3]);
        let kernel = match options.mixer {
            Mixer::Linear => {
                let mixer = kernel::mixer(options.config.model.chunk, scale)?;
                let mut inputs = Inputs::new(&x.q, &x.k, &x.v, x.log_decay.as_ref())?;
                inputs.decay_grad = decay_grad && x.log_decay.is_some();
                Kernel::Linear { mixer, x: inputs, scale }
            }
            Mixer::Softmax => Kernel::Softmax(attention::Inputs::new(&x.q, &x.k, &x.v, scale, true)?),
        };
        Ok(Self { shard, kernel, d_o: x.d_o, o: None, saved: None })
    }

    pub fn forward(&mut self) -> Result<&Tensor> {
        let (o, saved) = match (&self.kernel, &self.shard.linear) {
            (Kernel::Linear { mixer, x, .. }, LinearMethod::Scan(_)) => {
                let forward = linear::forward(&self.shard, mixer.as_ref(), x.shallow_clone(), None)?;
                (forward.o, Saved::Scan(forward.saved))
            }
            (Kernel::Linear { x, scale, .. }, LinearMethod::LeftProduct(method)) => {
                let forward = method.forward(&self.shard, x.shallow_clone(), *scale)?;
                (forward.o, Saved::LeftProduct(forward.saved))
            }
            (Kernel::Softmax(x), _) => {
                let forward = self.shard.attention.forward(&self.shard, x)?;
                (forward.o, Saved::Softmax(forward.saved))
            }
        };
        self.saved = Some(saved);
        Ok(self.o.insert(o))
    }

    pub fn backward(&mut self) -> Result<Grads> {
        let grads = match (self.saved.take(), &self.kernel, &self.shard.linear) {
            (Some(Saved::Scan(saved)), Kernel::Linear { mixer, .. }, _) => {
                linear::backward(&self.shard, mixer.as_ref(), saved, &self.d_o)?.grads
            }
            (Some(Saved::LeftProduct(saved)), _, LinearMethod::LeftProduct(method)) => {
                method.backward(&self.shard, saved, &self.d_o)?
            }
            (Some(Saved::Softmax(saved)), _, _) => {
                let attention::Grads { dq, dk, dv } = self.shard.attention.backward(&self.shard, saved, &self.d_o)?;
                return Ok(Grads { dq, dk, dv, dlog_decay: None });
            }
            _ => bail!("backward without a forward before it"),
        };
        self.o = None;
        Ok(Grads { dq: grads.dq, dk: grads.dk, dv: grads.dv, dlog_decay: grads.dlog_decay })
    }
}
