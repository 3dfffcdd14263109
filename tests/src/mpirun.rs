//! Test programs whose ranks are processes: started plainly, such a program starts itself again under mpirun, with what Open MPI
//! needs set here and not in the shell.

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};

/// The main function of a test program without harness. Started plainly: a test for each of `ranks`, on so many of which it is
/// started again, or skipped if `missing` says what this machine lacks for them. Started by mpirun: `on_this_rank`.
pub fn main(ranks: &[usize], missing: fn(usize) -> Option<String>, on_this_rank: fn() -> Result<()>) -> ExitCode {
    if std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some() {
        return match on_this_rank() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let trial = |&ranks| Trial::test(format!("parity_on_{ranks}_ranks"), move || on_ranks(ranks, missing));
    libtest_mimic::run(&arguments, ranks.iter().map(trial).collect()).exit_code()
}

fn on_ranks(ranks: usize, missing: fn(usize) -> Option<String>) -> Result<(), Failed> {
    let no_mpirun = || (!cfg!(feature = "mpi") || !available()).then(|| "no mpirun, or built without mpi".to_owned());
    if let Some(missing) = no_mpirun().or_else(|| missing(ranks)) {
        println!("not tested: {missing}");
        return Ok(());
    }
    let status = mpirun(ranks, &std::env::current_exe()?).status()?;
    if status.success() { Ok(()) } else { Err(format!("mpirun: {status}").into()) }
}

/// From here on a panic on this rank ends the job, unless the rank goes on after it ([`crate::is_held`]).
#[cfg(feature = "mpi")]
pub fn abort_on_panic() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        hook(info);
        if !crate::is_held() {
            collectives::mpi::abort(1);
        }
    }));
}

/// A command that runs `program` on `ranks` ranks: as root, with more ranks than cores, one libtorch thread each.
pub fn mpirun(ranks: usize, program: &Path) -> Command {
    let mut command = Command::new("mpirun");
    command
        .args(["--oversubscribe", "--bind-to", "none", "-n", &ranks.to_string()])
        .arg(program)
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env("OMP_NUM_THREADS", "1")
        .stdin(Stdio::null());
    command
}

/// Whether there is an mpirun to start.
pub fn available() -> bool {
    Command::new("mpirun")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}
