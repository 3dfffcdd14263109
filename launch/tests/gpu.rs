//! `train.device` where there is a GPU, and where there is none.

mod common;

use common::lasp;
use kernels::testing::cuda;

const QUICK: [&str; 8] =
    ["--set", "train.steps=2", "--set", "train.seq_len=256", "--set", "checkpoint.keep=0", "--run-dir", "RUN"];

fn train(folder: &std::path::Path, device: &str, more: &[&str]) -> common::Ran {
    let run_dir = folder.join(device).display().to_string();
    let config = format!("{}/../configs/bench.toml", env!("CARGO_MANIFEST_DIR"));
    let device = format!("train.device={device}");
    let mut args = vec!["train", config.as_str(), "--set", device.as_str()];
    args.extend(QUICK.map(|arg| if arg == "RUN" { run_dir.as_str() } else { arg }));
    args.extend(more);
    lasp(&args)
}

#[test]
fn a_gpu_that_is_not_there_is_an_error_and_auto_goes_without() {
    if kernels::cuda::devices() > 0 {
        println!("not tested: there is a GPU");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    train(folder.path(), "cuda", &[]).fails_with(&["lasp doctor"]);
    let ran = train(folder.path(), "auto", &[]).succeeds();
    assert!(ran.out.contains("on the CPU"), "{}", ran.out);
}

#[test]
fn trains_on_a_gpu_and_traces_it() {
    if cuda().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for dtype in ["f32", "bf16"] {
        let name = format!("train.dtype={dtype}");
        let ran = train(&folder.path().join(dtype), "cuda", &["--trace", "--set", &name, "--set", "train.steps=4"]);
        let ran = ran.succeeds();
        assert!(ran.out.contains("NVIDIA") && ran.out.contains("mem "), "{}", ran.out);
        let trace = std::fs::read_to_string(folder.path().join(dtype).join("cuda/trace-0.json")).unwrap();
        assert!(trace.contains("\"kernel\""), "kernels are in the trace");
    }
}
