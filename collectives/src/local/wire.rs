//! A local rank's side of the boards: publish, read, and let the others finish reading.
//!
//! A step ends on a rank only when every rank has read that rank's tensor, so that the input may then be overwritten.

use super::{
    board::{Board, Post, World},
    delay::Due,
};
use crate::{
    Result,
    op::{Call, Op, agree},
    pending::lock,
    program::Step,
    progress::{Face, Place, Sent, Transfer, Wire, fresh, nothing},
};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tch::Tensor;

pub(super) struct LocalWire {
    rank: usize,
    world: Arc<World>,
    /// By `Face::id`.
    groups: Vec<Membership>,
    /// In an emulated network, when this rank's last collective step was due: the next starts no earlier.
    through: Arc<Mutex<Option<Instant>>>,
}

/// A group, and how far this rank has come in it.
struct Membership {
    board: Arc<Board>,
    rounds: u64,
    collectives: u64,
    sent: HashMap<usize, u64>,
    received: HashMap<usize, u64>,
}

impl Membership {
    fn new(board: Arc<Board>) -> Membership {
        Membership { board, rounds: 0, collectives: 0, sent: HashMap::new(), received: HashMap::new() }
    }
}

fn count(counter: &mut u64) -> u64 {
    *counter += 1;
    *counter - 1
}

impl LocalWire {
    pub(super) fn new(rank: usize, world: Arc<World>) -> (LocalWire, Face) {
        let board = world.board.clone();
        let face = Face { id: 0, name: "world".into(), rank, size: board.members.len() };
        (LocalWire { rank, world, groups: vec![Membership::new(board)], through: Arc::default() }, face)
    }
}

impl Wire for LocalWire {
    fn begin(
        &mut self,
        face: &Arc<Face>,
        call: Option<Call>,
        step: Step,
        issued: Instant,
    ) -> Result<Box<dyn Transfer>> {
        self.world.check()?;
        let group = &mut self.groups[face.id];
        let (rank, face, world, board) = (face.rank, face.clone(), self.world.clone(), group.board.clone());
        let (x, runs, reading) = match step {
            Step::Send { x, to } => {
                let number = count(group.sent.entry(to).or_default());
                let call = call.map(|call| Call { number, ..call });
                board.mail(&world, rank, to, number, Post { call, x: fresh(&x)?, runs: vec![], since: issued });
                return Ok(Box::new(Sent));
            }
            Step::Recv { from } => {
                let number = count(group.received.entry(from).or_default());
                let call = call.map(|call| Call { number, ..call });
                return Ok(Box::new(Receiving { face, world, board, from, number, call, x: None, due: Due::NOW }));
            }
            Step::Gather { x, .. } => (x, vec![], Reading::All),
            Step::Exchange { x, send, recv } => (x, send, Reading::Runs(recv)),
            Step::Broadcast { x, root } if root == rank => (x, vec![], Reading::One(root)),
            Step::Broadcast { root, .. } => (nothing()?, vec![], Reading::One(root)),
            Step::Meet => (nothing()?, vec![], Reading::None),
        };
        if call.is_some() {
            group.collectives += 1;
        }
        let number = group.collectives - 1;
        let op = call.as_ref().map(|c| c.op);
        let call = call.map(|call| Call { number, ..call });
        let round = count(&mut group.rounds);
        let through = self.through.clone();
        let since = lock(&through).map_or(issued, |through| through.max(issued));
        board.publish(&world, round, rank, Post { call, x, runs, since });
        let result = None;
        Ok(Box::new(Meeting { face, world, board, round, op, number, reading, through, result, due: Due::NOW }))
    }

    fn split(&mut self, parent: &Arc<Face>, name: &Arc<str>, color: i64, _key: i64, place: Place) -> Result<Face> {
        let group = &self.groups[parent.id];
        let board = group.board.child(group.rounds, color, &place.members);
        self.groups.push(Membership::new(board));
        Ok(Face { id: self.groups.len() - 1, name: name.clone(), rank: place.rank, size: place.members.len() })
    }

