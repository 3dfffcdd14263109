//! `lasp simulate`: its table, its JSON lines, a machine from a file, and what it says when something is wrong.

use std::process::{Command, Output};

use benches::simulate::Machine;
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
fn documents_are_packed_into_sequences() {
    let of = |documents: &str| {
        let of = format!("--gpus 8 --seq-lens 256K --methods lasp2+lasp2h@contiguous{documents}");
        let points = points(&of);
        let number = |key: &str| points[0][key].as_f64().unwrap();
        ["documents", "step_s", "waited_s", "messages"].map(number)
    };
    let [documents, step, waited, messages] = of("");
    assert_eq!(documents, 1.0);
    let packed = of(" --documents 4K");
    assert_eq!(packed[0], 64.0);
    assert!(packed[1] < step && packed[2] < 0.2 * waited, "{packed:?} {step} {waited}");
    // States of the three linear layers do not travel; the softmax layer's two KV heads do, twice, and the sums of their gradients.
    assert_eq!((messages, packed[3]), (3.0 * 2.0 + 6.0, 6.0));
    // One length after the other and again, the last one cut: four times 8K, 16K and 32K, then 8K, 16K and 8K of 32K.
    assert_eq!(of(" --documents 8K..32K")[0], 15.0);
    assert_eq!(of(" --documents 1M"), [documents, step, waited, messages]);
}

#[test]
fn kernels_of_one_kind_are_measured_anew() {
    let preset = include_str!("../../benches/src/simulate/machines/epyc-2core.toml");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("machine.toml");
    std::fs::write(&path, preset).unwrap();
    let calibrate = |kind: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lasp"));
        command.current_dir(&folder).args(["calibrate", "--quick", "--only", kind]).output().unwrap()
    };
    let output = calibrate("copies");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (before, after) =
        (Machine::from_toml(preset, "preset").unwrap(), Machine::load(path.to_str().unwrap()).unwrap());
    let kernels = |machine: &Machine| machine.host.as_ref().unwrap().kernels.clone();
    let measured = ["copy", "add", "join"];
    let mut changed = 0;
    for (old, new) in kernels(&before).into_iter().zip(kernels(&after)) {
        assert_eq!((&old.name, old.threads), (&new.name, new.threads));
        if measured.contains(&old.name.as_str()) && new.at.len() == 2 {
            changed += 1;
        } else {
            assert_eq!(old, new);
        }
    }
    assert!(changed >= measured.len(), "{changed}");
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().next(), preset.lines().next());
    // What is known of the machine otherwise must be there already.
    std::fs::remove_file(&path).unwrap();
    let stderr = String::from_utf8_lossy(&calibrate("copies").stderr).into_owned();
    assert!(stderr.contains("cannot read machine.toml (--out with --only)"), "{stderr}");
}

#[test]
fn a_truncated_scan_says_when_nobody_knows_its_reach() {
    let table = |decay: &str| {
        let set = format!("model.decay={decay}");
        let output = simulate(&[
            "--model",
            "model.toml",
            "--gpus",
            "8",
            "--seq-lens",
            "1M",
            "--methods",
            "lasp2:truncate",
            "--documents",
            "512K,1M",
            "--set",
            &set,
        ]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let note =
        "model.decay = token depends on the data, so nobody can tell beforehand how far back a truncated scan listens";
    assert!(table("token").contains(note) && table("token").contains("at most"), "{}", table("token"));
    assert!(!table("retention").contains("at most"), "{}", table("retention"));
    let nothing_dies = "lasp2:truncate is lasp2 here: model.decay = none";
    assert!(table("none").contains(nothing_dies) && !table("retention").contains(nothing_dies), "{}", table("none"));
    assert!(table("none").contains("- documents of a sequence: 2 in 1024K\n"), "{}", table("none"));
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
        (vec!["--model", "model.toml", "--documents", "4K,none"], "--documents: found `none`"),
        (vec!["--model", "model.toml", "--gpus", "16", "--methods", "ulysses"], "8 heads, 16 GPUs"),
    ] {
        let output = simulate(&arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && stderr.contains(expected), "{arguments:?}: {stderr}");
    }
}
