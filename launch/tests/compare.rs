//! `lasp compare`: tiny comparisons on threads and under mpirun, what they write, and what they refuse.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{PROGRAM, Ran, Ranks, command, mpi, run};
use serde_json::Value;

fn compare(ranks: Ranks, out: &Path, arguments: &str) -> Ran {
    let mut command = command(ranks);
    command.arg("compare").args(arguments.split(' ').filter(|argument| !argument.is_empty()));
    if let Ranks::Threads(n) = ranks {
        command.args(["--ranks", &n.to_string()]);
    }
    run(command.args(["--heads", "2", "--kv-heads", "1", "--dim", "16", "--rounds", "2"]).arg("--out").arg(out))
}

fn rows(out: &Path) -> Vec<Value> {
    let text = fs::read_to_string(out.join("results.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn sum(numbers: &Value) -> u64 {
    numbers.as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum()
}

/// Fields of a row with figures, and that counts and formula agree.
fn check(row: &Value, ranks: usize, tokens: i64) {
    let phases: &[&str] = if row["mode"] == "train" { &["step"] } else { &["forward", "backward", "step"] };
    for phase in phases {
        let at = |key: &str| row[*phase][key].as_f64().unwrap();
        assert!(0.0 < at("p10_ms") && at("p10_ms") <= at("median_ms") && at("median_ms") <= at("p90_ms"), "{row}");
    }
    assert_eq!((row["ranks"].as_u64(), row["tokens"].as_i64()), (Some(ranks as u64), Some(tokens)));
    assert!(row["skipped"].is_null() && row["tokens_per_s"].as_f64().unwrap() > 0.0, "{row}");
    for key in ["sent", "received", "messages", "layers_received", "formula_received"] {
        assert_eq!(row[key].as_array().unwrap().len(), ranks, "{key}: {row}");
    }
    let pairs = row["layers_received"].as_array().unwrap().iter().zip(row["formula_received"].as_array().unwrap());
    for (counted, formula) in pairs.map(|(counted, formula)| (counted.as_u64().unwrap(), formula.as_u64().unwrap())) {
        let agrees = if row["formula"] == "exact" { counted == formula } else { counted <= formula };
        assert!(agrees, "{counted} bytes counted, {formula} by the formula: {row}");
    }
    assert_eq!(sum(&row["sent"]) == 0, ranks == 1, "{row}");
    assert!((0.0..=1.0).contains(&row["exposed"].as_f64().unwrap()), "{row}");
    if !row["memory"].is_null() {
        assert!(row["memory"]["peak"].as_u64() >= row["memory"]["added"].as_u64(), "{row}");
    }
    assert_eq!(row["options"]["heads"], 2);
    assert!(row["machine"]["cores"].as_u64() > Some(0) && row["versions"]["lasp"].is_string(), "{row}");
    let gpu = row["device"] == "cuda";
    assert!(gpu || row["device"] == "cpu", "{row}");
    for (part, key) in [("machine", "gpu"), ("versions", "driver")] {
        assert_eq!(row[part][key].is_string(), gpu, "{part}.{key}: {row}");
    }
}

fn labels(rows: &[Value]) -> Vec<&str> {
    rows.iter().map(|row| row["method"].as_str().unwrap()).collect()
}

#[test]
fn auto_is_a_row_that_says_what_was_chosen() {
    let folder = tempfile::tempdir().unwrap();
    let network = "node=2,intra=1us/10GB/s,inter=20ms/10GB/s";
    let arguments = format!("--methods lasp2,auto --seq-lens 40,80 --network {network}");
    let ran = compare(Ranks::Threads(4), folder.path(), &arguments).succeeds();
    let rows = rows(folder.path());
    for (tokens, of) in [40, 80].into_iter().zip(rows.chunks(2)) {
        let before = "--methods auto: ";
        let after = format!(", for {tokens} tokens on 4 ranks");
        let line = ran.err.lines().find(|line| line.contains(&after)).unwrap_or_else(|| panic!("{}", ran.err));
        assert!(line.contains(&format!("emulated network {}", network.replace("us/", "µs/"))), "{line}");
        let chosen = line.split(before).nth(1).unwrap().split(&after).next().unwrap();
        // Two hops between nodes, where a chain of nodes has one.
        assert_ne!(chosen, "lasp2", "{}", ran.err);
        assert_eq!(labels(of), ["lasp2", &format!("auto ({chosen})")]);
        of.iter().for_each(|row| check(row, 4, tokens));
    }
    let candidates = ran.err.matches(": forward and backward take ").count();
    assert_eq!(candidates, 8, "four candidates at each length:\n{}", ran.err);
}

#[test]
fn all_linear_methods_on_several_numbers_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = command(Ranks::Threads(3));
    command.args(["compare", "--heads", "2", "--dim", "16", "--rounds", "2", "--seq-lens", "300", "--ranks", "1,3"]);
    let ran = run(command.args(["--decay", "head", "--out"]).arg(folder.path())).succeeds();
    for words in ["1 rank, 300 tokens, ", "3 ranks, 300 tokens", "ring_left_product (quadratic)", " *\n"] {
        assert!(ran.out.contains(words), "{words:?} missing in:\n{}", ran.out);
    }
    let rows = rows(folder.path());
    let methods = [
        "lasp2",
        "lasp1",
        "all_scan",
        "hierarchical",
        "ring_left_product (quadratic)",
        "megatron_sp_left_product (quadratic)",
    ];
    assert_eq!(labels(&rows), methods.repeat(2));
    for (i, row) in rows.iter().enumerate() {
        check(row, if i < methods.len() { 1 } else { 3 }, 300);
        assert_eq!((&row["backend"], &row["formula"]), (&"local".into(), &"exact".into()));
    }
    // A state of 2 heads of 16 by 16 numbers of 4 bytes: two of them for each rank, in forward and in backward.
    assert_eq!(rows[6]["received"], serde_json::json!([8192, 8192, 8192]));
    assert_eq!(sum(&rows[7]["received"]), 2 * 2 * 2048);

    let html = fs::read_to_string(folder.path().join("report.html")).unwrap();
    for part in ["Throughput", "Scaling", "Bytes received", "One step on 3 ranks at 300 tokens", "rank 2", "</html>"] {
        assert!(html.contains(part), "{part} missing");
    }
    assert!(!html.contains("http:") && !html.contains("https:"), "nothing comes from the network");
    assert!(!html.contains("NaN") && !html.contains("inf\""));
    let json = fs::read_to_string(folder.path().join("results.jsonl")).unwrap();
    let at = folder.path().to_str().unwrap();
    assert!(!html.contains(at) && !json.contains(at), "a folder of this machine");
}

#[test]
fn processes_of_mpirun_are_compared_too() {
    if !mpi() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    compare(Ranks::Mpi(2), folder.path(), "--seq-lens 300 --mixer softmax").succeeds();
    let rows = rows(folder.path());
    assert_eq!(labels(&rows), ["lasp2h", "lasp2h zigzag", "ring", "ring zigzag", "ulysses", "megatron_sp"]);
    for row in &rows {
        check(row, 2, 300);
        assert_eq!(row["backend"], "mpi");
    }
    assert!(fs::read_to_string(folder.path().join("report.html")).unwrap().contains("processes under MPI"));
    compare(Ranks::Mpi(2), folder.path(), "--seq-lens 300 --ranks 1,2").fails_with(&["found [1, 2] under a launcher"]);
}

#[test]
fn layers_and_training_steps() {
    let folder = tempfile::tempdir().unwrap();
    for (mode, decay, dtype) in [("layer", "token", "bf16"), ("train", "channel", "f32")] {
        let mut command = command(Ranks::Threads(3));
        command.args(["compare", "--heads", "2", "--dim", "16", "--rounds", "2", "--ranks", "3", "--seq-lens", "101"]);
        command.args(["--mode", mode, "--decay", decay, "--dtype", dtype, "--out"]).arg(folder.path());
        run(command.args(["--methods", "lasp2,lasp2:truncate,hierarchical:node=2 zigzag"])).succeeds();
        let rows = rows(folder.path());
        assert_eq!(labels(&rows), ["lasp2", "lasp2:truncate", "hierarchical:node=2 zigzag"]);
        assert_eq!((&rows[0]["layout"], &rows[2]["layout"]), (&"contiguous".into(), &"zigzag".into()));
        for row in &rows {
            check(row, 3, 101);
            assert_eq!(row["mode"], mode);
        }
        assert_eq!((&rows[0]["formula"], &rows[1]["formula"]), (&"exact".into(), &"at_most".into()));
        // Gradients are summed too, but not by the layers.
        let gradients = sum(&rows[0]["received"]) > sum(&rows[0]["layers_received"]);
        assert_eq!(gradients, mode == "train");
    }
}

#[test]
fn more_ranks_than_tokens() {
    let folder = tempfile::tempdir().unwrap();
    compare(Ranks::Threads(5), folder.path(), "--seq-lens 2 --methods lasp2,lasp1,hierarchical:node=3").succeeds();
    rows(folder.path()).iter().for_each(|row| check(row, 5, 2));
}

#[test]
fn a_method_that_cannot_run_is_a_reason_or_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let ran = compare(Ranks::Threads(3), folder.path(), "--seq-lens 60 --mixer softmax").succeeds();
    let reason = "ulysses needs the sp degree to divide the heads: 2 heads, sp = 3";
    assert!(ran.out.contains(reason), "{}", ran.out);
    let rows = rows(folder.path());
    let ulysses = rows.iter().find(|row| row["method"] == "ulysses").unwrap();
    assert!(ulysses["skipped"].as_str().unwrap().contains(reason) && ulysses["step"].is_null());

    let fails = |arguments: &str, words: &[&str]| {
        compare(Ranks::Threads(3), folder.path(), arguments).fails_with(words);
    };
    fails("--seq-lens 60 --mixer softmax --methods lasp2h,ulysses", &["--methods: ulysses needs the sp degree"]);
    fails(
        "--methods ring_left_product --decay token",
        &["ring_left_product with a decay per token", "--decay none or head"],
    );
    fails("--methods lasp3", &["found \"lasp3\" for --mixer linear, expected one of \"lasp2\""]);
    fails("--methods ring", &["or --mixer softmax"]);
    fails("--mixer softmax --decay token", &["--decay: softmax attention has none"]);
    fails("--seq-lens 0", &["expected a number of tokens above 0"]);
    fails("--chunk 0", &["'--chunk <C>'", "expected a whole number of at least 1"]);
    fails("--chunk 48", &["--chunk: found 48, expected a power of two"]);
    fails("--ranks 2,0", &["'--ranks <N,..>'", "expected a whole number of at least 1"]);
}

