//! The estimate against what it estimates: the model's parameters, and the messages that the flight recorder counts.

use std::path::Path;

use collectives::{Group, Mesh, local};
use runtime::config::Config;
use runtime::data::Source;
use runtime::estimate::{busiest_traffic, estimate, traffic_of};
use runtime::model::Model;
use runtime::sequence::method;
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
    tch::set_num_threads(1);
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

/// The traffic that is estimated for each rank against what a step sends: by operation messages and bytes, exactly or as a bound.
fn check(ranks: usize, overrides: &[&str]) {
    let config = config(ranks, overrides);
    for (rank, recorded) in recorded(&config, ranks).into_iter().enumerate() {
        let traffic = traffic_of(&config, rank % config.parallel.sp).unwrap();
        let estimated = sorted(traffic.messages.iter().map(|m| {
            let counts = [m.each.messages, m.each.bytes_sent, m.each.bytes_received];
            (format!("{} {}", m.group, m.op), counts.map(|n| n * m.places))
        }));
        let total = |counts: &Counts| counts.iter().fold([0; 3], |sum, (_, n)| [0, 1, 2].map(|i| sum[i] + n[i]));
        let sum = traffic.total;
        let name = format!("rank {rank} of {ranks}, {overrides:?}");
        assert_eq!([sum.messages, sum.bytes_sent, sum.bytes_received], total(&estimated), "{name}");
        if ranks == 1 {
            let alone = recorded.iter().all(|(_, [_, sent, received])| sent + received == 0);
            assert!(alone && estimated.is_empty(), "{name}: {estimated:?} {recorded:?}");
            continue;
        }
        let truncates = config.parallel.linear_method.contains("truncate");
        assert!(!traffic.at_most || truncates, "{name}");
        if traffic.at_most {
            for (op, found) in &recorded {
                let most = estimated.iter().find(|(estimated, _)| estimated == op).map_or([0; 3], |(_, most)| *most);
                assert!(found.iter().zip(most).all(|(found, most)| *found <= most), "{name}: {op} {found:?} {most:?}");
            }
        } else {
            assert_eq!(estimated, recorded, "{name}");
        }
    }
}

#[test]
fn messages_are_those_of_a_step() {
    for (ranks, overrides) in [
        (3, &[][..]),
        (2, &["model.decay=token", "parallel.layout=zigzag"]),
        (3, &["model.decay=channel", "parallel.layout=zigzag", "train.dtype=bf16"]),
        (4, &["parallel.sp=2", "parallel.dp=2", "model.decay=lightning"]),
        (2, &["train.micro_batch=2", "train.activation_checkpointing=true", "parallel.linear_method=lasp2:splits=3"]),
        (3, &["train.activation_checkpointing=true", "parallel.linear_method=lasp1", "parallel.softmax_method=ring"]),
        (2, &["parallel.sp=1", "parallel.dp=2"]),
        // More ranks than tokens.
        (4, &["train.seq_len=2", "parallel.layout=zigzag", "parallel.linear_method=hierarchical:node=2"]),
        (4, &["train.seq_len=3", "parallel.linear_method=lasp1", "parallel.softmax_method=ring"]),
    ] {
        check(ranks, overrides);
    }
}

#[test]
fn messages_of_every_linear_method_are_those_of_a_step() {
    let scans = [
        "lasp2",
        "lasp2:splits=5",
        "lasp2:splits=999",
        "lasp2:truncate",
        "lasp2:truncate,splits=2",
        "lasp1",
        "all_scan",
        "all_scan:blocks=3",
        "hierarchical",
        "hierarchical:node=1",
        "hierarchical:node=2",
        "hierarchical:node=3",
    ];
    assert!(method::SCANS.iter().all(|name| scans.contains(name)));
    for ranks in 1..=4 {
        for layout in ["contiguous", "zigzag"] {
            let layout = format!("parallel.layout={layout}");
            let run = |name: &str, decay: &str| {
                let (name, decay) = (format!("parallel.linear_method={name}"), format!("model.decay={decay}"));
                check(ranks, &["model.pattern=L", "model.layers=2", "train.batch=1", &layout, &name, &decay]);
            };
            for name in scans {
                ["none", "channel"].iter().for_each(|decay| run(name, decay));
            }
            for name in ["lasp2", "lasp2:truncate", "hierarchical:node=2"] {
                ["lightning", "token"].iter().for_each(|decay| run(name, decay));
            }
            for name in method::LEFT_PRODUCTS {
                ["none", "retention"].iter().for_each(|decay| run(name, decay));
            }
        }
    }
}

