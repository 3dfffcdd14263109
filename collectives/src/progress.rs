//! The progress thread: one a rank, running the communication of all the rank's groups while the rank computes.
//!
//! Collectives run one at a time, in the order in which they were issued; sends and receives run beside them and hold up
//! nothing. A back end is a [`Wire`]: it begins a step and then answers polls, and never blocks the thread.

use crate::{
    Error, Recorder, Result,
    op::{Call, Op},
    pending::{Promise, lock},
    program::{Next, Program, Step},
};
use std::{
    collections::VecDeque,
    hint,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};
use tch::{Device, Tensor};

/// A thread that sleeps wakes so much too late, or a little less. For something due it sleeps until so much before.
const OVERSLEPT: Duration = Duration::from_micros(100);

/// One rank's view of a group, as all threads of the rank know it.
pub(crate) struct Face {
    /// The back end's name for it on this rank.
    pub id: usize,
    pub name: Arc<str>,
    pub rank: usize,
    pub size: usize,
}

/// A back end, as seen from a rank's progress thread.
pub(crate) trait Wire {
    /// Begins a step. The first step of an operation brings the call, on which all ranks must agree before any data is
    /// looked at; further steps bring none. Sends and receives between two ranks of a group match in order, and a send
    /// never waits for its receiver. `issued`: when the rank asked for the operation.
    fn begin(&mut self, face: &Arc<Face>, call: Option<Call>, step: Step, issued: Instant)
    -> Result<Box<dyn Transfer>>;

    /// Makes a group from the ranks of `parent` that share `color`; all ranks of `parent` are here at the same time.
    fn split(&mut self, parent: &Arc<Face>, name: &Arc<str>, color: i64, key: i64, place: Place) -> Result<Face>;

    /// How long to wait before polling again when `polls` polls in a row have moved nothing; `None`: until rung, zero:
    /// only let other threads go first.
    fn patience(&self, polls: u32) -> Option<Duration>;

    /// Moves on what is still under way for operations that have ended already; whether anything is.
    fn linger(&mut self) -> bool {
        false
    }

    /// This rank will begin nothing more.
    fn leave(&mut self);
}

/// A step that has begun.
pub(crate) trait Transfer {
    /// The step's flat result, once it is there; steps without one give an empty tensor. Never blocks.
    fn poll(&mut self) -> Result<Option<Tensor>>;

    /// Where the last poll found that only time must pass: when to poll again.
    fn due(&self) -> Option<Instant> {
        None
    }
}

/// A message is copied when it is sent, so that its sender need not wait.
pub(crate) struct Sent;

impl Transfer for Sent {
    fn poll(&mut self) -> Result<Option<Tensor>> {
        Ok(Some(nothing()?))
    }
}

/// Where a rank stands in a group that a split makes.
pub(crate) struct Place {
    pub rank: usize,
    /// Ranks of the parent, in the order of the new group.
    pub members: Vec<usize>,
}

pub(crate) struct Job {
    pub face: Arc<Face>,
    pub call: Call,
    /// Detached. Absent for `recv` and `barrier`.
    pub input: Option<Tensor>,
    /// For `split`: the name of the group to be made.
    pub name: Option<Arc<str>>,
    pub promise: Promise<Outcome>,
    /// The recorder's, if it is recorded.
    pub seq: Option<u64>,
    pub issued: Instant,
}

pub(crate) enum Outcome {
    Tensor(Tensor),
    Group(Face),
}

/// Jobs from the rank's thread to its progress thread, and the bell by which others wake it.
#[derive(Default)]
pub(crate) struct Queue {
    state: Mutex<QueueState>,
    bell: Condvar,
}

#[derive(Default)]
struct QueueState {
    jobs: VecDeque<Job>,
    rung: bool,
    closed: bool,
}

#[derive(Clone, Copy)]
enum Wait {
    Not,
    For(Duration),
    UntilRung,
}

impl Queue {
    /// Drops the job, and with it its promise, if the thread has been told to end.
    pub(crate) fn push(&self, job: Job) {
        let mut state = lock(&self.state);
        if !state.closed {
            state.jobs.push_back(job);
            self.bell.notify_one();
        }
    }

    pub(crate) fn ring(&self) {
        lock(&self.state).rung = true;
        self.bell.notify_one();
    }

    /// The thread ends once what was enqueued has run.
    pub(crate) fn close(&self) {
        lock(&self.state).closed = true;
        self.bell.notify_one();
    }

