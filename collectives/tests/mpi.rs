//! The MPI back end: every common case on 1, 2, 3 and 4 processes, long messages in parts, and how a job ends when a rank
//! fails.
//!
//! Without a test harness, since the ranks are processes: started plainly it starts itself under `mpirun`, once for each
//! line of the list below, and reports as the harness would. `OMPI_COMM_WORLD_SIZE` tells a rank that it is one.

#[cfg(feature = "mpi")]
mod common;
#[cfg(feature = "mpi")]
mod launcher;

#[cfg(not(feature = "mpi"))]
fn main() {
    println!("not tested: built without the cargo feature mpi");
}

#[cfg(feature = "mpi")]
fn main() -> std::process::ExitCode {
    match std::env::var_os("OMPI_COMM_WORLD_SIZE") {
        Some(_) => rank::main(),
        None => jobs::main(),
    }
}

#[cfg(feature = "mpi")]
mod jobs {
    use super::launcher::{self, Test};
    use std::{
        env,
        io::ErrorKind,
        process::{Command, ExitCode, Stdio},
    };

    const TESTS: &[Test] = &[
        Test { name: "all_cases_on_1_rank", ranks: 1, told: &["suite"] },
        Test { name: "all_cases_on_2_ranks", ranks: 2, told: &["suite"] },
        Test { name: "all_cases_on_3_ranks", ranks: 3, told: &["suite"] },
        Test { name: "all_cases_on_4_ranks", ranks: 4, told: &["suite"] },
        Test { name: "all_cases_in_parts_of_56_bytes", ranks: 3, told: &["suite", "56"] },
        Test { name: "a_panic_ends_the_job", ranks: 3, told: &["panic"] },
        Test { name: "an_error_ends_the_job", ranks: 3, told: &["error"] },
    ];

    pub fn main() -> ExitCode {
        launcher::main(TESTS, |test| {
            if let Err(error) = Command::new("mpirun").arg("--version").stdout(Stdio::null()).status() {
                let why = if error.kind() == ErrorKind::NotFound { "no mpirun".into() } else { error.to_string() };
                println!("not tested: {why}");
                return Ok(());
            }
            launcher::job(vec![mpirun(test)?])?.check(test)
        })
    }

    fn mpirun(test: &Test) -> Result<Command, String> {
        let program = env::current_exe().map_err(|e| e.to_string())?;
        let mut job = Command::new("mpirun");
        job.args(["--oversubscribe", "--bind-to", "none", "-n", &test.ranks.to_string()])
            .arg(program)
            .args(test.told)
            .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
            .env("OMP_NUM_THREADS", "1");
        Ok(job)
    }
}

#[cfg(feature = "mpi")]
mod rank {
    use super::{common, launcher::now_ms};
    use anyhow::{Context, Result, bail};
    use collectives::{Group, Tensor, mpi};
    use std::{env, panic, process::ExitCode};

    pub fn main() -> ExitCode {
        let told: Vec<String> = env::args().skip(1).collect();
        let default = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            default(info);
            mpi::abort(1);
        }));
        let mpi = match init(&told) {
            Ok(mpi) => mpi,
            Err(error) => {
                eprintln!("{error:#}");
                return ExitCode::FAILURE;
            }
        };
        let body = |world: Group| match told.first().map(String::as_str) {
            Some("panic") => fail(&world, &|| panic!("rank 1: gave up on purpose")),
            Some("error") => fail(&world, &|| bail!("rank 1: gave up on purpose")),
            _ => suite(&world),
        };
        mpi.run(body, |error| eprintln!("{error:#}"));
        ExitCode::SUCCESS
    }

    fn init(told: &[String]) -> Result<mpi::Mpi> {
        Ok(match told.get(1) {
            Some(longest) => mpi::init_splitting(longest.parse()?)?,
            None => mpi::init()?,
        })
    }

    fn suite(world: &Group) -> Result<()> {
        for (name, case) in common::CASES {
            let told = || format!("{name}, rank {} of {}", world.rank(), world.size());
            case(world).with_context(told)?;
        }
        Ok(())
    }

    /// Rank 1 fails while the others wait for it.
    fn fail(world: &Group, how: &dyn Fn() -> Result<()>) -> Result<()> {
        world.barrier()?.wait()?;
        if world.rank() == 1 {
            eprintln!("failing at {}", now_ms());
            return how();
        }
        let _never = world.all_gather(&Tensor::from_slice(&[1.0f32]))?.wait()?;
        bail!("a gather without rank 1 ended")
    }
}
