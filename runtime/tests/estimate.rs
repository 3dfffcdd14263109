//! The estimate against what it estimates: the model's parameters, and the messages that the flight recorder counts.

use collectives::{Group, Mesh, local};
use runtime::config::Config;
use runtime::data::Source;
use runtime::estimate::{estimate, traffic_of};
use runtime::model::Model;
use runtime::train::{Error, Trainer};
use tch::{Device, Kind};

fn config(ranks: usize, overrides: &[&str]) -> Config {
    let text = r#"
        model = { dim = 16, layers = 4, heads = 4, kv_heads = 2, pattern = "LN" }
        train = { seq_len = 45, batch = 2 }
        data = { kind = "random", documents = false, validation_fraction = 0.0 }
    "#;
    let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
    let mut config = Config::from_toml_str(text, "test", &overrides).unwrap();
    config.resolve_ranks(ranks).unwrap();
    config
}

#[test]
fn parameters_are_those_of_the_model() {
    for overrides in [
        &[][..],
        &["model.decay=token", "model.tied=false"],
        &["model.decay=channel", "model.pattern=L", "model.output_gate=false"],
        &["model.decay=retention", "model.pattern=N"],
    ] {
        let config = config(1, overrides);
        let counted = estimate(&config).unwrap().parameters;
        let model = Model::new(&config.model, Kind::Float, 0, Device::Cpu).unwrap();
        assert_eq!(counted.total, model.params.numel(), "{overrides:?}");
        let classes =
            [counted.embedding, counted.linear_attention, counted.softmax_attention, counted.mlp, counted.norms];
        assert_eq!(classes.iter().sum::<i64>(), counted.total, "{overrides:?}: {counted:?}");
        let has = |letter: char| config.model.pattern.contains(letter);
        assert_eq!((counted.linear_attention > 0, counted.softmax_attention > 0), (has('L'), has('N')));
    }
}

/// By operation: messages, bytes sent, bytes received.
type Counts = Vec<(String, [i64; 3])>;

fn sorted(counts: impl Iterator<Item = (String, [i64; 3])>) -> Counts {
    let mut sums = std::collections::BTreeMap::<String, [i64; 3]>::new();
    for (name, count) in counts {
        let sum = sums.entry(name).or_default();
        sum.iter_mut().zip(count).for_each(|(sum, n)| *sum += n);
    }
    sums.into_iter().collect()
}

/// What one step really sends, on each rank.
fn recorded(config: &Config, ranks: usize) -> Vec<Counts> {
    let step = |world: Group| -> Result<Counts, Error> {
        let mesh = Mesh::new(world, config.parallel.dp, config.parallel.sp)?;
        let (source, validation) = Source::open(config)?;
        let mut trainer = Trainer::new(mesh, config.clone(), source, validation)?;
        trainer.mesh.world.recorder().clear();
        trainer.step(false)?;
        let totals = trainer.mesh.world.recorder().totals_by_op();
        Ok(sorted(totals.into_iter().map(|((group, op), t)| {
            (format!("{group} {op}"), [t.messages as i64, t.bytes_sent as i64, t.bytes_received as i64])
        })))
    };
    local::run(ranks, step).unwrap()
}

#[test]
fn messages_are_those_of_a_step() {
    for (ranks, overrides) in [
        (3, &[][..]),
        (2, &["model.decay=token", "parallel.layout=zigzag"]),
        (3, &["model.decay=channel", "parallel.layout=zigzag", "train.dtype=bf16"]),
        (4, &["parallel.sp=2", "parallel.dp=2", "model.decay=lightning"]),
        (2, &["train.micro_batch=2", "train.activation_checkpointing=true", "parallel.linear_method=lasp2:splits=3"]),
        (2, &["parallel.sp=1", "parallel.dp=2"]),
    ] {
        let config = config(ranks, overrides);
        for (rank, recorded) in recorded(&config, ranks).into_iter().enumerate() {
            let traffic = traffic_of(&config, rank % config.parallel.sp).unwrap();
            assert!(traffic.not_counted.is_empty());
            let estimated = sorted(traffic.messages.iter().map(|m| {
                let counts = [m.each.messages, m.each.bytes_sent, m.each.bytes_received];
                (format!("{} {}", m.group, m.op), counts.map(|n| n * m.places))
            }));
            assert_eq!(estimated, recorded, "rank {rank} of {ranks}, {overrides:?}");
        }
    }
}

#[test]
fn checkpointing_keeps_less_and_computes_more() {
    let plain = estimate(&config(2, &[])).unwrap();
    let checkpointed = estimate(&config(2, &["train.activation_checkpointing=true"])).unwrap();
    assert_eq!(plain.memory.activations.with_checkpointing, checkpointed.memory.activations.with_checkpointing);
    assert!(checkpointed.memory.total <= plain.memory.total);
    assert!(checkpointed.flops.step > plain.flops.step);
}

#[test]
fn the_busiest_rank_is_meant() {
    let estimate = estimate(&config(2, &[])).unwrap();
    assert_eq!(estimate.tokens.per_rank, [23, 22]);
    assert_eq!(estimate.shapes[0].sizes, [1, 23, 16]);
}

#[test]
fn methods_that_are_not_counted_are_named() {
    let methods = &["parallel.linear_method=lasp1", "parallel.softmax_method=ring"];
    let traffic = estimate(&config(2, methods)).unwrap().traffic;
    assert_eq!(traffic.not_counted, ["lasp1", "ring"]);
    assert!(traffic.messages.iter().all(|message| message.place == "step"));
    assert!(estimate(&config(1, methods)).unwrap().traffic.not_counted.is_empty());
}
