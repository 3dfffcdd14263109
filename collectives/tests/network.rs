//! Emulated networks: operations take what the formulas say and never less, ranks compute meanwhile, results are the
//! same, and errors do not wait for the network. Upper limits are those of the best of a few tries, for busy machines.

mod common;

use anyhow::{Result, bail};
use collectives::{Error, Group, Kind, Pending, Reduce, Tensor, bench, local};
use local::Network;
use std::{
    hint::black_box,
    thread,
    time::{Duration, Instant},
};
use tch::Device;

const TRIES: usize = 4;

fn zeros(shape: &[i64]) -> Tensor {
    Tensor::zeros(shape, (Kind::Float, Device::Cpu))
}

fn network(text: &str) -> Network {
    text.parse().unwrap()
}

/// The best of several tries comes close to the expected time.
#[track_caller]
fn assert_quick(what: &str, tries: &[Duration], expected: Duration) {
    let best = tries.iter().min().unwrap();
    assert!(*best < expected.mul_f64(1.25) + Duration::from_millis(15), "{what} took {best:?}, expected {expected:?}");
}

type Timed = Box<dyn Fn() -> Result<()>>;

/// Times are for 2 nodes of 2: 25,000 numbers take 5 + 5 ms within a node and 10 + 10 ms between them.
fn timed_operations(world: &Group) -> Result<Vec<(&'static str, u64, Timed)>> {
    const N: i64 = 25_000;
    let pair = world.split("pair", world.rank() / 2, 0)?;
    let across = world.split("across", world.rank() % 2, 0)?;
    let group = || world.clone();
    let timed = |group: Group, op: fn(&Group) -> Result<()>| -> Timed { Box::new(move || op(&group)) };
    Ok(vec![
        ("all_gather", 50, timed(group(), |g| Ok(g.all_gather(&zeros(&[N]))?.wait().map(drop)?))),
        ("all_gather on a node", 10, timed(pair, |g| Ok(g.all_gather(&zeros(&[N]))?.wait().map(drop)?))),
        ("all_gather between nodes", 20, timed(across, |g| Ok(g.all_gather(&zeros(&[N]))?.wait().map(drop)?))),
        ("reduce_scatter", 50, timed(group(), |g| Ok(g.reduce_scatter(&zeros(&[4, N]))?.wait().map(drop)?))),
        ("all_reduce", 100, timed(group(), |g| Ok(g.all_reduce(&zeros(&[4 * N]), Reduce::Sum)?.wait().map(drop)?))),
        ("a short all_reduce", 40, timed(group(), |g| Ok(g.all_reduce(&zeros(&[4]), Reduce::Max)?.wait().map(drop)?))),
        ("all_to_all", 60, timed(group(), |g| Ok(g.all_to_all(&zeros(&[4, N]))?.wait().map(drop)?))),
        ("broadcast", 35, timed(group(), |g| Ok(g.broadcast(&zeros(&[N]), 1)?.wait().map(drop)?))),
        ("barrier", 20, timed(group(), |g| Ok(g.barrier()?.wait()?))),
    ])
}

#[test]
fn operations_take_what_the_formulas_say() {
    let network = network("node=2,intra=5ms/20MB/s,inter=10ms/10MB/s");
    let ran = local::run_on(Some(&network), 4, |world| -> Result<_> {
        let mut all = Vec::new();
        for (what, ms, op) in timed_operations(&world)? {
            let mut tries = Vec::new();
            for _ in 0..TRIES {
                world.barrier()?.wait()?;
                let start = Instant::now();
                op()?;
                tries.push(start.elapsed());
            }
            all.push((what, Duration::from_millis(ms), tries));
        }
        Ok(all)
    });
    let ranks = ran.unwrap();
    for (i, (what, expected, _)) in ranks[0].iter().enumerate() {
        let of_try = |n: usize| ranks.iter().map(move |rank| rank[i].2[n]);
        for n in 0..TRIES {
            assert!(of_try(n).all(|took| took >= *expected), "{what}: {:?}", of_try(n).collect::<Vec<_>>());
        }
        let slowest: Vec<Duration> = (0..TRIES).filter_map(|n| of_try(n).max()).collect();
        assert_quick(what, &slowest, *expected);
    }
}

