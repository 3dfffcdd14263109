//! The log of a run: written, cut off, continued, read.

use std::fs;

use proptest::prelude::*;
use runtime::metrics::{Error, MetricsLog, StepRecord, read};

fn record(step: u64) -> StepRecord {
    StepRecord {
        step,
        loss: 2.0 + 0.1 / step as f64,
        grad_norm: 0.3,
        lr: 3e-3,
        tokens: step * 4096,
        tokens_per_s: 12_345.678,
        exposed_comm_pct: 1.25,
        step_ms: 98.7,
        val_loss: step.is_multiple_of(2).then_some(2.5),
        mfu: None,
        peak_bytes: step.is_multiple_of(2).then_some(1 << 40),
    }
}

#[test]
fn written_and_read() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = MetricsLog::create(folder.path()).unwrap();
    for step in 1..=5 {
        log.write(&record(step)).unwrap();
        assert_eq!(read(folder.path()).unwrap().len() as u64, step, "visible at once");
    }
    let records: Vec<StepRecord> = (1..=5).map(record).collect();
    assert_eq!(read(folder.path()).unwrap(), records);
    let text = fs::read_to_string(folder.path().join("metrics.jsonl")).unwrap();
    assert_eq!(text.matches("val_loss").count(), 2);
}

#[test]
fn a_torn_last_line_is_left_out_and_a_torn_middle_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics.jsonl");
    let mut log = MetricsLog::create(folder.path()).unwrap();
    (1..=3).for_each(|step| log.write(&record(step)).unwrap());
    let text = fs::read_to_string(&path).unwrap();
    for cut in 1..80 {
        fs::write(&path, &text[..text.len() - cut]).unwrap();
        let records = read(folder.path()).unwrap();
        assert!(records.len() == 2 || (cut == 1 && records.len() == 3));
    }
    let mut log = MetricsLog::append(folder.path(), 3).unwrap();
    log.write(&record(3)).unwrap();
    assert_eq!(read(folder.path()).unwrap(), [record(1), record(2), record(3)]);

    fs::write(&path, text.replacen("\"step\":2", "\"st", 1)).unwrap();
    let error = read(folder.path()).unwrap_err();
    assert!(matches!(error, Error::Record { line: 2, .. }), "{error}");
}

#[test]
fn resuming_drops_later_steps() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = MetricsLog::create(folder.path()).unwrap();
    (1..=6).for_each(|step| log.write(&record(step)).unwrap());
    let mut log = MetricsLog::append(folder.path(), 4).unwrap();
    log.write(&record(5)).unwrap();
    let steps: Vec<u64> = read(folder.path()).unwrap().iter().map(|r| r.step).collect();
    assert_eq!(steps, [1, 2, 3, 4, 5]);

    let fresh = tempfile::tempdir().unwrap();
    MetricsLog::append(fresh.path(), 4).unwrap().write(&record(5)).unwrap();
    assert_eq!(read(fresh.path()).unwrap(), [record(5)]);
    let missing = read(&fresh.path().join("gone")).unwrap_err().to_string();
    assert!(missing.contains("gone/metrics.jsonl"), "{missing}");
}

#[test]
fn what_is_not_finite_comes_back_as_nan() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = MetricsLog::create(folder.path()).unwrap();
    let diverged = StepRecord { loss: f64::NAN, grad_norm: f64::INFINITY, ..record(1) };
    log.write(&diverged).unwrap();
    let back = &read(folder.path()).unwrap()[0];
    assert!(back.loss.is_nan() && back.grad_norm.is_nan());
    assert_eq!(back.lr, diverged.lr);
}

proptest! {
    #[test]
    fn numbers_come_back_exactly(loss in -1e300f64..1e300, lr in 0.0f64..1.0, val_loss in prop::option::of(0.0f64..20.0)) {
        let folder = tempfile::tempdir().unwrap();
        let written = StepRecord { loss, lr, val_loss, ..record(1) };
        MetricsLog::create(folder.path()).unwrap().write(&written).unwrap();
        prop_assert_eq!(read(folder.path()).unwrap(), [written]);
    }
}
