//! The report of a comparison: one HTML file in the look of the run report. Throughput, memory and bytes by length on the most
//! ranks; throughput by ranks at the longest sequence; a step of each method as lanes; all rows as tables.

use std::borrow::Cow;

use runtime::metrics::format_si;
use runtime::report::chart::{Axis, Chart, Mark, Scale, Series};
use runtime::report::{Head, compact, document, escape, headline};
use tch::Device;

use super::row::{Measured, Row};
use super::table::{self, Table, bytes, grouped, ranks};
use super::{Mixer, Mode, measure, timeline};

/// What the rows do not say.
pub struct Conditions {
    /// What was timed: [`super::Options::about`].
    pub about: String,
    /// Ranks as threads or processes, their libtorch threads, the network.
    pub ranks: String,
    /// The processor and its cores.
    pub machine: String,
    pub versions: String,
    pub rounds: usize,
    /// What ranks computed on; which of several GPUs does not matter.
    pub device: Device,
    /// The command line.
    pub command: String,
}

const CLASSES: [&str; 10] = ["m0", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "m9"];

/// The report as HTML.
pub fn html(rows: &[Row], conditions: &Conditions) -> String {
    let (mixer, mode) = rows.first().map_or((Mixer::Linear, Mode::Operator), |row| (row.mixer, row.mode));
    let title = match mode {
        Mode::Operator => format!("Sequence parallelism of {} attention", mixer.name()),
        Mode::Layer => format!("Sequence parallelism of {} layers", mixer.name()),
        Mode::Train => format!("Sequence parallelism in training, {} layers", mixer.name()),
    };
    let about = format!("{} · {} · {}", conditions.about, conditions.ranks, conditions.machine);
    let most = rows.iter().map(|row| row.ranks).max().unwrap_or(0);
    let longest = rows.iter().filter(|row| row.ranks == most).map(|row| row.tokens).max().unwrap_or(0);
    let at_end: Vec<&Row> = rows.iter().filter(|row| (row.ranks, row.tokens) == (most, longest)).collect();

    let mut body = headline(&figures(&at_end, conditions));
    body += "<section class=\"pair\">\n";
    for chart in charts(rows, most, longest, conditions) {
        body += &chart.render();
    }
    body += "</section>\n";
    let title_of_step = format!("One step on {} at {} tokens", ranks(most), grouped(longest));
    let drawn = match conditions.device.is_cuda() {
        true => "Computing, waiting and communication are those of the GPU's streams, by its events",
        false => "Communication is drawn from when the rank's progress thread takes it up until its result is there",
    };
    let note = format!(
        "The step of median duration. Each phase starts at a barrier, from which the clocks of the ranks count. {drawn}; for a \
         receive that includes the time until its sender sends."
    );
    body += &timeline::render(&at_end, &title_of_step, &note);
    body += &results(rows);
    body += &format!(
        "<details><summary>Conditions</summary><pre>{}\n{}\n{}\n{}\n{}\n{} rounds after {} to warm up; every method \
         against the f64 oracle first</pre></details>\n",
        escape(&conditions.command),
        escape(&conditions.about),
        escape(&conditions.ranks),
        escape(&conditions.machine),
        escape(&conditions.versions),
        conditions.rounds,
        measure::warm_up(conditions.device),
    );
    let style = include_str!("report.css");
    document(&Head { kicker: "Method comparison", title: &title, about: &about, style }, &body)
}

/// The row of numbers at the top, of the longest sequence on the most ranks.
fn figures(rows: &[&Row], conditions: &Conditions) -> Vec<(&'static str, String, String)> {
    let least = |of: &dyn Fn(&Measured) -> f64| {
        let measured = rows.iter().filter_map(|row| Some((*row, row.measured.as_ref()?)));
        measured.min_by(|a, b| of(a.1).total_cmp(&of(b.1)))
    };
    let where_ =
        rows.first().map_or_else(String::new, |row| format!("{} tokens, {}", grouped(row.tokens), ranks(row.ranks)));
    let mut figures = Vec::new();
    if let Some((row, m)) = least(&|m| m.step.median_ms) {
        // It may break after a colon.
        figures.push(("Quickest", row.method.replace(':', ":\u{200b}"), where_));
        figures.push(("Its tokens per second", format_si(m.tokens_per_s), "median step".to_owned()));
        figures.push(("Its exposed time", format!("{:.1}%", 100.0 * m.exposed), "of a step".to_owned()));
    }
    let received = |m: &Measured| m.received.iter().max().copied().unwrap_or(0);
    if let Some((row, m)) = least(&|m| received(m) as f64) {
        figures.push(("Least received", bytes(received(m)), format!("a rank and step, {}", row.method)));
    }
    let added = |m: &Measured| m.memory.map_or(f64::INFINITY, |memory| memory.added as f64);
    if let Some((row, memory)) = least(&added).and_then(|(row, m)| Some((row, m.memory?))) {
        figures.push(("Least memory added", bytes(memory.added), format!("a rank, {}", row.method)));
    }
    figures.push(("Rounds", conditions.rounds.to_string(), "methods in turn".to_owned()));
    figures
}