/// Under a constant decay it is known beforehand what a truncated scan leaves out.
#[test]
fn a_truncated_scan_sends_what_its_constant_decays_leave() {
    // One head of Retention keeps less than 2^-24 over 600 tokens: each of these ranks hears of its neighbour alone.
    let near = ["model.pattern=L", "model.heads=1", "model.kv_heads=1", "model.decay=retention", "train.batch=1"];
    let near = [&near[..], &["train.seq_len=1800", "parallel.linear_method=lasp2:truncate"]].concat();
    check(3, &near);
    let first = traffic_of(&config(3, &near), 0).unwrap();
    assert!(!first.at_most && first.messages.iter().all(|m| m.place == "step" || m.each.messages == 1), "{first:?}");
    // Lightning's later layers keep more: over a rank's 4096 tokens the slowest head of these e^-16, e^-10.7, e^-5.3 and nearly 1.
    let layers = ["model.pattern=L", "model.decay=lightning", "parallel.linear_method=lasp2:truncate"];
    let config = config(8, &[&layers[..], &["train.seq_len=32768", "train.batch=1"]].concat());
    let traffic = traffic_of(&config, 7).unwrap();
    let forward = traffic.messages.iter().filter(|m| (m.what, m.op) == ("forward", "recv"));
    let forward: Vec<_> = forward.map(|m| (m.places, m.each.messages, m.at_most)).collect();
    assert_eq!(forward, [(2, 2, false), (1, 4, false), (1, 7, false)]);
    assert!(!traffic.at_most);
}

