//! Published figures, and the model's prediction of each. The figures are in `published.toml`, a table with its sources; what
//! each quantity means is here. A prediction that misses stays a miss: nothing is left out.

use runtime::config::Config;
use serde::Deserialize;

use super::{Error, Machine, Method, Result, Workload, attention_share, exchange_seconds, predict, step_seconds};

/// All of them.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Published {
    pub series: Vec<Series>,
}

/// Figures of one source and quantity.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Series {
    pub name: String,
    pub source: String,
    pub machine: String,
    model: String,
    pub quantity: Quantity,
    over: Option<String>,
    /// Methods whose rows constants are fitted to.
    #[serde(default)]
    pub fit: Vec<String>,
    #[serde(default)]
    pub note: String,
    pub rows: Vec<Row>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantity {
    TokensPerS,
    TokensPerSPerGpu,
    StepMs,
    /// Throughput of the method `over` over that of the row's.
    SpeedOver,
    MemoryGb,
    /// One exchange of states by itself.
    ExchangeMs,
    /// Rate of softmax attention by itself as a share of one GPU's.
    AttentionShare,
}

/// Method, GPUs, tokens of the sequence, figure.
#[derive(Debug, Deserialize)]
pub struct Row(pub String, pub usize, pub usize, pub Figure);

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Figure {
    Number(f64),
    /// Said to be "OOM".
    Text(String),
}

/// What the model says about a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Predicted {
    pub value: f64,
    pub out_of_memory: bool,
}

/// Name, configuration, and what is set otherwise: the published 1.336 B parameters have no output gate.
const MODELS: &[(&str, &str, &[&str])] = &[
    ("linear-llama3-1b", include_str!("../../../configs/linear-llama3-1b.toml"), &["model.output_gate=false"]),
    ("gla-1b", include_str!("models/gla-1b.toml"), &[]),
    ("operator", include_str!("models/operator.toml"), &[]),
];

impl Published {
    pub fn load() -> Result<Published> {
        let published: Published =
            toml::from_str(include_str!("published.toml")).map_err(|error| Error::Published(error.to_string()))?;
        for series in &published.series {
            series.config()?;
            for Row(method, _, _, figure) in &series.rows {
                Method::parse(method)?;
                if matches!(figure, Figure::Text(text) if text != "OOM") {
                    return Err(Error::Published(format!(
                        "{}: found {figure:?}, expected a number or \"OOM\"",
                        series.name
                    )));
                }
            }
        }
        Ok(published)
    }
}

impl Row {
    fn work<'a>(&self, config: &'a Config) -> Workload<'a> {
        Workload::one(config, self.1, self.2)
    }

    /// The figure, unless it is out of memory.
    pub fn number(&self) -> Option<f64> {
        match self.3 {
            Figure::Number(number) => Some(number),
            Figure::Text(_) => None,
        }
    }

    /// By how much `predicted` exceeds what was published, as a share of it.
    pub fn error(&self, predicted: &Predicted) -> Option<f64> {
        self.number().map(|published| predicted.value / published - 1.0)
    }
}

impl Series {
    pub fn config(&self) -> Result<Config> {
        let model = MODELS.iter().find(|(name, _, _)| *name == self.model);
        let (_, text, set) =
            model.ok_or_else(|| Error::Published(format!("{}: no model named {}", self.name, self.model)))?;
        let set: Vec<String> = set.iter().map(|set| (*set).to_owned()).collect();
        Ok(Config::from_toml_str(text, &self.model, &set)?)
    }

    /// What the model says about a row.
    pub fn predict(&self, machine: &Machine, config: &Config, row: &Row) -> Result<Predicted> {
        let value = self.value(machine, config, row)?;
        let out_of_memory = match self.quantity {
            Quantity::ExchangeMs | Quantity::AttentionShare => false,
            _ => predict(machine, &Method::parse(&row.0)?, &row.work(config))?.out_of_memory,
        };
        Ok(Predicted { value, out_of_memory })
    }

