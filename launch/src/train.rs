//! `lasp train`: the configuration, the ranks, the run folder; training itself is `runtime::train`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use collectives::Group;
use runtime::config::Config;
use runtime::train;
use tch::Tensor;

use crate::argument::at_least_one;
use crate::identity::Launcher;
use crate::{auto, gpu, job};

/// Train a model: on the processes of mpirun, or on ranks as threads.
#[derive(clap::Args)]
pub struct Args {
    /// The configuration, TOML
    config: PathBuf,
    /// Where metrics, checkpoints and the report go; default: runs/NAME, NAME being that of CONFIG,
    /// or the next free one of runs/NAME-2, runs/NAME-3, ..; with --resume the last one there is
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Change a setting of the configuration; may be repeated
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// Number of ranks, as threads; under mpirun, if given, its number of processes [default: parallel.sp x parallel.dp]
    #[arg(long, value_name = "N", value_parser = at_least_one::<usize>)]
    ranks: Option<usize>,
    /// Go on from the newest checkpoint of the run folder
    #[arg(long)]
    resume: bool,
    /// Record the third and fourth step to trace-RANK.json in the run folder, for Chrome's or Perfetto's trace viewer, and
    /// print for how long a layer waited for communication
    #[arg(long)]
    trace: bool,
}

pub fn run(args: Args, launcher: &Launcher) -> Result<()> {
    let started = Instant::now();
    let config = Config::load(&args.config, &args.set)?;
    let ranks = match launcher.joins_processes()? {
        true => args.ranks,
        false => Some(args.ranks.unwrap_or_else(|| wanted_ranks(&config))),
    };
    job::on_ranks(launcher, ranks, |world| {
        let mut config = config.clone();
        config.resolve_ranks(world.size())?;
        let (world, device) = gpu::place(config.train.device, launcher, world)?;
        auto::agree(&mut config, &world, device.is_cuda())?;
        let run_dir = agree_on_run_dir(&args, &world)?;
        let console = world.rank() == 0;
        let options = train::Options { resume: args.resume, console, trace: args.trace, device, started };
        train::run(world, config, &run_dir, options)?;
        Ok(())
    })
}

/// As many ranks as the configuration spells out.
pub fn wanted_ranks(config: &Config) -> usize {
    config.parallel.sp.max(1).saturating_mul(config.parallel.dp.max(1))
}

/// The folder that the user named, or the next free one; rank 0 looks, the others are told.
fn agree_on_run_dir(args: &Args, world: &Group) -> Result<PathBuf> {
    if let Some(run_dir) = &args.run_dir {
        return Ok(run_dir.clone());
    }
    let name = args.config.file_stem().context("CONFIG has no file name")?.to_string_lossy();
    let mut number = 1;
    if world.rank() == 0 {
        let last = last_run(Path::new("runs"), &name);
        number = if args.resume { last.max(1) } else { last + 1 };
    }
    let number = world.broadcast(&Tensor::f_from_slice(&[number])?, 0)?.wait()?.f_int64_value(&[0])?;
    Ok(Path::new("runs").join(if number == 1 { name.into_owned() } else { format!("{name}-{number}") }))
}

/// The highest N of the folders `NAME` (which is 1) and `NAME-N` in `folder`; 0 if there is none.
fn last_run(folder: &Path, name: &str) -> i64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| match entry.file_name().to_str()?.strip_prefix(name)? {
        "" => Some(1),
        rest => rest.strip_prefix('-')?.parse::<i64>().ok(),
    });
    numbers.max().unwrap_or(0).max(0)
}
