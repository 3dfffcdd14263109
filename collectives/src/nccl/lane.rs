//! A communicator with a stream of its own, on which its operations follow each other.
//!
//! It is made by [`Lane::begin`] or at its first use, by a thread of its own, as that blocks until all its ranks have come. Before
//! anything else its ranks meet on it ([`Lane::meet`]): then, too, each waits for the others. What is issued meanwhile is launched by
//! the thread afterwards. Then operations are launched by whoever issues them. Where each must first be agreed on, the thread always
//! launches.

use super::{
    api::{Buffers, Comm},
    cuda::Stream,
    gpu::{About, Flight, Gpu, NOT_MADE},
    peers::{CopiesFound, Peers},
};
use crate::{
    Error, Pending, Result,
    op::{Call, Op, agree},
    pending::lock,
};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, OnceLock, mpsc},
    thread,
    time::{Duration, Instant},
};
use tch::{Device, Tensor};

/// How often is asked whether a communicator is made.
const POLL: Duration = Duration::from_millis(1);

pub(super) type Make = Box<dyn FnOnce() -> Result<Comm> + Send>;

pub(super) struct Lane {
    gpu: Arc<Gpu>,
    /// Of the group; it fixes the length of a header.
    ranks: usize,
    stream: Stream,
    comm: OnceLock<Comm>,
    /// That its ranks have met.
    met: OnceLock<Met>,
    part: Part,
    state: Mutex<State>,
}

/// What a lane is to this rank.
#[derive(Clone, Copy)]
pub(super) enum Part {
    /// Of the collectives of a group, its place there.
    Collectives(usize),
    /// Of the messages from one rank to another, which are ranks 0 and 1 of the communicator.
    Sender,
    Receiver,
}

/// A way for short gathers.
#[derive(Default)]
struct Met {
    peers: Option<Peers>,
    found: CopiesFound,
}

struct State {
    make: Option<Make>,
    /// Who wants the communicator to be made, if no operation does, and will have its ranks meet.
    wanted: Option<About>,
    queue: VecDeque<Item>,
    /// The lane's thread runs.
    working: bool,
}

/// An operation to be launched.
pub(super) struct Item {
    pub call: Call,
    /// Flat or not, contiguous, on the GPU; as is `out`. For a message, the one that it has.
    pub x: Tensor,
    pub out: Tensor,
    /// This rank's place in the group.
    pub rank: usize,
    /// Where nothing may start before all ranks agree: what they, or the sender, brought.
    pub check: Option<Pending<Tensor>>,
    pub flight: Arc<Flight>,
}

impl Lane {
    pub(super) fn new(gpu: &Arc<Gpu>, ranks: usize, part: Part, make: Make) -> Result<Arc<Lane>> {
        let stream = gpu.context.stream()?;
        let state = Mutex::new(State { make: Some(make), wanted: None, queue: VecDeque::new(), working: false });
        let lane = Arc::new(Lane {
            gpu: gpu.clone(),
            ranks,
            stream,
            comm: OnceLock::new(),
            met: OnceLock::new(),
            part,
            state,
        });
        gpu.watch_lane(&lane);
        Ok(lane)
    }

    /// Launches it, now or later; what goes wrong then is the flight's to tell.
    pub(super) fn issue(self: &Arc<Lane>, item: Item) -> Result<()> {
        self.gpu.watch_flight(item.flight.clone());
        let mut state = lock(&self.state);
        if let (false, None, Some(comm), Some(met)) = (state.working, &item.check, self.comm.get(), self.met.get()) {
            self.launch(comm, met, item);
            return Ok(());
        }
        state.queue.push_back(item);
        self.start(&mut state)
    }

    /// Makes the communicator, on the lane's thread; `false` if that has begun before. Who gets `true` calls [`Lane::meet`] once it
    /// is made, and issues nothing before.
    pub(super) fn begin(self: &Arc<Lane>, about: &About) -> Result<bool> {
        let mut state = lock(&self.state);
        if state.make.is_none() {
            return Ok(false);
        }
        state.wanted = Some(about.clone());
        self.start(&mut state).map(|()| true)
    }

