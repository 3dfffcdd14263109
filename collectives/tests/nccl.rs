//! The NCCL back end: every common case with tensors on GPUs, on 1, 2 and 4 processes over TCP, and how a job ends when ranks
//! disagree or one never comes.
//!
//! As `tcp.rs`, it starts itself once for each rank. Several ranks need as many GPUs, or one GPU, NCCL 2.30 or later and
//! NCCL_MULTI_RANK_GPU_ENABLE=1; LASP_NCCL names another libnccl.so.2 than libtorch's own.

mod common;
#[allow(dead_code)]
mod launcher;

use anyhow::{Context, Result, bail, ensure};
use collectives::{Group, Kind, Tensor, nccl, tcp};
use launcher::{Test, now_ms};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::{
    env,
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    process::{self, Command, ExitCode},
    sync::Arc,
    time::{Duration, Instant},
};
use tch::{Cuda, Device};

const TESTS: &[Test] = &[
    Test { name: "all_cases_on_1_rank", ranks: 1, told: &["suite"] },
    Test { name: "all_cases_on_2_ranks", ranks: 2, told: &["suite"] },
    Test { name: "all_cases_on_4_ranks", ranks: 4, told: &["suite"] },
    Test { name: "beside_the_work_on_1_rank", ranks: 1, told: &["beside"] },
    Test { name: "beside_the_work_on_2_ranks", ranks: 2, told: &["beside"] },
    Test { name: "beside_the_work_on_4_ranks", ranks: 4, told: &["beside"] },
    Test { name: "peer_copies_on_2_ranks", ranks: 2, told: &["copies"] },
    Test { name: "peer_copies_on_4_ranks", ranks: 4, told: &["copies"] },
    Test { name: "neighbours_are_connected_on_2_ranks", ranks: 2, told: &["connect"] },
    Test { name: "neighbours_are_connected_on_4_ranks", ranks: 4, told: &["connect"] },
    Test { name: "communication_runs_beside_computation", ranks: 1, told: &["overlap"] },
    Test { name: "disagreement_ends_the_job", ranks: 2, told: &["mismatch"] },
    Test { name: "a_rank_that_never_comes_ends_the_job", ranks: 2, told: &["absent"] },
    Test { name: "a_rank_that_does_not_connect_ends_the_job", ranks: 2, told: &["alone"] },
];

/// Cases in which ranks disagree, and the group works on.
const DISAGREEING: [&str; 2] = ["mismatches_are_named_on_every_rank", "a_message_must_be_as_expected"];

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "rank") {
        return rank(&args[1..]);
    }
    launcher::main(TESTS, |test| match missing(test.ranks) {
        Some(missing) => {
            println!("not tested: {missing}");
            Ok(())
        }
        None => run(test),
    })
}

/// What this machine lacks for so many ranks.
fn missing(ranks: usize) -> Option<String> {
    nccl::missing(ranks, open_cuda().map_or(0, |_| Cuda::device_count() as usize))
}

/// libtorch's CUDA part, after another NCCL if one is named.
fn open_cuda() -> Result<Library> {
    if let Some(path) = env::var_os("LASP_NCCL") {
        nccl::Library::open(Some(&PathBuf::from(path)))?;
    }
    // SAFETY: a library that libtorch itself is made to load in this way.
    Ok(unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL) }?)
}

fn run(test: &Test) -> Result<(), String> {
    let program = env::current_exe().map_err(|e| e.to_string())?;
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|l| l.local_addr()).map_err(|e| e.to_string())?;
    let port = port.port().min(65000);
    let rank = |rank: usize| {
        let mut command = Command::new(&program);
        command.args(["rank", &rank.to_string(), &test.ranks.to_string(), &port.to_string()]).args(test.told);
        // As `kernels::bridge::open_cuda` has it.
        command.env("CUDA_DEVICE_MAX_CONNECTIONS", "32");
        command
    };
    let end = launcher::job((0..test.ranks).map(rank).collect())?;
    let expected: &[&str] = match test.told[0] {
        "mismatch" => &["all_gather #1 on group world", "shapes differ: rank 0 [2, 3] f32, rank 1 [2, 4] f32"],
        "absent" => &["rank 0: all_gather #1 on group world, 24 bytes, on the GPU: it has not ended within 2 s"],
        "alone" => {
            &["rank 0: connect #0 on group world", "not all of its ranks have come to make a communicator within 2 s"]
        }
        _ if end.succeeded => {
            end.output
                .lines()
                .filter(|line| line.starts_with("not tested"))
                .take(1)
                .for_each(|line| println!("{line}"));
            return Ok(());
        }
        _ => return Err(format!("the ranks failed\n{}", end.output)),
    };
    match expected.iter().find(|words| end.succeeded || !end.output.contains(**words)) {
        None => Ok(()),
        Some(missing) => Err(format!("expected a failure with {missing:?}\n{}", end.output)),
    }
}

