//! The pictures of the README: SVG files in docs/figures, which follow the reader's light or dark theme.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use runtime::report::chart::{Axis, Chart, Mark, Scale, Series};
use serde_json::Value;

use crate::table::lines;

const FOLDER: &str = "docs/figures";
const CLASSES: [&str; 4] = ["a", "b", "c", "d"];
const COLOURS: &str = ".a { color: #2563eb; } .b { color: #dd6b10; } .c { color: #0f8a6d; } .d { color: #7c4ddb; }\n\
    @media (prefers-color-scheme: dark) { .a { color: #6ea0ff; } .b { color: #ff9f4a; } .c { color: #45c9a5; } .d { color: #b197fc; } }\n";

pub fn write(run: &Path) -> Result<()> {
    fs::create_dir_all(FOLDER).with_context(|| format!("cannot create {FOLDER}; start in the project's folder"))?;
    for (name, chart) in [("network", network(run)?), ("quickstart", quickstart(run)?)] {
        if let Some(chart) = chart {
            let path = Path::new(FOLDER).join(format!("{name}.svg"));
            fs::write(&path, chart.picture(COLOURS)).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(())
}

fn network(run: &Path) -> Result<Option<Chart>> {
    let Some(rows) = lines(run, "network/results.jsonl")? else { return Ok(None) };
    let point = |row: &Value| Some((row["ranks"].as_f64()?, row["step"]["median_ms"].as_f64()?));
    let mut series: Vec<Series> = Vec::new();
    for row in &rows {
        let (Some(method), Some(point)) = (row["method"].as_str(), point(row)) else { continue };
        match series.iter_mut().find(|series| series.name == method) {
            Some(series) => series.points.push(point),
            None => series.push(Series {
                name: method.to_owned().into(),
                class: CLASSES[series.len() % CLASSES.len()],
                mark: Mark::Dots,
                points: vec![point],
            }),
        }
    }
    Ok(Some(Chart {
        title: "One step of linear attention on an emulated network".into(),
        note: "".into(),
        x: Axis { title: "ranks".into(), name: "ranks", scale: Scale::Log, format: |ranks| format!("{ranks:.0}") },
        y: Axis { title: "ms".into(), name: "ms", scale: Scale::FromZero, format: |ms| format!("{ms:.0}") },
        width: 640.0,
        height: 300.0,
        series,
    }))
}

fn quickstart(run: &Path) -> Result<Option<Chart>> {
    let Some(steps) = lines(run, "quickstart/metrics.jsonl")? else { return Ok(None) };
    let points = |of: &str| -> Vec<(f64, f64)> {
        steps.iter().filter_map(|step| Some((step["tokens"].as_f64()? / 1e6, step[of].as_f64()?))).collect()
    };
    let one = |name: &'static str, class, mark, of| Series { name: name.into(), class, mark, points: points(of) };
    Ok(Some(Chart {
        title: "The quickstart: loss in nats a byte".into(),
        note: "".into(),
        x: Axis { title: "million tokens".into(), name: "tokens", scale: Scale::Linear, format: |m| format!("{m:.1}") },
        y: Axis { title: "loss".into(), name: "loss", scale: Scale::Linear, format: |loss| format!("{loss:.1}") },
        width: 640.0,
        height: 260.0,
        series: vec![one("training", "a", Mark::Faint, "loss"), one("validation", "b", Mark::Dots, "val_loss")],
    }))
}