#[test]
fn what_is_wrong_with_a_size_is_said_of_its_option() {
    let folder = tempfile::tempdir().unwrap();
    let fails = |arguments: &str, words: &[&str]| {
        let mut command = command(Ranks::Threads(1));
        run(command.arg("compare").args(arguments.split(' ')).arg("--out").arg(folder.path())).fails_with(words);
    };
    fails("--dim 63", &["--dim: found 63, expected an even head_dim"]);
    fails("--heads 3 --dim 63", &["--dim: found 63, expected an even head_dim"]);
    fails("--heads 3 --kv-heads 2", &["--kv-heads: found 2, expected a divisor of model.heads = 3"]);
    let left_product = "--set parallel.linear_method=ring_left_product --decay token";
    fails(left_product, &["--decay: parallel.linear_method", "a method that carries states"]);
    // What no option gave is said as ever.
    fails("--dim 64 --set model.chunk=48", &["model.chunk in override `model.chunk=48`"]);
}

#[test]
fn what_a_gpu_cannot_do_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let fails = |arguments: &str, words: &[&str]| {
        let mut command = command(Ranks::Threads(1));
        run(command.arg("compare").args(arguments.split(' ')).arg("--out").arg(folder.path())).fails_with(words);
    };
    let network = "--network node=2,intra=1us/10GB/s,inter=20ms/10GB/s";
    for device in ["--device cuda", "--set train.device=cuda"] {
        fails(&format!("{device} --ranks 1,2"), &["2 ranks as threads", "mpirun -n 2 lasp compare", "torchrun"]);
        fails(&format!("{device} {network}"), &["--network: found node=2", "--device cuda", "threads on the CPU"]);
    }
    fails("--device gpu", &["possible values: cpu, cuda"]);
    if kernels::cuda::devices() > 0 {
        println!("not tested: there is a GPU");
    } else {
        fails("--device cuda", &["--device cuda: ", "see lasp doctor"]);
        assert!(!folder.path().join("results.jsonl").exists(), "nothing was measured");
    }
}

