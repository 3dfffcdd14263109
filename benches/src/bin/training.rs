//! Throughput of whole training steps, by the program itself under mpirun: sp = 2 against sp = 1, one libtorch thread a rank,
//! and the cost of a token as the sequence grows. Runs alternate, so that a noisy machine favours none.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};

#[derive(Parser)]
struct Options {
    #[arg(long, value_enum)]
    what: What,
    #[arg(long, default_value = "configs/bench.toml")]
    config: PathBuf,
    /// More settings for every run, as for `lasp train --set`.
    #[arg(long)]
    set: Vec<String>,
    /// Runs of each variant.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Tokens of a step when scaling.
    #[arg(long, default_value_t = 8192)]
    tokens: usize,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// sp = 1, sp = 2 and sp = 2 zigzag, on the same sequences.
    Scaling,
    /// 4,096 to 65,536 tokens at sp = 1.
    Flat,
}

/// A way of running, and what it gave: tokens/s of each step but the first two.
struct Variant {
    name: String,
    ranks: usize,
    settings: Vec<String>,
    tokens_per_s: Vec<f64>,
    exposed_pct: Vec<f64>,
}

impl Variant {
    fn new(name: impl Into<String>, ranks: usize, settings: &[String]) -> Self {
        Self { name: name.into(), ranks, settings: settings.to_vec(), tokens_per_s: vec![], exposed_pct: vec![] }
    }

    fn run(&mut self, options: &Options, lasp: &Path, run_dir: &Path) -> Result<()> {
        let mut command = benches::mpirun(self.ranks);
        command.arg(lasp).arg("train").arg(&options.config).arg("--run-dir").arg(run_dir).stdout(Stdio::null());
        for setting in options.set.iter().chain(&self.settings) {
            command.arg("--set").arg(setting);
        }
        ensure!(command.status().context("mpirun")?.success(), "{} failed", self.name);
        let metrics = std::fs::read_to_string(run_dir.join("metrics.jsonl"))?;
        for line in metrics.lines().skip(2) {
            let record: Value = serde_json::from_str(line)?;
            let number = |key: &str| record[key].as_f64().with_context(|| format!("no {key} in the metrics"));
            self.tokens_per_s.push(number("tokens_per_s")?);
            self.exposed_pct.push(number("exposed_comm_pct")?);
        }
        Ok(())
    }

    fn json(&mut self) -> Value {
        let at = |values: &mut Vec<f64>, share: f64| {
            values.sort_by(f64::total_cmp);
            values[((values.len() - 1) as f64 * share).round() as usize]
        };
        json!({
            "variant": self.name, "ranks": self.ranks, "steps": self.tokens_per_s.len(), "settings": self.settings,
            "tokens_per_s": {
                "median": at(&mut self.tokens_per_s, 0.5),
                "p10": at(&mut self.tokens_per_s, 0.1),
                "p90": at(&mut self.tokens_per_s, 0.9),
            },
            "exposed_comm_pct": at(&mut self.exposed_pct, 0.5),
        })
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    let lasp = std::env::current_exe()?.with_file_name("lasp");
    ensure!(lasp.exists(), "{} is missing: cargo build --release -p lasp", lasp.display());
    let mut variants = match options.what {
        What::Scaling => {
            let settings = |sp: usize, layout: &str| {
                let tokens = options.tokens;
                [format!("parallel.sp={sp}"), format!("train.seq_len={tokens}"), format!("parallel.layout={layout}")]
            };
            vec![
                Variant::new("sp = 1", 1, &settings(1, "contiguous")),
                Variant::new("sp = 2, contiguous", 2, &settings(2, "contiguous")),
                Variant::new("sp = 2, zigzag", 2, &settings(2, "zigzag")),
            ]
        }
        What::Flat => (12..=16)
            .map(|log| {
                let tokens = 1usize << log;
                Variant::new(format!("{tokens} tokens"), 1, &[format!("train.seq_len={tokens}")])
            })
            .collect(),
    };
    let folder = std::env::temp_dir().join(format!("lasp-bench-{}", std::process::id()));
    for round in 0..options.rounds {
        for (i, variant) in variants.iter_mut().enumerate() {
            variant.run(&options, &lasp, &folder.join(format!("{round}-{i}")))?;
        }
    }
    std::fs::remove_dir_all(&folder)?;
    let results: Vec<Value> = variants.iter_mut().map(Variant::json).collect();
    let base = results[0]["tokens_per_s"]["median"].as_f64().unwrap_or(f64::NAN);
    for mut result in results {
        result["ratio"] = json!(result["tokens_per_s"]["median"].as_f64().unwrap_or(f64::NAN) / base);
        println!("{result}");
    }
    Ok(())
}
