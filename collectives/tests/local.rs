//! The local back end: every common case at 1, 2, 3, 4 and 8 ranks, and how a run ends when a rank fails.

mod common;

use anyhow::{Result, bail};
use collectives::{Error, Group, Kind, Mesh, Pending, Recorder, Tensor, local};
use std::{
    thread,
    time::{Duration, Instant},
};

fn all_cases(ranks: usize) {
    for (name, case) in common::CASES {
        let ran = local::run(ranks, |world| -> Result<()> { case(&world) });
        if let Err(error) = ran {
            panic!("{name} at {ranks} ranks: {error:#}");
        }
    }
}

#[test]
fn one_rank() {
    all_cases(1);
}

#[test]
fn two_ranks() {
    all_cases(2);
}

#[test]
fn three_ranks() {
    all_cases(3);
}

#[test]
fn four_ranks() {
    all_cases(4);
}

#[test]
fn eight_ranks() {
    all_cases(8);
}

#[test]
fn results_come_in_rank_order_from_named_threads() {
    let names = local::run(3, |world| -> Result<_> {
        Ok((world.rank(), thread::current().name().map(String::from), world.recorder().clone()))
    });
    let names = names.unwrap();
    for (rank, (found, name, _recorder)) in names.iter().enumerate() {
        assert_eq!((*found, name.as_deref()), (rank, Some(format!("rank {rank}").as_str())));
    }
    let none: collectives::Result<Vec<()>> = local::run(0, |_| Ok(()));
    assert!(matches!(none, Err(Error::NoRanks)));
}

/// Runs four ranks of which rank 2 fails while the others wait; gives how the run ended.
fn with_a_failing_rank(fail: impl Fn() -> Result<()> + Sync, wait: impl Fn(&Group) -> Result<()> + Sync) -> String {
    let started = Instant::now();
    let ran = local::run(4, |world| -> Result<()> {
        if world.rank() == 2 {
            thread::sleep(Duration::from_millis(50));
            return fail();
        }
        let first = wait(&world).expect_err("rank 2 never comes");
        let found = first.downcast_ref::<Error>();
        assert!(matches!(found, Some(Error::RankFailed { rank: 2, .. })), "{first}");
        // And whatever is tried later fails at once.
        let later = world.barrier()?.wait();
        assert!(matches!(later, Err(Error::RankFailed { rank: 2, .. })));
        bail!("an error that follows from the first")
    });
    assert!(started.elapsed() < Duration::from_secs(2), "took {:?}", started.elapsed());
    ran.expect_err("rank 2 failed").to_string()
}

fn gather(world: &Group) -> Result<()> {
    Ok(world.all_gather(&Tensor::from_slice(&[1.0f32]))?.wait().map(drop)?)
}

fn receive(world: &Group) -> Result<()> {
    Ok(world.recv(&[1], Kind::Float, 2)?.wait().map(drop)?)
}

#[test]
fn a_panic_ends_the_run() {
    for wait in [gather, receive] {
        assert_eq!(with_a_failing_rank(|| panic!("gave up {}", "here"), wait), "rank 2 failed: gave up here");
    }
}

#[test]
fn an_error_ends_the_run() {
    for wait in [gather, receive] {
        assert_eq!(with_a_failing_rank(|| bail!("no data"), wait), "no data");
    }
}

#[test]
fn a_rank_that_returns_early_is_named() {
    for (wait, what) in [(gather as fn(&Group) -> Result<()>, "all_gather #0"), (receive, "recv #0 from rank 2")] {
        let ran = local::run(4, |world| if world.rank() == 2 { Ok(()) } else { wait(&world) });
        let found = ran.unwrap_err().to_string();
        assert!(found.starts_with("rank 2 failed: it has returned") && found.contains(what), "{found}");
    }
}

#[test]
fn what_nobody_waited_for_is_completed() {
    let recorders = local::run(2, |world| -> Result<_> {
        drop(world.all_gather(&Tensor::from_slice(&[1.0f32]))?);
        Ok(world.recorder().clone())
    });
    assert!(recorders.unwrap().iter().all(|recorder| recorder.comm_spans().len() == 1));
}

#[test]
fn handles_may_change_threads() {
    fn send<T: Send>() {}
    fn sync<T: Sync>() {}
    send::<Group>();
    send::<Mesh>();
    send::<Pending<Tensor>>();
    send::<Recorder>();
    sync::<Recorder>();
    sync::<Error>();
}

#[test]
fn a_group_that_outlives_its_run_says_so() {
    let group = local::run(1, |world| -> Result<Group> { Ok(world) }).unwrap().remove(0);
    let later = group.barrier().unwrap().wait();
    assert!(matches!(later, Err(Error::Stopped { op: "barrier", .. })));
}
