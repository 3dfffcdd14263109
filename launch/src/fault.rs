//! `lasp fault`, hidden: makes one rank fail while the others wait for it or compute, to see that the job ends.

use anyhow::{Result, bail};
use clap::ValueEnum;
use tch::{Device, Kind, Tensor};

use crate::argument::at_least_one;
use crate::identity::Launcher;
use crate::{job, output};

#[derive(clap::Args)]
pub struct Args {
    #[arg(long)]
    rank: usize,
    #[arg(long, value_enum)]
    kind: Fault,
    #[arg(long, value_parser = at_least_one::<usize>)]
    ranks: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Fault {
    None,
    Error,
    Panic,
    /// The ranks call different collectives.
    Mismatch,
}

pub fn run(args: Args, launcher: &Launcher) -> Result<()> {
    job::on_ranks(launcher, args.ranks, |world| {
        let x = Tensor::f_ones([4], (Kind::Float, Device::Cpu))?;
        let _ = world.all_gather(&x)?.wait()?;
        let fails = world.rank() == args.rank;
        if fails {
            output::print("failing\n")?;
        }
        match args.kind {
            Fault::None => world.barrier()?.wait()?,
            Fault::Mismatch if fails => drop(world.all_gather(&x.f_narrow(0, 0, 3)?)?.wait()?),
            Fault::Mismatch => drop(world.all_gather(&x)?.wait()?),
            Fault::Error if fails => bail!("a fault was asked for"),
            Fault::Panic if fails => panic!("a fault was asked for"),
            _ if world.rank().is_multiple_of(2) => world.barrier()?.wait()?,
            _ => loop {
                let x = Tensor::f_rand([512, 512], (Kind::Float, Device::Cpu))?;
                let _ = x.f_matmul(&x)?;
            },
        }
        Ok(())
    })
}
