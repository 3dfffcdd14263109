//! The cost model held against ourselves: what `lasp compare` measured on ranks that share cores, beside what the model says of the same (`host`). Nothing is fitted, and no row is left out but those that could not run.

use std::fmt::Write;

use runtime::config::{Config, LayerKind, ParallelConfig};
use serde::{Deserialize, Serialize};

use super::host::Host;
use super::{Error, Machine, Method, Result, Workload, layer_seconds, operator_on_host, step_seconds};
use crate::compare::{Mixer, Mode, Row};

/// A row of `results.jsonl`, and the conditions that it repeats.
#[derive(Debug, Deserialize)]
struct Line {
    #[serde(flatten)]
    row: Row,
    network: Option<String>,
    options: Sizes,
    /// Of layers and training steps.
    config: Option<Config>,
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

/// One row; times in milliseconds, medians, of forward, of backward and of both; or of a training step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Compared {
    pub mode: Mode,
    pub mixer: Mixer,
    pub method: String,
    pub ranks: usize,
    pub tokens: i64,
    pub network: Option<String>,
    pub sizes: Sizes,
    #[serde(skip)]
    pub config: Option<Config>,
    pub measured_ms: Vec<f64>,
    pub predicted_ms: Vec<f64>,
    /// (predicted - measured) / measured, of both passes together, or of the step.
    pub error: f64,
}

impl Compared {
    fn of(&self, measured_ms: Vec<f64>) -> Compared {
        let last = |ms: &[f64]| ms.last().copied().unwrap_or(f64::NAN);
        Compared { error: last(&self.predicted_ms) / last(&measured_ms) - 1.0, measured_ms, ..self.clone() }
    }
}

/// Predictions of what the lines of a `results.jsonl` say was measured. Rows that were measured several times
/// become one, of the medians.
pub fn against(machine: &Machine, results: &str) -> Result<Vec<Compared>> {
    let wrong = |message: String| Error::Against { message };
    if machine.host.is_none() {
        let message =
            format!("machine {} has no host: expected one that lasp calibrate wrote (--machine)", machine.name);
        return Err(wrong(message));
    }
    let mut compared = Vec::new();
    for (number, text) in results.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()) {
        let line: Line = serde_json::from_str(text)
            .map_err(|e| wrong(format!("line {} is not one of a results.jsonl: {e}", number + 1)))?;
        if line.row.mode != Mode::Operator && line.config.is_none() {
            let mode = line.row.mode.name();
            return Err(wrong(format!("line {}: found mode {mode} without config: measure it anew", number + 1)));
        }
        if line.options.dtype != "f32" {
            return Err(wrong(format!("line {}: found dtype {}, expected f32", number + 1, line.options.dtype)));
        }
        compared.extend(one(machine, line)?);
    }
    Ok(pooled(compared))
}