    /// Blocks until the communicator is made; `met`: and its ranks have met.
    pub(super) fn until_made(&self, about: &About, met: bool) -> Result<()> {
        let (began, waited) = (Instant::now(), self.gpu.options.timeout);
        while self.comm.get().is_none() || (met && self.met.get().is_none()) {
            if let Some(error) = self.gpu.failure() {
                return Err(error);
            }
            if began.elapsed() > waited {
                let late = self.gpu.error(about, format!("{NOT_MADE} within {} s", waited.as_secs()));
                self.gpu.fail(about, late);
                return Err(self.gpu.failure().unwrap_or(Error::Stopped { op: about.op, group: about.group.clone() }));
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// What the communicator's ranks do first, each waiting for the others: on one for messages the first is of no content, as NCCL
    /// connects two ranks at their first, inside a call that returns when the other one has come to its own; on one for collectives
    /// they find out whether short gathers go by copies.
    pub(super) fn meet(&self) -> Result<()> {
        let Some(comm) = self.comm.get() else { return Ok(()) };
        let _entered = self.gpu.context.enter()?;
        let x = self.gpu.scratch();
        let met = match self.part {
            Part::Collectives(rank) => {
                let wanted = self.gpu.options.peer_copies;
                let (peers, found) = Peers::connect(&self.gpu.context, comm, &self.stream, (rank, self.ranks), wanted)?;
                Met { peers, found }
            }
            Part::Sender => {
                comm.send(&x, 0, 1, 1, &self.stream)?;
                Met::default()
            }
            Part::Receiver => {
                comm.recv(&x, 0, 1, 0, &self.stream)?;
                Met::default()
            }
        };
        self.stream.record()?.synchronize()?;
        let _ = self.met.set(met);
        Ok(())
    }

    fn start(self: &Arc<Lane>, state: &mut State) -> Result<()> {
        if state.working {
            return Ok(());
        }
        state.working = true;
        let (lane, rank) = (self.clone(), self.gpu.rank);
        let named = thread::Builder::new().name(format!("rank {rank} lane"));
        named.spawn(move || lane.work()).map(drop).map_err(|source| Error::Spawn { rank, source })
    }

    fn work(self: Arc<Lane>) {
        let _no_grad = tch::no_grad_guard();
        let (make, wanted) = {
            let mut state = lock(&self.state);
            (state.make.take(), state.wanted.take())
        };
        if let Some(make) = make {
            let made = self.gpu.context.enter().and_then(|_entered| {
                drop(self.comm.set(make()?));
                if wanted.is_some() { Ok(()) } else { self.meet() }
            });
            if let Err(error) = made {
                let first = || lock(&self.state).queue.front().map(|item| item.flight.about.clone());
                if let Some(about) = wanted.or_else(first) {
                    self.gpu.fail(&about, error);
                }
            }
        }
        loop {
            let item = {
                let mut state = lock(&self.state);
                let Some(item) = state.queue.pop_front() else {
                    state.working = false;
                    return;
                };
                item
            };
            match (self.comm.get(), self.met.get()) {
                (Some(comm), Some(met)) => self.agree_and_launch(comm, met, item),
                _ => item.flight.fail(None),
            }
        }
    }

    fn agree_and_launch(&self, comm: &Comm, met: &Met, mut item: Item) {
        let Some(check) = item.check.take() else { return self.launch(comm, met, item) };
        let brought = check.wait().and_then(|words| calls(&words, self.ranks));
        let compared = brought.and_then(|brought| {
            let agreed = agree_on(&brought, &item.call, &item.flight.about.group, item.rank);
            let Err(error) = agreed else { return Ok(true) };
            // What was sent must be taken, or nothing behind it could come.
            if let (Op::Recv { .. }, [sent]) = (item.call.op, brought.as_slice()) {
                self.throw_away(comm, sent)?;
            }
            item.flight.fail(Some(error));
            Ok(false)
        });
        match compared {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                self.gpu.fail(&item.flight.about, error);
                return item.flight.fail(None);
            }
        }
        self.launch(comm, met, item);
    }

    fn launch(&self, comm: &Comm, Met { peers, .. }: &Met, item: Item) {
        let flight = &item.flight;
        let launched = || {
            if let Some(error) = self.gpu.failure() {
                return Err(error);
            }
            let _entered = self.gpu.context.enter()?;
            self.stream.wait(&flight.ready)?;
            let begun = self.stream.record()?;
            let on = Buffers { x: &item.x, out: &item.out, stream: &self.stream };
            match peers {
                Some(peers) if gathers_alike(&item.call) && peers.can(&item.x) => peers.all_gather(&on)?,
                _ => carry_out(comm, &item.call, item.rank, &on)?,
            }
            self.gpu.recorder.started(flight.about.seq);
            Ok((begun, self.stream.record()?))
        };
        match launched() {
            Ok((begun, done)) => flight.launched(begun, done),
            Err(error) => {
                self.gpu.fail(&flight.about, error);
                flight.fail(None);
            }
        }
    }

    fn throw_away(&self, comm: &Comm, sent: &Call) -> Result<()> {
        let scratch = Tensor::f_empty([sent.numel()], (sent.kind, Device::Cuda(self.gpu.context.index)))?;
        let _entered = self.gpu.context.enter()?;
        // Whoever had that memory before may still compute.
        self.stream.wait(&self.gpu.context.current_stream()?.record()?)?;
        comm.recv(&scratch, 0, sent.numel(), 0, &self.stream)?;
        self.stream.record()?.synchronize()
    }

    pub(super) fn peer_copies(&self) -> CopiesFound {
        self.met.get().map(|met| met.found.clone()).unwrap_or_default()
    }

    pub(super) fn asynchronous_error(&self) -> Result<()> {
        self.comm.get().map_or(Ok(()), Comm::asynchronous_error)
    }

    pub(super) fn abort(&self) {
        if let Some(comm) = self.comm.get() {
            comm.abort();
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let Some(comm) = self.comm.take() else { return };
        let context = self.gpu.context.clone();
        let (ended, has_ended) = mpsc::channel();
        let free = move || {
            let _entered = context.enter();
            comm.destroy();
            let _ = ended.send(());
        };
        if thread::Builder::new().spawn(free).is_ok() {
            self.gpu.watch_end(has_ended);
        }
    }
}

/// The headers that `words` hold, each for a group of `ranks`.
fn calls(words: &Tensor, ranks: usize) -> Result<Vec<Call>> {
    let mut read = vec![0; words.numel()];
    let count = read.len();
    words.f_copy_data(&mut read, count)?;
    let foreign = |words: &[i64]| Error::Foreign { found: format!("the header {words:?}") };
    read.chunks(Call::words(ranks)).map(|words| Call::decode(words).ok_or_else(|| foreign(words))).collect()
}

/// `brought`: the calls of all ranks, or for `recv` that of the sender.
fn agree_on(brought: &[Call], own: &Call, group: &Arc<str>, rank: usize) -> Result<()> {
    match own.op {
        Op::Recv { from } => brought.iter().try_for_each(|sent| sent.check_received(group, from, rank, own)),
        _ => agree(group, brought),
    }
}

/// Whether the ranks agree, for a check that nobody waits for.
pub(super) fn compare(words: &Tensor, own: &Call, group: &Arc<str>, rank: usize, ranks: usize) -> Result<()> {
    agree_on(&calls(words, ranks)?, own, group, rank)
}

/// Whether it is a gather of equal parts that have elements.
fn gathers_alike(call: &Call) -> bool {
    match call.op {
        Op::AllGather => call.numel() > 0,
        Op::AllGatherV => call.numel() > 0 && call.send_rows.iter().all(|&rows| rows == call.send_rows[0]),
        _ => false,
    }
}

/// Enqueues the operation's NCCL calls.
fn carry_out(comm: &Comm, call: &Call, rank: usize, on: &Buffers) -> Result<()> {
    let equal = |rows: &[i64]| rows.iter().all(|&r| r == rows[0]);
    let elements = |rows: &[i64]| -> Vec<i64> { rows.iter().map(|r| r * call.row()).collect() };
    let n = call.numel();
    match call.op {
        // Sender and receiver are ranks 0 and 1 of a communicator of two.
        Op::Send { .. } => comm.send(on.x, 0, n, 1, on.stream),
        Op::Recv { .. } => comm.recv(on.out, 0, n, 0, on.stream),
        // For these and the next, rows and shapes are such that either all ranks have elements or none.
        Op::AllGather | Op::AllGatherV if gathers_alike(call) => comm.all_gather(on),
        Op::AllGatherV => {
            let recv = elements(&call.send_rows);
            comm.exchange(on, true, &vec![recv[rank]; recv.len()], &recv)
        }
        Op::ReduceScatter if n > 0 => comm.reduce_scatter(on),
        Op::ReduceScatterV if equal(&call.send_rows) && n > 0 => comm.reduce_scatter(on),
        Op::ReduceScatterV => comm.reduce_runs(on, &elements(&call.send_rows)),
        Op::AllReduce(op) if n > 0 => comm.all_reduce(on, op),
        Op::AllToAll => {
            let w = call.shape[0];
            let each = vec![n / w; w as usize];
            comm.exchange(on, false, &each, &each)
        }
        Op::AllToAllV => comm.exchange(on, false, &elements(&call.send_rows), &elements(&call.recv_rows)),
        Op::Broadcast { root } if n > 0 => comm.broadcast(on, root),
        // Without elements, or without data.
        _ => Ok(()),
    }
}
