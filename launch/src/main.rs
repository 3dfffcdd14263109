//! `lasp`: one program for training, generating, running a single operator, and finding out what would be needed.
//! This file parses the command line and hands over; a command is a file. `identity` finds out how this process was
//! started, `job` runs a command on all ranks, `failure` ends the job when one of them fails.

#![forbid(unsafe_code)]

mod argument;
mod attend;
mod auto;
mod bench;
mod calibrate;
mod compare;
mod data;
mod doctor;
mod failure;
mod fault;
mod generate;
mod gpu;
mod identity;
mod job;
mod output;
mod plan;
mod simulate;
mod train;

use std::fmt;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};
use identity::Launcher;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Trains linear-attention and hybrid language models on sequences sharded over ranks (LASP-2)
#[derive(Parser)]
#[command(name = "lasp", version, max_term_width = 120, after_help = AFTER_HELP, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Ranks are processes (mpirun -n 4 lasp train .., srun or torchrun) or threads of one (lasp train .. --ranks 4).

Environment:
  LASP_LOG         stderr shows: error, warn, info (default), debug, trace
  LASP_KERNELS     where compiled GPU kernels are kept; default: ~/.cache/lasp/kernels; empty: nowhere
  OMP_NUM_THREADS  libtorch threads of each rank; default: an equal share of the cores
  LASP_NCCL        the libnccl.so.2 to use; default: the one that comes with libtorch";

#[derive(Subcommand)]
enum Command {
    Train(train::Args),
    Generate(generate::Args),
    #[command(subcommand)]
    Data(data::Command),
    Plan(plan::Args),
    Simulate(simulate::Args),
    Attend(attend::Args),
    #[command(subcommand)]
    Bench(bench::Command),
    Compare(compare::Args),
    Calibrate(calibrate::Args),
    Doctor(doctor::Args),
    #[command(hide = true)]
    Fault(fault::Args),
}

fn main() {
    let launcher = Launcher::detect();
    failure::install(&launcher);
    let cli = Cli::try_parse().unwrap_or_else(|error| quit(&launcher, &error));
    log();
    kernels::bridge::keep_freed_memory();
    gpu::keep_kernels();
    if let Err(error) = run(cli.command, &launcher) {
        failure::end(&error);
    }
}

fn run(command: Command, launcher: &Launcher) -> Result<()> {
    let first = launcher.rank().unwrap_or(0) == 0;
    match command {
        Command::Train(args) => train::run(args, launcher),
        Command::Attend(args) => attend::run(args, launcher),
        Command::Bench(command) => bench::run(command, launcher),
        Command::Compare(args) => compare::run(args, launcher),
        Command::Calibrate(args) => calibrate::run(args, launcher),
        Command::Fault(args) => fault::run(args, launcher),
        // One process is enough for these, however many were started.
        _ if !first => Ok(()),
        Command::Generate(args) => generate::run(args, launcher),
        Command::Plan(args) => plan::run(args),
        Command::Simulate(args) => simulate::run(args),
        Command::Data(command) => data::run(command),
        Command::Doctor(args) => doctor::run(args),
    }
}

/// Prints help, the version or what is wrong with the command line, on one rank of many.
fn quit(launcher: &Launcher, error: &clap::Error) -> ! {
    if launcher.rank().unwrap_or(0) == 0 {
        error.exit();
    }
    // mpirun ends the job with the first process that fails: it must be the one that says why.
    std::thread::sleep(Duration::from_millis(500));
    std::process::exit(error.exit_code());
}

/// Logs to stderr, a line each, plainly: people read it between a program's own lines.
fn log() {
    let filter = EnvFilter::try_from_env("LASP_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).event_format(Plain).init();
}

/// `warning: tensor foo is not used`.
struct Plain;

impl<S, N> FormatEvent<S, N> for Plain
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        match *event.metadata().level() {
            Level::ERROR => writer.write_str("error: ")?,
            Level::WARN => writer.write_str("warning: ")?,
            Level::INFO => {}
            Level::DEBUG | Level::TRACE => write!(writer, "{}: ", event.metadata().target())?,
        }
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}
