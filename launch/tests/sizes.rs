//! Sizes that fit nothing, by every method: more ranks than tokens, documents shorter than the ranks are many, nodes and
//! heads that the ranks do not divide. `lasp train` and `lasp compare` give the right results or say what is wrong, and end.
//! (`attend.rs` has the same for `lasp attend`.)

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{PROGRAM, Ran, Ranks, command, mpi, run_within};
use runtime::data::{PrepareOptions, prepare};
use runtime::metrics;
use runtime::sequence::method;
use serde_json::Value;

/// Each takes less than a second on an idle machine.
const LIMIT: Duration = Duration::from_secs(180);

/// Documents of 1 to 4 tokens, and a model with a layer of each kind.
fn prepared(folder: &Path) -> String {
    let texts = folder.join("texts");
    std::fs::create_dir_all(&texts).unwrap();
    for i in 0..60u8 {
        let text = String::from(char::from(b'A' + i)).repeat(1 + usize::from(i % 4));
        std::fs::write(texts.join(i.to_string()), text).unwrap();
    }
    let corpus = folder.join("corpus.bin");
    prepare(&[texts], None, &corpus, &PrepareOptions::default(), false).unwrap();
    let path = folder.join("short.toml");
    let text = format!(
        "[model]\ndim = 24\nlayers = 2\nheads = 6\nkv_heads = 2\npattern = \"LN\"\nchunk = 16\n\
         [train]\nsteps = 2\nbatch = 2\nvalidate_sequences = 2\ndtype = \"f64\"\n\
         [data]\npath = {corpus:?}\nvalidation_fraction = 0.3\n"
    );
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

fn train(config: &str, run_dir: &Path, ranks: Ranks, settings: &[&str]) -> Ran {
    let mut command = command(ranks);
    command.args(["train", config, "--run-dir"]).arg(run_dir);
    if let Ranks::Threads(n) = ranks {
        command.args(["--ranks", &n.to_string()]);
    }
    run_within(LIMIT, command.args(settings.iter().flat_map(|setting| ["--set", setting])))
}

/// Losses and norms of gradients.
fn losses(config: &str, ranks: Ranks, settings: &[&str]) -> Vec<f64> {
    let folder = tempfile::tempdir().unwrap();
    train(config, folder.path(), ranks, settings).succeeds();
    let steps = metrics::read(folder.path()).unwrap();
    steps.iter().flat_map(|step| [Some(step.loss), Some(step.grad_norm), step.val_loss]).flatten().collect()
}

/// Every method, with the setting that chooses it and a decay that it can have.
fn methods() -> Vec<(&'static str, String, &'static str)> {
    let with = |key: &str, name: &'static str, decay| (name, format!("parallel.{key}={name}"), decay);
    let scans = method::SCANS.iter().copied().chain(["lasp2:truncate", "hierarchical:node=2", "hierarchical:node=3"]);
    let scans = scans.map(|name| with("linear_method", name, "model.decay=channel"));
    let products = method::LEFT_PRODUCTS.iter().map(|name| with("linear_method", name, "model.decay=lightning"));
    let attentions = method::ATTENTIONS.iter().map(|name| with("softmax_method", name, "model.decay=lightning"));
    scans.chain(products).chain(attentions).collect()
}

#[test]
fn training_with_more_ranks_than_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let config = prepared(folder.path());
    // Of one rank, by settings.
    let mut alone = BTreeMap::new();
    for (i, (name, method, decay)) in methods().into_iter().enumerate() {
        // Fewer tokens than ranks, or than the segments of a zigzag.
        let (layout, tokens) =
            [("parallel.layout=contiguous", "train.seq_len=3"), ("parallel.layout=zigzag", "train.seq_len=7")][i % 2];
        let expected =
            alone.entry((decay, tokens)).or_insert_with(|| losses(&config, Ranks::Threads(1), &[decay, tokens]));
        assert_eq!(expected.len(), 5, "{expected:?}");
        let ranks = if name == "ulysses" { 6 } else { 5 };
        let mut launched = vec![Ranks::Threads(ranks)];
        if ["hierarchical:node=2", "ring"].contains(&name) && mpi() {
            launched.push(Ranks::Mpi(ranks));
        }
        for ranks in launched {
            let ours = losses(&config, ranks, &[decay, tokens, layout, &method]);
            let error = ours.iter().zip(&*expected).map(|(a, b)| ((a - b) / b).abs()).fold(0.0, f64::max);
            let fits = ours.len() == expected.len() && error <= 1e-9;
            assert!(fits, "{name}, {layout}, {tokens}, {ranks:?}: losses differ by {error:.1e}: {ours:?} {expected:?}");
        }
    }
}

#[test]
fn training_says_which_sizes_do_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    let config = prepared(folder.path());
    let run_dir = folder.path().join("run");
    let ulysses = ["parallel.softmax_method=ulysses", "parallel.sp=5", "train.seq_len=3"];
    let words = ["ulysses needs the sp degree to divide the heads: 6 heads, sp = 5 (parallel.sp)", "one of 1, 2, 3, 6"];
    train(&config, &run_dir, Ranks::Threads(5), &ulysses).fails_with(&words);
    if mpi() {
        train(&config, &run_dir, Ranks::Mpi(5), &ulysses).fails_with(&words);
    }
    train(&config, &run_dir, Ranks::Threads(2), &["parallel.linear_method=hierarchical:node=0"])
        .fails_with(&["parallel.linear_method", "hierarchical:node=N with a whole number N of at least 1"]);
    assert!(!run_dir.exists());
}

#[test]
fn comparing_with_more_ranks_than_tokens() {
    let folder = tempfile::tempdir().unwrap();
    for (mixer, mode, more) in [
        ("linear", "operator", ["--decay", "channel", "--layout", "zigzag"]),
        ("linear", "train", ["--decay", "head", "--layout", "contiguous"]),
        ("softmax", "operator", ["--kv-heads", "2", "--layout", "contiguous"]),
        ("softmax", "train", ["--kv-heads", "1", "--layout", "zigzag"]),
    ] {
        let mut command = Command::new(PROGRAM);
        command.env("OMP_NUM_THREADS", "1").args(["compare", "--mixer", mixer, "--mode", mode, "--ranks", "5"]);
        command.args(["--heads", "6", "--dim", "4", "--seq-lens", "1,3,7", "--rounds", "1"]).args(more);
        run_within(LIMIT, command.arg("--out").arg(folder.path())).succeeds();
        let text = std::fs::read_to_string(folder.path().join("results.jsonl")).unwrap();
        let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let names = if mixer == "linear" { method::LINEAR } else { method::ATTENTIONS };
        for name in names {
            let of: Vec<&Value> = rows.iter().filter(|row| label(row) == *name).collect();
            assert!(of.len() >= 3, "{mixer} {mode}: {} rows of {name}", of.len());
            for row in of {
                let skipped = row["skipped"].as_str();
                let reason = match *name {
                    "ulysses" => Some("ulysses needs the sp degree to divide the heads: 6 heads, sp = 5"),
                    _ if name.ends_with("left_product") && more[1] == "channel" => Some("with a decay per channel"),
                    _ => None,
                };
                match reason {
                    Some(reason) => assert!(skipped.is_some_and(|skipped| skipped.contains(reason)), "{row}"),
                    None => assert!(skipped.is_none() && row["step"]["median_ms"].as_f64() > Some(0.0), "{row}"),
                }
            }
        }
    }
}

/// A method's name without its layout.
fn label(row: &Value) -> &str {
    row["method"].as_str().and_then(|label| label.split(' ').next()).unwrap_or_default()
}
