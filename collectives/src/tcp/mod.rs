//! The TCP back end: ranks as processes that have no MPI between them, as torchrun and Slurm start them. Tensors in host
//! memory.
//!
//! [`join`] finds the other ranks through rank 0, and every two ranks then have a connection of their own: for tens of ranks,
//! or some hundreds where so many files may be open. A thread a connection reads, another writes; so the progress thread
//! never waits for the network, and a rank that dies is noticed at once, also by ranks that only compute.
//!
//! Nothing is encrypted and a peer is known by the job's token alone: for networks that one would trust with MPI.

mod link;
mod rendezvous;
mod wire;

pub use link::abort;

use crate::{
    Error, Group, Recorder, Result,
    flight::Flight,
    group::Line,
    progress::{self, Face, Queue},
};
use link::Links;
use std::{
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

/// Called once, on a thread of this library, when another rank has failed: [`Error::RankFailed`] if it said so, else
/// [`Error::RankLost`]. What it does not end goes on with errors.
pub type OnFailure = Arc<dyn Fn(Error) + Send + Sync>;

/// Who this process is, and where rank 0 is to be found.
#[derive(Clone)]
pub struct Options {
    pub rank: usize,
    pub size: usize,
    /// Where rank 0 runs: a name or a number.
    pub address: String,
    /// Rank 0 listens on the first of the ports `port`, `port + 1`, .. that is free, and the others look there.
    pub port: u16,
    /// Tells this job from others that use the same ports.
    pub token: String,
    /// For all ranks to come.
    pub timeout: Duration,
    pub on_failure: OnFailure,
}

/// A job whose ranks are connected. Dropping it completes what is in flight and waits until the other ranks have come as far,
/// or have failed. A rank that fails must end its process without dropping it, after [`abort`]: the others then learn of it.
pub struct Tcp {
    world: Group,
    queue: Arc<Queue>,
    links: Arc<Links>,
    progress: Option<JoinHandle<()>>,
}

/// Connects this rank with all others. All ranks call it; it returns when all have come.
pub fn join(options: &Options) -> Result<Tcp> {
    let Options { rank, size, .. } = *options;
    let sockets = rendezvous::meet(options)?;
    let queue = Arc::<Queue>::default();
    let recorder = Recorder::new();
    let links = Links::start(rank, sockets, queue.clone(), options.on_failure.clone())?;
    let progress = {
        let (queue, recorder) = (queue.clone(), recorder.clone());
        let mut wire = wire::TcpWire::new(links.clone(), size);
        let named = thread::Builder::new().name(format!("rank {rank} progress"));
        named
            .spawn(move || progress::run(&queue, &recorder, &mut wire))
            .map_err(|source| Error::Spawn { rank, source })?
    };
    let face = Face { id: 0, name: "world".into(), rank, size };
    let line = Line { queue: queue.clone(), recorder, backend: "tcp", flight: Flight::default() };
    Ok(Tcp { world: Group::new(face, line), queue, links, progress: Some(progress) })
}

impl Tcp {
    /// The group of all ranks.
    pub fn world(&self) -> Group {
        self.world.clone()
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        if thread::panicking() {
            return;
        }
        self.queue.close();
        let ended = self.progress.take().is_none_or(|progress| progress.join().is_ok());
        if ended {
            self.links.finish();
        }
    }
}
