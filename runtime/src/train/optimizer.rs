//! AdamW (arXiv 1711.05101) over the flat parameters: moments and, for bf16 parameters, master weights in f32.
//!
//! On a GPU an update of bf16 parameters is one pass over memory, and of the master weights only the 16 bits are kept that the
//! parameters do not have: high and low together are the f32 number, bit for bit.

use kernels::cuda::ops::{self, AdamStep};
use tch::{Kind, Tensor};

use super::Result;
use crate::config::OptimizerConfig;
use crate::model::{self, Params};

/// First and second moment `[P]` and, where the parameters are narrower than f32, the master weights `[P]`.
pub struct AdamW {
    config: OptimizerConfig,
    mean: Tensor,
    square: Tensor,
    master: Master,
}

/// The weights that are updated.
enum Master {
    /// The parameters themselves.
    Parameters,
    /// `[P]` f32 beside narrower parameters.
    Wide(Tensor),
    /// `[P]` i16: the lower bits, beside bf16 parameters on a GPU.
    Low(Tensor),
}

impl AdamW {
    pub fn new(config: OptimizerConfig, params: &Params) -> Result<Self> {
        let kind = kernels::linear::accumulation_kind(params.flat.kind());
        let zeros = || Tensor::f_zeros([params.numel()], (kind, params.flat.device()));
        let (found, device) = (params.flat.kind(), params.flat.device());
        let master = if kind == found {
            Master::Parameters
        } else if found == Kind::BFloat16 && device.is_cuda() {
            Master::Low(Tensor::f_zeros([params.numel()], (Kind::Int16, device))?)
        } else {
            Master::Wide(params.flat.f_to_kind(kind)?)
        };
        Ok(Self { config, mean: zeros()?, square: zeros()?, master })
    }

    /// The kind of moments, master weights and sums of gradients.
    pub fn kind(&self) -> Kind {
        self.mean.kind()
    }

    /// One update from the gradient `grad` `[P]`, which is scaled to the clipping norm in place; `step` counts from 1.
    /// Returns the norm of the gradient before clipping.
    pub fn step(&mut self, params: &mut Params, grad: &mut Tensor, lr: f64, step: u64) -> Result<f64> {
        Ok(self.update(params, grad, 1.0, lr, step)?.double_value(&[]))
    }