#[test]
fn one_rank_on_a_gpu() {
    if kernels::testing::cuda().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (mixer, methods) in [("linear", "lasp2,lasp1,ring_left_product"), ("softmax", "lasp2h,ring zigzag")] {
        for mode in ["operator", "layer", "train"] {
            let mut command = command(Ranks::Threads(1));
            command.args([
                "compare",
                "--device",
                "cuda",
                "--heads",
                "2",
                "--kv-heads",
                "1",
                "--dim",
                "64",
                "--rounds",
                "3",
            ]);
            command.args(["--mixer", mixer, "--methods", methods, "--mode", mode, "--seq-lens", "300"]);
            let ran = run(command.arg("--out").arg(folder.path())).succeeds();
            assert!(ran.out.contains("one process with a GPU") && ran.out.contains("bf16"), "{}", ran.out);
            let rows = rows(folder.path());
            assert_eq!(rows.len(), methods.split(',').count());
            for row in &rows {
                check(row, 1, 300);
                assert_eq!((&row["device"], &row["options"]["dtype"]), (&"cuda".into(), &"bf16".into()));
                assert!(row["memory"]["added"].as_u64() > Some(0), "{row}");
            }
            let html = fs::read_to_string(folder.path().join("report.html")).unwrap();
            assert!(html.contains("NVIDIA") && html.contains("of the GPU's streams"), "the report says where");
        }
    }
}

