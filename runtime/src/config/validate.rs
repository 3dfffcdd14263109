//! The rules a configuration must keep, beyond each key's kind. `resolve_ranks` in the parent adds those that need the number of ranks.

use std::fmt::Display;

use super::{Config, DataKind, DecayKind};
use crate::sequence::method::{AUTO, LEFT_PRODUCTS, check_attention, check_linear};

/// One rule broken: the key, its value, and what would have been right.
pub(super) struct Violation {
    pub key: &'static str,
    pub found: String,
    pub expected: String,
}

type Check = Result<(), Violation>;

pub(super) fn check(config: &Config) -> Check {
    model(config)?;
    parallel(config)?;
    train(config)?;
    optimizer(config)?;
    data(config)?;
    let temperature = config.sample.temperature;
    require(
        temperature.is_finite() && temperature >= 0.0,
        "sample.temperature",
        temperature,
        "zero (always the likeliest token) or more",
    )
}

fn model(config: &Config) -> Check {
    let model = &config.model;
    for (key, value) in [
        ("model.vocab", model.vocab),
        ("model.dim", model.dim),
        ("model.layers", model.layers as i64),
        ("model.heads", model.heads),
        ("model.kv_heads", model.kv_heads),
        ("model.mlp_dim", model.mlp_dim),
        ("model.chunk", model.chunk),
    ] {
        require(value > 0, key, value, "at least 1")?;
    }
    let halves = u64::try_from(model.chunk).is_ok_and(|chunk| chunk.is_power_of_two() && chunk <= 1024);
    require(halves, "model.chunk", model.chunk, "a power of two of at most 1024")?;
    require(
        model.dim % model.heads == 0,
        "model.heads",
        model.heads,
        format!("a divisor of model.dim = {}", model.dim),
    )?;
    require(
        model.head_dim() % 2 == 0,
        "model.heads",
        model.heads,
        format!(
            "an even head_dim, since rotary embeddings turn pairs; model.dim / model.heads = {} / {} = {}",
            model.dim,
            model.heads,
            model.head_dim()
        ),
    )?;
    require(
        model.heads % model.kv_heads == 0,
        "model.kv_heads",
        model.kv_heads,
        format!("a divisor of model.heads = {}", model.heads),
    )?;
    let letters = !model.pattern.is_empty() && model.pattern.chars().all(|c| matches!(c, 'L' | 'N'));
    require(
        letters,
        "model.pattern",
        format!("{:?}", model.pattern),
        "a string of L (linear attention) and N (softmax attention), such as \"LLLN\"",
    )?;
    positive("model.rope_base", model.rope_base)?;
    positive("model.norm_eps", model.norm_eps)
}

fn parallel(config: &Config) -> Check {
    let parallel = &config.parallel;
    let (linear, softmax) = (&parallel.linear_method, &parallel.softmax_method);
    for (key, found, check) in [
        ("parallel.linear_method", linear, check_linear(linear)),
        ("parallel.softmax_method", softmax, check_attention(softmax)),
    ] {
        if let Err(expected) = check {
            require(found == AUTO, key, format!("{found:?}"), format!("{expected}, or {AUTO:?}"))?;
        }
    }
    let constant = matches!(config.model.decay, DecayKind::None | DecayKind::Lightning | DecayKind::Retention);
    require(
        constant || !LEFT_PRODUCTS.contains(&linear.as_str()),
        "parallel.linear_method",
        format!("{linear:?}"),
        "a method that carries states, such as \"lasp2\", or model.decay = \"none\", \"lightning\" or \"retention\"",
    )
}

fn train(config: &Config) -> Check {
    let train = &config.train;
    for (key, value) in [
        ("train.steps", train.steps),
        ("train.seq_len", train.seq_len as u64),
        ("train.batch", train.batch as u64),
        ("train.micro_batch", train.micro_batch as u64),
        ("train.log_every", train.log_every),
        ("train.validate_sequences", train.validate_sequences as u64),
    ] {
        require(value > 0, key, value, "at least 1")?;
    }
    require(
        train.micro_batch == 1 || !config.data.documents,
        "train.micro_batch",
        train.micro_batch,
        "1 while data.documents = true, since document boundaries differ between sequences; or set data.documents = false",
    )?;
    let share = config.parallel.dp.max(1) * train.micro_batch;
    require(
        train.batch.is_multiple_of(share),
        "train.batch",
        train.batch,
        format!(
            "a multiple of parallel.dp x train.micro_batch = {} x {}",
            config.parallel.dp.max(1),
            train.micro_batch
        ),
    )?;
    require(train.minutes.is_finite() && train.minutes >= 0.0, "train.minutes", train.minutes, "0 (no limit) or more")
}

fn optimizer(config: &Config) -> Check {
    let optimizer = &config.optimizer;
    positive("optimizer.lr", optimizer.lr)?;
    require(
        (0.0..=optimizer.lr).contains(&optimizer.min_lr),
        "optimizer.min_lr",
        optimizer.min_lr,
        format!("between 0 and optimizer.lr = {}", optimizer.lr),
    )?;
    positive("optimizer.eps", optimizer.eps)?;
    for (key, value) in [("optimizer.weight_decay", optimizer.weight_decay), ("optimizer.clip", optimizer.clip)] {
        require(value.is_finite() && value >= 0.0, key, value, "0 (off) or more")?;
    }
    for (key, value) in [("optimizer.beta1", optimizer.beta1), ("optimizer.beta2", optimizer.beta2)] {
        require((0.0..1.0).contains(&value), key, value, "at least 0 and below 1")?;
    }
    Ok(())
}

fn data(config: &Config) -> Check {
    let data = &config.data;
    require(
        data.kind == DataKind::Random || config.model.vocab >= 256,
        "model.vocab",
        config.model.vocab,
        "at least 256, since the tokens of a corpus are bytes (data.kind = \"corpus\")",
    )?;
    require(
        data.kind == DataKind::Random || !data.path.as_os_str().is_empty(),
        "data.path",
        "\"\"",
        "the corpus file that `lasp data prepare` wrote",
    )?;
    require(
        (0.0..1.0).contains(&data.validation_fraction),
        "data.validation_fraction",
        data.validation_fraction,
        "at least 0 (no validation) and below 1",
    )
}

fn positive(key: &'static str, value: f64) -> Check {
    require(value.is_finite() && value > 0.0, key, value, "a number above 0")
}

fn require(holds: bool, key: &'static str, found: impl Display, expected: impl Display) -> Check {
    if holds {
        return Ok(());
    }
    Err(Violation { key, found: found.to_string(), expected: expected.to_string() })
}
