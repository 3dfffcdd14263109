//! The MPI back end: ranks as processes under `mpirun` or Slurm, with tensors in host memory.
//!
//! One progress thread a rank makes all MPI calls, nonblocking ones that it polls; between polls it sleeps, because a
//! machine has as many compute threads as cores, and a busy progress thread would steal one. Ending the job when a rank
//! fails is the program's business: call [`abort`] from a panic hook and on every error, or the others wait for ever.

mod calls;
mod wire;

use crate::{
    Error, Group, Recorder, Result,
    flight::Flight,
    group::Line,
    progress::{self, Face, Queue},
};
use mpi::environment::{Threading, Universe, initialize_with_threading};
use std::{
    mem, process,
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
};

/// The longest message MPI is given in one call, in bytes; its counts are 32-bit. Longer ones go in parts.
const LONGEST: usize = 1 << 30;

/// An initialised MPI. Dropping it completes what is in flight and finalizes, unless MPI has failed or the thread panics:
/// then finalizing would wait for ever, and the process is left to end without it.
///
/// An error that a `?` carries out of the guard's scope drops it too, and finalizing then waits for ranks that wait for
/// this one: let [`Mpi::run`] hold the guard, or call [`abort`] before it drops.
pub struct Mpi {
    universe: Option<Universe>,
    world: Group,
    queue: Arc<Queue>,
    progress: Option<JoinHandle<()>>,
}

/// Initialises MPI; once a process.
pub fn init() -> Result<Mpi> {
    init_splitting(LONGEST)
}

/// [`init`], with messages of more than `longest` bytes sent in parts, so that a test need not send gigabytes.
#[doc(hidden)]
pub fn init_splitting(longest: usize) -> Result<Mpi> {
    let failed = |message: String| Error::Mpi { call: "MPI_Init_thread", code: 0, message };
    let (universe, threading) = initialize_with_threading(Threading::Multiple)
        .ok_or_else(|| failed("MPI is initialised already; a process can do so once".into()))?;
    if threading != Threading::Multiple {
        let found =
            format!("this MPI gives threading level {threading:?}, expected Multiple; it needs a build with it");
        return Err(failed(found));
    }
    let (rank, size) = calls::place_in_world()?;
    let queue = Arc::<Queue>::default();
    let recorder = Recorder::new();
    let (started, has_started) = mpsc::channel();
    let progress = {
        let (queue, recorder) = (queue.clone(), recorder.clone());
        let run = move || match wire::MpiWire::new(longest.min(LONGEST)) {
            Ok(mut wire) => {
                let _ = started.send(Ok(()));
                progress::run(&queue, &recorder, &mut wire);
            }
            Err(error) => {
                let _ = started.send(Err(error));
            }
        };
        let named = thread::Builder::new().name(format!("rank {rank} progress"));
        named.spawn(run).map_err(|source| Error::Spawn { rank, source })?
    };
    let ended = Error::Stopped { op: "init", group: "world".into() };
    has_started.recv().unwrap_or(Err(ended))?;
    let face = Face { id: 0, name: "world".into(), rank, size };
    let world = Group::new(face, Line { queue: queue.clone(), recorder, backend: "mpi", flight: Flight::default() });
    Ok(Mpi { universe: Some(universe), world, queue, progress: Some(progress) })
}

impl Mpi {
    /// The group of all ranks.
    pub fn world(&self) -> Group {
        self.world.clone()
    }

    /// Runs `body` with the group of all ranks and finalizes. If it fails, `report` tells the user why, and the job ends
    /// on all ranks with status 1.
    pub fn run<T, E>(self, body: impl FnOnce(Group) -> std::result::Result<T, E>, report: impl FnOnce(&E)) -> T {
        match body(self.world()) {
            Ok(value) => value,
            Err(error) => {
                report(&error);
                abort(1)
            }
        }
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        if thread::panicking() || calls::has_failed() {
            mem::forget(self.universe.take());
            return;
        }
        self.queue.close();
        if self.progress.take().is_some_and(|progress| progress.join().is_err()) {
            mem::forget(self.universe.take());
        }
    }
}

/// Ends all ranks of the job, with `code` as its status. May be called from any thread, and so from a panic hook.
pub fn abort(code: i32) -> ! {
    if mpi::environment::is_initialized() && !mpi::environment::is_finalized() {
        calls::abort(code);
    }
    process::exit(code)
}
