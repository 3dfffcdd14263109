//! The other commands, and how a job ends.

mod common;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{PROGRAM, Ran, Ranks, command, lasp, mpi, run};

const TINY: &str = r#"
[model]
dim = 32
layers = 2
heads = 2
kv_heads = 1
pattern = "LN"
decay = "token"
[train]
steps = 3
seq_len = 64
[data]
kind = "random"
validation_fraction = 0.0
"#;

fn tiny() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.toml");
    std::fs::write(&path, TINY).unwrap();
    (folder, path.to_str().unwrap().to_owned())
}

fn fault(ranks: Ranks, rank: usize, kind: &str) -> Ran {
    let mut command = command(ranks);
    command.args(["fault", "--rank", &rank.to_string(), "--kind", kind]);
    if let Ranks::Threads(n) = ranks {
        command.args(["--ranks", &n.to_string()]);
    }
    run(&mut command)
}

fn a_failing_rank_ends_the_job(ranks: Ranks) {
    fault(ranks, 0, "none").succeeds();
    for rank in [0, 1, 2] {
        for kind in ["error", "panic"] {
            let what = format!("{kind} on rank {rank}, {ranks:?}");
            let attempt = || {
                let ran = fault(ranks, rank, kind).fails_with(&[&format!("rank {rank}: "), "a fault was asked for"]);
                let said = ran.err.lines().filter(|line| line.starts_with("rank ")).count();
                assert_eq!(said, 1, "{what}:\n{}", ran.err);
                ran.since_first_line
            };
            // Other tests share the machine.
            let took = (0..5).map(|_| attempt()).find(|took| *took < Duration::from_secs(2));
            assert!(took.is_some(), "{what}: took more than 2 s, five times");
        }
    }
    let ran = fault(ranks, 1, "mismatch").fails_with(&["all_gather", "shapes differ", "rank 1 [3] f32"]);
    assert_eq!(ran.err.matches("shapes differ").count(), 1, "{}", ran.err);
}

#[test]
fn a_failing_thread_ends_the_job() {
    a_failing_rank_ends_the_job(Ranks::Threads(3));
}

#[test]
fn a_failing_process_ends_the_job() {
    if mpi() {
        a_failing_rank_ends_the_job(Ranks::Mpi(3));
    }
}

#[test]
fn the_flight_recorder_is_shown_on_demand() {
    let with_log = |level: &str| {
        let mut command = Command::new(PROGRAM);
        command.args(["fault", "--rank", "1", "--kind", "error", "--ranks", "2"]).env("LASP_LOG", level);
        run(&mut command).fails_with(&["rank 1: a fault"]).err
    };
    assert!(with_log("debug").contains("#0 all_gather on world"));
    assert!(!with_log("info").contains("all_gather"));
}

#[test]
fn help_and_usage() {
    let ran = lasp(&["--help"]).succeeds();
    for name in ["train", "generate", "data", "plan", "attend", "doctor"] {
        assert!(ran.out.contains(&format!("\n  {name} ")), "{}", ran.out);
    }
    assert!(!ran.out.contains("\n  fault"));
    lasp(&["trian"]).fails_with(&["trian", "train"]);
    lasp(&["attend"]).fails_with(&["--input", "--output", "--mixer"]);
    if mpi() {
        let ran = run(command(Ranks::Mpi(2)).arg("nonsense")).fails_with(&["nonsense"]);
        assert_eq!(ran.err.matches("unrecognized subcommand").count(), 1, "{}", ran.err);
        let ran = run(command(Ranks::Mpi(2)).arg("--version")).succeeds();
        assert_eq!(ran.out.matches("lasp").count(), 1, "{}", ran.out);
    }
}

