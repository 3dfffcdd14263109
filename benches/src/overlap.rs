//! Whether LASP-2's AllGather hides behind the intra-rank work when it takes as long: steps with no network to speak of and
//! steps on a network just that slow, in turn.

use anyhow::{Context, Result};
use collectives::local::{self, Network};
use runtime::config::{Config, LayoutKind};
use serde::Serialize;
use tch::Device;

use crate::compare::{Comparison, Measured, Method, Mixer, Mode, Options, Row};

const RANKS: usize = 2;

/// Steps of one turn: medians over its rounds, of the slowest rank.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Turn {
    /// The shorter of forward's and backward's intra-rank work, of the quickest rank, without a network; so long takes the
    /// AllGather of either pass.
    pub gather_ms: f64,
    pub free_ms: f64,
    pub slowed_ms: f64,
    /// Share of the communication during which the rank was not blocked, on the slow network.
    pub hidden: f64,
}

impl Turn {
    /// How much longer the step takes for its communication.
    pub fn ratio(&self) -> f64 {
        self.slowed_ms / self.free_ms
    }
}

/// LASP-2, operator with backward, on two ranks as threads of one libtorch thread each: 4 heads of K = V = 64, no decay.
pub struct Overlap {
    options: Options,
    tokens: i64,
}

impl Overlap {
    pub fn new(tokens: i64, rounds: usize) -> Result<Self> {
        let text = "[model]\nkv_heads = 1\nheads = 4\ndim = 256\nchunk = 64";
        let config = Config::from_toml_str(text, "the sizes of the overlap", &[])?;
        let methods = Method::list("lasp2", Mixer::Linear, LayoutKind::Contiguous)?;
        Ok(Self {
            options: Options {
                mixer: Mixer::Linear,
                mode: Mode::Operator,
                methods,
                rounds,
                device: Device::Cpu,
                config,
            },
            tokens,
        })
    }

    /// One turn of both.
    pub fn turn(&self) -> Result<Turn> {
        let free = self.measure(None)?;
        let lanes = free.lanes.as_ref().context("no spans")?;
        let shortest = |phase: usize, name: &str| {
            let of_rank = lanes.ranks.iter().map(|rank| {
                let spans = rank[phase].computing.iter().filter(|span| span.name == name);
                spans.map(|span| span.end_ns - span.start_ns).sum::<u64>()
            });
            of_rank.min().unwrap_or(0) as f64 / 1e6
        };
        let gather_ms = shortest(0, "intra_rank").min(shortest(1, "intra_rank_grad"));
        anyhow::ensure!(gather_ms > 0.0, "no intra-rank work was recorded");
        let link = format!("{:.0}us/100GB/s", 1e3 * gather_ms);
        let slowed = self.measure(Some(&format!("node=1,intra={link},inter={link}").parse()?))?;
        Ok(Turn {
            gather_ms,
            free_ms: free.step.median_ms,
            slowed_ms: slowed.step.median_ms,
            hidden: slowed.hidden.unwrap_or(0.0),
        })
    }

    fn measure(&self, network: Option<&Network>) -> Result<Measured> {
        let rows = local::run_on(network, RANKS, |world| -> Result<Vec<Row>> {
            tch::set_num_threads(1);
            Comparison::new(&world, &self.options)?.at(self.tokens, &|_| {})
        })?;
        let row = rows.into_iter().next().and_then(|mut rows| rows.pop());
        row.and_then(|row| row.measured).context("LASP-2 has no figures")
    }
}
