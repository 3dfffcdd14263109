//! How steps become MPI messages: first a header by which the ranks agree, then the data.
//!
//! A group has two communicators of its own, one for collectives and their headers and one for sends and receives.

use super::calls::{Comm, Moving};
use crate::{
    Error, Result,
    op::{Call, agree},
    program::Step,
    progress::{Face, Place, Sent, Transfer, Wire, fresh},
};
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tch::{Kind, Tensor};

/// So many polls are tried at once, a few microseconds in all, ...
const EAGER_POLLS: u32 = 20;
/// ... and then one after each pause, the first of this length. A long wait needs no quick answer: pauses grow, so that a
/// rank that waits for seconds leaves the cores to those that compute.
const FIRST_PAUSE: Duration = Duration::from_micros(30);
const LONGER: Duration = Duration::from_micros(2);
const LONGEST_PAUSE: Duration = Duration::from_micros(250);

/// MPI promises tags up to this; so many messages between two ranks may be under way before one could be mistaken.
const TAGS: u64 = 32768;

pub(super) struct MpiWire {
    /// By `Face::id`.
    groups: Vec<Membership>,
    /// Copies on their way to their receivers.
    outgoing: Vec<Moving>,
    /// What went wrong with one of them, for the next operation to report.
    broken: Option<Error>,
}

struct Membership {
    collective: Comm,
    messages: Comm,
    collectives: u64,
    sent: HashMap<usize, u64>,
    received: HashMap<usize, u64>,
}

impl Membership {
    fn new(collective: Comm) -> Result<Membership> {
        let messages = collective.duplicate()?;
        Ok(Membership { collective, messages, collectives: 0, sent: HashMap::new(), received: HashMap::new() })
    }
}

/// Counts up, and numbers `call` accordingly.
fn number(counter: &mut u64, call: Option<Call>) -> (Option<Call>, i32) {
    let number = *counter;
    *counter += 1;
    (call.map(|call| Call { number, ..call }), (number % TAGS) as i32)
}

impl MpiWire {
    /// Collective over all ranks. To be called on the progress thread.
    pub(super) fn new(longest: usize) -> Result<MpiWire> {
        let world = Membership::new(Comm::world(longest)?)?;
        Ok(MpiWire { groups: vec![world], outgoing: vec![], broken: None })
    }
}

impl Wire for MpiWire {
    fn begin(
        &mut self,
        face: &Arc<Face>,
        call: Option<Call>,
        step: Step,
        _issued: Instant,
    ) -> Result<Box<dyn Transfer>> {
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        let group = &mut self.groups[face.id];
        let comm = group.messages;
        match step {
            Step::Send { x, to } => {
                let (call, tag) = number(group.sent.entry(to).or_default(), call);
                let mut moving = Moving::nothing()?;
                if let Some(call) = call {
                    moving = comm.send(moving, Tensor::f_from_slice(&call.encode(0))?, to, tag)?;
                }
                self.outgoing.push(comm.send(moving, fresh(&x)?, to, tag)?);
                Ok(Box::new(Sent))
            }
            Step::Recv { from } => {
                let (expected, tag) = number(group.received.entry(from).or_default(), call);
                let header = comm.receive(Call::words(0) as i64, Kind::Int64, from, tag)?;
                let face = face.clone();
                Ok(Box::new(Receiving { face, comm, from, tag, expected, moving: header, sent: None }))
            }
            collective => {
                let comm = group.collective;
                let stage = match call {
                    Some(call) => {
                        let (call, _) = number(&mut group.collectives, Some(call));
                        let words = call.map(|call| call.encode(face.size)).unwrap_or_default();
                        let counts = vec![words.len() as i64; face.size];
                        Stage::Agreeing(comm.gather(Tensor::f_from_slice(&words)?, &counts)?, Some(collective))
                    }
                    None => start(comm, collective)?,
                };
                Ok(Box::new(Collective { face: face.clone(), comm, stage }))
            }
        }
    }

