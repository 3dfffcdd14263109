//! `lasp simulate`: its table, its JSON lines, a machine from a file, and what it says when something is wrong.

use std::process::{Command, Output};

use serde_json::Value;

const CONFIG: &str =
    "[model]\nvocab = 1024\ndim = 512\nlayers = 4\nheads = 8\npattern = \"LLLN\"\n[train]\ndtype = \"bf16\"\n";

fn simulate(arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("model.toml", CONFIG);
    write("small.toml", "base = \"h100-dgx\"\nname = \"small\"\n[memory]\ncapacity_gb = 4.0\n");
    write("typo.toml", "base = \"h100-dgx\"\n[memory]\ncapacity = 4.0\n");
    let mut command = Command::new(env!("CARGO_BIN_EXE_lasp"));
    command.current_dir(&folder).arg("simulate").args(arguments).output().unwrap()
}

#[track_caller]
fn points(arguments: &str) -> Vec<Value> {
    let arguments: Vec<&str> = ["--model", "model.toml", "--json"].into_iter().chain(arguments.split(' ')).collect();
    let output = simulate(&arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn every_combination_is_a_line() {
    let points = points("--gpus 4..16 --seq-lens 64K,256K --methods lasp2,lasp1+ulysses@zigzag");
    assert_eq!(points.len(), 3 * 2 * 2);
    let at = |method: &str, gpus: u64| {
        points
            .iter()
            .find(|point| point["method"] == method && point["gpus"] == gpus && point["seq_len"] == 65536)
            .unwrap()
    };
    let point = at("lasp2", 8);
    assert!(point["step_s"].as_f64().unwrap() > point["exposed_s"].as_f64().unwrap());
    assert_eq!(point["out_of_memory"], false);
    let refused = at("lasp1+ulysses@zigzag", 16)["refused"].as_str().unwrap();
    assert!(refused.contains("8 heads, 16 GPUs"), "{refused}");
}

#[test]
fn a_machine_may_be_a_file() {
    let points = points("--machine small.toml --gpus 8 --seq-lens 64K,16M --methods lasp2");
    let flags: Vec<bool> = points.iter().map(|point| point["out_of_memory"].as_bool().unwrap()).collect();
    assert_eq!((flags, points[0]["machine"].as_str()), (vec![false, true], Some("small")));
}

#[test]
fn what_is_wrong_is_said() {
    for (arguments, expected) in [
        (vec![], "--model"),
        (vec!["--model", "model.toml", "--machine", "typo.toml"], "unknown field `capacity`"),
        (vec!["--model", "model.toml", "--methods", "lasp3"], "all_scan:blocks=N"),
        (vec!["--model", "model.toml", "--gpus", "8..4"], "--gpus: found `8..4`"),
        (vec!["--model", "model.toml", "--gpus", "16", "--methods", "ulysses"], "8 heads, 16 GPUs"),
    ] {
        let output = simulate(&arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && stderr.contains(expected), "{arguments:?}: {stderr}");
    }
}