/// The program on `size` processes as torchrun starts them, in rank order.
fn torchrun(folder: &Path, size: usize, args: &[&str]) -> Vec<Ran> {
    let listener = std::net::TcpListener::bind("localhost:0").expect("a port");
    // Room for the ports after it.
    let port = listener.local_addr().expect("a port").port().min(65000);
    drop(listener);
    let start = |rank: usize| {
        let numbers = [("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", rank), ("MASTER_PORT", port.into())];
        let mut command = Command::new(PROGRAM);
        command.envs(numbers.map(|(name, number)| (name, number.to_string())));
        run(command.env("MASTER_ADDR", "localhost").env("OMP_NUM_THREADS", "1").current_dir(folder).args(args))
    };
    std::thread::scope(|scope| {
        let started: Vec<_> = (0..size).map(|rank| scope.spawn(move || start(rank))).collect();
        started.into_iter().map(|job| job.join().expect("it ran")).collect()
    })
}

#[test]
fn processes_of_torchrun_find_each_other() {
    let here = Path::new(".");
    let fault = |kind, rank, size| torchrun(here, size, &["fault", "--kind", kind, "--rank", rank]);
    fault("none", "0", 3).into_iter().for_each(|ran| drop(ran.succeeds()));
    fault("none", "0", 1).into_iter().for_each(|ran| drop(ran.succeeds()));
    for (kind, why) in [("error", "rank 1: a fault was asked for"), ("panic", "a fault was asked for")] {
        let ran: Vec<_> = fault(kind, "1", 3).into_iter().map(|ran| ran.fails_with(&[])).collect();
        let said: Vec<_> = ran.iter().map(|ran| ran.err.lines().count()).collect();
        assert!(ran[1].err.contains(why) && said == [0, 1, 0], "{said:?} lines:\n{}", ran[1].err);
        assert!(ran.iter().all(|ran| ran.since_first_line < std::time::Duration::from_secs(5)));
    }
    let ran = fault("mismatch", "1", 2);
    assert!(ran.iter().all(|ran| !ran.ok) && ran[0].err.contains("shapes differ"), "{}", ran[0].err);
    let network = "node=1,intra=1us/1GB/s,inter=1us/1GB/s";
    for ran in torchrun(here, 2, &["bench", "collectives", "--network", network]) {
        assert!(!ran.ok);
    }
}

#[test]
#[cfg(not(feature = "mpi"))]
fn mpirun_needs_a_build_with_mpi() {
    let mut command = Command::new(PROGRAM);
    command.args(["fault", "--rank", "0", "--kind", "none"]).env("OMPI_COMM_WORLD_SIZE", "2");
    run(&mut command).fails_with(&["built without MPI"]);
}

#[test]
fn unknown_settings_suggest_the_nearest() {
    let (_folder, config) = tiny();
    for command in ["plan", "train"] {
        lasp(&[command, &config, "--set", "model.head=4"]).fails_with(&["model.head", "did you mean model.heads?"]);
        lasp(&[command, &config, "--set", "train.steps=many"]).fails_with(&["train.steps", "many", "whole number"]);
        lasp(&[command, "nowhere.toml"]).fails_with(&["nowhere.toml"]);
    }
}

