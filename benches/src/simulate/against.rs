//! The cost model held against ourselves: what `lasp compare` measured of operators on ranks that share cores, beside what the
//! model says of the same (`host`). Nothing is fitted, and no row is left out but those that could not run.

use std::fmt::Write;

use collectives::local::Network;
use runtime::config::Config;
use serde::{Deserialize, Serialize};

use super::host::{self, Host};
use super::{Error, Machine, Method, Result};
use crate::compare::{Mixer, Mode, Row};

/// A row of `results.jsonl`, and the conditions that it repeats.
#[derive(Debug, Deserialize)]
struct Line {
    #[serde(flatten)]
    row: Row,
    network: Option<String>,
    options: Sizes,
}

/// Of the tensors, as `lasp compare` writes them.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Sizes {
    heads: i64,
    kv_heads: i64,
    dim: i64,
    chunk: i64,
    decay: String,
    dtype: String,
}

/// One row; times in milliseconds, medians, of forward, of backward and of both.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Compared {
    pub mixer: Mixer,
    pub method: String,
    pub ranks: usize,
    pub tokens: i64,
    pub network: Option<String>,
    pub sizes: Sizes,
    pub measured_ms: [f64; 3],
    pub predicted_ms: [f64; 3],
    /// (predicted - measured) / measured, of both passes together.
    pub error: f64,
}

/// Predictions of what the lines of a `results.jsonl` say was measured in operator mode. Rows that were measured several times
/// become one, of the medians.
pub fn against(machine: &Machine, results: &str) -> Result<Vec<Compared>> {
    let wrong = |message: String| Error::Against { message };
    let host = machine.host.as_ref().ok_or_else(|| {
        wrong(format!("machine {} has no host: expected one that lasp calibrate wrote (--machine)", machine.name))
    })?;
    let mut compared = Vec::new();
    for (number, text) in results.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()) {
        let line: Line = serde_json::from_str(text).map_err(|e| wrong(format!("line {}: {e}", number + 1)))?;
        if line.row.mode != Mode::Operator {
            return Err(wrong(format!("line {}: found mode {}, expected operator", number + 1, line.row.mode.name())));
        }
        if line.options.dtype != "f32" {
            return Err(wrong(format!("line {}: found dtype {}, expected f32", number + 1, line.options.dtype)));
        }
        compared.extend(one(host, line)?);
    }
    Ok(pooled(compared))
}

fn pooled(rows: Vec<Compared>) -> Vec<Compared> {
    let mut all: Vec<Vec<Compared>> = Vec::new();
    for row in rows {
        let same = |of: &&mut Vec<Compared>| {
            let key = |row: &Compared| {
                (row.mixer, row.method.clone(), row.ranks, row.tokens, row.network.clone(), row.sizes.clone())
            };
            key(&of[0]) == key(&row)
        };
        match all.iter_mut().find(same) {
            Some(of) => of.push(row),
            None => all.push(vec![row]),
        }
    }
    let one = |mut of: Vec<Compared>| {
        let measured_ms = [0, 1, 2].map(|i| median(of.iter().map(|row| row.measured_ms[i]).collect()));
        let row = of.swap_remove(0);
        Compared { error: row.predicted_ms[2] / measured_ms[2] - 1.0, measured_ms, ..row }
    };
    let mut rows: Vec<Compared> = all.into_iter().map(one).collect();
    let mixer = |row: &Compared| row.mixer == Mixer::Softmax;
    rows.sort_by(|a, b| {
        a.network.cmp(&b.network).then(mixer(a).cmp(&mixer(b))).then(a.sizes.decay.cmp(&b.sizes.decay))
    });
    rows
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    match numbers.len() {
        0 => 0.0,
        n if n % 2 == 1 => numbers[n / 2],
        n => (numbers[n / 2 - 1] + numbers[n / 2]) / 2.0,
    }
}

fn one(host: &Host, line: Line) -> Result<Option<Compared>> {
    let Line { row, network, options } = line;
    let Some(measured) = &row.measured else { return Ok(None) };
    let (Some(forward), Some(backward)) = (measured.forward, measured.backward) else { return Ok(None) };
    let emulated: Option<Network> = network
        .as_deref()
        .map(str::parse)
        .transpose()
        .map_err(|e: collectives::Error| Error::Against { message: e.to_string() })?;
    let text = format!(
        "[model]\nheads = {}\nkv_heads = {}\ndim = {}\nchunk = {}\ndecay = {:?}\n",
        options.heads,
        options.kv_heads,
        options.heads * options.dim,
        options.chunk,
        options.decay
    );
    let config = Config::from_toml_str(&text, "the sizes of a measured row", &[])?;
    let name = row.method.replace(" (quadratic)", "");
    let method = Method::parse(&name)?;
    let softmax = row.mixer == Mixer::Softmax;
    let seconds = host::operator(host, emulated, &config, &method, softmax, row.ranks, row.tokens as usize)?;
    let [f, b] = seconds.map(|seconds| 1e3 * seconds);
    let step = measured.step.median_ms;
    Ok(Some(Compared {
        mixer: row.mixer,
        method: row.method,
        ranks: row.ranks,
        tokens: row.tokens,
        network,
        sizes: options,
        measured_ms: [forward.median_ms, backward.median_ms, step],
        predicted_ms: [f, b, f + b],
        error: (f + b) / step - 1.0,
    }))
}

/// The median size of the errors, and the largest.
pub fn errors(rows: &[Compared]) -> [f64; 2] {
    let errors: Vec<f64> = rows.iter().map(|row| row.error.abs()).collect();
    [median(errors.clone()), errors.into_iter().fold(0.0, f64::max)]
}