#[test]
fn a_calibrated_machine_has_the_network_that_was_emulated() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("emulated.toml");
    let mut command = command(Ranks::Threads(4));
    command.args([
        "calibrate",
        "--quick",
        "--ranks",
        "4",
        "--network",
        "node=2,intra=1ms/1GB/s,inter=4ms/100MB/s",
        "--out",
    ]);
    let ran = run(command.arg(&file)).succeeds();
    assert!(ran.out.contains("chunkwise linear attention"), "{}", ran.out);
    let machine = benches::simulate::Machine::load(file.to_str().unwrap()).unwrap();
    let network = &machine.network;
    assert_eq!((machine.name.as_str(), machine.gpus_per_node), ("emulated", 2));
    assert!(
        (1e3..4e3).contains(&network.simple.intra_us) && (4e3..9e3).contains(&network.simple.inter_us),
        "{network:?}"
    );
    assert!((0.06..=0.1).contains(&network.inter_gbps) && (0.06..=0.1).contains(&network.across_gbps), "{network:?}");
    assert!(network.intra_gbps > 0.3 && network.intra_gbps <= 1.0, "{network:?}");
    assert!(machine.compute.matmul_efficiency <= 1.0 && machine.compute.softmax_efficiency < 1.5, "{machine:?}");

    let fails = |arguments: &str, words: &[&str]| {
        let mut command = Command::new(PROGRAM);
        run(command.current_dir(folder.path()).arg("calibrate").args(arguments.split(' '))).fails_with(words);
    };
    fails("--ranks 1", &["found 1 rank, expected at least 2"]);
    // Before minutes of measuring, not after.
    fails("--out nosuch/machine.toml", &["--out nosuch/machine.toml: there is no folder nosuch"]);
}