    /// [`AdamW::step`] by `scale` times `grad`, which may be of the kind of the parameters too and is of no use afterwards.
    /// Returns the norm as a scalar on the device: on a GPU nothing here waits for it.
    pub fn update(&mut self, params: &mut Params, grad: &mut Tensor, scale: f64, lr: f64, step: u64) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let OptimizerConfig { beta1, beta2, eps, clip, weight_decay, .. } = self.config;
        if let Master::Low(low) = &self.master {
            let clipping = ops::clipping(grad, scale, clip)?;
            let settings = AdamStep { lr, beta1, beta2, eps, weight_decay, step, decayed: params.decayed };
            ops::adamw(&params.flat, low, [&self.mean, &self.square], grad, &clipping, settings)?;
            return Ok(clipping.f_select(0, 0)?);
        }
        if scale != 1.0 {
            let _ = grad.f_mul_scalar_(scale)?;
        }
        let norm = grad.f_norm()?;
        if clip > 0.0 && norm.device().is_cuda() {
            let _ = grad.f_mul_(&norm.f_reciprocal()?.f_mul_scalar(clip)?.f_clamp_max(1.0)?)?;
        } else if clip > 0.0 && norm.double_value(&[]) > clip {
            let _ = grad.f_mul_scalar_(clip / norm.double_value(&[]))?;
        }
        let _ = self.mean.f_lerp_(grad, 1.0 - beta1)?;
        let _ = self.square.f_lerp_(&grad.f_square()?, 1.0 - beta2)?;
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        let root = self.square.f_div_scalar(correction(beta2))?.f_sqrt_()?.f_add_scalar_(eps)?;
        let update = self.mean.f_mul_scalar(-lr / correction(beta1))?.f_div_(&root)?;
        let target = if let Master::Wide(master) = &self.master { master } else { &params.flat };
        if weight_decay > 0.0 {
            let _ = target.f_narrow(0, 0, params.decayed)?.f_mul_scalar_(1.0 - lr * weight_decay)?;
        }
        let _ = target.shallow_clone().f_add_(&update)?;
        if let Master::Wide(master) = &self.master {
            params.flat.f_copy_(master)?;
        }
        Ok(norm)
    }

    /// All state by the names `mean.NAME`, `square.NAME`, `master.NAME`, for a checkpoint.
    pub fn state(&self, params: &Params) -> model::Result<Vec<(String, Tensor)>> {
        let mut all = Vec::new();
        for (class, vector) in self.vectors(params)? {
            all.extend(params.split(&vector)?.into_iter().map(|(name, share)| (format!("{class}.{name}"), share)));
        }
        Ok(all)
    }

    /// The inverse of [`AdamW::state`].
    pub fn load(&mut self, params: &Params, from: impl Fn(&str) -> Option<Tensor>) -> model::Result<()> {
        for (class, vector) in self.vectors(params)? {
            params.fill(&vector, |name| from(&format!("{class}.{name}")))?;
            if let ("master", Master::Low(low)) = (class, &self.master) {
                ops::split_master(&vector, &params.flat, low)?;
            }
        }
        Ok(())
    }

    /// Views, but for a master that is put together from its parts.
    fn vectors(&self, params: &Params) -> model::Result<Vec<(&'static str, Tensor)>> {
        let mut all = vec![("mean", self.mean.shallow_clone()), ("square", self.square.shallow_clone())];
        match &self.master {
            Master::Parameters => {}
            Master::Wide(master) => all.push(("master", master.shallow_clone())),
            Master::Low(low) => all.push(("master", ops::join_master(&params.flat, low)?)),
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Init, Spec};
    use kernels::testing::assert_close;
    use tch::Device;

    /// Three steps against the formulas written out for one vector.
    #[test]
    fn follows_the_formulas() {
        let specs = [
            Spec::new("norm", &[3], Init::Constant(1.0), false),
            Spec::new("matrix", &[2, 2], Init::Normal(1.0), true),
        ];
        let mut params = Params::new(&specs, Kind::Double, 7, Device::Cpu).unwrap();
        let config = OptimizerConfig { clip: 0.5, weight_decay: 0.1, ..OptimizerConfig::default() };
        let mut adam = AdamW::new(config.clone(), &params).unwrap();
        let mut p = Vec::<f64>::try_from(params.flat.copy()).unwrap();
        let (mut m, mut v) = (vec![0.0; 7], vec![0.0; 7]);
        for step in 1..=3u64 {
            let g: Vec<f64> = (0..7).map(|i| (i as f64 - 2.5) * step as f64).collect();
            let norm = adam.step(&mut params, &mut Tensor::from_slice(&g), 0.01, step).unwrap();
            let expected = g.iter().map(|x| x * x).sum::<f64>().sqrt();
            assert!((norm - expected).abs() < 1e-12);
            for i in 0..7 {
                let g = g[i] * config.clip / expected;
                m[i] = config.beta1 * m[i] + (1.0 - config.beta1) * g;
                v[i] = config.beta2 * v[i] + (1.0 - config.beta2) * g * g;
                let (mh, vh) =
                    (m[i] / (1.0 - config.beta1.powi(step as i32)), v[i] / (1.0 - config.beta2.powi(step as i32)));
                // The matrix comes first.
                p[i] *= if i < 4 { 1.0 - 0.01 * config.weight_decay } else { 1.0 };
                p[i] -= 0.01 * mh / (vh.sqrt() + config.eps);
            }
        }
        assert_close("parameters", &params.flat, &Tensor::from_slice(&p), 1e-12);
        assert!(params.get("matrix").unwrap().flatten(0, -1).equal(&params.flat.narrow(0, 0, 4)), "leaves are views");
    }
}