#[test]
fn plan_and_doctor_say_what_they_found() {
    let (_folder, config) = tiny();
    let ran = lasp(&["plan", &config, "--ranks", "4", "--set", "parallel.layout=zigzag"]).succeeds();
    for word in ["sp 4 x dp 1, zigzag", "parameters", "memory of a rank", "all_gather", "operations"] {
        assert!(ran.out.contains(word), "expected {word:?} in:\n{}", ran.out);
    }
    let methods = ["--set", "parallel.linear_method=lasp2:truncate", "--set", "parallel.softmax_method=ring"];
    let ran = lasp(&[&["plan", &config, "--ranks", "4"], &methods[..]].concat()).succeeds();
    for word in ["linear layer: forward, at most", "softmax layer: backward", "total, at most", "send", "recv"] {
        assert!(ran.out.contains(word), "expected {word:?} in:\n{}", ran.out);
    }
    let constant = ["--set", "model.decay=retention"];
    let ran = lasp(&[&["plan", &config, "--ranks", "4"], &methods[..], &constant].concat()).succeeds();
    assert!(ran.out.contains("linear layer: forward ") && !ran.out.contains("at most"), "{}", ran.out);
    let ran = lasp(&["plan", &config, "--ranks", "4", "--json"]).succeeds();
    let json: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(json["tokens"]["per_rank"], serde_json::json!([16, 16, 16, 16]));
    assert!(json["parameters"]["total"].as_i64().unwrap() > 0);
    let ran = lasp(&["plan", &config, "--set", "train.device=cuda", "--set", "train.dtype=bf16"]).succeeds();
    assert!(ran.out.contains("memory of a rank, on a GPU"), "{}", ran.out);
    lasp(&["plan", &config, "--ranks", "3", "--set", "parallel.sp=2"]).fails_with(&["3 ranks", "parallel.sp"]);

    let ran = lasp(&["doctor"]).succeeds();
    assert!(ran.out.contains("libtorch") && ran.out.contains("2.11.0"), "{}", ran.out);
    let json: serde_json::Value = serde_json::from_str(&lasp(&["doctor", "--json"]).succeeds().out).unwrap();
    assert!(json["machine"]["detail"]["cores"].as_u64().unwrap() >= 1);
}