    /// The same, without asking whether it fits.
    pub fn value(&self, machine: &Machine, config: &Config, row: &Row) -> Result<f64> {
        let (method, work) = (Method::parse(&row.0)?, row.work(config));
        let step = |method: &Method| step_seconds(machine, method, &work);
        Ok(match self.quantity {
            Quantity::TokensPerS => row.2 as f64 / step(&method)?,
            Quantity::TokensPerSPerGpu => row.2 as f64 / row.1 as f64 / step(&method)?,
            Quantity::StepMs => 1e3 * step(&method)?,
            Quantity::SpeedOver => {
                let over = Method::parse(self.over.as_deref().unwrap_or("lasp2"))?;
                step(&method)? / step(&over)?
            }
            Quantity::MemoryGb => predict(machine, &method, &work)?.memory.total / 1e9,
            Quantity::ExchangeMs => 1e3 * exchange_seconds(machine, &method, &work)?,
            Quantity::AttentionShare => attention_share(machine, &method, &work)?,
        })
    }

    /// Predictions of all rows on the series' own machine.
    pub fn predict_all(&self) -> Result<Vec<Predicted>> {
        let (machine, config) = (Machine::load(&self.machine)?, self.config()?);
        self.rows.iter().map(|row| self.predict(&machine, &config, row)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<(Series, Vec<Predicted>)> {
        let all = Published::load().unwrap().series;
        all.into_iter().map(|series| (series.predict_all().map(|found| (series, found))).unwrap()).collect()
    }

    #[test]
    fn out_of_memory_where_published_and_nowhere_else() {
        for (series, predicted) in all() {
            let rules = matches!(series.quantity, Quantity::TokensPerS | Quantity::MemoryGb);
            for (row, predicted) in series.rows.iter().zip(&predicted).filter(|_| rules) {
                assert_eq!(row.number().is_none(), predicted.out_of_memory, "{}: {row:?} {predicted:?}", series.name);
            }
        }
    }

    #[test]
    fn methods_come_in_the_published_order() {
        for (series, predicted) in all() {
            let rows: Vec<_> =
                series.rows.iter().zip(&predicted).filter_map(|(r, p)| Some((r, r.number()?, p.value))).collect();
            for (a, published_a, predicted_a) in &rows {
                for (b, published_b, predicted_b) in &rows {
                    if (a.1, a.2) == (b.1, b.2) && published_a > &(1.01 * published_b) {
                        assert!(predicted_a > predicted_b, "{}: {a:?} {predicted_a}, {b:?} {predicted_b}", series.name);
                    }
                }
            }
        }
        // LASP-2 before LASP-1 before Ring Attention, and the more so the longer the sequence.
        let over = |name: &str| -> Vec<f64> {
            let (_, predicted) = all().into_iter().find(|(series, _)| series.name.ends_with(name)).unwrap();
            predicted.iter().map(|predicted| predicted.value).collect()
        };
        let (lasp1, ring) = (over("over LASP-1"), over("over Ring Attention"));
        assert!(1.0 < lasp1[0] && lasp1[0] < lasp1[1] && lasp1[0] < ring[0] && lasp1[1] < ring[1] && ring[0] < ring[1]);
    }

    #[test]
    fn splitting_the_gather_changes_next_to_nothing() {
        let (_, predicted) = all().into_iter().find(|(series, _)| series.name.contains("several messages")).unwrap();
        for split in &predicted {
            assert!((split.value / predicted[0].value - 1.0).abs() < 0.02, "{predicted:?}");
        }
    }

    #[test]
    fn the_median_error_is_below_15_percent() {
        let errors = |(series, predicted): (Series, Vec<Predicted>)| {
            let errors = series.rows.iter().zip(&predicted).filter_map(|(row, p)| row.error(p)).map(f64::abs);
            errors.collect::<Vec<_>>()
        };
        let mut errors: Vec<f64> = all().into_iter().flat_map(errors).collect();
        errors.sort_by(f64::total_cmp);
        assert!(errors[errors.len() / 2] < 0.15, "{errors:?}");
    }
}