/// The head of the section that [`markdown`] writes.
pub const HEADING: &str = "## Measured here, and predicted";

/// The section of docs/cost-model.md.
pub fn markdown(machine: &Machine, rows: &[Compared]) -> String {
    let mut text = format!("{HEADING}\n\n{}\n", include_str!("against.md"));
    let [median, largest] = errors(rows);
    let _ = writeln!(
        text,
        "{} rows: median error **{:.1} %**, largest {:.1} %.\n",
        rows.len(),
        100.0 * median,
        100.0 * largest
    );
    text += "| method | rows | median error | largest |\n|---|---:|---:|---:|\n";
    let mut methods: Vec<&str> = Vec::new();
    for row in rows {
        if !methods.contains(&row.method.as_str()) {
            methods.push(&row.method);
        }
    }
    for method in methods {
        let of: Vec<Compared> = rows.iter().filter(|row| row.method == method).cloned().collect();
        let [median, largest] = errors(&of);
        let _ = writeln!(text, "| `{method}` | {} | {:.1} % | {:.1} % |", of.len(), 100.0 * median, 100.0 * largest);
    }
    if let Some(host) = &machine.host {
        let _ = writeln!(
            text,
            "\nMachine `{}`: {} cores, one alone {:.2} times as fast as among busy ones; a thread wakes after {:.0} us, among busy \
             ones after {:.0}.",
            machine.name, host.cores, host.alone, host.wake_us, host.wake_busy_us
        );
    }
    let conditions = |row: &Compared| (row.network.clone(), row.mixer == Mixer::Softmax, row.sizes.decay.clone());
    for (at, row) in rows.iter().enumerate() {
        if at == 0 || conditions(&rows[at - 1]) != conditions(row) {
            let name = row.network.as_deref().unwrap_or("none, memory of one machine");
            let decay = if row.mixer == Mixer::Linear { format!(", decay {}", row.sizes.decay) } else { String::new() };
            let of: Vec<Compared> = rows.iter().filter(|other| conditions(other) == conditions(row)).cloned().collect();
            let _ = writeln!(
                text,
                "\n{} attention{decay}, network `{name}`: {} rows, median error {:.1} %. Times in ms: forward + backward.\n\n\
                 | method | ranks | tokens | measured | predicted | error |\n|---|---:|---:|---:|---:|---:|",
                if row.mixer == Mixer::Linear { "Linear" } else { "Softmax" },
                of.len(),
                100.0 * errors(&of)[0]
            );
        }
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | {:.1} + {:.1} | {:.1} + {:.1} | {:+.1} % |",
            row.method,
            row.ranks,
            row.tokens,
            row.measured_ms[0],
            row.measured_ms[1],
            row.predicted_ms[0],
            row.predicted_ms[1],
            100.0 * row.error
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELD_OUT: &str = include_str!("../../runs/2026-11-24-epyc-2core/predicted/held-out.jsonl");
    const MEASURED: &str = include_str!("../../runs/2026-11-24-epyc-2core/predicted/results.jsonl");

    #[test]
    fn the_median_error_is_below_10_percent() {
        let rows = against(&Machine::load("epyc-2core").unwrap(), MEASURED).unwrap();
        let [median, largest] = errors(&rows);
        assert!(median < 0.1 && largest < 0.25, "{median} {largest}");
        let [held_out, _] = errors(&against(&Machine::load("epyc-2core").unwrap(), HELD_OUT).unwrap());
        assert!(held_out < 0.1, "{held_out}");
        // Every method, on 1, 2, 4 and 8 ranks, on both networks.
        let mut methods: Vec<&str> = rows.iter().map(|row| row.method.as_str()).collect();
        methods.sort_unstable();
        methods.dedup();
        assert_eq!(methods.len(), 11, "{methods:?}");
        for method in methods {
            let of: Vec<_> = rows.iter().filter(|row| row.method == method).map(|row| row.ranks).collect();
            assert!(
                [1, 2, 4, 8].iter().all(|ranks| of.iter().filter(|r| *r == ranks).count() == 2),
                "{method}: {of:?}"
            );
        }
    }

    #[test]
    fn rows_measured_again_become_one_of_the_medians() {
        let rows = against(&Machine::load("epyc-2core").unwrap(), MEASURED).unwrap();
        assert_eq!(3 * rows.len(), MEASURED.lines().count());
        let found = &rows[0];
        let mut steps: Vec<f64> = MEASURED
            .lines()
            .map(|line| serde_json::from_str::<Line>(line).unwrap())
            .filter(|line| {
                (&line.row.method, line.row.ranks, line.row.tokens) == (&found.method, found.ranks, found.tokens)
                    && line.network == found.network
            })
            .map(|line| line.row.measured.unwrap().step.median_ms)
            .collect();
        steps.sort_by(f64::total_cmp);
        assert_eq!((steps.len(), found.measured_ms[2]), (3, steps[1]));
    }

    #[test]
    fn what_cannot_be_compared_is_an_error() {
        let error =
            |machine: &str, text: &str| against(&Machine::load(machine).unwrap(), text).unwrap_err().to_string();
        assert!(error("h100-dgx", MEASURED).contains("h100-dgx has no host"));
        assert!(error("epyc-2core", "{}").contains("line 1"));
        let line = MEASURED.lines().next().unwrap();
        let layer = error("epyc-2core", &line.replace("\"operator\"", "\"layer\""));
        assert!(layer.contains("found mode layer, expected operator"), "{layer}");
        assert!(error("epyc-2core", &line.replace("\"f32\"", "\"bf16\"")).contains("expected f32"));
    }
}
