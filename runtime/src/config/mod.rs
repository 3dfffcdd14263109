//! The configuration of a run. As typed it is a `RawConfig`: a TOML file with overrides laid over it, every key known
//! and of the right kind. Validated it is a `Config`: plain structs, one a section, with every derived value filled in.
//! How many ranks there are is learned later, and entered with `Config::resolve_ranks`.

mod error;
mod raw;
mod sections;
mod validate;

use std::path::Path;

use serde::{Deserialize, Serialize};

pub use error::{Error, Result};
pub use raw::{Origin, RawConfig};
pub use sections::{
    CheckpointConfig, DataConfig, DataKind, DecayKind, DeviceKind, Dtype, LayerKind, LayoutKind, ModelConfig,
    OptimizerConfig, ParallelConfig, SampleConfig, TrainConfig,
};

use crate::sequence::method;
pub use crate::sequence::method::{ATTENTIONS as SOFTMAX_METHODS, LINEAR as LINEAR_METHODS};

/// A validated configuration.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub model: ModelConfig,
    pub parallel: ParallelConfig,
    pub train: TrainConfig,
    pub optimizer: OptimizerConfig,
    pub data: DataConfig,
    pub checkpoint: CheckpointConfig,
    pub sample: SampleConfig,
}

impl Config {
    /// Reads the TOML file at `path` and lays `overrides` over it, each `section.key=value` with the value in TOML or bare text.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        Self::from_toml_str(&text, &path.display().to_string(), overrides)
    }

    /// As `load`, with the text of the file; `name` is what errors call it.
    pub fn from_toml_str(text: &str, name: &str, overrides: &[String]) -> Result<Self> {
        RawConfig::parse(text, name, overrides)?.validate()
    }

    /// Every key with its resolved value, as TOML. Loading it gives the same configuration.
    pub fn to_toml(&self) -> Result<String> {
        Ok(toml::to_string(self)?)
    }

    /// Fills in the degrees left at 0 (`parallel.sp`, `parallel.dp`; if both are, dp becomes 1), so that sp x dp is the
    /// number of ranks, and checks what depends on them.
    pub fn resolve_ranks(&mut self, ranks: usize) -> Result<()> {
        let typed = (self.parallel.sp, self.parallel.dp);
        let (sp, dp) = match typed {
            (0, 0) => (ranks, 1),
            (0, dp) => (ranks / dp, dp),
            (sp, 0) => (sp, ranks / sp),
            both => both,
        };
        if ranks == 0 || sp.checked_mul(dp) != Some(ranks) {
            let (sp, dp) = typed;
            return Err(Error::Mesh { ranks, sp, dp });
        }
        let train = &self.train;
        if !train.batch.is_multiple_of(dp * train.micro_batch) {
            return Err(Error::Batch { batch: train.batch, micro_batch: train.micro_batch, ranks, sp, dp });
        }
        let decided = self.parallel.softmax_method != method::AUTO;
        if decided && self.model.layer_kinds().contains(&LayerKind::Softmax) {
            let check = method::attention(&self.parallel.softmax_method).and_then(|m| m.check(self.model.heads, sp));
            check.map_err(|error| Error::Softmax(error.to_string()))?;
        }
        (self.parallel.sp, self.parallel.dp) = (sp, dp);
        Ok(())
    }
}

impl RawConfig {
    /// Lays the typed values over the defaults, derives what was left open, and checks every rule.
    pub fn validate(&self) -> Result<Config> {
        let mut config: Config = self.table().clone().try_into().map_err(|e: toml::de::Error| Error::Syntax {
            name: "the configuration".to_owned(),
            message: e.message().to_owned(),
        })?;
        let typed = |key| self.origin(key) != Origin::Default;
        if !typed("model.mlp_dim") || config.model.mlp_dim == 0 {
            config.model.mlp_dim = ModelConfig::mlp_dim_for(config.model.dim);
        }
        if !typed("optimizer.min_lr") {
            config.optimizer.min_lr = OptimizerConfig::min_lr_for(config.optimizer.lr);
        }
        validate::check(&config).map_err(|broken| Error::Value {
            origin: self.origin(broken.key),
            key: broken.key.to_owned(),
            found: broken.found,
            expected: broken.expected,
        })?;
        Ok(config)
    }
}