/// Messages `(from, to)` of 20 ms on links of 10 ms latency, all sent at once in this order, and when each must arrive.
fn messages_arrive(sent: &[(usize, usize)], expected_ms: &[u64]) {
    const N: i64 = 50_000;
    let network = network("node=4,intra=10ms/10MB/s,inter=1s/1MB/s");
    let mut tries = vec![Vec::new(); sent.len()];
    for _ in 0..TRIES {
        let ran = local::run_on(Some(&network), 4, |world| -> Result<_> {
            let mine = |rank: usize| rank == world.rank();
            world.barrier()?.wait()?;
            let start = Instant::now();
            for (_, to) in sent.iter().filter(|(from, _)| mine(*from)) {
                world.send(&zeros(&[N]), *to)?.wait()?;
            }
            let mut ends = Vec::new();
            for (i, (from, _)) in sent.iter().enumerate().filter(|(_, (_, to))| mine(*to)) {
                let _ = world.recv(&[N], Kind::Float, *from)?.wait()?;
                ends.push((i, Instant::now()));
            }
            Ok((start, ends))
        });
        let ranks = ran.unwrap();
        let first = ranks.iter().map(|(start, _)| *start).min().unwrap();
        for (i, end) in ranks.iter().flat_map(|(_, ends)| ends) {
            // The earliest possible start, for the strict limit below.
            tries[*i].push(*end - first);
        }
    }
    for (i, ms) in expected_ms.iter().enumerate() {
        let expected = Duration::from_millis(*ms);
        assert!(tries[i].iter().all(|took| *took >= expected), "message {i} of {sent:?}: {:?}", tries[i]);
        assert_quick(&format!("message {i} of {sent:?}"), &tries[i], expected);
    }
}

#[test]
fn messages_queue_on_a_link_they_share() {
    messages_arrive(&[(0, 1)], &[30]);
    // The same way twice; the same sender; none shared.
    messages_arrive(&[(0, 1), (0, 1)], &[30, 50]);
    messages_arrive(&[(0, 1), (0, 2), (0, 3)], &[30, 50, 70]);
    messages_arrive(&[(0, 1), (1, 0), (2, 3)], &[30, 30, 30]);
}

#[test]
fn messages_queue_at_their_receiver() {
    let network = network("node=4,intra=10ms/10MB/s,inter=1s/1MB/s");
    let took = local::run_on(Some(&network), 3, |world| -> Result<_> {
        world.barrier()?.wait()?;
        let start = Instant::now();
        if world.rank() > 0 {
            world.send(&zeros(&[50_000]), 0)?.wait()?;
            return Ok((start, start));
        }
        // Either may be first.
        let both = [world.recv(&[50_000], Kind::Float, 1)?, world.recv(&[50_000], Kind::Float, 2)?];
        both.into_iter().try_for_each(|message| message.wait().map(drop))?;
        Ok((start, Instant::now()))
    });
    let ranks = took.unwrap();
    let sent = ranks[1].0.min(ranks[2].0);
    let took = ranks[0].1 - sent;
    assert!(took >= Duration::from_millis(50), "{took:?}");
}

#[test]
fn what_is_queued_takes_no_longer_than_its_parts() {
    let network = network("node=4,intra=20ms/1GB/s,inter=1s/1MB/s");
    let ran = local::run_on(Some(&network), 2, |world| -> Result<_> {
        let mut tries = Vec::new();
        for _ in 0..TRIES {
            world.barrier()?.wait()?;
            let start = Instant::now();
            let pending: Vec<Pending<Tensor>> =
                (0..4).map(|_| world.all_gather(&zeros(&[1]))).collect::<collectives::Result<_>>()?;
            pending.into_iter().try_for_each(|pending| pending.wait().map(drop))?;
            tries.push(start.elapsed());
        }
        Ok(tries)
    });
    let tries = ran.unwrap().remove(0);
    let expected = Duration::from_millis(80);
    assert!(tries.iter().all(|took| *took >= expected), "{tries:?}");
    assert_quick("four all_gathers", &tries, expected);
}

