//! The MPI back end: every common case on 1, 2, 3 and 4 processes, long messages in parts, and how a job ends when a rank
//! fails.
//!
//! Without a test harness, since the ranks are processes: started plainly it starts itself under `mpirun`, once for each
//! line of the list below, and reports as the harness would. `OMPI_COMM_WORLD_SIZE` tells a rank that it is one.

#[cfg(feature = "mpi")]
mod common;

#[cfg(not(feature = "mpi"))]
fn main() {
    println!("not tested: built without the cargo feature mpi");
}

#[cfg(feature = "mpi")]
fn main() -> std::process::ExitCode {
    match std::env::var_os("OMPI_COMM_WORLD_SIZE") {
        Some(_) => rank::main(),
        None => launcher::main(),
    }
}

#[cfg(feature = "mpi")]
mod launcher {
    use std::{
        env,
        io::{ErrorKind, Read},
        process::{Command, ExitCode, Stdio},
        thread,
        time::{Duration, Instant, SystemTime, UNIX_EPOCH},
    };

    /// Name, ranks, and what the ranks are told.
    const TESTS: &[(&str, usize, &[&str])] = &[
        ("all_cases_on_1_rank", 1, &["suite"]),
        ("all_cases_on_2_ranks", 2, &["suite"]),
        ("all_cases_on_3_ranks", 3, &["suite"]),
        ("all_cases_on_4_ranks", 4, &["suite"]),
        ("all_cases_in_parts_of_56_bytes", 3, &["suite", "56"]),
        ("a_panic_ends_the_job", 3, &["panic"]),
        ("an_error_ends_the_job", 3, &["error"]),
    ];
    const LIMIT: Duration = Duration::from_secs(120);

    pub fn main() -> ExitCode {
        if let Err(error) = Command::new("mpirun").arg("--version").stdout(Stdio::null()).status() {
            let why = if error.kind() == ErrorKind::NotFound { "no mpirun".into() } else { error.to_string() };
            println!("not tested: {why}");
            return ExitCode::SUCCESS;
        }
        // As libtest does: arguments that are not options choose tests by a part of their name.
        let chosen: Vec<String> = env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
        let (mut passed, mut failed, started) = (0, 0, Instant::now());
        let is_chosen = |name: &str| chosen.is_empty() || chosen.iter().any(|part| name.contains(part.as_str()));
        for (name, ranks, told) in TESTS.iter().filter(|(name, ..)| is_chosen(name)) {
            let ran = mpirun(*ranks, told).and_then(|end| end.check(told[0]));
            match ran {
                Ok(()) => {
                    println!("test {name} ... ok");
                    passed += 1;
                }
                Err(why) => {
                    println!("test {name} ... FAILED\n{why}");
                    failed += 1;
                }
            }
        }
        println!(
            "\ntest result: {}. {passed} passed; {failed} failed; 0 ignored; 0 measured; {} filtered out; \
             finished in {:.2}s\n",
            if failed == 0 { "ok" } else { "FAILED" },
            TESTS.len() - passed - failed,
            started.elapsed().as_secs_f64()
        );
        if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    struct End {
        succeeded: bool,
        output: String,
        at_ms: u128,
    }

    fn mpirun(ranks: usize, told: &[&str]) -> Result<End, String> {
        let program = env::current_exe().map_err(|e| e.to_string())?;
        let mut job = Command::new("mpirun")
            .args(["--oversubscribe", "--bind-to", "none", "-n", &ranks.to_string()])
            .arg(program)
            .args(told)
            .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
            .env("OMP_NUM_THREADS", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| format!("cannot start mpirun: {e}"))?;
        let (stdout, stderr) = (job.stdout.take(), job.stderr.take());
        let out = thread::spawn(move || read(stdout));
        let err = thread::spawn(move || read(stderr));
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = job.try_wait().map_err(|e| e.to_string())? {
                break Some(status);
            }
            if Instant::now() > deadline {
                let _ = job.kill();
                let _ = job.wait();
                break None;
            }
            thread::sleep(Duration::from_millis(5));
        };
        let at_ms = now_ms();
        let output = [out, err].map(|pipe| pipe.join().unwrap_or_default()).concat();
        match status {
            Some(status) => Ok(End { succeeded: status.success(), output, at_ms }),
            None => Err(format!("no end after {LIMIT:?}\n{output}")),
        }
    }

    fn read(pipe: Option<impl Read>) -> String {
        let mut bytes = Vec::new();
        let _ = pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub fn now_ms() -> u128 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis())
    }

    impl End {
        fn check(self, told: &str) -> Result<(), String> {
            let fail = |why: String| Err(format!("{why}\n{}", self.output));
            if told == "suite" {
                return if self.succeeded { Ok(()) } else { fail("the ranks failed".into()) };
            }
            if self.succeeded {
                return fail("the job's status is that of success".into());
            }
            if !self.output.contains("rank 1: gave up on purpose") {
                return fail("the failing rank's message is missing".into());
            }
            let failed_at = self.output.lines().find_map(|line| line.strip_prefix("failing at ")?.parse::<u128>().ok());
            match failed_at.map(|at| self.at_ms.saturating_sub(at)) {
                Some(ms) if ms < 2000 => Ok(()),
                Some(ms) => fail(format!("the job ended {ms} ms after the failure, expected less than 2000")),
                None => fail("the failing rank said no time".into()),
            }
        }
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
