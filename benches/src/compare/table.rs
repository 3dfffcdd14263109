//! The rows of one length on so many ranks as two tables of text: times, then memory and messages. Of each column the best is
//! marked. Aligning and printing is left to the caller.

use super::row::{Measured, Row};
use super::traffic::Bound;
use crate::Timing;

/// Cells by row, the headings first; `aligns` has `l` or `r` for each column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    pub aligns: String,
    pub cells: Vec<Vec<String>>,
    /// `(row, column)` of the best cells; their text does not say so.
    pub best: Vec<(usize, usize)>,
}

impl Table {
    /// The cells with an asterisk behind the best ones.
    pub fn marked(&self) -> Vec<Vec<String>> {
        let mark = |row: usize, column: usize, cell: &String| match (column, self.best.contains(&(row, column))) {
            (0, _) => cell.clone(),
            (_, true) => format!("{cell} *"),
            (_, false) => format!("{cell}  "),
        };
        let row = |(row, cells): (usize, &Vec<String>)| {
            cells.iter().enumerate().map(|(column, cell)| mark(row, column, cell)).collect()
        };
        self.cells.iter().enumerate().map(row).collect()
    }
}

/// What a column shows of a row, and the number by which the best is found: the lowest, if there is one.
type Column = (&'static str, fn(&Measured) -> (String, Option<f64>));

const TIMES: &[Column] = &[
    ("forward ms", |m| timing(m.forward.as_ref())),
    ("backward ms", |m| timing(m.backward.as_ref())),
    ("step ms", |m| timing(Some(&m.step))),
    ("tokens/s", |m| (count(m.tokens_per_s), Some(-m.tokens_per_s))),
    ("a rank", |m| (count(m.tokens_per_s_and_rank), None)),
    ("exposed", |m| (percent(m.exposed), Some(m.exposed))),
    ("hidden", |m| (m.hidden.map_or_else(none, percent), m.hidden.map(|hidden| -hidden))),
];

const MEMORY_AND_MESSAGES: &[Column] = &[
    ("peak memory", |m| number(m.memory.map(|memory| memory.peak))),
    ("added", |m| number(m.memory.map(|memory| memory.added))),
    ("sent", |m| number(most(&m.sent))),
    ("received", |m| number(most(&m.received))),
    ("by layers", |m| match m.layers_received == m.received {
        true => (none(), None),
        false => number(most(&m.layers_received)),
    }),
    ("formula", |m| {
        let formula = most(&m.formula_received).map_or_else(none, bytes);
        (if m.formula == Bound::AtMost { format!("≤ {formula}") } else { formula }, None)
    }),
    ("messages", |m| (most(&m.messages).map_or_else(none, |n| n.to_string()), most(&m.messages).map(|n| n as f64))),
];

/// What the columns of the tables mean.
pub const LEGEND: &str = "\
times      median (10th to 90th percentile) over rounds; of a round the slowest rank, from a
           barrier until it, or its GPU, is through
tokens/s   of the median step, of all ranks and then of one
exposed    share of a step in which a rank, or its GPU's computing stream, waits for
           communication, mean over ranks
hidden     share of the time that messages are under way, from start to result, in which the
           rank does not wait
memory     resident at most in a step (VmHWM), and what of it the step added; of ranks as
           threads an equal share; on a GPU what libtorch's allocator had given out
messages   and what is sent and received: of the rank with most, in a step, counted by the
           flight recorder
by layers  what of `received` the layers' method moved, where a training step moves gradients
           too
formula    what the method's formula says its layers receive; held against the count on every
           rank, each round
*          best of its column";

pub fn times(rows: &[Row]) -> Table {
    table(TIMES, rows)
}

pub fn memory_and_messages(rows: &[Row]) -> Table {
    table(MEMORY_AND_MESSAGES, rows)
}

/// Why methods have no row; each reason begins with its method.
pub fn skipped(rows: &[Row]) -> impl Iterator<Item = &str> {
    rows.iter().filter_map(|row| row.skipped.as_deref())
}

/// `1 rank`, `2 ranks`.
pub fn ranks(n: usize) -> String {
    format!("{n} rank{}", if n == 1 { "" } else { "s" })
}

/// A heading for the rows of one length.
pub fn heading(rows: &[Row]) -> String {
    let Some(row) = rows.first() else { return String::new() };
    format!("{}, {} tokens", ranks(row.ranks), grouped(row.tokens))
}

/// Columns that say nothing of any row are left out.
fn table(columns: &[Column], rows: &[Row]) -> Table {
    let measured: Vec<(&Row, &Measured)> = rows.iter().filter_map(|row| Some((row, row.measured.as_ref()?))).collect();
    let (mut cells, mut best) = (vec![vec!["method".to_owned()]], Vec::new());
    cells.extend(measured.iter().map(|(row, _)| vec![row.method.clone()]));
    for (head, show) in columns {
        let shown: Vec<(String, Option<f64>)> = measured.iter().map(|(_, m)| show(m)).collect();
        if shown.iter().all(|(text, _)| *text == none()) {
            continue;
        }
        let column = cells[0].len();
        cells[0].push((*head).to_owned());
        let lowest = shown.iter().filter_map(|(_, value)| *value).reduce(f64::min);
        // A column in which all are alike has no best.
        let differs = shown.iter().any(|(_, value)| *value != lowest);
        for (row, (text, value)) in shown.into_iter().enumerate() {
            if value.is_some() && value == lowest && differs {
                best.push((row + 1, column));
            }
            cells[row + 1].push(text);
        }
    }
    let aligns = format!("l{}", "r".repeat(cells[0].len() - 1));
    Table { aligns, cells, best }
}

fn timing(timing: Option<&Timing>) -> (String, Option<f64>) {
    match timing {
        Some(t) => (format!("{} ({} to {})", ms(t.median_ms), ms(t.p10_ms), ms(t.p90_ms)), Some(t.median_ms)),
        None => (none(), None),
    }
}

fn number(number: Option<u64>) -> (String, Option<f64>) {
    (number.map_or_else(none, bytes), number.map(|number| number as f64))
}

fn most(numbers: &[u64]) -> Option<u64> {
    numbers.iter().max().copied()
}

fn none() -> String {
    "–".to_owned()
}

/// About three digits.
pub(super) fn ms(value: f64) -> String {
    let decimals = match value {
        large if large >= 99.95 => 0,
        middle if middle >= 9.995 => 1,
        small if small >= 0.9995 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

fn count(number: f64) -> String {
    runtime::metrics::format_si(number)
}

/// In binary units.
pub(super) fn bytes(count: u64) -> String {
    let (mut value, mut unit) = (count as f64, "B");
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1000.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    let decimals = if unit == "B" || value >= 99.95 { 0 } else { 1 };
    format!("{value:.decimals$} {unit}")
}

/// `1234567` as `1,234,567`.
pub fn grouped(whole: impl ToString) -> String {
    let digits = whole.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::compare::{Mixer, Mode};

    pub fn row(method: &str, step_ms: f64) -> Row {
        let timing = Timing { median_ms: step_ms, p10_ms: 0.9 * step_ms, p90_ms: 1.1 * step_ms };
        let measured = Measured {
            forward: Some(timing),
            backward: None,
            step: timing,
            tokens_per_s: 1e6 / step_ms,
            tokens_per_s_and_rank: 5e5 / step_ms,
            memory: None,
            sent: vec![0, 4096],
            received: vec![4096, 0],
            messages: vec![1, 1],
            layers_received: vec![4096, 0],
            formula_received: vec![4096, 0],
            formula: Bound::Exact,
            exposed: 0.1,
            hidden: None,
            lanes: None,
        };
        Row {
            method: method.to_owned(),
            quadratic: false,
            layout: runtime::config::LayoutKind::Contiguous,
            mixer: Mixer::Linear,
            mode: Mode::Operator,
            ranks: 2,
            tokens: 4096,
            skipped: None,
            measured: Some(measured),
        }
    }

    #[test]
    fn the_best_of_a_column_is_marked() {
        let rows = [row("slow", 20.0), row("quick", 5.0)];
        let marked = times(&rows).marked();
        // Backward has no times, and nothing is hidden: no columns.
        assert_eq!(marked[0].len(), 6);
        assert_eq!(marked[2][..3], ["quick", "5.00 (4.50 to 5.50) *", "5.00 (4.50 to 5.50) *"]);
        assert_eq!(marked[1][3], "50.0K  ");
        let messages = memory_and_messages(&rows);
        assert!(messages.best.is_empty(), "all alike: {:?}", messages.best);
        assert_eq!(messages.cells[1][1..], ["4.0 KiB", "4.0 KiB", "4.0 KiB", "1"]);
        assert_eq!(heading(&rows), "2 ranks, 4,096 tokens");
    }

    #[test]
    fn rows_without_figures_say_why() {
        let refused = Row { skipped: Some("ulysses: 12 heads".to_owned()), measured: None, ..row("ulysses", 1.0) };
        let rows = [refused, row("ring", 1.0)];
        assert_eq!(skipped(&rows).collect::<Vec<_>>(), ["ulysses: 12 heads"]);
        assert_eq!(times(&rows).cells.len(), 2);
    }
}
