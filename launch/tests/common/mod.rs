//! Running the program: alone or under mpirun, with what it printed.

#![allow(dead_code)]

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use lasp_tests::mpirun;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_lasp");

/// How ranks are started.
#[derive(Clone, Copy, Debug)]
pub enum Ranks {
    Threads(usize),
    Mpi(usize),
}

pub struct Ran {
    pub ok: bool,
    pub out: String,
    pub err: String,
    /// From the first line on stdout to the end.
    pub since_first_line: Duration,
}

impl Ran {
    #[track_caller]
    pub fn succeeds(self) -> Ran {
        assert!(self.ok, "failed:\n{}{}", self.out, self.err);
        self
    }

    /// It failed, and said all of `words` on stderr.
    #[track_caller]
    pub fn fails_with(self, words: &[&str]) -> Ran {
        assert!(!self.ok, "succeeded:\n{}", self.out);
        for word in words {
            assert!(self.err.contains(word), "expected {word:?} in:\n{}", self.err);
        }
        self
    }
}

/// Whether ranks can be processes here; says so where they cannot.
pub fn mpi() -> bool {
    let there = cfg!(feature = "mpi") && mpirun::available();
    if !there {
        println!("not tested under mpirun: there is none, or built without mpi");
    }
    there
}

/// The program, or mpirun of it. The number of threads is passed as `--ranks` by the caller.
pub fn command(ranks: Ranks) -> Command {
    match ranks {
        Ranks::Threads(_) => {
            // Tests run side by side: more threads than cores would spin at each other's barriers.
            let mut command = Command::new(PROGRAM);
            command.env("OMP_NUM_THREADS", "1");
            command
        }
        Ranks::Mpi(n) => mpirun::mpirun(n, Path::new(PROGRAM)),
    }
}

/// Much longer than any command here takes: what runs on after that hangs.
const LIMIT: Duration = Duration::from_secs(600);

#[track_caller]
pub fn run(command: &mut Command) -> Ran {
    run_within(LIMIT, command)
}

/// Runs it, or fails when it has not ended by then.
#[track_caller]
pub fn run_within(limit: Duration, command: &mut Command) -> Ran {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    let mut stdout = BufReader::new(child.stdout.take().expect("a pipe"));
    let lines = thread::spawn(move || {
        let mut bytes = vec![];
        stdout.read_until(b'\n', &mut bytes).expect("stdout is read");
        let first = Instant::now();
        stdout.read_to_end(&mut bytes).expect("stdout is read");
        (first, bytes)
    });
    let mut stderr = child.stderr.take().expect("a pipe");
    let errors = thread::spawn(move || {
        let mut bytes = vec![];
        stderr.read_to_end(&mut bytes).expect("stderr is read");
        bytes
    });
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("the program ends") {
            break status;
        }
        if started.elapsed() > limit {
            child.kill().expect("the program is killed");
            panic!("still running after {limit:?}: {command:?}");
        }
        thread::sleep(Duration::from_millis(2));
    };
    let ended = Instant::now();
    let (first, stdout) = lines.join().expect("stdout is read");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let err = text(errors.join().expect("stderr is read"));
    Ran { ok: status.success(), out: text(stdout), err, since_first_line: ended - first }
}

pub fn lasp(args: &[&str]) -> Ran {
    run(Command::new(PROGRAM).args(args))
}