fn rank(args: &[String]) -> ExitCode {
    match on_rank(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            process::exit(1)
        }
    }
}

fn on_rank(args: &[String]) -> Result<()> {
    let number = |at: usize| args.get(at).context("RANK SIZE PORT")?.parse::<usize>().context("a number");
    let (rank, size, port) = (number(0)?, number(1)?, number(2)? as u16);
    let told = args.get(3).map(String::as_str);
    let _opened = open_cuda()?;
    ensure!(Cuda::is_available(), "libtorch sees no GPU");
    let gpu = rank % Cuda::device_count() as usize;
    let on_failure = Arc::new(|error: collectives::Error| {
        eprintln!("{error}");
        process::exit(1)
    });
    let tcp = tcp::join(&tcp::Options {
        rank,
        size,
        address: "127.0.0.1".into(),
        port,
        token: format!("test-{port}"),
        timeout: Duration::from_secs(60),
        on_failure: on_failure.clone(),
    })?;
    let mut options = nccl::Options::new(on_failure);
    match told {
        Some("suite") => {
            options.check = nccl::Check::Before;
            options.peer_copies = nccl::PeerCopies::Never;
        }
        Some("copies") => options.peer_copies = nccl::PeerCopies::Always,
        Some("absent" | "alone") => (options.check, options.timeout) = (nccl::Check::Never, Duration::from_secs(2)),
        _ => {}
    }
    let started = now_ms();
    let world = nccl::open(&tcp.world(), gpu, nccl::Library::open(None)?, options)?;
    let device = Device::Cuda(gpu);
    ensure!(common::DEVICE.set(device).is_ok(), "the device is set once");
    assert_eq!((world.device(), world.backend(), world.backend_on(device)), (device, "tcp", "nccl"));
    match told {
        Some("suite") => suite(&world, |_| true),
        Some("beside") => suite(&world, |name| !DISAGREEING.contains(&name)),
        Some("copies") => copies(&world),
        Some("overlap") => overlap(&world),
        Some("connect") => connect(&world),
        Some("alone") => alone(&world),
        _ => disagree(&world, told),
    }?;
    if env::var_os("LASP_TIMES").is_some() && rank == 0 {
        println!("{size} ranks, {told:?}: {} ms", now_ms() - started);
    }
    let ending = Instant::now();
    drop(world);
    // Ranks that end their communicators one by one, each in an order of its own, wait for each other until they give up.
    ensure!(ending.elapsed() < Duration::from_secs(8), "communicators took {:?} to end", ending.elapsed());
    Ok(())
}

fn suite(world: &Group, chosen: impl Fn(&str) -> bool) -> Result<()> {
    for (name, case) in common::CASES.iter().filter(|(name, _)| chosen(name)) {
        let started = now_ms();
        case(world).with_context(|| format!("{name}, rank {} of {}", world.rank(), world.size()))?;
        if env::var_os("LASP_TIMES").is_some() && world.rank() == 0 {
            println!("{name}: {} ms", now_ms() - started);
        }
    }
    // Tensors on the CPU still travel as before.
    let x = Tensor::from_slice(&[world.rank() as f32]);
    ensure!(world.all_gather(&x)?.wait()?.device() == Device::Cpu, "a tensor on the CPU came back elsewhere");
    world.recorder().settle();
    Ok(())
}