#[test]
fn messages_of_every_softmax_method_in_a_hybrid_are_those_of_a_step() {
    for (i, name) in method::ATTENTIONS.iter().chain(&["lasp2h:stages=3"]).enumerate() {
        for ranks in 1..=4 {
            // Heads in groups that the ranks cut, in one group, and none.
            for (heads, kv_heads) in [(12, 4), (12, 1), (12, 12)] {
                let layout = ["contiguous", "zigzag"][(ranks + i) % 2];
                let heads = [format!("model.heads={heads}"), format!("model.kv_heads={kv_heads}")];
                let method = [format!("parallel.softmax_method={name}"), format!("parallel.layout={layout}")];
                let dtype = if kv_heads == 4 { "train.dtype=bf16" } else { "train.dtype=f32" };
                check(ranks, &["model.dim=24", "model.layers=2", dtype, &heads[0], &heads[1], &method[0], &method[1]]);
            }
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

/// The 1B model of configs/linear-llama3-1b.toml on a GPU.
fn on_a_gpu(overrides: &[&str]) -> Config {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/linear-llama3-1b.toml");
    let overrides: Vec<String> = [&["train.device=cuda"], overrides].concat().iter().map(|s| s.to_string()).collect();
    Config::load(Path::new(path), &overrides).unwrap()
}

/// The peaks that libtorch's allocator counted on an H200: `peak_bytes` in benches/runs/2026-11-24-h200. At 4,096 tokens the
/// mixer was linear.cu; the others are of before, with the mixer as tensor operations in f32.
#[test]
fn memory_of_a_gpu_is_near_the_measured_peaks() {
    for (tokens, measured, within) in
        [(4096, 24_692_005_888i64, 0.01), (16384, 36_145_317_888, 0.03), (32768, 52_474_578_944, 0.03)]
    {
        let mut config = on_a_gpu(&[&format!("train.seq_len={tokens}")]);
        config.resolve_ranks(1).unwrap();
        let estimated = estimate(&config).unwrap().memory.total;
        let error = estimated as f64 / measured as f64 - 1.0;
        println!("{tokens} tokens: {estimated} estimated, {measured} measured, {:+.2} %", 100.0 * error);
        assert!(error.abs() < within, "{tokens} tokens: {estimated} estimated, {measured} measured");
    }
}

#[test]
fn a_gpu_keeps_less_than_plain_tensor_code() {
    let of = |overrides: &[&str], ranks: usize| {
        let mut config = on_a_gpu(overrides);
        config.resolve_ranks(ranks).unwrap();
        estimate(&config).unwrap().memory
    };
    let (gpu, cpu) = (of(&[], 1), of(&["train.device=cpu"], 1));
    let parameters = gpu.weights / 2;
    assert_eq!((gpu.optimizer, cpu.optimizer), (10 * parameters, 12 * parameters));
    assert_eq!((gpu.gradients, cpu.gradients), (2 * parameters, 4 * parameters));
    // Where the gradients of several passes add up, in f32.
    assert_eq!(of(&["train.batch=2"], 1).gradients, 4 * parameters);
    assert_eq!(of(&["parallel.dp=2", "train.batch=4"], 2).gradients, 4 * parameters);
    assert_eq!(
        (of(&[], 2).gradients, of(&["parallel.dp=2", "train.batch=2"], 2).gradients),
        (2 * parameters, 2 * parameters)
    );
    assert!(gpu.activations.without_checkpointing < cpu.activations.without_checkpointing);
    // GPUs sum in place, but for sums of bf16 that would be rounded more than once.
    assert_eq!((gpu.update, gpu.sums, of(&[], 2).sums, of(&["train.dtype=f32"], 4).sums), (0, 0, 0, 0));
    let (on_gpus, on_cpus) = (of(&[], 4).sums, of(&["train.device=cpu"], 2).sums);
    assert!((1..4 * parameters).contains(&on_gpus) && on_cpus == on_gpus, "{on_gpus} and {on_cpus}");
    let at_once = of(&["train.device=cpu", "parallel.gradient_bucket_mib=1000000"], 2);
    assert_eq!((at_once.sums, at_once.update - cpu.update), (0, 4 * parameters));
    // The kernels for linear layers, and the states that they keep, are not for f64.
    let [narrow, wide] = ["train.dtype=f32", "train.dtype=f64"].map(|dtype| of(&[dtype], 1).activations.linear_layer);
    assert!(wide < 2 * narrow, "{wide} in f64, {narrow} in f32");
}

/// How what a method holds grows with the ranks, at a length in proportion.
#[test]
fn memory_of_every_method() {
    let gathers = |pattern: &str, method: &str, ranks: usize, device: &str| {
        let overrides = [
            format!("model.pattern={pattern}"),
            format!("parallel.{}={method}", if pattern == "L" { "linear_method" } else { "softmax_method" }),
            format!("train.seq_len={}", 1024 * ranks),
            format!("train.device={device}"),
        ];
        let mut config = on_a_gpu(&overrides.each_ref().map(String::as_str));
        config.resolve_ranks(ranks).unwrap();
        estimate(&config).unwrap().memory.gathers
    };
    for device in ["cpu", "cuda"] {
        for method in method::LINEAR {
            let of = |ranks| gathers("L", method, ranks, device);
            assert_eq!(of(1), 0, "{method}");
            match *method {
                "lasp2" => assert_eq!(of(16) * 9, of(8) * 17),
                "hierarchical" | "lasp1" | "all_scan" | "ring_left_product" => assert_eq!(of(16), of(8), "{method}"),
                "megatron_sp_left_product" => assert_eq!(of(16), 2 * of(8)),
                other => panic!("{other} is not tested"),
            }
        }
        for method in method::ATTENTIONS {
            let of = |ranks| gathers("N", method, ranks, device);
            assert_eq!(of(1), 0, "{method}");
            match *method {
                "ring" => assert_eq!(of(16), of(8)),
                "lasp2h" | "megatron_sp" => assert_eq!(of(16), 2 * of(8), "{method}"),
                // Each rank has one query head of 16 and a copy of its KV head, of 4; on 8 ranks two and one.
                "ulysses" => assert!(of(8) < of(16) && of(16) < 2 * of(8)),
                other => panic!("{other} is not tested"),
            }
        }
    }
    assert!(gathers("L", "lasp1", 8, "cuda") < gathers("L", "lasp2", 8, "cuda"));
    assert!(gathers("N", "ring", 8, "cuda") < gathers("N", "lasp2h", 8, "cuda"));
    assert!(gathers("N", "lasp2h", 8, "cuda") < gathers("N", "lasp2h:stages=1", 8, "cuda"));
}

#[test]
fn the_busiest_rank_is_meant() {
    let estimate = estimate(&config(2, &[])).unwrap();
    assert_eq!(estimate.tokens.per_rank, [23, 22]);
    assert_eq!(estimate.shapes[0].sizes, [1, 23, 16]);
    // The ends of a chain send or receive one state a pass; those between both.
    let chain = config(4, &["model.pattern=L", "parallel.linear_method=lasp1"]);
    let busiest = busiest_traffic(&chain).unwrap();
    assert_eq!((busiest.rank, busiest), (1, traffic_of(&chain, 1).unwrap()));
}