    fn split(&mut self, parent: &Arc<Face>, name: &Arc<str>, color: i64, key: i64, place: Place) -> Result<Face> {
        let comm = self.groups[parent.id].collective.split(color, key)?;
        self.groups.push(Membership::new(comm)?);
        Ok(Face { id: self.groups.len() - 1, name: name.clone(), rank: place.rank, size: place.members.len() })
    }

    fn patience(&self, polls: u32) -> Option<Duration> {
        Some(match polls.checked_sub(EAGER_POLLS) {
            None => Duration::ZERO,
            Some(pauses) => LONGEST_PAUSE.min(FIRST_PAUSE + LONGER.saturating_mul(pauses)),
        })
    }

    fn linger(&mut self) -> bool {
        let broken = &mut self.broken;
        self.outgoing.retain_mut(|moving| match moving.poll() {
            Ok(done) => done.is_none(),
            Err(error) => {
                *broken = Some(error);
                false
            }
        });
        !self.outgoing.is_empty()
    }

    fn leave(&mut self) {}
}

struct Collective {
    face: Arc<Face>,
    comm: Comm,
    stage: Stage,
}

enum Stage {
    /// The headers of all ranks are on their way; then comes the step.
    Agreeing(Moving, Option<Step>),
    Data(Moving),
}

fn start(comm: Comm, step: Step) -> Result<Stage> {
    Ok(Stage::Data(match step {
        Step::Gather { x, counts } => comm.gather(x, &counts)?,
        Step::Exchange { x, send, recv } => comm.exchange(x, &send, &recv)?,
        Step::Broadcast { x, root } => comm.broadcast(x, root)?,
        // Agreeing was the meeting; messages have begun elsewhere.
        Step::Meet | Step::Send { .. } | Step::Recv { .. } => Moving::nothing()?,
    }))
}

impl Transfer for Collective {
    fn poll(&mut self) -> Result<Option<Tensor>> {
        if let Stage::Agreeing(header, step) = &mut self.stage {
            let Some(words) = header.poll()? else { return Ok(None) };
            let each = Call::words(self.face.size);
            let calls = read(&words)?.chunks(each).map(decode).collect::<Result<Vec<_>>>()?;
            agree(&self.face.name, &calls)?;
            self.stage = start(self.comm, step.take().unwrap_or(Step::Meet))?;
        }
        match &mut self.stage {
            Stage::Data(data) => data.poll(),
            Stage::Agreeing(..) => Ok(None),
        }
    }
}

fn read(words: &Tensor) -> Result<Vec<i64>> {
    let mut read = vec![0; words.numel()];
    let count = read.len();
    words.f_copy_data(&mut read, count)?;
    Ok(read)
}

fn decode(words: &[i64]) -> Result<Call> {
    let message = || format!("found {words:?}; all ranks must run the same build");
    Call::decode(words).ok_or_else(|| Error::Mpi { call: "reading a header", code: 0, message: message() })
}

/// A message is received as its header describes it, and only then compared with what was expected, so that nothing is
/// left in the network when they differ.
struct Receiving {
    face: Arc<Face>,
    comm: Comm,
    from: usize,
    tag: i32,
    expected: Option<Call>,
    moving: Moving,
    /// Set once the header has come.
    sent: Option<Call>,
}

impl Transfer for Receiving {
    fn poll(&mut self) -> Result<Option<Tensor>> {
        let Some(mut arrived) = self.moving.poll()? else { return Ok(None) };
        if self.sent.is_none() {
            let sent = decode(&read(&arrived)?)?;
            self.moving = self.comm.receive(sent.numel(), sent.kind, self.from, self.tag)?;
            self.sent = Some(sent);
            match self.moving.poll()? {
                Some(data) => arrived = data,
                None => return Ok(None),
            }
        }
        if let (Some(sent), Some(expected)) = (&self.sent, &self.expected) {
            sent.check_received(&self.face.name, self.from, self.face.rank, expected)?;
        }
        Ok(Some(arrived))
    }
}
