//! `lasp bench`: what the ranks' communication can do here, or on an emulated network; the measuring is
//! `collectives::bench`.

use anyhow::{Result, bail};
use clap::builder::PossibleValuesParser;
use collectives::Group;
use collectives::bench::{self, COLLECTIVES, Collective, Options, Row};
use collectives::local::Network;
use serde_json::json;
use tch::Device;

use crate::argument::at_least_one;
use crate::gpu::Place;
use crate::identity::Launcher;
use crate::{job, output};

/// Measure what the machine can do
#[derive(clap::Subcommand)]
pub enum Command {
    Collectives(Args),
}

/// Time collectives and print their bandwidths as nccl-tests defines them
#[derive(clap::Args)]
#[command(after_help = EXPLANATION)]
pub struct Args {
    /// Only these operations [default: all]
    #[arg(long, value_name = "OP,..", value_delimiter = ',', value_parser = known())]
    ops: Vec<String>,
    /// The smallest size in bytes; K, M and G are 1024, 1024^2, 1024^3
    #[arg(long, value_name = "SIZE", default_value = "1K", value_parser = size)]
    min: u64,
    /// The largest size
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = size)]
    max: u64,
    /// Each size is so many times the one before
    #[arg(long, value_name = "X", default_value_t = 4, value_parser = clap::value_parser!(u64).range(2..))]
    factor: u64,
    /// Timed iterations of a row; fewer, but at least 5, where they would take more than a second
    #[arg(long, value_name = "N", default_value_t = 50)]
    iterations: usize,
    /// Number of ranks, as threads; under mpirun, if given, its number of processes [default: 2]
    #[arg(long, value_name = "N", value_parser = at_least_one::<usize>)]
    ranks: Option<usize>,
    /// Emulate this network between ranks that are threads: ranks on a node, latency/bandwidth within and between nodes,
    /// as in node=4,intra=2us/100GB/s,inter=20us/10GB/s
    #[arg(long, value_name = "NETWORK")]
    network: Option<Network>,
    /// Where the tensors are; cuda: on GPUs, by NCCL
    #[arg(long, value_enum, default_value_t = Place::Cpu)]
    device: Place,
    /// Print a line of JSON for each row: times in us, bandwidths in GB/s
    #[arg(long)]
    json: bool,
}

const EXPLANATION: &str = "\
Columns:
  bytes   all_gather: of a result; the others: of an input of one rank
  time    of the slowest rank, from a barrier to its result (its GPU has it): median, 10th and 90th percentile
  algbw   bytes / time
  busbw   algbw x (W-1)/W for all_gather, reduce_scatter and all_to_all, x 2(W-1)/W for
          all_reduce, x 1 for send_recv; W is the number of ranks. It is what a link
          carries, whatever W, and compares with the bandwidth of the hardware
  times   timed iterations
Elements are f32. A wrong result is an error.";

fn known() -> PossibleValuesParser {
    PossibleValuesParser::new(COLLECTIVES.iter().map(|collective| collective.name))
}

fn size(text: &str) -> Result<u64, String> {
    let (number, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| "expected a number of bytes above 0, as in 512, 64K, 16M or 1G".into())
}

pub fn run(command: Command, launcher: &Launcher) -> Result<()> {
    let Command::Collectives(args) = command;
    if args.min > args.max {
        bail!("--min: found {}, expected at most the {} of --max", args.min, args.max);
    }
    let ranks = match launcher.joins_processes()? {
        true => args.ranks,
        false => Some(args.ranks.unwrap_or(2)),
    };
    job::on_network(launcher, args.network.as_ref(), ranks, |world| match args.device {
        Place::Cpu => measure(&args, world, Device::Cpu),
        Place::Cuda => {
            let (world, device) = job::on_gpu(launcher, world)?;
            measure(&args, &world, device)
        }
    })
}

fn measure(args: &Args, world: &Group, device: Device) -> Result<()> {
    let first = world.rank() == 0;
    if first && !args.json {
        output::print(&heading(args, world, device))?;
    }
    let mut copies = None;
    let asked_for = |collective: &&Collective| args.ops.is_empty() || args.ops.iter().any(|op| op == collective.name);
    for collective in COLLECTIVES.iter().filter(asked_for) {
        for size in bench::sizes(args.min, args.max, args.factor) {
            let options = Options {
                collectives: vec![collective],
                sizes: vec![size],
                iterations: args.iterations,
                device,
                ..Options::default()
            };
            for row in bench::run(world, &options)? {
                if first {
                    output::print(&if args.json { line(args, &row) } else { cells(&row) })?;
                }
                copies = Some(world.peer_copies());
            }
        }
    }
    if let Some(copies) = copies.filter(|_| first && !args.json && device.is_cuda()) {
        output::print(&format!("all_gather: {copies}\n"))?;
    }
    Ok(())
}

fn heading(args: &Args, world: &Group, device: Device) -> String {
    let network = args.network.map(|network| format!(", network {network}")).unwrap_or_default();
    format!(
        "{} ranks, back end {}{network}\n{:<14}  {:>12}  {:>10}  {:>10}  {:>10}  {:>10}  {:>10}  {:>5}\n",
        world.size(),
        world.backend_on(device),
        "operation",
        "bytes",
        "time us",
        "p10",
        "p90",
        "algbw GB/s",
        "busbw GB/s",
        "times",
    )
}

fn cells(row: &Row) -> String {
    format!(
        "{:<14}  {:>12}  {:>10.1}  {:>10.1}  {:>10.1}  {:>10.3}  {:>10.3}  {:>5}\n",
        row.collective, row.bytes, row.median_us, row.p10_us, row.p90_us, row.algbw, row.busbw, row.iterations
    )
}

fn line(args: &Args, row: &Row) -> String {
    let line = json!({
        "op": row.collective, "bytes": row.bytes, "ranks": row.ranks, "backend": row.backend,
        "network": args.network.map(|network| network.to_string()), "iterations": row.iterations,
        "time_us": row.median_us, "p10_us": row.p10_us, "p90_us": row.p90_us, "algbw": row.algbw, "busbw": row.busbw,
    });
    format!("{line}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(["1", "512", "64K", "16m", "2G"].map(size), [1, 512, 65536, 16 << 20, 2 << 30].map(Ok));
        assert!(
            ["", "K", "0", "-1", "1.5K", "1T", "99999999999999999999G", "16µ"].iter().all(|text| size(text).is_err())
        );
    }
}