#[test]
fn ranks_compute_while_messages_travel() {
    let network = network("node=4,intra=150ms/1GB/s,inter=1s/1MB/s");
    let busy = Duration::from_millis(100);
    let ran = local::run_on(Some(&network), 2, |world| -> Result<_> {
        let peer = 1 - world.rank();
        let mut tries = Vec::new();
        for _ in 0..TRIES {
            world.barrier()?.wait()?;
            let start = Instant::now();
            world.send(&zeros(&[10]), peer)?.wait()?;
            let pending = [world.all_gather(&zeros(&[10]))?, world.recv(&[10], Kind::Float, peer)?];
            let mut value = 1.0f64;
            while start.elapsed() < busy {
                value = black_box(value * 1.000001);
            }
            let computed = start.elapsed();
            assert!(computed > Duration::from_millis(140) || !pending.iter().any(Pending::is_ready));
            pending.into_iter().try_for_each(|pending| pending.wait().map(drop))?;
            tries.push(start.elapsed());
        }
        let spans = world.recorder().comm_spans();
        let gathers = spans.iter().filter(|span| span.op == "all_gather");
        Ok((tries, gathers.map(|span| Duration::from_nanos(span.exposed_ns)).collect::<Vec<_>>()))
    });
    for (tries, exposed) in ran.unwrap() {
        assert_quick("computing and communicating", &tries, Duration::from_millis(150));
        assert!(*exposed.iter().min().unwrap() < Duration::from_millis(90), "{exposed:?}");
    }
}

#[test]
fn results_are_those_without_a_network() {
    let network = network("node=2,intra=20us/1GB/s,inter=100us/200MB/s");
    for ranks in [1, 3, 4] {
        for (name, case) in common::CASES {
            if let Err(error) = local::run_on(Some(&network), ranks, |world| -> Result<()> { case(&world) }) {
                panic!("{name} at {ranks} ranks: {error:#}");
            }
        }
    }
}

/// On a network where everything takes a minute, the run ends at once with this error.
#[track_caller]
fn ends_at_once(expected: &str, body: impl Fn(&Group) -> Result<()> + Sync) {
    let network = network("node=1,intra=1us/1GB/s,inter=60s/1KB/s");
    let started = Instant::now();
    let found = local::run_on(Some(&network), 4, |world| body(&world)).unwrap_err().to_string();
    assert!(started.elapsed() < Duration::from_secs(2), "took {:?}", started.elapsed());
    assert!(found.contains(expected), "{found}");
}

#[test]
fn errors_do_not_wait_for_the_network() {
    let x = || zeros(&[3]);
    // Rank 2 fails when everything has been sent and nothing has arrived.
    let fails_while = |wait: fn(Pending<Tensor>, Pending<Tensor>) -> collectives::Result<Tensor>| {
        ends_at_once("no data", |world| {
            let (rank, w) = (world.rank(), world.size());
            world.send(&x(), (rank + 1) % w)?.wait()?;
            let message = world.recv(&[3], Kind::Float, (rank + w - 1) % w)?;
            let gathered = world.all_gather(&x())?;
            if rank == 2 {
                thread::sleep(Duration::from_millis(50));
                bail!("no data");
            }
            let error = wait(gathered, message).expect_err("nothing can have arrived");
            assert!(matches!(error, Error::RankFailed { rank: 2, .. }), "{error}");
            bail!("an error that follows from the first")
        });
    };
    fails_while(|gathered, _| gathered.wait());
    fails_while(|_, message| message.wait());
    ends_at_once("shapes differ: rank 0 [1] f32", |world| {
        Ok(world.all_gather(&zeros(&[1 + world.rank() as i64 % 2]))?.wait().map(drop)?)
    });
    ends_at_once("shapes differ: rank 0 sent [3] f32", |world| match world.rank() {
        0 => Ok(world.send(&x(), 1)?.wait()?),
        1 => Ok(world.recv(&[2], Kind::Float, 0)?.wait().map(drop)?),
        _ => Ok(()),
    });
    ends_at_once("rank 2 failed: it has returned", |world| match world.rank() {
        2 => Ok(()),
        _ => Ok(world.all_gather(&x())?.wait().map(drop)?),
    });
}

#[test]
fn the_benchmark_finds_the_bandwidth_of_the_network() {
    let network = network("node=2,intra=50us/1GB/s,inter=100us/50MB/s");
    let options = bench::Options { sizes: vec![4 << 20], iterations: 5, ..Default::default() };
    let ranks = local::run_on(Some(&network), 4, |world| bench::run(&world, &options)).unwrap();
    assert!(ranks.iter().all(|rows| *rows == ranks[0]), "ranks differ: {ranks:?}");
    assert_eq!(ranks[0].len(), bench::COLLECTIVES.len());
    for row in &ranks[0] {
        assert!(row.busbw <= 0.050 && row.busbw > 0.8 * 0.050, "{row:?}");
    }
}
