//! AdamW (arXiv 1711.05101) over the flat parameters: moments and, for bf16 parameters, master weights in f32.

use tch::{Kind, Tensor};

use super::Result;
use crate::config::OptimizerConfig;
use crate::model::{self, Params};

/// First and second moment `[P]` and, where the parameters are narrower than f32, the master weights `[P]`.
pub struct AdamW {
    config: OptimizerConfig,
    mean: Tensor,
    square: Tensor,
    master: Option<Tensor>,
}

impl AdamW {
    pub fn new(config: OptimizerConfig, params: &Params) -> Result<Self> {
        let kind = kernels::linear::accumulation_kind(params.flat.kind());
        let zeros = || Tensor::f_zeros([params.numel()], (kind, params.flat.device()));
        let master = if kind == params.flat.kind() { None } else { Some(params.flat.f_to_kind(kind)?) };
        Ok(Self { config, mean: zeros()?, square: zeros()?, master })
    }

    /// The kind of moments, master weights and gradients.
    pub fn kind(&self) -> Kind {
        self.mean.kind()
    }

    /// One update from the gradient `grad` `[P]`, which is scaled to the clipping norm in place; `step` counts from 1.
    /// Returns the norm of the gradient before clipping.
    pub fn step(&mut self, params: &mut Params, grad: &mut Tensor, lr: f64, step: u64) -> Result<f64> {
        let _guard = tch::no_grad_guard();
        let OptimizerConfig { beta1, beta2, eps, clip, weight_decay, .. } = self.config;
        let norm = grad.f_norm()?.double_value(&[]);
        if clip > 0.0 && norm > clip {
            let _ = grad.f_mul_scalar_(clip / norm)?;
        }
        let _ = self.mean.f_lerp_(grad, 1.0 - beta1)?;
        let _ = self.square.f_lerp_(&grad.f_square()?, 1.0 - beta2)?;
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        let root = self.square.f_div_scalar(correction(beta2))?.f_sqrt_()?.f_add_scalar_(eps)?;
        let update = self.mean.f_mul_scalar(-lr / correction(beta1))?.f_div_(&root)?;
        let target = self.master.as_mut().unwrap_or(&mut params.flat);
        if weight_decay > 0.0 {
            let _ = target.f_narrow(0, 0, params.decayed)?.f_mul_scalar_(1.0 - lr * weight_decay)?;
        }
        let _ = target.f_add_(&update)?;
        if let Some(master) = &self.master {
            params.flat.f_copy_(master)?;
        }
        Ok(norm)
    }

    /// All state by the names `mean.NAME`, `square.NAME`, `master.NAME`: views, for a checkpoint.
    pub fn state(&self, params: &Params) -> model::Result<Vec<(String, Tensor)>> {
        let mut all = Vec::new();
        for (class, vector) in self.vectors() {
            all.extend(params.split(vector)?.into_iter().map(|(name, share)| (format!("{class}.{name}"), share)));
        }
        Ok(all)
    }

    /// The inverse of [`AdamW::state`].
    pub fn load(&mut self, params: &Params, from: impl Fn(&str) -> Option<Tensor>) -> model::Result<()> {
        for (class, vector) in self.vectors() {
            params.fill(vector, |name| from(&format!("{class}.{name}")))?;
        }
        Ok(())
    }

    fn vectors(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let master = self.master.as_ref().map(|master| ("master", master));
        [("mean", &self.mean), ("square", &self.square)].into_iter().chain(master)
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
