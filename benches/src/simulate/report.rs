//! `docs/cost-model.md`: what was published, what the model predicts, and the error, for every figure, with the constants that
//! were fitted and what remains unexplained. Generated, so that it cannot disagree with the model.

use std::fmt::Write;

use super::fit::{FITTED, Fit};
use super::published::{Predicted, Published, Quantity, Row, Series};
use super::sweep::in_k;
use super::{Machine, Result};

/// Errors of some figures, as shares of what was published.
#[derive(Clone, Debug, Default)]
pub struct Errors(Vec<f64>);

impl Errors {
    /// Of the rows that were fitted, or of those that were not.
    pub fn of(series: &Series, predicted: &[Predicted], fitted: bool) -> Errors {
        let rows = series.rows.iter().zip(predicted).filter(|(row, _)| series.fit.contains(&row.0) == fitted);
        Errors(rows.filter_map(|(row, predicted)| row.error(predicted)).map(f64::abs).collect())
    }

    pub fn add(&mut self, other: &Errors) {
        self.0.extend(&other.0);
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The mean of the middle two of an even number.
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted.len() {
            0 => 0.0,
            n if n % 2 == 1 => sorted[n / 2],
            n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
        }
    }

    pub fn largest(&self) -> f64 {
        self.0.iter().copied().fold(0.0, f64::max)
    }
}

/// The whole document. `fits`: what the fit finds now, if it was run.
pub fn markdown(fits: &[Fit]) -> Result<String> {
    let published = Published::load()?;
    let mut tables = String::new();
    let mut summary = "| figures | number | median error | largest |\n|---|---:|---:|---:|\n".to_owned();
    let mut all = [Errors::default(), Errors::default()];
    for series in &published.series {
        let predicted = series.predict_all()?;
        let mut of_series = Errors::default();
        for (all, fitted) in all.iter_mut().zip([true, false]) {
            let errors = Errors::of(series, &predicted, fitted);
            of_series.add(&errors);
            all.add(&errors);
        }
        let _ = writeln!(summary, "{}", summary_row(&series.name, &of_series));
        tables += &table(series, &predicted);
    }
    let mut whole = all[0].clone();
    whole.add(&all[1]);
    for (name, errors) in [("**fitted**", &all[0]), ("**not fitted**", &all[1]), ("**all**", &whole)] {
        let _ = writeln!(summary, "{}", summary_row(name, errors));
    }
    Ok(format!("{HEAD}\n{summary}\n{CONSTANTS}\n{}\n{OPEN}\n{tables}", constants(fits)?))
}

fn summary_row(name: &str, errors: &Errors) -> String {
    let [median, largest] = [errors.median(), errors.largest()].map(|error| format!("{:.1} %", 100.0 * error));
    format!("| {name} | {} | {median} | {largest} |", errors.count())
}

fn constants(fits: &[Fit]) -> Result<String> {
    let mut text = "| machine | constant | value | the fit finds |\n|---|---|---:|---:|\n".to_owned();
    for (name, constants) in FITTED {
        let machine = Machine::load(name)?;
        for constant in *constants {
            let fit = fits.iter().find(|fit| fit.machine == *name);
            let found = fit.and_then(|fit| fit.constants.iter().find(|(found, _)| found == constant));
            let found = found.map(|(_, value)| three_digits(*value)).unwrap_or_default();
            let _ = writeln!(text, "| {name} | `{}` | {} | {found} |", constant.key(), constant.of(&machine));
        }
    }
    Ok(text)
}

fn table(series: &Series, predicted: &[Predicted]) -> String {
    let mut text = format!("## {}\n\nSource: {}. Machine: `{}`.", series.name, series.source, series.machine);
    let fitted = match series.fit.is_empty() {
        true => " Nothing here was fitted.".to_owned(),
        false => {
            format!(" Fitted to: {}.", series.fit.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "))
        }
    };
    text += &fitted;
    if !series.note.is_empty() {
        let _ = write!(text, "\n\n{}", series.note.trim());
    }
    text += "\n\n| method | GPUs | tokens | published | predicted | error |\n|---|---:|---:|---:|---:|---:|\n";
    for (row, predicted) in series.rows.iter().zip(predicted) {
        let Row(method, gpus, tokens, _) = row;
        let published = row.number().map(three_digits).unwrap_or_else(|| "OOM".to_owned());
        let error = match row.error(predicted) {
            Some(error) => format!("{:+.1} %", 100.0 * error),
            None if predicted.out_of_memory => "right".to_owned(),
            None => "wrong".to_owned(),
        };
        let found = match (predicted.out_of_memory, row.number()) {
            (true, None) => "OOM".to_owned(),
            (true, Some(_)) if series.quantity != Quantity::MemoryGb => {
                format!("{} (OOM)", three_digits(predicted.value))
            }
            _ => three_digits(predicted.value),
        };
        let _ = writeln!(text, "| `{method}` | {gpus} | {} | {published} | {found} | {error} |", in_k(*tokens));
    }
    text + "\n"
}

/// At least three digits, all of a whole number.
fn three_digits(number: f64) -> String {
    match number.abs() {
        large if large >= 100.0 => format!("{number:.0}"),
        medium if medium >= 10.0 => format!("{number:.1}"),
        _ => format!("{number:.3}"),
    }
}

const HEAD: &str = "\
# The cost model against what was published

Written by `lasp simulate --published docs/cost-model.md`; do not edit. The figures are in `benches/src/simulate/published.toml`,
the machines in `benches/src/simulate/machines`. An error is (predicted - published) / published; medians and largest are of its
size. `released` after a method: nothing overlaps with its exchange, and LASP-1 has a barrier in every call, as in the code that the
LASP papers released.
";

const CONSTANTS: &str = "\
## What was fitted

At most three constants a machine, to the rows that each table names, by least squares of the log error
(`lasp simulate --fit published`). All others come from specifications and measurements, or are assumed, as the machine's file
says.
";

const OPEN: &str = "\
## What the model leaves out

- Ranks run at the same speed, and networks carry nothing else. There is no jitter, congestion or slow node.
- A rank's gradients and sharded weights give way to the exchanges of layers; in NCCL they share the links.
- Kernels take no time to launch unless `overhead.layer_us` says so, and none for shards too short to fill a GPU; nor for
  packed documents too short to fill one.
- Further messages of a split gather are taken to overlap their ways around the ring.
- Allocators do not fragment.
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(Errors(vec![0.3, 0.1, 0.2]).median(), 0.2);
        assert_eq!(Errors(vec![0.5, 0.125, 0.25, 0.0]).median(), 0.1875);
        assert_eq!(Errors::default().median(), 0.0);
    }

    #[test]
    fn the_committed_document_is_of_this_model() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/cost-model.md");
        let committed = std::fs::read_to_string(path).unwrap();
        let tables = |text: &str| {
            let (_, tables) = text.split_once("## What the model leaves out").unwrap();
            tables.split_once(super::super::against::HEADING).map_or(tables, |(ours, _)| ours).trim_end().to_owned()
        };
        let same = tables(&committed) == tables(&markdown(&[]).unwrap());
        assert!(same, "run: lasp simulate --published docs/cost-model.md");
    }

    #[test]
    fn the_document_has_every_series_and_figure() {
        let text = markdown(&[]).unwrap();
        for series in Published::load().unwrap().series {
            assert!(text.contains(&format!("## {}\n", series.name)));
        }
        assert!(text.contains("| `lasp2:released` | 16 | 4096K | OOM | OOM | right |"));
    }
}