#[test]
fn a_corpus_is_prepared_and_shown() {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in [("a.py", "def a():\n    return 1\n"), ("b.py", "b = 2\n"), ("c.txt", "no")] {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let (from, out) = (folder.path().to_str().unwrap(), folder.path().join("corpus.bin"));
    let out = out.to_str().unwrap();
    let ran = lasp(&["data", "prepare", from, "--glob", "*.py", "--out", out]).succeeds();
    assert!(ran.out.contains("2 documents, 30 tokens, from 2 files"), "{}", ran.out);
    let ran = lasp(&["data", "show", out]).succeeds();
    assert!(ran.out.contains("2 documents, 30 tokens") && ran.out.contains("document 0"), "{}", ran.out);
    lasp(&["data", "prepare", from, "--glob", "*.rs", "--out", out]).fails_with(&["no documents", "*.rs"]);
    lasp(&["data", "show", from]).fails_with(&[from]);
}

fn train(folder: &Path, ranks: Ranks, args: &[&str]) -> Ran {
    run(command(ranks).current_dir(folder).args(["train", "tiny.toml"]).args(args))
}

/// With ranks as threads and as processes: a trace a rank, and a line a kind of layer.
#[test]
fn a_trace_comes_with_a_summary() {
    let (folder, _) = tiny();
    let mut ways = vec![(Ranks::Threads(2), "threads", vec!["--ranks", "2"])];
    if mpi() {
        ways.push((Ranks::Mpi(2), "processes", vec![]));
    }
    for (ranks, name, args) in ways {
        let settings = ["--trace", "--run-dir", name, "--set", "train.steps=4"];
        let ran = train(folder.path(), ranks, &[&settings, &args[..]].concat()).succeeds();
        let lines: Vec<&str> = ran.out.lines().filter(|line| line.contains("layers: exposed")).collect();
        assert!(!lines.is_empty(), "{}", ran.out);
        for line in lines {
            let numbers = line.split(' ').filter_map(|word| word.parse::<f64>().ok()).count();
            assert_eq!(numbers, 2, "{line}");
        }
        for rank in 0..2 {
            let text = std::fs::read_to_string(folder.path().join(name).join(format!("trace-{rank}.json"))).unwrap();
            let trace: serde_json::Value = serde_json::from_str(&text).unwrap();
            let sorts = |sort: &str| trace["traceEvents"].as_array().unwrap().iter().any(|e| e["cat"] == sort);
            assert!(sorts("compute") && sorts("communication"), "{name}, rank {rank}");
            assert!(sorts("cpu_op") || matches!(ranks, Ranks::Threads(_)), "{name}, rank {rank}");
        }
    }
}

#[test]
fn runs_are_numbered_resumed_and_sampled() {
    let (folder, _) = tiny();
    let at = |name: &str| folder.path().join("runs").join(name).join("metrics.jsonl");
    train(folder.path(), Ranks::Threads(2), &["--ranks", "2"]).succeeds();
    assert!(at("tiny").exists());
    train(folder.path(), Ranks::Threads(1), &["--set", "train.dtype=bf16"]).succeeds();
    assert!(at("tiny-2").exists());
    let ran = train(folder.path(), Ranks::Threads(1), &["--run-dir", "runs/tiny"]);
    ran.fails_with(&["runs/tiny", "--resume", "--run-dir"]);
    train(folder.path(), Ranks::Threads(1), &["--resume", "--run-dir", "runs/tiny", "--set", "train.steps=5"])
        .succeeds();
    assert_eq!(std::fs::read_to_string(at("tiny")).unwrap().lines().count(), 5);
    train(folder.path(), Ranks::Threads(1), &["--resume", "--set", "train.dtype=bf16", "--set", "train.steps=4"])
        .succeeds();
    assert_eq!(std::fs::read_to_string(at("tiny-2")).unwrap().lines().count(), 4);
    train(folder.path(), Ranks::Threads(1), &["--resume", "--run-dir", "runs/none"])
        .fails_with(&["runs/none", "no checkpoint"]);
    if mpi() {
        train(folder.path(), Ranks::Mpi(2), &[]).succeeds();
        assert!(at("tiny-3").exists());
    }

    let run_dir = folder.path().join("runs/tiny");
    let run_dir = run_dir.to_str().unwrap();
    let generate = |seed: &str| {
        run(Command::new(PROGRAM).args(["generate", run_dir, "--prompt", "-x", "--tokens", "5", "--seed", seed]))
            .succeeds()
            .out
    };
    assert!(generate("0").starts_with("-x"));
    assert_eq!(generate("0"), generate("0"));
    lasp(&["generate", "nowhere", "--prompt", "x"]).fails_with(&["nowhere"]);
}

/// Loss of every step, as the run folder has it.
fn losses(run_dir: &Path) -> Vec<f64> {
    let text = std::fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap();
    let loss = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64().unwrap();
    text.lines().map(loss).collect()
}

/// Training is a function of (config, seed): threads or processes, one layout or the other, only round differently.
#[test]
fn losses_are_those_of_one_rank() {
    let (folder, _) = tiny();
    let train = |name: &str, ranks: Ranks, more: &[&str]| {
        let run_dir = folder.path().join(name);
        let mut args =
            vec!["--run-dir", run_dir.to_str().unwrap(), "--set", "train.dtype=f64", "--set", "train.steps=20"];
        args.extend(more);
        self::train(folder.path(), ranks, &args).succeeds();
        losses(&run_dir)
    };
    let alone = train("alone", Ranks::Threads(1), &[]);
    assert_eq!(alone.len(), 20);
    let mut others = vec![train("threads", Ranks::Threads(3), &["--ranks", "3"])];
    if mpi() {
        others.push(train("processes", Ranks::Mpi(2), &[]));
        others.push(train("zigzag", Ranks::Mpi(4), &["--set", "parallel.layout=zigzag"]));
    }
    let args = ["train", "tiny.toml", "--run-dir", "tcp", "--set", "train.dtype=f64", "--set", "train.steps=20"];
    torchrun(folder.path(), 2, &args).into_iter().for_each(|ran| drop(ran.succeeds()));
    others.push(losses(&folder.path().join("tcp")));
    for losses in &others {
        let worst = losses.iter().zip(&alone).map(|(a, b)| ((a - b) / b).abs()).fold(0.0, f64::max);
        assert!(losses.len() == 20 && worst <= 1e-9, "losses differ by {worst:.1e}");
    }
}
