//! The local back end: ranks as threads of one process. It runs on a laptop, needs no launcher, and is what tests use.
//!
//! [`run`] starts the ranks and collects their results. A rank that fails, by an error or a panic, ends the run: the
//! others get [`Error::RankFailed`] from whatever they wait for, and from all they try afterwards.
//!
//! [`run_on`] does so on an emulated network: results come as late as on links of a given latency and bandwidth, while
//! the ranks compute on. The formulas are in `delay.rs`.

mod board;
mod delay;
mod network;
mod wire;

pub use network::{Link, Network};

use crate::{Error, Group, Recorder, flight::Flight, group::Line, progress};
use std::{
    any::Any,
    fmt::Display,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
};

/// Runs `body` on `ranks` threads named `rank 0`, `rank 1`, ..., each with its world group.
///
/// Gives their results in rank order, or the error of the rank that failed first; a panic becomes
/// [`Error::RankFailed`]. Communication still in flight when `body` returns is completed first. To see a rank's record
/// afterwards, let `body` return a clone of [`Group::recorder`].
pub fn run<T, E>(ranks: usize, body: impl Fn(Group) -> Result<T, E> + Sync) -> Result<Vec<T>, E>
where
    T: Send,
    E: From<Error> + Display + Send,
{
    run_on(None, ranks, body)
}

/// [`run`], with every message as slow as on `network`; `None`: as quick as this machine is.
pub fn run_on<T, E>(
    network: Option<&Network>,
    ranks: usize,
    body: impl Fn(Group) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E>
where
    T: Send,
    E: From<Error> + Display + Send,
{
    if ranks == 0 {
        return Err(Error::NoRanks.into());
    }
    let world = Arc::new(board::World::new(ranks, network));
    let body = &body;
    let results: Vec<Result<T, E>> = thread::scope(|scope| {
        let started: Vec<_> = (0..ranks)
            .map(|rank| {
                let world = world.clone();
                let named = thread::Builder::new().name(format!("rank {rank}"));
                named
                    .spawn_scoped(scope, move || one_rank(rank, &world, body))
                    .map_err(|source| Error::Spawn { rank, source })
            })
            .collect();
        if let Some((rank, Err(error))) = started.iter().enumerate().find(|(_, thread)| thread.is_err()) {
            world.fail(rank, error.to_string());
        }
        let joined = started.into_iter().enumerate().map(|(rank, thread)| match thread {
            Ok(thread) => thread.join().unwrap_or_else(|panic| Err(failed(rank, panic.as_ref()).into())),
            Err(error) => Err(error.into()),
        });
        joined.collect()
    });
    let Some(first) = world.failed_first() else { return results.into_iter().collect() };
    let error = results.into_iter().nth(first).and_then(Result::err);
    Err(error.unwrap_or_else(|| world.failure().unwrap_or(Error::NoRanks).into()))
}

fn one_rank<T, E>(rank: usize, world: &Arc<board::World>, body: &impl Fn(Group) -> Result<T, E>) -> Result<T, E>
where
    E: From<Error> + Display,
{
    let queue = world.queue(rank);
    let recorder = Recorder::new();
    let (mut wire, face) = wire::LocalWire::new(rank, world.clone());
    let line = Line { queue: queue.clone(), recorder: recorder.clone(), backend: "local", flight: Flight::default() };
    let group = Group::new(face, line);
    let progress = {
        let (queue, world) = (queue.clone(), world.clone());
        let named = thread::Builder::new().name(format!("rank {rank} progress"));
        named.spawn(move || {
            let run = AssertUnwindSafe(|| progress::run(&queue, &recorder, &mut wire));
            if let Err(panic) = catch_unwind(run) {
                world.fail(rank, format!("its progress thread panicked: {}", panic_message(panic.as_ref())));
                queue.close();
            }
        })
    };
    let progress = match progress {
        Ok(progress) => progress,
        Err(source) => {
            let error = Error::Spawn { rank, source };
            world.fail(rank, error.to_string());
            return Err(error.into());
        }
    };
    let result = match catch_unwind(AssertUnwindSafe(|| body(group))) {
        Ok(result) => result,
        Err(panic) => Err(failed(rank, panic.as_ref()).into()),
    };
    if let Err(error) = &result {
        // `#`: with anyhow, the whole chain of causes on one line.
        world.fail(rank, format!("{error:#}"));
    }
    queue.close();
    // Its panics have been reported above.
    let _ = progress.join();
    result
}

fn failed(rank: usize, panic: &(dyn Any + Send)) -> Error {
    Error::RankFailed { rank, message: panic_message(panic) }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| s.to_string());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without a message".into())
}
