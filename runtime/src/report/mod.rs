//! The report of a run: `report.html` in the run folder, made from `metrics.jsonl` and `config.toml` alone. One file
//! that needs nothing else: style, script and curves are inside, and it follows the reader's light or dark theme.

pub mod chart;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use chart::{Axis, Chart, Mark, Scale, Series};

use crate::atomic;
use crate::config::Config;
use crate::metrics::{self, StepRecord, format_duration, format_si};

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no report of {}: {source}; expected the folder of a run, with its metrics.jsonl", run.display())]
    Metrics { run: PathBuf, source: metrics::Error },
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

/// Writes `report.html` of the run in `run_dir` and returns its path. A run without `config.toml` has a report without it.
pub fn write(run_dir: &Path) -> Result<PathBuf> {
    let records = metrics::read(run_dir).map_err(|source| Error::Metrics { run: run_dir.to_owned(), source })?;
    let config_path = run_dir.join("config.toml");
    let config = match fs::read_to_string(&config_path) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(source) => {
            return Err(Error::Io { action: "read", path: config_path, source });
        }
    };
    let name = fs::canonicalize(run_dir)
        .ok()
        .and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
        .unwrap_or_else(|| "run".to_owned());
    let path = run_dir.join("report.html");
    let html = page(&name, &records, config.as_deref());
    atomic::replace_bytes(&path, html.as_bytes()).map_err(|source| Error::Io {
        action: "write",
        path: path.clone(),
        source,
    })?;
    Ok(path)
}

fn page(name: &str, records: &[StepRecord], config: Option<&str>) -> String {
    let parsed = config.and_then(|text| Config::from_toml_str(text, "config.toml", &[]).ok());
    let mut html = headline(&figures(records, parsed.as_ref()));
    html += &loss_chart(records).render();
    html += "<section class=\"pair\">\n";
    for chart in small_charts(records) {
        html += &chart.render();
    }
    html += "</section>\n";
    if let Some(text) = config {
        html += &format!(
            "<details><summary>Resolved configuration</summary><pre>{}</pre></details>\n",
            escape(text.trim_end())
        );
    }
    let about = parsed.as_ref().map(about).unwrap_or_default();
    document(&Head { kicker: "Training report", title: name, about: &about, style: "" }, &html)
}

/// What a report says before anything else.
pub struct Head<'a> {
    /// What kind of report it is.
    pub kicker: &'a str,
    pub title: &'a str,
    /// May be empty.
    pub about: &'a str,
    /// Style that the report needs beside that of all reports.
    pub style: &'a str,
}

/// A report as one HTML file; `body` is HTML, the head is text.
pub fn document(head: &Head, body: &str) -> String {
    let Head { kicker, title, about, style } = *head;
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{0} · {1}</title>\n<style>\n{2}{style}</style>\n</head>\n<body>\n<main>\n\
         <header><p class=\"kicker\">{3}</p><h1>{0}</h1>",
        escape(title),
        escape(&kicker.to_lowercase()),
        include_str!("style.css"),
        escape(kicker),
    );
    if !about.is_empty() {
        html += &format!("<p class=\"about\">{}</p>", escape(about));
    }
    html += "</header>\n";
    html += body;
    html += &format!("</main>\n<script>\n{}</script>\n</body>\n</html>\n", include_str!("hover.js"));
    html
}

/// The run in one line.
fn about(config: &Config) -> String {
    let (model, parallel, train) = (&config.model, &config.parallel, &config.train);
    let dtype = format!("{:?}", train.dtype).to_lowercase();
    format!(
        "{} layers ({}), width {}, {} heads · {} × {} tokens a step · sp {} × dp {} · {} and {} · {dtype}",
        model.layers,
        model.pattern,
        model.dim,
        model.heads,
        train.batch,
        train.seq_len,
        parallel.sp,
        parallel.dp,
        parallel.linear_method,
        parallel.softmax_method,
    )
}

/// The row of numbers at the top: what each is, its value, and a note.
pub fn headline(figures: &[(&str, String, String)]) -> String {
    let mut html = "<dl class=\"headline\">\n".to_owned();
    for (label, value, note) in figures {
        let (label, value, note) = (escape(label), escape(value), escape(note));
        html += &format!("<div><dt>{label}</dt><dd>{value}</dd><dd class=\"note\">{note}</dd></div>\n");
    }
    html += "</dl>\n";
    html
}

fn figures(records: &[StepRecord], config: Option<&Config>) -> Vec<(&'static str, String, String)> {
    let none = || ("–".to_owned(), String::new());
    let last = records.last();
    let steps = |step: u64| match config {
        Some(config) => format!("step {step} of {}", config.train.steps),
        None => format!("step {step}"),
    };
    let final_loss = last.map(|record| (format!("{:.4}", record.loss), steps(record.step)));
    let best = records
        .iter()
        .filter_map(|record| Some((record.val_loss.filter(|loss| loss.is_finite())?, record.step)))
        .min_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(loss, step)| (format!("{loss:.4}"), format!("at step {step}")));
    let tokens = last.map(|record| {
        let steps = records.len() as f64;
        (format_si(record.tokens as f64), format!("{} a step", format_si(record.tokens as f64 / steps.max(1.0))))
    });
    let rate = median(records.iter().map(|record| record.tokens_per_s))
        .map(|rate| (format_si(rate), "median of all steps".to_owned()));
    let milliseconds: f64 = records.iter().map(|r| r.step_ms).filter(|ms| ms.is_finite()).sum();
    let time = median(records.iter().map(|record| record.step_ms)).map(|step| {
        let median = if step < 1000.0 { format!("{step:.0} ms") } else { format!("{:.2} s", step / 1000.0) };
        (format_duration(milliseconds / 1000.0), format!("{median} a step"))
    });
    let exposed = median(records.iter().map(|record| record.exposed_comm_pct))
        .map(|percent| (format!("{percent:.1}%"), "median of all steps".to_owned()));
    let entries = [
        ("Final loss", final_loss),
        ("Best validation loss", best),
        ("Tokens", tokens),
        ("Tokens per second", rate),
        ("Training time", time),
        ("Exposed communication", exposed),
    ];
    let figure = |(label, entry): (&'static str, Option<(String, String)>)| {
        let (value, note) = entry.unwrap_or_else(none);
        (label, value, note)
    };
    entries.into_iter().map(figure).collect()
}

