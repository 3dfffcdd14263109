//! The table of the README, between two marks, from the raw results of a run.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

const README: &str = "README.md";
const BEGIN: &str = "<!-- figures write: begin -->\n";
const END: &str = "<!-- figures write: end -->";

/// Puts the table into the README of the working directory.
pub fn write(run: &Path) -> Result<()> {
    let text = fs::read_to_string(README).context("cannot read README.md; start in the project's folder")?;
    let marks = text.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let (before, after) = marks.with_context(|| format!("{README} has no {BEGIN:?} with {END:?} after it"))?;
    fs::write(README, format!("{before}{BEGIN}{}{END}{after}", table(run)?)).context("cannot write README.md")
}

fn table(run: &Path) -> Result<String> {
    let rows = [quickstart, chunkwise, scaling, flat, overlap, network, links];
    let mut text = "| | |\n|---|---|\n".to_owned();
    for row in rows {
        if let Some((what, figure)) = row(run)? {
            text += &format!("| {what} | {figure} |\n");
        }
    }
    Ok(text)
}

type Row = Result<Option<(String, String)>>;

/// The JSON lines of a result; none if it was not measured.
pub fn lines(run: &Path, file: &str) -> Result<Option<Vec<Value>>> {
    let path = run.join(file);
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let parsed = text.lines().map(serde_json::from_str).collect::<serde_json::Result<Vec<Value>>>();
    Ok(Some(parsed.with_context(|| path.display().to_string())?))
}

fn number(value: &Value, path: &str) -> Result<f64> {
    let found = path.split('.').fold(value, |value, key| &value[key]);
    found.as_f64().with_context(|| format!("no number {path} in {value}"))
}

fn quickstart(run: &Path) -> Row {
    let Some(steps) = lines(run, "quickstart/metrics.jsonl")? else { return Ok(None) };
    let last = steps.iter().rev().find(|step| step["val_loss"].is_number()).context("no validation loss")?;
    let ms = steps.iter().map(|step| number(step, "step_ms")).sum::<Result<f64>>()?;
    let figure = format!(
        "validation loss {:.2} nats a byte after {:.1} minutes of steps, {:.2} M tokens (untrained: 5.5)",
        number(last, "val_loss")?,
        ms / 60e3,
        number(last, "tokens")? / 1e6
    );
    Ok(Some(("quickstart, `make train`".into(), figure)))
}

fn chunkwise(run: &Path) -> Row {
    let Some(rows) = lines(run, "chunkwise.jsonl")? else { return Ok(None) };
    let mut figures = Vec::new();
    for row in &rows {
        let decay = match row["decay"].as_str() {
            Some("none") => "without decay".to_owned(),
            decay => format!("per {}", decay.unwrap_or("?")),
        };
        figures.push(format!("{:.2}x {decay}", number(row, "ratio")?));
    }
    let first = rows.first().context("no rows")?;
    let what = format!(
        "chunkwise linear attention, f32, T {}, H {}, K = V = {}, forward + backward, over the time of the same operations in \
         batched matrix products",
        first["tokens"], first["heads"], first["dim"]
    );
    Ok(Some((what, figures.join(", "))))
}

fn scaling(run: &Path) -> Row {
    let Some(rows) = lines(run, "scaling.jsonl")? else { return Ok(None) };
    let mut figures = Vec::new();
    for row in rows.iter().skip(1) {
        figures.push(format!("{:.2}x {}", number(row, "ratio")?, row["variant"].as_str().unwrap_or("?")));
    }
    Ok(Some(("training under mpirun, one thread a rank, tokens/s over those at sp = 1".into(), figures.join("; "))))
}

fn flat(run: &Path) -> Row {
    let Some(rows) = lines(run, "flat.jsonl")? else { return Ok(None) };
    let ratios = rows.iter().map(|row| number(row, "ratio")).collect::<Result<Vec<f64>>>()?;
    let (least, most) =
        (ratios.iter().copied().fold(f64::INFINITY, f64::min), ratios.iter().copied().fold(0.0, f64::max));
    let what = "tokens/s from 4K to 64K tokens over those at 4K, pure linear model, sp = 1".into();
    Ok(Some((what, format!("{least:.2}x to {most:.2}x"))))
}

fn overlap(run: &Path) -> Row {
    let Some(rows) = lines(run, "overlap.jsonl")? else { return Ok(None) };
    let last = rows.last().context("no rows")?;
    let what = "LASP-2's step on an emulated network whose AllGather takes as long as the intra-rank work, over the step without \
                communication";
    Ok(Some((what.into(), format!("{:.2}x, median of {} turns", number(last, "median_ratio")?, last["turns"]))))
}

/// Step times over LASP-2's, by ranks.
fn network(run: &Path) -> Row {
    let Some(rows) = lines(run, "network/results.jsonl")? else { return Ok(None) };
    let step = |method: &str, ranks: u64| {
        let row = rows.iter().find(|row| row["method"] == method && row["ranks"] == ranks);
        row.with_context(|| format!("no {method} on {ranks} ranks")).and_then(|row| number(row, "step.median_ms"))
    };
    let mut counts: Vec<u64> = rows.iter().filter_map(|row| row["ranks"].as_u64()).collect();
    counts.dedup();
    let mut methods: Vec<&str> =
        rows.iter().filter_map(|row| row["method"].as_str()).filter(|m| *m != "lasp2").collect();
    methods.sort_unstable();
    methods.dedup();
    let mut figures = Vec::new();
    for method in methods {
        let ratios = counts.iter().map(|&ranks| Ok(format!("{:.2}", step(method, ranks)? / step("lasp2", ranks)?)));
        figures.push(format!("`{method}` {}", ratios.collect::<Result<Vec<_>>>()?.join(" / ")));
    }
    let counts = counts.iter().map(u64::to_string).collect::<Vec<_>>().join(" / ");
    let network = rows.first().and_then(|row| row["network"].as_str()).unwrap_or("?");
    let what =
        format!("step time over LASP-2's on {counts} ranks of an emulated network (`{network}`), short sequences");
    Ok(Some((what, figures.join("; "))))
}

fn links(run: &Path) -> Row {
    let Some(rows) = lines(run, "links.jsonl")? else { return Ok(None) };
    let row = rows.iter().find(|row| row["op"] == "send_recv").context("no send_recv")?;
    let what = "a 1 KiB message over an emulated link of 50 us, two threads on an idle machine".into();
    Ok(Some((what, format!("{:.0} us, the hand-over between threads included", number(row, "time_us")?))))
}