/// Many gathers in a row, of sizes on both sides of the limit, and their neighbours.
fn copies(world: &Group) -> Result<()> {
    suite(world, |name| ["equal_shapes", "uneven_rows", "many_in_flight", "splits"].contains(&name))?;
    let (rank, w) = (world.rank(), world.size());
    match world.peer_copies().up_to {
        0 => println!("not tested: this driver lets processes open no memory of each other"),
        longest => assert_eq!(longest, 1 << 20),
    }
    let mut pending = Vec::new();
    for round in 0..60i64 {
        let n = [1, 77, 4096, 1 << 18, (1 << 18) + 1][round as usize % 5];
        let of = |rank: usize| common::numbers(rank, &[n], Kind::Float) + round;
        let expected = Tensor::stack(&(0..w).map(of).collect::<Vec<_>>(), 0);
        pending.push((world.all_gather(&of(rank))?, expected));
        if round % 7 == 6 {
            for (gathered, expected) in pending.drain(..) {
                common::assert_same(&gathered.wait()?, &expected);
            }
        }
    }
    for (gathered, expected) in pending {
        common::assert_same(&gathered.wait()?, &expected);
    }
    Ok(())
}

/// Messages both ways around, by communicators that are there before.
fn connect(world: &Group) -> Result<()> {
    let (rank, w) = (world.rank(), world.size());
    let [next, last] = [1, w - 1].map(|step| (rank + step) % w);
    // Some of it, and then all, of which some is there.
    world.connect(&[next], &[last])?;
    world.connect(&[next, last], &[next, last])?;
    for round in 0..4i64 {
        let of = |rank: usize| common::numbers(rank, &[1000 + round], Kind::Float);
        let sent = world.send(&of(rank), next)?;
        let back = world.send(&(of(rank) + 1), last)?;
        let there = world.recv(&[1000 + round], Kind::Float, last)?;
        let returned = world.recv(&[1000 + round], Kind::Float, next)?;
        common::assert_same(&there.wait()?, &of(last));
        common::assert_same(&returned.wait()?, &(of(next) + 1));
        sent.wait()?;
        back.wait()?;
    }
    world.recorder().settle();
    Ok(())
}

fn alone(world: &Group) -> Result<()> {
    if world.rank() == 0 {
        world.connect(&[1], &[])?;
        bail!("rank 0 connected with nobody");
    }
    std::thread::sleep(Duration::from_secs(5));
    bail!("rank 0 went on");
}

/// A gather issued before a long computation ends inside it, and waiting for it then costs next to nothing.
fn overlap(world: &Group) -> Result<()> {
    let device = common::device();
    let x = Tensor::zeros([1 << 20], (Kind::Float, device));
    let a = Tensor::rand([4096, 4096], (Kind::Float, device));
    let recorder = world.recorder();
    for round in 0..3 {
        recorder.settle();
        recorder.clear();
        let gathered = {
            let _span = recorder.span("busy");
            let gathered = world.all_gather(&x)?;
            for _ in 0..8 {
                let _product = a.matmul(&a);
            }
            gathered
        };
        let _x = gathered.wait()?;
        recorder.settle();
        let (comm, busy) = (recorder.comm_spans(), recorder.compute_spans());
        let (Some(comm), Some(busy)) = (comm.first(), busy.first()) else { bail!("no spans: {comm:?}, {busy:?}") };
        println!("round {round}: {comm:?} {busy:?}");
        // The first round makes the communicator, and the matrix library its plan.
        if round > 0 {
            ensure!(busy.started_ns <= comm.started_ns && comm.ended_ns <= busy.ended_ns, "{comm:?} beside {busy:?}");
            ensure!(comm.exposed_ns < 100_000, "exposed for {} ns", comm.exposed_ns);
        }
    }
    Ok(())
}

/// Rank 1 brings another shape, or nothing.
fn disagree(world: &Group, told: Option<&str>) -> Result<()> {
    let _together = world.all_gather(&common::numbers(world.rank(), &[2, 3], Kind::Float))?.wait()?;
    Cuda::synchronize(0);
    if told == Some("absent") && world.rank() == 1 {
        std::thread::sleep(Duration::from_secs(20));
        bail!("rank 0 went on");
    }
    let x = common::numbers(world.rank(), &[2, 3 + world.rank() as i64], Kind::Float);
    let gathered = world.all_gather(&x)?.wait()?;
    std::thread::sleep(Duration::from_secs(20));
    bail!("a gather of different shapes gave {gathered:?}")
}