    /// Moves new jobs to `inbox`, after waiting for a reason to look; true when no more will come.
    fn collect(&self, inbox: &mut VecDeque<Job>, wait: Wait, known_closed: bool) -> bool {
        let mut state = lock(&self.state);
        let idle = |s: &mut QueueState| s.jobs.is_empty() && !s.rung && s.closed == known_closed;
        state = match wait {
            Wait::Not => state,
            Wait::For(time) => {
                self.bell.wait_timeout_while(state, time, idle).unwrap_or_else(PoisonError::into_inner).0
            }
            Wait::UntilRung => self.bell.wait_while(state, idle).unwrap_or_else(PoisonError::into_inner),
        };
        state.rung = false;
        inbox.append(&mut state.jobs);
        state.closed
    }
}

/// An operation that the wire is working on.
struct Running {
    face: Arc<Face>,
    program: Program,
    transfer: Box<dyn Transfer>,
    split: Option<Arc<str>>,
    device: Device,
    promise: Promise<Outcome>,
    op: Op,
    bytes: (u64, u64),
    seq: Option<u64>,
    issued: Instant,
}

/// Waits for something due sooner than a sleeping thread would wake. Other threads go first, unless they keep the core:
/// one that computes does so for milliseconds. Then, for a while, this waits without letting go.
#[derive(Default)]
struct Nap {
    /// Naps to take before others are let go first again.
    awake: u32,
}

impl Nap {
    /// Longer than a round of threads that only wait.
    const KEPT: Duration = Duration::from_micros(300);
    /// Some milliseconds of naps.
    const AWAKE: u32 = 5000;

    fn take(&mut self) {
        if self.awake > 0 {
            self.awake -= 1;
            (0..32).for_each(|_| hint::spin_loop());
            return;
        }
        let before = Instant::now();
        thread::yield_now();
        if before.elapsed() > Nap::KEPT {
            self.awake = Nap::AWAKE;
        }
    }
}

/// Runs until the queue is closed and everything enqueued has ended.
pub(crate) fn run(queue: &Queue, recorder: &Recorder, wire: &mut dyn Wire) {
    let _no_grad = tch::no_grad_guard();
    let mut inbox = VecDeque::new();
    let mut waiting: VecDeque<Job> = VecDeque::new();
    let mut collective: Option<Running> = None;
    let mut messages: Vec<Running> = Vec::new();
    let mut wait = Wait::UntilRung;
    let mut closed = false;
    let mut left = false;
    let mut polls = 0;
    let mut nap = Nap::default();
    loop {
        closed = queue.collect(&mut inbox, wait, closed);
        let mut moved = false;
        for job in inbox.drain(..) {
            if job.call.op.is_point_to_point() {
                messages.extend(begin(job, recorder, wire));
                moved = true;
            } else {
                waiting.push_back(job);
            }
        }
        for mut running in std::mem::take(&mut messages) {
            match running.poll(wire) {
                None => messages.push(running),
                Some(result) => {
                    running.end(result, recorder);
                    moved = true;
                }
            }
        }
        loop {
            let Some(mut running) = collective.take() else {
                let Some(job) = waiting.pop_front() else { break };
                collective = begin(job, recorder, wire);
                moved = true;
                continue;
            };
            let Some(result) = running.poll(wire) else {
                collective = Some(running);
                break;
            };
            running.end(result, recorder);
            moved = true;
        }
        let busy = wire.linger() || collective.is_some() || !messages.is_empty();
        if closed && collective.is_none() {
            if !left {
                wire.leave();
                left = true;
            }
            if !busy {
                return;
            }
        }
        polls = if moved { 0 } else { polls + 1 };
        let due = collective.iter().chain(&messages).filter_map(|running| running.transfer.due()).min();
        let patience = match due {
            Some(due) => Some(due.saturating_duration_since(Instant::now()).saturating_sub(OVERSLEPT)),
            None => wire.patience(polls),
        };
        wait = match patience {
            _ if moved => Wait::Not,
            Some(Duration::ZERO) if busy => {
                if due.is_some() {
                    nap.take()
                } else {
                    thread::yield_now()
                }
                Wait::Not
            }
            Some(time) if busy => Wait::For(time),
            _ => Wait::UntilRung,
        };
    }
}

