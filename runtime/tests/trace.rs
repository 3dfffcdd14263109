//! `lasp train --trace` on two ranks: one file a rank, with what was computed and what was sent on one clock.

use std::path::Path;

use collectives::local;
use runtime::config::Config;
use runtime::train::{self, Options};
use serde_json::Value;

fn traced(folder: &Path) -> Vec<Vec<Value>> {
    let text = r#"
        model = { dim = 32, layers = 4, heads = 4, kv_heads = 2, pattern = "LN" }
        train = { seq_len = 512, batch = 1, steps = 5 }
        data = { kind = "random", documents = false, validation_fraction = 0.0 }
        checkpoint = { keep = 0 }
    "#;
    let mut config = Config::from_toml_str(text, "test", &[]).unwrap();
    config.resolve_ranks(2).unwrap();
    tch::set_num_threads(1);
    let options = Options { trace: true, ..Options::default() };
    local::run(2, |world| train::run(world, config.clone(), folder, options)).unwrap();
    let read = |rank: usize| {
        let text = std::fs::read_to_string(folder.join(format!("trace-{rank}.json"))).unwrap();
        let trace: Value = serde_json::from_str(&text).unwrap();
        trace["traceEvents"].as_array().unwrap().clone()
    };
    (0..2).map(read).collect()
}

/// Start and end in microseconds.
fn times(event: &Value) -> (f64, f64) {
    let from = event["ts"].as_f64().unwrap();
    (from, from + event["dur"].as_f64().unwrap())
}

fn of<'a>(events: &'a [Value], sort: &str) -> Vec<&'a Value> {
    events.iter().filter(|event| event["cat"] == sort).collect()
}

#[test]
fn computation_and_communication_share_a_clock() {
    let folder = tempfile::tempdir().unwrap();
    let ranks = traced(folder.path());
    for (rank, events) in ranks.iter().enumerate() {
        let lanes: Vec<&str> = (events.iter())
            .filter(|event| event["name"] == "thread_name")
            .filter_map(|event| event["args"]["name"].as_str())
            .collect();
        assert!(["steps", "compute", "communication"].iter().all(|lane| lanes.contains(lane)), "{rank}: {lanes:?}");
        let steps: Vec<(f64, f64)> = of(events, "steps").into_iter().map(times).collect();
        assert_eq!(steps.len(), 2);
        let inside = |(from, to): (f64, f64)| steps.iter().any(|step| step.0 <= from && to <= step.1);

        let gathers: Vec<&Value> = (of(events, "communication").into_iter())
            .filter(|event| event["name"] == "all_gather" && event["args"]["group"] == "sp")
            .collect();
        let at = |place: &str| gathers.iter().filter(|event| event["args"]["place"] == place).count();
        // Two linear layers, two steps.
        assert_eq!((at("linear layer, forward"), at("linear layer, backward"), gathers.len()), (4, 4, 8));
        // A state of 4 heads of 8 x 8 in f32.
        assert!(gathers.iter().all(|event| event["args"]["bytes_sent"] == 4 * 8 * 8 * 4));
        assert!(gathers.iter().all(|event| inside(times(event))), "{rank}: {steps:?} {gathers:?}");
        let intra: Vec<&Value> = of(events, "compute").into_iter().filter(|e| e["name"] == "intra_rank").collect();
        assert!(intra.len() == 4 && intra.iter().all(|event| inside(times(event))), "{rank}: {intra:?}");
    }

    // One of the two threads was profiled, and its operations lie in the steps.
    let profiled: Vec<&Vec<Value>> = ranks.iter().filter(|events| !of(events, "cpu_op").is_empty()).collect();
    assert_eq!(profiled.len(), 1);
    let bounds = |events: Vec<&Value>| {
        let times: Vec<(f64, f64)> = events.into_iter().map(times).collect();
        (times.iter().map(|t| t.0).fold(f64::MAX, f64::min), times.iter().map(|t| t.1).fold(f64::MIN, f64::max))
    };
    let (steps, ops) = (bounds(of(profiled[0], "steps")), bounds(of(profiled[0], "cpu_op")));
    const NEAR: f64 = 2e3;
    assert!(steps.0 - NEAR <= ops.0 && ops.1 <= steps.1 + NEAR, "{steps:?} {ops:?}");
    assert!(ops.1 - ops.0 > 0.5 * (steps.1 - steps.0), "{steps:?} {ops:?}");
}
