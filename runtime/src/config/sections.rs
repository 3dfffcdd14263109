//! The sections of a configuration: every key, its default and its meaning. Rules between keys are in `validate`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tch::Kind;

/// What mixes the tokens of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// Linear attention, written `L` in a pattern.
    Linear,
    /// Softmax attention, written `N` in a pattern.
    Softmax,
}

/// How the state of a linear-attention layer fades.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DecayKind {
    /// Not at all: plain linear attention.
    None,
    /// A constant of each head and layer, as Lightning Attention.
    Lightning,
    /// A constant of each head, as RetNet.
    Retention,
    /// Learned, one number for each token and head, as simple GLA and Mamba-2.
    Token,
    /// Learned, one number for each token, head and key channel, as GLA.
    Channel,
}

/// Which tokens of a sequence each rank of the `sp` axis holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayoutKind {
    /// Rank r holds segment r of W.
    Contiguous,
    /// Rank r holds segments r and 2W-1-r of 2W, which balances causal softmax layers.
    Zigzag,
}

/// The element type of parameters and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    F32,
    Bf16,
    F64,
}

impl Dtype {
    pub fn kind(self) -> Kind {
        match self {
            Dtype::F32 => Kind::Float,
            Dtype::Bf16 => Kind::BFloat16,
            Dtype::F64 => Kind::Double,
        }
    }
}

/// What a rank computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// A GPU where every rank of a node can have one.
    Auto,
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// Where tokens come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataKind {
    /// A file written by `data::prepare`.
    Corpus,
    /// Uniform random tokens, for benchmarks.
    Random,
}

/// `[model]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// Number of tokens there are; at least 256 for a corpus, whose tokens are bytes. Default 256.
    pub vocab: i64,
    /// Width of the residual stream. Default 256.
    pub dim: i64,
    /// Number of layers. Default 8.
    pub layers: usize,
    /// Heads of linear layers, and query heads of softmax layers; divides `dim`. Default 4.
    pub heads: i64,
    /// Key and value heads of softmax layers; divides `heads`. Default 2.
    pub kv_heads: i64,
    /// Hidden width of the MLP. Default, also where typed as 0: 8/3 of `dim`, rounded up to a multiple of 64.
    pub mlp_dim: i64,
    /// The kinds of the layers, L (linear) and N (softmax), repeated as often as needed. Default "LLLN".
    pub pattern: String,
    /// Decay of the linear layers' state. Default "none".
    pub decay: DecayKind,
    /// Whether the output projection is the token embedding. Default true.
    pub tied: bool,
    /// Base of the rotary embeddings' wavelengths. Default 500000.
    pub rope_base: f64,
    /// Added to the mean square in RMS norms. Default 1e-5.
    pub norm_eps: f64,
    /// Chunk length of chunkwise linear attention, in tokens. Default 64.
    pub chunk: i64,
    /// Whether a gate multiplies the output of linear layers. Default true.
    pub output_gate: bool,
}

impl Default for ModelConfig {
    fn default() -> Self {
        ModelConfig {
            vocab: 256,
            dim: 256,
            layers: 8,
            heads: 4,
            kv_heads: 2,
            mlp_dim: Self::mlp_dim_for(256),
            pattern: "LLLN".to_owned(),
            decay: DecayKind::None,
            tied: true,
            rope_base: 500_000.0,
            norm_eps: 1e-5,
            chunk: 64,
            output_gate: true,
        }
    }
}

impl ModelConfig {
    /// Width of one head, `dim / heads`.
    pub fn head_dim(&self) -> i64 {
        self.dim / self.heads
    }

    /// The kind of each of the `layers` layers: `pattern`, repeated.
    pub fn layer_kinds(&self) -> Vec<LayerKind> {
        let letters = self.pattern.chars().cycle().take(self.layers);
        letters
            .map(|letter| match letter {
                'N' => LayerKind::Softmax,
                _ => LayerKind::Linear,
            })
            .collect()
    }

    /// 8/3 of `dim`, rounded up to a multiple of 64: three matrices of it have the size of the two of a classic 4 x MLP.
    pub(super) fn mlp_dim_for(dim: i64) -> i64 {
        let exact = (dim.saturating_mul(8) + 2) / 3;
        (exact + 63) / 64 * 64
    }
}

/// `[parallel]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ParallelConfig {
    /// Ranks that share one sequence (elsewhere called context parallelism). Default 0: all ranks that `dp` leaves.
    pub sp: usize,
    /// Groups of `sp` ranks, each with its own sequences; 0: all ranks that `sp` leaves. Default 1.
    pub dp: usize,
    /// Which tokens each rank holds. Default "contiguous".
    pub layout: LayoutKind,
    /// How linear layers carry their state across ranks; one of `LINEAR_METHODS`, with settings as in
    /// "all_scan:blocks=8"; or "auto", the one that the cost model finds quickest. Default "lasp2".
    pub linear_method: String,
    /// How softmax layers attend across ranks; one of `SOFTMAX_METHODS`, with settings as in "lasp2h:stages=2"; or "auto".
    /// Default "lasp2h".
    pub softmax_method: String,
    /// The machine that "auto" decides for: a preset of `lasp simulate`, or a file that `lasp calibrate` wrote. Default "":
    /// machine.toml if there is one, else a preset.
    pub machine: String,
    /// The gradient is summed over ranks while backward goes on, in messages of whole layers of at least so many MiB
    /// in f32. Default 64.
    pub gradient_bucket_mib: u64,
}

