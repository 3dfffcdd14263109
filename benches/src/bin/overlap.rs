//! LASP-2's step on a network whose AllGather takes as long as the intra-rank work, over the step without communication: a
//! JSON line for each turn, and one for the medians.

use anyhow::Result;
use benches::overlap::Overlap;
use clap::Parser;
use serde_json::json;

#[derive(Parser)]
struct Options {
    /// Of the sequence, over two ranks.
    #[arg(long, default_value_t = 16384)]
    tokens: i64,
    /// Timed rounds of a turn.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    turns: u32,
}

fn main() -> Result<()> {
    let options = Options::parse();
    kernels::bridge::keep_freed_memory();
    let overlap = Overlap::new(options.tokens, options.rounds)?;
    let mut ratios = Vec::new();
    for _ in 0..options.turns {
        let turn = overlap.turn()?;
        ratios.push(turn.ratio());
        println!("{}", json!({"turn": turn, "ratio": turn.ratio()}));
    }
    ratios.sort_by(f64::total_cmp);
    println!("{}", json!({"tokens": options.tokens, "turns": options.turns, "median_ratio": ratios[ratios.len() / 2]}));
    Ok(())
}