fn pooled(rows: Vec<Compared>) -> Vec<Compared> {
    let mut all: Vec<Vec<Compared>> = Vec::new();
    for row in rows {
        let same = |of: &&mut Vec<Compared>| {
            let key = |row: &Compared| {
                (row.mode, row.mixer, row.method.clone(), row.ranks, row.tokens, row.network.clone(), row.sizes.clone())
            };
            key(&of[0]) == key(&row) && of[0].config == row.config
        };
        match all.iter_mut().find(same) {
            Some(of) => of.push(row),
            None => all.push(vec![row]),
        }
    }
    let one = |of: Vec<Compared>| {
        let at = |i: usize| median(of.iter().map(|row| row.measured_ms[i]).collect());
        of[0].of((0..of[0].measured_ms.len()).map(at).collect())
    };
    let mut rows: Vec<Compared> = all.into_iter().map(one).collect();
    let mixer = |row: &Compared| row.mixer == Mixer::Softmax;
    rows.sort_by(|a, b| {
        let network = |row: &Compared| (row.mode as usize, row.network.clone());
        network(a).cmp(&network(b)).then(mixer(a).cmp(&mixer(b))).then(a.sizes.decay.cmp(&b.sizes.decay))
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

fn one(machine: &Machine, line: Line) -> Result<Option<Compared>> {
    let Line { row, network, options, config } = line;
    let (Some(measured), Some(host)) = (&row.measured, &machine.host) else { return Ok(None) };
    let step = measured.step.median_ms;
    let measured_ms = match (measured.forward, measured.backward) {
        (Some(forward), Some(backward)) => vec![forward.median_ms, backward.median_ms, step],
        _ => vec![step],
    };
    let host = Host { network: network.clone(), ..host.clone() };
    // As a method of the model: what chose it, and that it is quadratic, is said in brackets.
    let name = row.method.replace(" (quadratic)", "").replace("auto (", "").replace(')', "");
    let kind = if row.mixer == Mixer::Softmax { LayerKind::Softmax } else { LayerKind::Linear };
    let predicted_ms = match row.mode {
        Mode::Operator => operator(machine, &host, &options, &name, kind, &row)?,
        Mode::Layer => {
            let config =
                Config { parallel: ParallelConfig { layout: row.layout, ..Default::default() }, ..sure(&config)? };
            let work = Workload::one(&config, row.ranks, row.tokens as usize);
            let [f, b] = layer_seconds(machine, &host, &Method::parse(&name)?, kind, &work)?;
            vec![f, b, f + b]
        }
        Mode::Train => {
            let config = sure(&config)?;
            let other = match kind {
                LayerKind::Linear => &config.parallel.softmax_method,
                LayerKind::Softmax => &config.parallel.linear_method,
            };
            let (named, layout) = name.split_once(' ').unwrap_or((&name, "contiguous"));
            let method = Method::parse(&format!("{named}+{other}@{layout}"))?;
            let work =
                Workload { passes: config.train.batch, ..Workload::one(&config, row.ranks, row.tokens as usize) };
            let machine = Machine { host: Some(host), ..machine.clone() };
            vec![step_seconds(&machine, &method, &work)?]
        }
    };
    let all = Compared {
        mode: row.mode,
        mixer: row.mixer,
        method: row.method,
        ranks: row.ranks,
        tokens: row.tokens,
        network,
        sizes: options,
        config,
        measured_ms: vec![],
        predicted_ms: predicted_ms.into_iter().map(|seconds| 1e3 * seconds).collect(),
        error: 0.0,
    };
    Ok(Some(all.of(measured_ms)))
}

fn sure(config: &Option<Config>) -> Result<Config> {
    config.clone().ok_or_else(|| Error::Against { message: "a row without config".to_owned() })
}

fn operator(
    machine: &Machine,
    host: &Host,
    options: &Sizes,
    name: &str,
    kind: LayerKind,
    row: &Row,
) -> Result<Vec<f64>> {
    let text = format!(
        "[model]\nheads = {}\nkv_heads = {}\ndim = {}\nchunk = {}\ndecay = {:?}\n",
        options.heads,
        options.kv_heads,
        options.heads * options.dim,
        options.chunk,
        options.decay
    );
    let config = Config::from_toml_str(&text, "the sizes of a measured row", &[])?;
    let work = Workload::one(&config, row.ranks, row.tokens as usize);
    let [f, b] = operator_on_host(machine, host, &Method::parse(name)?, kind, &work)?;
    Ok(vec![f, b, f + b])
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
    let conditions = |row: &Compared| {
        (row.mode, row.network.clone(), row.mixer == Mixer::Softmax, row.sizes.decay.clone(), row.config.clone())
    };
    // Forward and backward, or a step.
    let phases = |ms: &[f64]| {
        let shown = if ms.len() > 1 { &ms[..ms.len() - 1] } else { ms };
        shown.iter().map(|ms| format!("{ms:.1}")).collect::<Vec<_>>().join(" + ")
    };
    for (at, row) in rows.iter().enumerate() {
        if at == 0 || conditions(&rows[at - 1]) != conditions(row) {
            let name = row.network.as_deref().unwrap_or("none, memory of one machine");
            let decay = if row.mixer == Mixer::Linear { format!(", decay {}", row.sizes.decay) } else { String::new() };
            let of: Vec<Compared> = rows.iter().filter(|other| conditions(other) == conditions(row)).cloned().collect();
            let mixer = if row.mixer == Mixer::Linear { "linear" } else { "softmax" };
            let what = match (row.mode, &row.config) {
                (Mode::Layer, Some(config)) => format!("A layer of {mixer} attention of width {}", config.model.dim),
                (Mode::Train, Some(config)) => {
                    let (model, batch) = (&config.model, config.train.batch);
                    let (layers, pattern, width) = (model.layers, &model.pattern, model.dim);
                    format!(
                        "Training steps of {layers} layers (`{pattern}`) of width {width}, batch {batch}, by {mixer} layers' method"
                    )
                }
                _ if row.mixer == Mixer::Linear => "Linear attention".to_owned(),
                _ => "Softmax attention".to_owned(),
            };
            let times = if row.mode == Mode::Train { "" } else { ": forward + backward" };
            let _ = writeln!(
                text,
                "\n{what}{decay}, network `{name}`: {} rows, median error {:.1} %. Times in ms{times}.\n\n\
                 | method | ranks | tokens | measured | predicted | error |\n|---|---:|---:|---:|---:|---:|",
                of.len(),
                100.0 * errors(&of)[0]
            );
        }
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | {} | {} | {:+.1} % |",
            row.method,
            row.ranks,
            row.tokens,
            phases(&row.measured_ms),
            phases(&row.predicted_ms),
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

    const TRAINING: &str = include_str!("../../runs/2026-11-24-epyc-2core/predicted/training.jsonl");

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
    fn layers_and_training_steps_are_compared_too() {
        let machine = Machine::load("epyc-2core").unwrap();
        let rows = against(&machine, TRAINING).unwrap();
        let [median, largest] = errors(&rows);
        assert!(median < 0.1 && largest < 0.2, "{median} {largest}");
        // Without what was measured of layers, their products and passes go at the rates of large ones: too quick.
        let mut without = machine.clone();
        without.host.as_mut().unwrap().kernels.retain(|kernel| !kernel.name.starts_with("dense"));
        let quick = against(&without, TRAINING).unwrap();
        assert!(quick.iter().zip(&rows).all(|(quick, row)| quick.predicted_ms < row.predicted_ms));
        assert!(errors(&quick)[0] > 1.5 * median, "{:?}", errors(&quick));
        // A step is one number, a layer two and their sum.
        let count = |mode: Mode| rows.iter().filter(|row| row.mode == mode).map(|row| row.predicted_ms.len()).collect();
        let (layers, steps): (Vec<_>, Vec<_>) = (count(Mode::Layer), count(Mode::Train));
        assert_eq!((layers, steps), (vec![3; 3], vec![1; 12]));
        let text = markdown(&machine, &rows);
        for words in
            ["\nA layer of linear attention of width 256", "\nTraining steps of 4 layers (`LLLN`) of width 256"]
        {
            assert!(text.contains(words), "{text}");
        }
        // What auto chose is that method.
        let line = TRAINING.lines().next().unwrap();
        let auto = line.replacen("\"method\":\"lasp2\"", "\"method\":\"auto (lasp2)\"", 1);
        assert_ne!(line, auto);
        let predicted = |text: &str| against(&machine, text).unwrap()[0].predicted_ms.clone();
        assert_eq!(predicted(line), predicted(&auto));
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
        assert!(layer.contains("found mode layer without config"), "{layer}");
        assert!(error("epyc-2core", &line.replace("\"f32\"", "\"bf16\"")).contains("expected f32"));
    }
}
