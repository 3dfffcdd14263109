//! For tests whose ranks are processes: runs a list of jobs as tests.

use libtest_mimic::{Arguments, Trial};
use std::{
    io::Read,
    process::{Child, Command, ExitCode, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

pub const LIMIT: Duration = Duration::from_secs(300);

pub struct Test {
    pub name: &'static str,
    pub ranks: usize,
    /// What the ranks are told. The first word `panic` or `error`: rank 1 fails on purpose.
    pub told: &'static [&'static str],
}

/// Runs the tests that the command line chooses, one after another.
pub fn main(tests: &'static [Test], run: fn(&Test) -> Result<(), String>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let trials = tests.iter().map(|test| Trial::test(test.name, move || Ok(run(test)?))).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// How a job ended.
pub struct End {
    pub succeeded: bool,
    pub output: String,
    pub at_ms: u128,
}

/// Starts the commands and waits until all have ended; an error if that takes longer than [`LIMIT`].
pub fn job(commands: Vec<Command>) -> Result<End, String> {
    let started: Vec<_> = commands.into_iter().map(start).collect::<Result<_, _>>()?;
    let (mut jobs, pipes): (Vec<Child>, Vec<_>) = started.into_iter().unzip();
    let deadline = Instant::now() + LIMIT;
    let mut succeeded = Some(true);
    for job in &mut jobs {
        match wait(job, deadline)? {
            Some(success) => succeeded = succeeded.map(|all| all && success),
            None => succeeded = None,
        }
    }
    let at_ms = now_ms();
    let output = pipes.into_iter().flatten().map(|pipe| pipe.join().unwrap_or_default()).collect::<String>();
    match succeeded {
        Some(succeeded) => Ok(End { succeeded, output, at_ms }),
        None => Err(format!("no end after {LIMIT:?}\n{output}")),
    }
}

fn start(mut command: Command) -> Result<(Child, [JoinHandle<String>; 2]), String> {
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut job = command.spawn().map_err(|e| format!("cannot start {command:?}: {e}"))?;
    let (stdout, stderr) = (job.stdout.take(), job.stderr.take());
    Ok((job, [thread::spawn(move || read(stdout)), thread::spawn(move || read(stderr))]))
}

/// Whether it succeeded; `None`: it had to be killed.
fn wait(job: &mut Child, deadline: Instant) -> Result<Option<bool>, String> {
    loop {
        if let Some(status) = job.try_wait().map_err(|e| e.to_string())? {
            return Ok(Some(status.success()));
        }
        if Instant::now() > deadline {
            let _ = job.kill();
            let _ = job.wait();
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(5));
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
    /// It ended as its test says: well, or soon after rank 1 failed and with its message.
    pub fn check(self, test: &Test) -> Result<(), String> {
        let fail = |why: String| Err(format!("{why}\n{}", self.output));
        if !["panic", "error"].contains(&test.told[0]) {
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