/// Prepares the input and begins the first step; a job that fails already is ended here.
fn begin(job: Job, recorder: &Recorder, wire: &mut dyn Wire) -> Option<Running> {
    job.seq.iter().for_each(|&seq| recorder.started(seq));
    let Job { face, call, input, name, promise, seq, issued } = job;
    let op = call.op;
    let bytes = call.bytes(face.rank, face.size);
    let device = input.as_ref().map_or(Device::Cpu, Tensor::device);
    let first = || {
        let x = match input {
            Some(x) => x.f_to_device(Device::Cpu)?.f_contiguous()?,
            None => nothing()?,
        };
        let program = Program::new(call.clone(), face.rank, face.size);
        let step = program.first(x)?;
        let transfer = wire.begin(&face, Some(call), step, issued)?;
        Ok((program, transfer))
    };
    match first() {
        Ok((program, transfer)) => {
            Some(Running { face, program, transfer, split: name, device, promise, op, bytes, seq, issued })
        }
        Err(error) => {
            seq.iter().for_each(|&seq| recorder.ended(seq, face.name.clone(), op.name(), bytes, false));
            promise.fulfil(Err(error));
            None
        }
    }
}

impl Running {
    fn poll(&mut self, wire: &mut dyn Wire) -> Option<Result<Outcome>> {
        self.advance(wire).transpose()
    }

    fn advance(&mut self, wire: &mut dyn Wire) -> Result<Option<Outcome>> {
        while let Some(arrived) = self.transfer.poll()? {
            match self.program.then(arrived)? {
                Next::Step(step) => self.transfer = wire.begin(&self.face, None, step, self.issued)?,
                Next::Done(result) => {
                    let Some(name) = &self.split else {
                        return Ok(Some(Outcome::Tensor(result.f_to_device(self.device)?)));
                    };
                    let (color, key, place) = place(&result, self.face.rank, self.face.size)?;
                    return Ok(Some(Outcome::Group(wire.split(&self.face, name, color, key, place)?)));
                }
            }
        }
        Ok(None)
    }

    fn end(self, result: Result<Outcome>, recorder: &Recorder) {
        let Running { ref face, op, bytes, .. } = self;
        self.seq.iter().for_each(|&seq| recorder.ended(seq, face.name.clone(), op.name(), bytes, result.is_ok()));
        // Its tensors go first: when `wait` returns, nothing of ours refers to the input any more.
        drop((self.program, self.transfer));
        self.promise.fulfil(result);
    }
}

/// `pairs`: `[W, 2]`, color and key of each rank. Gives this rank's pair, and its place among those of its color: by key,
/// then by rank, as MPI_Comm_split orders them.
fn place(pairs: &Tensor, rank: usize, size: usize) -> Result<(i64, i64, Place)> {
    let mut flat = vec![0i64; 2 * size];
    pairs.f_copy_data(&mut flat, 2 * size)?;
    let pair = |r: usize| (flat[2 * r], flat[2 * r + 1]);
    let (color, key) = pair(rank);
    let mut members: Vec<usize> = (0..size).filter(|&r| pair(r).0 == color).collect();
    members.sort_by_key(|&r| (pair(r).1, r));
    let before = |r: usize| (pair(r).1, r) < (key, rank);
    let place = Place { rank: members.iter().filter(|&&r| before(r)).count(), members };
    Ok((color, key, place))
}

/// The empty tensor that stands where an operation has no data.
pub(crate) fn nothing() -> Result<Tensor> {
    Ok(Tensor::f_empty([0], (tch::Kind::Float, Device::Cpu))?)
}

/// A copy that shares no memory with `x`.
pub(crate) fn fresh(x: &Tensor) -> Result<Tensor> {
    let mut copy = Tensor::f_empty(x.size(), (x.f_kind()?, Device::Cpu))?;
    copy.f_copy_(x)?;
    Ok(copy)
}

/// The error of an operation whose thread could not take it.
pub(crate) fn stopped(op: Op, face: &Face) -> Error {
    Error::Stopped { op: op.name(), group: face.name.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_orders_by_key_and_then_by_rank() {
        // Ranks 0, 2 and 3 share color 7; rank 3 has the smallest key, 0 and 2 tie.
        let pairs = Tensor::from_slice(&[7i64, 5, 1, 0, 7, 5, 7, 2]).view([4, 2]);
        let (color, key, place) = place(&pairs, 2, 4).unwrap();
        assert_eq!((color, key, place.rank, place.members), (7, 5, 2, vec![3, 0, 2]));
    }
}
