//! The parity list under mpirun: this program starts itself again on 1 to 8 ranks.

use std::process::ExitCode;

use lasp_tests::mpirun;
use libtest_mimic::{Arguments, Failed, Trial};

const RANKS: [usize; 5] = [1, 2, 3, 4, 8];

#[cfg(feature = "mpi")]
fn on_this_rank() -> anyhow::Result<()> {
    use collectives::mpi;
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        hook(info);
        mpi::abort(1);
    }));
    tch::set_num_threads(1);
    let mpi = mpi::init()?;
    let world = mpi.world();
    let scans = lasp_tests::scans(&world)?;
    for case in lasp_tests::linear_cases() {
        case.check(&world, &scans)?;
    }
    for case in lasp_tests::softmax_cases() {
        case.check(&world)?;
    }
    for case in lasp_tests::left_product_cases() {
        case.check(&world)?;
    }
    if world.size() <= 4 {
        lasp_tests::determinism::check(&world)?;
    }
    // With more ranks than cores there is no compute to hide behind.
    if world.size() == 2 {
        lasp_tests::overlap::check(&world)?;
    }
    Ok(())
}

#[cfg(not(feature = "mpi"))]
fn on_this_rank() -> anyhow::Result<()> {
    anyhow::bail!("built without mpi")
}

fn main() -> ExitCode {
    if mpirun::inside() {
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
    let trial = |ranks| Trial::test(format!("parity_on_{ranks}_ranks"), move || on_ranks(ranks));
    libtest_mimic::run(&arguments, RANKS.map(trial).into()).exit_code()
}

fn on_ranks(ranks: usize) -> Result<(), Failed> {
    if !cfg!(feature = "mpi") || !mpirun::available() {
        println!("not tested: no mpirun, or built without mpi");
        return Ok(());
    }
    let status = mpirun::mpirun(ranks, &std::env::current_exe()?).status()?;
    if status.success() { Ok(()) } else { Err(format!("mpirun: {status}").into()) }
}