    fn patience(&self, _polls: u32) -> Option<Duration> {
        None
    }

    fn leave(&mut self) {
        self.world.leave(self.rank);
    }
}

/// What a rank takes from the posts of a step.
enum Reading {
    All,
    /// From each rank its run for this one, of the given length.
    Runs(Vec<i64>),
    One(usize),
    None,
}

/// A step of a collective: first the posts of all ranks are awaited, then that all ranks have read them, and in an
/// emulated network that the time has come.
struct Meeting {
    face: Arc<Face>,
    world: Arc<World>,
    board: Arc<Board>,
    round: u64,
    /// Absent in the later steps of an operation.
    op: Option<Op>,
    number: u64,
    reading: Reading,
    through: Arc<Mutex<Option<Instant>>>,
    /// Set once the posts have been read.
    result: Option<Result<Tensor>>,
    due: Due,
}

impl Meeting {
    fn read(&self, posts: &[Post]) -> Result<Tensor> {
        let calls: Vec<Call> = posts.iter().filter_map(|post| post.call.clone()).collect();
        agree(&self.face.name, &calls)?;
        match &self.reading {
            Reading::All => {
                let xs: Vec<&Tensor> = posts.iter().map(|post| &post.x).collect();
                Ok(Tensor::f_cat(&xs, 0)?)
            }
            Reading::Runs(recv) => {
                let run = |(post, length): (&Post, &i64)| {
                    let before = post.runs[..self.face.rank].iter().sum();
                    post.x.f_narrow(0, before, *length)
                };
                let runs = posts.iter().zip(recv).map(run).collect::<std::result::Result<Vec<_>, _>>()?;
                Ok(Tensor::f_cat(&runs, 0)?)
            }
            Reading::One(root) => fresh(&posts[*root].x),
            Reading::None => nothing(),
        }
    }
}

impl Transfer for Meeting {
    fn poll(&mut self) -> Result<Option<Tensor>> {
        self.world.check()?;
        if self.result.is_none() {
            let what = || {
                let op = self.op.map_or("a collective", Op::name);
                format!("{op} #{} on group {}", self.number, self.face.name)
            };
            let Some((posts, due)) = self.board.read(&self.world, self.round, &what)? else { return Ok(None) };
            let result = self.read(&posts);
            // An error does not wait for the network.
            if result.is_ok() && due.is_some() {
                *lock(&self.through) = due;
                self.due = Due::at(due);
            }
            self.result = Some(result);
            drop(posts);
            self.board.done_reading(&self.world, self.round);
        }
        if !self.due.has_passed() || !self.board.all_have_read(self.round) {
            return Ok(None);
        }
        self.result.take().transpose()
    }

    fn due(&self) -> Option<Instant> {
        self.due.awaited()
    }
}

struct Receiving {
    face: Arc<Face>,
    world: Arc<World>,
    board: Arc<Board>,
    from: usize,
    number: u64,
    /// What the receiver expects.
    call: Option<Call>,
    /// Set once the message has been found; in an emulated network it may not be there yet.
    x: Option<Tensor>,
    due: Due,
}

impl Transfer for Receiving {
    fn poll(&mut self) -> Result<Option<Tensor>> {
        self.world.check()?;
        if self.x.is_none() {
            let at = (self.from, self.face.rank, self.number);
            let what = || format!("recv #{} from rank {} on group {}", at.2, self.from, self.face.name);
            let Some((post, due)) = self.board.open(&self.world, at, &what)? else { return Ok(None) };
            if let (Some(sent), Some(expected)) = (&post.call, &self.call) {
                sent.check_received(&self.face.name, self.from, self.face.rank, expected)?;
            }
            self.x = Some(post.x);
            self.due = Due::at(due);
        }
        Ok(if self.due.has_passed() { self.x.take() } else { None })
    }

    fn due(&self) -> Option<Instant> {
        self.due.awaited()
    }
}
