//! The report of a run, from nothing recorded to a long run. The long one stays in `target/tmp/quickstart`, for looking at.

use std::fs;
use std::path::Path;

use runtime::config::Config;
use runtime::data::RandomSource;
use runtime::metrics::{MetricsLog, StepRecord};
use runtime::report;

/// A plausible run of `steps` steps.
fn simulate(run: &Path, steps: u64) {
    let noise = RandomSource::new(1000, 4 * steps as usize + 4, 1).sequence(0).tokens;
    let noise = |step: u64, k: u64| noise[(4 * step + k) as usize] as f64 / 500.0 - 1.0;
    let mut log = MetricsLog::create(run).unwrap();
    for step in 1..=steps {
        let done = step as f64 / steps as f64;
        let loss = 1.35 + 4.2 * (-14.0 * done).exp() + 0.55 * (-2.5 * done).exp();
        let warm = (step as f64 / (0.05 * steps as f64)).min(1.0);
        log.write(&StepRecord {
            step,
            loss: loss + 0.09 * noise(step, 0),
            grad_norm: 0.3 + 2.0 * (-20.0 * done).exp() + 0.08 * noise(step, 1).abs(),
            lr: 3e-3 * warm * (0.55 + 0.45 * (std::f64::consts::PI * done).cos()),
            tokens: step * 16_384,
            tokens_per_s: 18_200.0 + 900.0 * noise(step, 2) - if step < 3 { 9000.0 } else { 0.0 },
            exposed_comm_pct: 3.1 + 0.8 * noise(step, 3),
            step_ms: 16_384.0 / 18.2,
            val_loss: (step % (steps / 8).max(1) == 0).then_some(loss + 0.07),
            mfu: None,
            peak_bytes: None,
        })
        .unwrap();
    }
}

fn read(run: &Path) -> String {
    fs::read_to_string(report::write(run).unwrap()).unwrap()
}

#[test]
fn a_long_run() {
    let run = Path::new(env!("CARGO_TARGET_TMPDIR")).join("quickstart");
    fs::create_dir_all(&run).unwrap();
    simulate(&run, 400);
    let overrides = ["train.steps=400", "parallel.sp=4", "sample.prompt=</pre><script>alert(1)</script>"];
    let config = Config::from_toml_str("", "c.toml", &overrides.map(str::to_owned)).unwrap();
    fs::write(run.join("config.toml"), config.to_toml().unwrap()).unwrap();
    let html = read(&run);
    for part in ["step 400 of 400", "6.55M", "18.2K", "6m00s", "sp 4 × dp 1", "Best validation loss", "&lt;script&gt;"]
    {
        assert!(html.contains(part), "{part} missing");
    }
    assert!(!html.contains("<script>alert"), "the configuration is escaped");
    assert!(!html.contains("http:") && !html.contains("https:"), "nothing comes from the network");
    assert!(!html.contains("NaN"));
    assert_eq!(html.matches("<svg").count(), 5);
    assert_eq!(html.matches("<circle").count(), 8, "one dot for each validation");
}

#[test]
fn short_and_empty_runs() {
    let folder = tempfile::tempdir().unwrap();
    simulate(folder.path(), 1);
    let html = read(folder.path());
    assert!(html.contains("step 1<") && !html.contains("NaN") && !html.contains("Resolved configuration"));
    MetricsLog::create(folder.path()).unwrap();
    let html = read(folder.path());
    assert_eq!(html.matches("Nothing recorded yet.").count(), 5);
    simulate(folder.path(), 2);
    assert!(!read(folder.path()).contains("NaN"));
}

#[test]
fn a_very_long_run_stays_small() {
    let folder = tempfile::tempdir().unwrap();
    simulate(folder.path(), 50_000);
    assert!(read(folder.path()).len() < 600_000);
}

#[test]
fn a_folder_that_is_no_run_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = report::write(folder.path()).unwrap_err().to_string();
    assert!(error.contains("metrics.jsonl") && error.contains("expected the folder of a run"), "{error}");
}
