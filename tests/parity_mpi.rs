//! The parity list under mpirun: this program starts itself again on 1 to 8 ranks.

use std::process::ExitCode;

use lasp_tests::mpirun;

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
    if !cfg!(feature = "mpi") || !mpirun::available() {
        println!("not tested: no mpirun, or built without mpi");
        println!("test result: ok. 0 passed; 0 failed; {} ignored; 0 measured; 0 filtered out", RANKS.len());
        return ExitCode::SUCCESS;
    }
    let program = std::env::current_exe().expect("this program has a path");
    let mut failed = 0;
    for ranks in RANKS {
        let ok = mpirun::mpirun(ranks, &program).status().is_ok_and(|status| status.success());
        println!("test parity under mpirun, {ranks} ranks ... {}", if ok { "ok" } else { "FAILED" });
        failed += usize::from(!ok);
    }
    let outcome = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "test result: {outcome}. {} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out",
        RANKS.len() - failed
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