impl Default for ParallelConfig {
    fn default() -> Self {
        ParallelConfig {
            sp: 0,
            dp: 1,
            layout: LayoutKind::Contiguous,
            linear_method: "lasp2".to_owned(),
            softmax_method: "lasp2h".to_owned(),
            machine: String::new(),
            gradient_bucket_mib: 64,
        }
    }
}

/// `[train]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Optimizer steps. Default 100.
    pub steps: u64,
    /// Tokens of one sequence, over all its ranks. Default 4096.
    pub seq_len: usize,
    /// Sequences of one optimizer step, over all dp groups. Default 1.
    pub batch: usize,
    /// Sequences of one forward pass of a dp group; above 1 only with `data.documents = false`. Default 1.
    pub micro_batch: usize,
    /// Seed of the parameters and of the order of the data. Default 0.
    pub seed: u64,
    /// Element type of parameters and activations. Default "f32".
    pub dtype: Dtype,
    /// What ranks compute on: "cpu", "cuda", or "auto", which is a GPU where every rank of a node can have one. Default "auto".
    pub device: DeviceKind,
    /// Dense bf16 TFLOP/s of one device, of which the MFU is a share; 0: known for A100, H100 and H200, else no MFU. Default 0.
    pub peak_tflops: f64,
    /// Whether layers recompute their activations in backward instead of keeping them; of softmax layers what attention gave is kept, by
    /// the methods lasp2h and ring. Default false.
    pub activation_checkpointing: bool,
    /// Steps between lines on the terminal. Default 1.
    pub log_every: u64,
    /// Steps between validations; 0: only at the end. Default 0.
    pub validate_every: u64,
    /// Sequences of one validation. Default 8.
    pub validate_sequences: usize,
    /// Minutes after which training stops cleanly, before `steps` are done; 0: no limit. Default 0.
    pub minutes: f64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            steps: 100,
            seq_len: 4096,
            batch: 1,
            micro_batch: 1,
            seed: 0,
            dtype: Dtype::F32,
            device: DeviceKind::Auto,
            peak_tflops: 0.0,
            activation_checkpointing: false,
            log_every: 1,
            validate_every: 0,
            validate_sequences: 8,
            minutes: 0.0,
        }
    }
}

/// `[optimizer]`: AdamW with a linear warm-up and a cosine decay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Highest learning rate. Default 3e-3.
    pub lr: f64,
    /// Learning rate at the last step. Default a tenth of `lr`.
    pub min_lr: f64,
    /// Steps over which the learning rate rises from zero. Default 0.
    pub warmup_steps: u64,
    /// Decoupled weight decay of matrices. Default 0.1.
    pub weight_decay: f64,
    /// Decay of the mean of the gradients. Default 0.9.
    pub beta1: f64,
    /// Decay of the mean of their squares. Default 0.95.
    pub beta2: f64,
    /// Added to the root of the mean square. Default 1e-8.
    pub eps: f64,
    /// Norm to which the gradient of the whole model is clipped; 0: not at all. Default 1.
    pub clip: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        OptimizerConfig {
            lr: 3e-3,
            min_lr: Self::min_lr_for(3e-3),
            warmup_steps: 0,
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            clip: 1.0,
        }
    }
}

impl OptimizerConfig {
    pub(super) fn min_lr_for(lr: f64) -> f64 {
        0.1 * lr
    }
}

/// `[data]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// Where tokens come from. Default "corpus".
    pub kind: DataKind,
    /// The corpus file, relative to the working directory. Default "corpus.bin".
    pub path: PathBuf,
    /// Whether state is reset and attention masked at the boundaries of documents. Default true.
    pub documents: bool,
    /// Share of the corpus, at its end, held out for validation; 0: none. Default 0.02.
    pub validation_fraction: f64,
}

impl Default for DataConfig {
    fn default() -> Self {
        DataConfig {
            kind: DataKind::Corpus,
            path: PathBuf::from("corpus.bin"),
            documents: true,
            validation_fraction: 0.02,
        }
    }
}

/// `[checkpoint]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Steps between checkpoints; 0: only at the end. Default 0.
    pub every: u64,
    /// How many of the newest checkpoints to keep; 0: none is written, as benchmarks want it. Default 2.
    pub keep: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        CheckpointConfig { every: 0, keep: 2 }
    }
}

/// `[sample]`: text printed at the end of training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SampleConfig {
    /// The text to continue. Default "".
    pub prompt: String,
    /// Tokens to generate; 0: print no sample. Default 0.
    pub tokens: usize,
    /// What the logits are divided by; 0 always takes the likeliest token. Default 0.8.
    pub temperature: f64,
    /// How many of the likeliest tokens to draw from; 0: all. Default 0.
    pub top_k: usize,
}

impl Default for SampleConfig {
    fn default() -> Self {
        SampleConfig { prompt: String::new(), tokens: 0, temperature: 0.8, top_k: 0 }
    }
}
