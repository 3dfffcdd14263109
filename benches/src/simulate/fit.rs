//! Fits a machine's free constants to published figures: at most three a machine, by a coordinate search for the least sum of
//! squared log errors. Everything else in a machine is a specification, measured elsewhere, or assumed, as its file says.

use runtime::config::Config;
use serde::Serialize;

use super::published::{Published, Row, Series};
use super::{Error, Machine, Result};

/// A number of a machine that nothing published gives directly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Constant {
    /// `overhead.step_ms`
    StepMs,
    /// `network.collective_efficiency`
    CollectiveEfficiency,
    /// `network.call_us`
    CallUs,
    /// `network.hop_us`
    HopUs,
}

/// What is fitted, by machine.
pub const FITTED: &[(&str, &[Constant])] = &[
    ("lasp2-paper", &[Constant::StepMs, Constant::CollectiveEfficiency, Constant::HopUs]),
    ("zeco-paper", &[Constant::CollectiveEfficiency, Constant::CallUs, Constant::HopUs]),
];

#[derive(Clone, Debug, Serialize)]
pub struct Fit {
    pub machine: String,
    pub constants: Vec<(Constant, f64)>,
    /// Of how many figures, and the root of their mean squared log error.
    pub figures: usize,
    pub rms: f64,
}

impl Constant {
    /// Its key in a machine's file.
    pub fn key(self) -> &'static str {
        match self {
            Constant::StepMs => "overhead.step_ms",
            Constant::CollectiveEfficiency => "network.collective_efficiency",
            Constant::CallUs => "network.call_us",
            Constant::HopUs => "network.hop_us",
        }
    }

    pub fn of(self, machine: &Machine) -> f64 {
        *self.at(&mut machine.clone())
    }

    fn at(self, machine: &mut Machine) -> &mut f64 {
        match self {
            Constant::StepMs => &mut machine.overhead.step_ms,
            Constant::CollectiveEfficiency => &mut machine.network.collective_efficiency,
            Constant::CallUs => &mut machine.network.call_us,
            Constant::HopUs => &mut machine.network.hop_us,
        }
    }

    /// Where the search starts, a lower and a higher value.
    fn starts(self) -> [f64; 2] {
        match self {
            Constant::StepMs => [100.0, 1500.0],
            Constant::CollectiveEfficiency => [0.05, 0.5],
            Constant::CallUs | Constant::HopUs => [10.0, 500.0],
        }
    }
}

/// Fits every machine of [`FITTED`], from starts that do not depend on what its file says now.
pub fn fit_published() -> Result<Vec<Fit>> {
    let published = Published::load()?;
    FITTED.iter().map(|(name, constants)| fit(&published, name, constants)).collect()
}

fn fit(published: &Published, name: &str, constants: &[Constant]) -> Result<Fit> {
    let machine = Machine::load(name)?;
    let targets = targets(published, name)?;
    let mut loss = |values: &[f64]| {
        let mut machine = machine.clone();
        for (constant, value) in constants.iter().zip(values) {
            *constant.at(&mut machine) = *value;
        }
        mean_square(&targets, &machine)
    };
    let mut best: Option<(f64, Vec<f64>)> = None;
    for start in 0..1 << constants.len() {
        let start = constants.iter().enumerate().map(|(i, constant)| constant.starts()[start >> i & 1]).collect();
        let found = search(&mut loss, start, 2.0, 1.1)?;
        if best.as_ref().is_none_or(|(least, _)| found.0 < *least) {
            best = Some(found);
        }
    }
    let (_, values) = best.ok_or_else(|| Error::Published(format!("{name}: nothing to fit")))?;
    let (least, values) = search(&mut loss, values, 1.1, 1.002)?;
    Ok(Fit {
        machine: name.to_owned(),
        constants: constants.iter().copied().zip(values).collect(),
        figures: targets.iter().map(|target| target.rows.len()).sum(),
        rms: least.sqrt(),
    })
}

/// Hooke and Jeeves' search (1961): each value in turn is multiplied or divided by a factor while that lowers the loss, then
/// all go on the way they went; where nothing helps, the factor shrinks, down to `finest`.
fn search(
    loss: &mut impl FnMut(&[f64]) -> Result<f64>,
    mut values: Vec<f64>,
    mut factor: f64,
    finest: f64,
) -> Result<(f64, Vec<f64>)> {
    let mut least = loss(&values)?;
    while factor > finest {
        let before = values.clone();
        for i in 0..values.len() {
            for step in [factor, 1.0 / factor] {
                let mut trial = values.clone();
                trial[i] *= step;
                take_if_lower(loss, trial, &mut least, &mut values)?;
            }
        }
        if values == before {
            factor = factor.sqrt();
        }
        let way: Vec<f64> = values.iter().zip(&before).map(|(now, then)| now / then).collect();
        while values != before {
            let trial = values.iter().zip(&way).map(|(value, way)| value * way).collect();
            if !take_if_lower(loss, trial, &mut least, &mut values)? {
                break;
            }
        }
    }
    Ok((least, values))
}

fn take_if_lower(
    loss: &mut impl FnMut(&[f64]) -> Result<f64>,
    trial: Vec<f64>,
    least: &mut f64,
    values: &mut Vec<f64>,
) -> Result<bool> {
    let found = loss(&trial)?;
    let lower = found < *least;
    if lower {
        (*least, *values) = (found, trial);
    }
    Ok(lower)
}

/// The figures to fit one machine to.
struct Target<'a> {
    series: &'a Series,
    config: Config,
    rows: Vec<(&'a Row, f64)>,
}

fn targets<'a>(published: &'a Published, machine: &str) -> Result<Vec<Target<'a>>> {
    let series = published.series.iter().filter(|series| series.machine == machine);
    let target = |series: &'a Series| {
        let rows = series.rows.iter().filter(|row| series.fit.contains(&row.0));
        let rows = rows.filter_map(|row| Some((row, row.number()?))).collect();
        Ok(Target { series, config: series.config()?, rows })
    };
    series.map(target).collect()
}

fn mean_square(targets: &[Target], machine: &Machine) -> Result<f64> {
    let (mut sum, mut count) = (0.0, 0.0);
    for Target { series, config, rows } in targets {
        for (row, published) in rows {
            sum += (series.value(machine, config, row)? / published).ln().powi(2);
            count += 1.0;
        }
    }
    Ok(sum / f64::max(count, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_search_finds_a_valley() {
        let mut loss = |x: &[f64]| Ok((x[0] * x[1] / 6.0).ln().powi(2) + 0.1 * (x[0] / 2.0).ln().powi(2));
        let (least, values) = search(&mut loss, vec![50.0, 0.01], 2.0, 1.01).unwrap();
        assert!(least < 1e-4 && (values[0] / 2.0).ln().abs() < 0.1 && (values[1] / 3.0).ln().abs() < 0.1, "{values:?}");
    }

    /// At the committed constants no step of 5 % of any of them lowers the error by more than a little.
    #[test]
    fn committed_constants_are_the_fitted_ones() {
        let published = Published::load().unwrap();
        for (name, constants) in FITTED {
            assert!(constants.len() <= 3);
            let machine = Machine::load(name).unwrap();
            let targets = targets(&published, name).unwrap();
            let committed = mean_square(&targets, &machine).unwrap();
            for constant in *constants {
                for factor in [0.95, 1.05] {
                    let mut other = machine.clone();
                    *constant.at(&mut other) *= factor;
                    let found = mean_square(&targets, &other).unwrap();
                    assert!(found > 0.995 * committed, "{name}, {}: {found} below {committed}", constant.key());
                }
            }
        }
    }
}
