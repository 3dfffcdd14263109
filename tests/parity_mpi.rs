//! The parity list under mpirun: this program starts itself again on 1 to 8 ranks.

use std::process::ExitCode;

use lasp_tests::mpirun;

const RANKS: [usize; 5] = [1, 2, 3, 4, 8];

#[cfg(feature = "mpi")]
fn on_this_rank() -> anyhow::Result<()> {
    mpirun::abort_on_panic();
    tch::set_num_threads(1);
    let mpi = collectives::mpi::init()?;
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
    mpirun::main(&RANKS, |_| None, on_this_rank)
}
