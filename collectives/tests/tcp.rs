//! The TCP back end: every common case on 1, 2, 3 and 4 processes, how a job ends when a rank fails, and what a rank is told
//! that cannot get into the job.
//!
//! Without a test harness, since the ranks are processes: started plainly it starts itself, once for each rank, with its rank,
//! the number of ranks and a port as its first arguments.

mod common;
mod launcher;

use anyhow::{Context, Result, bail};
use collectives::{Error, Group, Tensor, tcp};
use launcher::{Test, now_ms};
use std::{
    env,
    hint::black_box,
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    panic,
    process::{self, Command, ExitCode},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

const TESTS: &[Test] = &[
    Test { name: "all_cases_on_1_rank", ranks: 1, told: &["suite"] },
    Test { name: "all_cases_on_2_ranks", ranks: 2, told: &["suite"] },
    Test { name: "all_cases_on_3_ranks", ranks: 3, told: &["suite"] },
    Test { name: "all_cases_on_4_ranks", ranks: 4, told: &["suite"] },
    Test { name: "a_panic_ends_the_job", ranks: 4, told: &["panic"] },
    Test { name: "an_error_ends_the_job", ranks: 4, told: &["error"] },
    Test { name: "ranks_may_end_at_different_times", ranks: 3, told: &["farewell"] },
    Test { name: "a_port_in_use_is_passed_over", ranks: 3, told: &["occupied"] },
    Test { name: "who_is_missing_is_said", ranks: 0, told: &["missing"] },
];

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some("rank") => rank(&args[1..]),
        _ => launcher::main(TESTS, run),
    }
}

fn run(test: &Test) -> Result<(), String> {
    if test.told == ["missing"] {
        return who_is_missing_is_said();
    }
    let port = free_port();
    let occupied = if test.told == ["occupied"] { Some(deaf(port)) } else { None };
    let program = env::current_exe().map_err(|e| e.to_string())?;
    let rank = |rank: usize| {
        let mut command = Command::new(&program);
        command.args(["rank", &rank.to_string(), &test.ranks.to_string(), &port.to_string()]).args(test.told);
        command.env("OMP_NUM_THREADS", "1");
        command
    };
    // The last first: rank 0 may come late.
    let end = launcher::job((0..test.ranks).rev().map(rank).collect())?;
    drop(occupied);
    end.check(test)
}

fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    // Room for the ports after it.
    listener.local_addr().expect("a port").port().min(65000)
}

/// Another program on the port: it reads what it is sent and closes.
fn deaf(port: u16) -> TcpListener {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).expect("the port is free");
    let accepting = listener.try_clone().expect("a second handle");
    thread::spawn(move || {
        for socket in accepting.incoming().flatten() {
            let mut socket: TcpStream = socket;
            let _ = socket.read(&mut [0; 256]);
            let _ = socket.write_all(b"who are you?\n");
        }
    });
    listener
}

fn options(rank: usize, size: usize, port: u16, seconds: u64) -> tcp::Options {
    tcp::Options {
        rank,
        size,
        address: "127.0.0.1".into(),
        port,
        token: format!("test-{port}"),
        timeout: Duration::from_secs(seconds),
        on_failure: Arc::new(|error| {
            eprintln!("{error}");
            process::exit(1)
        }),
    }
}

fn who_is_missing_is_said() -> Result<(), String> {
    let port = free_port();
    let zero = thread::spawn(move || tcp::join(&options(0, 4, port, 1)).err().map(|e| e.to_string()));
    let two = thread::spawn(move || tcp::join(&options(2, 4, port, 5)).err().map(|e| e.to_string()));
    let [zero, two] = [zero, two].map(|found| found.join().ok().flatten().unwrap_or_default());
    if !zero.contains("rank 0 of 4") || !zero.contains("ranks [1, 3] have not come within 1 s") {
        return Err(format!("rank 0 said: {zero}"));
    }
    if !two.contains("rank 0 sent no list of ranks") {
        return Err(format!("rank 2 said: {two}"));
    }
    let alone = tcp::join(&options(1, 2, port, 1)).err().map(|e| e.to_string()).unwrap_or_default();
    if !alone.contains("rank 0 did not answer") || !alone.contains("refused") {
        return Err(format!("a rank alone said: {alone}"));
    }
    let twice = thread::spawn(move || tcp::join(&options(0, 3, port, 5)).err().map(|e| e.to_string()));
    let other = tcp::join(&options(1, 2, port, 5)).err().map(|e| e.to_string()).unwrap_or_default();
    let twice = twice.join().ok().flatten().unwrap_or_default();
    if !other.contains("it was told of 2 ranks, rank 0 of 3") || !twice.contains("it was told of 2 ranks") {
        return Err(format!("rank 1 said: {other}; rank 0 said: {twice}"));
    }
    Ok(())
}

fn rank(args: &[String]) -> ExitCode {
    let default = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        default(info);
        process::exit(1);
    }));
    match on_rank(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            // Without unwinding: the others must see it as a failure.
            process::exit(1)
        }
    }
}

fn on_rank(args: &[String]) -> Result<()> {
    let number = |at: usize| args.get(at).context("RANK SIZE PORT")?.parse::<usize>().context("a number");
    let tcp = tcp::join(&options(number(0)?, number(1)?, number(2)? as u16, 60))?;
    let world = tcp.world();
    let done = match args.get(3).map(String::as_str) {
        Some("panic") => fail(&world, &|| panic!("rank 1: gave up on purpose")),
        Some("error") => fail(&world, &|| bail!("rank 1: gave up on purpose")),
        Some("farewell") => farewell(&world),
        Some("occupied") => Ok(world.barrier()?.wait()?),
        _ => suite(&world),
    };
    if let Err(error) = done {
        eprintln!("{error:#}");
        process::exit(1);
    }
    Ok(())
}

fn suite(world: &Group) -> Result<()> {
    assert_eq!(world.backend(), "tcp");
    for (name, case) in common::CASES {
        case(world).with_context(|| format!("{name}, rank {} of {}", world.rank(), world.size()))?;
    }
    Ok(())
}

/// Rank 1 fails while some wait for it and rank 2 only computes.
fn fail(world: &Group, how: &dyn Fn() -> Result<()>) -> Result<()> {
    world.barrier()?.wait()?;
    match world.rank() {
        1 => {
            eprintln!("failing at {}", now_ms());
            return how();
        }
        2 => {
            let mut value = 1.0f64;
            let deadline = Instant::now() + Duration::from_secs(60);
            while Instant::now() < deadline {
                value = black_box(value * 1.000001);
            }
        }
        _ => drop(world.all_gather(&Tensor::from_slice(&[1.0f32]))?.wait()?),
    }
    bail!("rank {} went on without rank 1", world.rank())
}

/// Rank 2 returns at once; what it sent must arrive all the same, and a call that it never makes is an error.
fn farewell(world: &Group) -> Result<()> {
    let long = common::numbers(world.rank(), &[500, 1000], collectives::Kind::Double);
    if world.rank() == 2 {
        world.send(&long, 0)?.wait()?;
        return Ok(());
    }
    thread::sleep(Duration::from_millis(300));
    if world.rank() == 0 {
        let found = world.recv(&[500, 1000], collectives::Kind::Double, 2)?.wait()?;
        common::assert_same(&found, &common::numbers(2, &[500, 1000], collectives::Kind::Double));
    }
    match world.all_gather(&long)?.wait() {
        Err(Error::RankFailed { rank: 2, message }) if message.contains("all_gather #0 on group world") => Ok(()),
        other => bail!("a gather without rank 2 gave {other:?}"),
    }
}