fn loss_chart(records: &[StepRecord]) -> Chart {
    let training = points(records, |record| record.loss);
    let smoothed = smooth(&training);
    let validation = records.iter().filter_map(|record| Some((record.step as f64, record.val_loss?))).collect();
    Chart {
        title: "Loss".into(),
        note: "".into(),
        x: steps(),
        y: Axis { title: "loss (nats per token)".into(), name: "loss", scale: Scale::Linear, format: plain },
        width: 1080.0,
        height: 380.0,
        series: vec![
            Series { name: "training, each step".into(), class: "train", mark: Mark::Faint, points: training },
            Series { name: "training, smoothed".into(), class: "train", mark: Mark::Line, points: smoothed },
            Series { name: "validation".into(), class: "validation", mark: Mark::Dots, points: validation },
        ],
    }
}

fn steps() -> Axis {
    Axis { title: "optimizer step".into(), name: "step", scale: Scale::Whole, format: |step| step.to_string() }
}

fn small_charts(records: &[StepRecord]) -> [Chart; 4] {
    let small = |title: &'static str, y: &'static str, class, format, value: fn(&StepRecord) -> f64, noisy| {
        let points = points(records, value);
        let smoothed = smooth(&points);
        let mark = if noisy { Mark::Faint } else { Mark::Line };
        let mut series = vec![Series { name: "each step".into(), class, mark, points }];
        if noisy {
            series.push(Series { name: "smoothed".into(), class, mark: Mark::Line, points: smoothed });
        }
        let y = Axis { title: y.into(), name: y, scale: Scale::FromZero, format };
        Chart { title: title.into(), note: "".into(), x: steps(), y, width: 528.0, height: 240.0, series }
    };
    [
        small("Learning rate", "learning rate", "lr", plain, |r| r.lr, false),
        small("Gradient norm", "norm before clipping", "gradient", plain, |r| r.grad_norm, true),
        small("Throughput", "tokens per second", "rate", compact, |r| r.tokens_per_s, true),
        small("Exposed communication", "share of the time (%)", "comm", plain, |r| r.exposed_comm_pct, true),
    ]
}

fn points(records: &[StepRecord], value: impl Fn(&StepRecord) -> f64) -> Vec<(f64, f64)> {
    records.iter().map(|record| (record.step as f64, value(record))).collect()
}

/// The mean of a window around each point. Towards the start, where curves are steep, the window narrows so that it
/// stays centred; at the end, where they are flat, it keeps what there is before.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let widest = points.len() / 50;
    let mut sums = vec![(0.0, 0.0)];
    let (mut sum, mut count) = (0.0, 0.0);
    for &(_, value) in points {
        if value.is_finite() {
            sum += value;
            count += 1.0;
        }
        sums.push((sum, count));
    }
    let windowed = points.iter().enumerate().map(|(n, &(step, value))| {
        let half = widest.min(n);
        let (before, after) = (sums[n - half], sums[(n + half + 1).min(points.len())]);
        let mean = (after.0 - before.0) / (after.1 - before.1);
        (step, if value.is_finite() { mean } else { value })
    });
    windowed.collect()
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut finite: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    finite.sort_by(f64::total_cmp);
    let middle = finite.len() / 2;
    match finite.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(finite[middle]),
        _ => Some((finite[middle - 1] + finite[middle]) / 2.0),
    }
}

/// As few digits as tell the value.
pub fn plain(value: f64) -> String {
    if value != 0.0 && (value.abs() < 1e-2 || value.abs() >= 1e5) { format!("{value:e}") } else { value.to_string() }
}

/// As `plain`, with a decimal prefix.
pub fn compact(value: f64) -> String {
    match value.abs() {
        large if large >= 1e9 => format!("{}G", value / 1e9),
        large if large >= 1e6 => format!("{}M", value / 1e6),
        large if large >= 1e3 => format!("{}K", value / 1e3),
        _ => plain(value),
    }
}

/// Text made safe for HTML, inside elements and quoted attributes.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smoothing_is_centred_and_skips_gaps() {
        let straight: Vec<(f64, f64)> = (0..500).map(|n| (f64::from(n), f64::from(n))).collect();
        for ((_, found), (_, expected)) in smooth(&straight).into_iter().zip(straight).take(490) {
            assert!((found - expected).abs() < 1e-9);
        }
        let mut gap = vec![(0.0, 1.0); 200];
        gap[100].1 = f64::NAN;
        let smoothed = smooth(&gap);
        assert!(smoothed[100].1.is_nan());
        assert_eq!(smoothed[99].1, 1.0);
        assert!(smooth(&[]).is_empty());
    }

    #[test]
    fn medians() {
        assert_eq!(median([3.0, f64::NAN, 1.0].into_iter()), Some(2.0));
        assert_eq!(median([3.0, 9.0, 1.0].into_iter()), Some(3.0));
        assert_eq!(median(std::iter::empty()), None);
    }
}
