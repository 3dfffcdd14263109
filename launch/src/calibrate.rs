//! `lasp calibrate`: measures this machine, or ranks on an emulated network, and writes it as a machine for `lasp simulate`.
//! The measuring is `benches::calibrate`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use benches::calibrate::{Calibration, Setting, calibrate};
use collectives::Group;
use collectives::local::Network;

use crate::identity::{Launcher, cores};
use crate::{doctor, job, output};

/// Measure kernels and collectives here, and write them as a machine of the cost model
#[derive(clap::Args)]
pub struct Args {
    /// Number of ranks, as threads; under mpirun, if given, its number of processes [default: 2]
    #[arg(long, value_name = "N")]
    ranks: Option<usize>,
    /// Emulate this network between ranks that are threads: ranks on a node, latency/bandwidth within and between nodes,
    /// as in node=4,intra=2us/100GB/s,inter=20us/10GB/s
    #[arg(long, value_name = "NETWORK")]
    network: Option<Network>,
    /// Measure kernels once and at few sizes: some seconds, for a first look
    #[arg(long)]
    quick: bool,
    /// The file to write, TOML; it is replaced
    #[arg(long, value_name = "FILE", default_value = "machine.toml")]
    out: PathBuf,
}

pub fn run(args: Args, launcher: &Launcher) -> Result<()> {
    let ranks = match launcher.joins_processes()? {
        true => args.ranks,
        false => Some(args.ranks.unwrap_or(2)),
    };
    job::on_network(launcher, args.network.as_ref(), ranks, |world| {
        let name = args.out.file_stem().map_or_else(|| "here".to_owned(), |name| name.to_string_lossy().into_owned());
        let node = args.network.map_or(world.size(), |network| network.node);
        let network = args.network.map(|network| network.to_string());
        let found =
            calibrate(world, &Setting { name, node, memory: doctor::memory("MemTotal"), network, quick: args.quick })?;
        if world.rank() == 0 { write(&args, world, &found) } else { Ok(()) }
    })
}

fn write(args: &Args, world: &Group, found: &Calibration) -> Result<()> {
    let network = args.network.map_or_else(String::new, |network| format!(", emulated network {network}"));
    let about = format!(
        "{} ranks, back end {}, libtorch threads of each: {}, cores: {}{network}; f32",
        world.size(),
        world.backend(),
        tch::get_num_threads(),
        cores()
    );
    let comments = std::iter::once(&about).chain(&found.measured).map(|line| format!("# {line}\n"));
    let text = comments.collect::<String>() + "\n" + &found.machine.to_toml()?;
    fs::write(&args.out, text).with_context(|| format!("cannot write {} (--out)", args.out.display()))?;
    let lines: String = found.measured.iter().map(|line| format!("  {line}\n")).collect();
    output::print(&format!("{about}\n{lines}{}\n", args.out.display()))
}
