//! All parameters in one flat buffer, each a view of it: the optimizer, the gradient's AllReduce and its norm are then single
//! passes. What weight decay applies to comes first.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::{Error, Result};
use crate::data::mix;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Normal with this standard deviation.
    Normal(f64),
    Constant(f64),
    /// Such that `softplus` of it runs from 1/1024 to 1, evenly on a logarithmic scale: a layer's heads and channels forget
    /// over spans of one to a thousand tokens.
    DecayRates,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    pub name: String,
    pub shape: Vec<i64>,
    pub init: Init,
    /// Whether weight decay applies.
    pub decayed: bool,
}

impl Spec {
    pub fn new(name: impl Into<String>, shape: &[i64], init: Init, decayed: bool) -> Self {
        Self { name: name.into(), shape: shape.to_vec(), init, decayed }
    }

    pub fn numel(&self) -> i64 {
        self.shape.iter().product()
    }

    /// The layer that it belongs to.
    pub fn layer(&self) -> Option<usize> {
        self.name.strip_prefix("layers.")?.split('.').next()?.parse().ok()
    }
}

struct Entry {
    name: String,
    start: i64,
    shape: Vec<i64>,
    leaf: Tensor,
}

/// The parameters: `flat` `[P]` in the kind of training, and its leaves for autograd.
pub struct Params {
    pub flat: Tensor,
    /// How many numbers at the front of `flat` weight decay applies to.
    pub decayed: i64,
    entries: Vec<Entry>,
    index: HashMap<String, usize>,
}

impl Params {
    pub fn new(specs: &[Spec], kind: Kind, seed: u64, device: Device) -> Result<Self> {
        let total = specs.iter().map(Spec::numel).sum::<i64>();
        let flat = Tensor::f_empty([total], (kind, device))?;
        let (mut entries, mut index, mut start) = (Vec::new(), HashMap::new(), 0);
        let mut decayed = 0;
        for first in [true, false] {
            for spec in specs.iter().filter(|spec| spec.decayed == first) {
                let mut view = flat.f_narrow(0, start, spec.numel())?;
                view.f_copy_(&initial(spec, seed, device)?)?;
                let leaf = view.f_view(spec.shape.as_slice())?.f_detach()?.f_set_requires_grad(true)?;
                index.insert(spec.name.clone(), entries.len());
                entries.push(Entry { name: spec.name.clone(), start, shape: spec.shape.clone(), leaf });
                start += spec.numel();
            }
            decayed = if first { start } else { decayed };
        }
        Ok(Self { flat, decayed, entries, index })
    }

    /// P.
    pub fn numel(&self) -> i64 {
        self.flat.size()[0]
    }

    /// A leaf; it shares memory with `flat`.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        let at = self.index.get(name).ok_or_else(|| Error::NoParameter(name.to_owned()))?;
        Ok(self.entries[*at].leaf.shallow_clone())
    }

    /// Makes the views of `sum` `[P]`, of any floating-point kind, the places where backward adds up the leaves' gradients.
    pub fn share_grads(&self, sum: &Tensor) -> Result<()> {
        for ((_, share), entry) in self.split(sum)?.iter().zip(&self.entries) {
            kernels::bridge::set_grad(&entry.leaf, share)?;
        }
        Ok(())
    }

    /// Adds the leaves' gradients to `sum` `[P]` and forgets them.
    pub fn take_grads(&mut self, sum: &Tensor) -> Result<()> {
        let _guard = tch::no_grad_guard();
        for entry in &mut self.entries {
            let grad = entry.leaf.f_grad()?;
            if grad.defined() {
                let _ = sum.f_narrow(0, entry.start, grad.numel() as i64)?.f_add_(&grad.f_flatten(0, -1)?)?;
                entry.leaf.zero_grad();
            }
        }
        Ok(())
    }

    /// The parameters' shares of a vector `[P]`, by name: views.
    pub fn split(&self, vector: &Tensor) -> Result<Vec<(String, Tensor)>> {
        let share = |entry: &Entry| -> Result<(String, Tensor)> {
            let size = entry.shape.iter().product();
            Ok((entry.name.clone(), vector.f_narrow(0, entry.start, size)?.f_view(entry.shape.as_slice())?))
        };
        self.entries.iter().map(share).collect()
    }

    /// Fills a vector `[P]` from tensors by name, of any kind; every parameter must be there, in its shape.
    pub fn fill(&self, vector: &Tensor, from: impl Fn(&str) -> Option<Tensor>) -> Result<()> {
        let _guard = tch::no_grad_guard();
        for (name, mut share) in self.split(vector)? {
            let value = from(&name).ok_or_else(|| Error::NoParameter(name.clone()))?;
            if value.size() != share.size() {
                return Err(Error::ParameterShape { name, found: value.size(), expected: share.size() });
            }
            share.f_copy_(&value)?;
        }
        Ok(())
    }
}

/// On a GPU the same numbers but for rounding; there a billion of them take milliseconds.
fn initial(spec: &Spec, seed: u64, device: Device) -> Result<Tensor> {
    let count = spec.numel() as usize;
    let numbers: Vec<f32> = match spec.init {
        Init::Normal(std) => {
            let key = spec.name.bytes().fold(mix(seed), |key, byte| mix(key ^ u64::from(byte)));
            if device.is_cuda() {
                return Ok(kernels::cuda::ops::normal(key, spec.numel(), std, device)?);
            }
            normal(key, count, std)
        }
        Init::Constant(value) => vec![value as f32; count],
        Init::DecayRates => {
            let rate = |i: usize| 2f64.powf(-10.0 * i as f64 / (count.max(2) - 1) as f64);
            (0..count).map(|i| rate(i).exp_m1().ln() as f32).collect()
        }
    };
    Ok(Tensor::f_from_slice(&numbers)?)
}

/// Normal numbers that depend on `key` alone (Box-Muller).
fn normal(key: u64, count: usize, std: f64) -> Vec<f32> {
    let uniform = |i: u64| -> f64 {
        ((mix(key.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15))) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    let pair = |i: u64| {
        let radius = std * (-2.0 * uniform(2 * i).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * uniform(2 * i + 1)).sin_cos();
        [(radius * cos) as f32, (radius * sin) as f32]
    };
    (0..count.div_ceil(2) as u64).flat_map(pair).take(count).collect()
}