fn charts(rows: &[Row], most: usize, longest: i64, conditions: &Conditions) -> Vec<Chart> {
    let on = format!("On {}.", ranks(most));
    let tokens = || Axis {
        title: "tokens of the sequence".into(),
        name: "tokens",
        scale: Scale::Log,
        format: |tokens| grouped(tokens as i64),
    };
    let by_length = |title: &'static str, y: &'static str, note: String, of: fn(&Measured) -> Option<f64>| {
        let series = series(rows, |row| (row.ranks == most).then_some(row.tokens as f64), of);
        let y = Axis { title: y.into(), name: y, scale: Scale::RoundLog, format: compact };
        chart(title.into(), note, tokens(), y, series)
    };
    let mut charts =
        vec![by_length("Throughput", "tokens per second", format!("Median step. {on}"), |m| Some(m.tokens_per_s))];
    let mut counts: Vec<usize> = rows.iter().map(|row| row.ranks).collect();
    counts.sort_unstable();
    counts.dedup();
    if counts.len() > 1 {
        let series = series(rows, |row| (row.tokens == longest).then_some(row.ranks as f64), |m| Some(m.tokens_per_s));
        let x = Axis { title: "ranks".into(), name: "ranks", scale: Scale::Log, format: |ranks| ranks.to_string() };
        let y = Axis { title: "tokens per second".into(), name: "tokens/s", scale: Scale::RoundLog, format: compact };
        let note = format!("Median step. {} tokens at every number of ranks.", grouped(longest));
        charts.push(chart("Scaling".into(), note, x, y, series));
    } else {
        let series = series(rows, |row| Some(row.tokens as f64), |m| Some(100.0 * m.exposed));
        let y = Axis { title: "share of a step (%)".into(), name: "exposed", scale: Scale::FromZero, format: compact };
        let note = format!("In which a rank waits for communication, mean over ranks, median over rounds. {on}");
        charts.push(chart("Exposed communication".into(), note, tokens(), y, series));
    }
    let memory = match conditions.device.is_cuda() {
        true => "Given out by libtorch's allocator above what it had before the step",
        false => "VmHWM above what was resident before the step",
    };
    charts.push(by_length(
        "Memory",
        "added by a step, MiB per rank",
        format!("{memory}, in a step of its own. {on}"),
        |m| m.memory.map(|memory| memory.added as f64 / f64::from(1 << 20)),
    ));
    charts.push(by_length(
        "Bytes received",
        "received by layers in a step, bytes",
        format!("Of the rank with most, counted by the flight recorder, as the method's formula has it. Lines may coincide. {on}"),
        |m| m.layers_received.iter().max().map(|&received| received as f64),
    ));
    charts
}

fn chart(title: Cow<'static, str>, note: String, x: Axis, y: Axis, series: Vec<Series>) -> Chart {
    Chart { title, note: note.into(), x, y, width: 528.0, height: 300.0, series }
}

/// A series for each method: `x` of its rows that belong into the chart, and what it shows of them.
fn series(rows: &[Row], x: impl Fn(&Row) -> Option<f64>, y: fn(&Measured) -> Option<f64>) -> Vec<Series> {
    let mut methods: Vec<&str> = Vec::new();
    for row in rows {
        if !methods.contains(&row.method.as_str()) {
            methods.push(&row.method);
        }
    }
    let of = |(i, method): (usize, &&str)| {
        let own = rows.iter().filter(|row| row.method == **method);
        let mut points: Vec<(f64, f64)> = own.filter_map(|row| Some((x(row)?, y(row.measured.as_ref()?)?))).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let name = (**method).to_owned().into();
        Series { name, class: CLASSES[i % CLASSES.len()], mark: Mark::Dots, points }
    };
    methods.iter().enumerate().map(of).collect()
}

/// All rows, by ranks and length.
fn results(rows: &[Row]) -> String {
    let mut html = "<section class=\"panel results\"><h2>All figures</h2>".to_owned();
    let group = |row: &Row| (row.ranks, row.tokens);
    for rows in rows.chunk_by(|a, b| group(a) == group(b)) {
        html += &format!("<h3>{}</h3>", escape(&table::heading(rows)));
        html += &table_html(&table::times(rows));
        html += &table_html(&table::memory_and_messages(rows));
        for reason in table::skipped(rows) {
            html += &format!("<p class=\"caption\">{}</p>", escape(reason));
        }
    }
    html += &format!(
        "<pre>{}</pre></section>\n",
        escape(table::LEGEND.trim_end_matches("\n*          best of its column"))
    );
    html
}

fn table_html(table: &Table) -> String {
    let mut html = "<table>".to_owned();
    for (row, cells) in table.cells.iter().enumerate() {
        html += "<tr>";
        for (column, cell) in cells.iter().enumerate() {
            let (tag, class) = match (row, table.best.contains(&(row, column))) {
                (0, _) => ("th", ""),
                (_, true) => ("td", " class=\"best\""),
                (_, false) => ("td", ""),
            };
            html += &format!("<{tag}{class}>{}</{tag}>", escape(cell));
        }
        html += "</tr>";
    }
    html + "</table>"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::lanes::{Lanes, Phase};
    use crate::compare::memory::Memory;

    #[test]
    fn says_where_times_and_memory_come_from() {
        let mut row = table::tests::row("lasp2", 5.0);
        let lanes =
            Lanes { phases: vec!["step".into()], ranks: vec![vec![Phase { ns: 5_000_000, ..Phase::default() }]] };
        let measured = row.measured.as_mut().unwrap();
        (measured.lanes, measured.memory) = (Some(lanes), Some(Memory { peak: 9 << 20, added: 4 << 20 }));
        let text = |device| {
            let [about, ranks, machine, versions, command] = ["a", "b", "c", "d", "e"].map(str::to_owned);
            html(&[row.clone()], &Conditions { about, ranks, machine, versions, rounds: 7, device, command })
        };
        let words = [
            "progress thread",
            "VmHWM above",
            "7 rounds after 2",
            "streams, by its events",
            "libtorch's allocator above",
            "7 rounds after 5",
        ];
        for (device, said) in [(Device::Cpu, 0..3), (Device::Cuda(1), 3..6)] {
            let text = text(device);
            for (at, words) in words.iter().enumerate() {
                assert_eq!(text.contains(&*escape(words)), said.contains(&at), "{device:?}: {words}");
            }
        }
    }
}
