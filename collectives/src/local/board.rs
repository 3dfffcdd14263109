//! What the ranks of a local run share: for each group a board on which they leave their tensors for each other, and for
//! the run the news of who has failed and who has left.

use super::{delay::Delays, network::Network};
use crate::{Error, Result, op::Call, pending::lock, progress::Queue};
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};
use tch::Tensor;

/// What one rank leaves for others.
pub(super) struct Post {
    /// Absent in the later steps of an operation.
    pub call: Option<Call>,
    pub x: Tensor,
    /// How many elements of `x` are for each rank, where that differs.
    pub runs: Vec<i64>,
    /// Since when it could have been on its way.
    pub since: Instant,
}

impl Post {
    fn again(&self) -> Post {
        Post { call: self.call.clone(), x: self.x.shallow_clone(), runs: self.runs.clone(), since: self.since }
    }
}

/// One group's board.
pub(super) struct Board {
    /// World ranks of the members, in group order.
    pub members: Vec<usize>,
    state: Mutex<BoardState>,
}

#[derive(Default)]
struct BoardState {
    /// By number of the step; a round is taken down when all ranks have read it.
    rounds: HashMap<u64, Round>,
    /// By sender, receiver and number.
    mail: HashMap<(usize, usize, u64), Arriving<Post>>,
    /// Groups split off this one, by number of the step and color.
    children: HashMap<(u64, i64), Arc<Board>>,
}

/// Something that can be read, and when it is there in an emulated network.
pub(super) type Arriving<T> = (T, Option<Instant>);

struct Round {
    posts: Vec<Option<Post>>,
    readers: usize,
    /// Set by the last post, in an emulated network.
    due: Option<Instant>,
}

impl Board {
    pub(super) fn new(members: Vec<usize>) -> Arc<Board> {
        Arc::new(Board { members, state: Mutex::default() })
    }

    fn ring(&self, world: &World) {
        for &member in &self.members {
            world.queues[member].ring();
        }
    }

    /// Makes this rank's part of a step visible to the others.
    pub(super) fn publish(&self, world: &World, round: u64, rank: usize, post: Post) {
        let complete = {
            let mut state = lock(&self.state);
            let round = state.rounds.entry(round).or_insert_with(|| Round {
                posts: self.members.iter().map(|_| None).collect(),
                readers: 0,
                due: None,
            });
            round.posts[rank] = Some(post);
            let posts: Option<Vec<&Post>> = round.posts.iter().map(Option::as_ref).collect();
            if let (Some(posts), Some(delays)) = (&posts, &world.delays) {
                round.due = delays.collective(&self.members, posts);
            }
            posts.is_some()
        };
        if complete {
            self.ring(world);
        }
    }

    /// All posts of a step in rank order, once every rank has published; an error if one never will.
    pub(super) fn read(
        &self,
        world: &World,
        round: u64,
        what: &dyn Fn() -> String,
    ) -> Result<Option<Arriving<Vec<Post>>>> {
        // Who has left is asked before the posts are looked at, so that a rank's last post is never overlooked.
        let left: Vec<bool> = self.members.iter().map(|&m| world.left[m].load(Ordering::SeqCst)).collect();
        let state = lock(&self.state);
        let Some(round) = state.rounds.get(&round) else { return Ok(None) };
        if round.posts.iter().all(Option::is_some) {
            return Ok(Some((round.posts.iter().flatten().map(Post::again).collect(), round.due)));
        }
        match round.posts.iter().zip(&left).position(|(post, &left)| post.is_none() && left) {
            Some(missing) => Err(world.gone(self.members[missing], what())),
            None => Ok(None),
        }
    }

    /// Tells that this rank has read a step's posts and lets go of them.
    pub(super) fn done_reading(&self, world: &World, round: u64) {
        let all = {
            let mut state = lock(&self.state);
            let Some(entry) = state.rounds.get_mut(&round) else { return };
            entry.readers += 1;
            let all = entry.readers == self.members.len();
            if all {
                state.rounds.remove(&round);
            }
            all
        };
        if all {
            self.ring(world);
        }
    }

    pub(super) fn all_have_read(&self, round: u64) -> bool {
        !lock(&self.state).rounds.contains_key(&round)
    }

    /// Makes a message visible to its receiver.
    pub(super) fn mail(&self, world: &World, from: usize, to: usize, number: u64, post: Post) {
        let (sender, receiver) = (self.members[from], self.members[to]);
        let due = world.delays.as_ref().map(|delays| delays.message(sender, receiver, &post.x, post.since));
        lock(&self.state).mail.insert((from, to, number), (post, due));
        world.queues[receiver].ring();
    }

    pub(super) fn open(
        &self,
        world: &World,
        (from, to, number): (usize, usize, u64),
        what: &dyn Fn() -> String,
    ) -> Result<Option<Arriving<Post>>> {
        let left = world.left[self.members[from]].load(Ordering::SeqCst);
        match lock(&self.state).mail.remove(&(from, to, number)) {
            None if left => Err(world.gone(self.members[from], what())),
            post => Ok(post),
        }
    }

    /// The board of a group split off this one in a step; whoever comes first makes it.
    pub(super) fn child(&self, round: u64, color: i64, members: &[usize]) -> Arc<Board> {
        let mut state = lock(&self.state);
        let of_world = || Board::new(members.iter().map(|&m| self.members[m]).collect());
        state.children.entry((round, color)).or_insert_with(of_world).clone()
    }
}

/// The run as a whole.
pub(super) struct World {
    queues: Vec<Arc<Queue>>,
    left: Vec<AtomicBool>,
    failure: OnceLock<(usize, String)>,
    pub(super) board: Arc<Board>,
    /// Only with an emulated network.
    pub(super) delays: Option<Delays>,
}

impl World {
    pub(super) fn new(ranks: usize, network: Option<&Network>) -> World {
        World {
            queues: (0..ranks).map(|_| Arc::default()).collect(),
            left: (0..ranks).map(|_| AtomicBool::new(false)).collect(),
            failure: OnceLock::new(),
            board: Board::new((0..ranks).collect()),
            delays: network.map(|network| Delays::new(*network, ranks)),
        }
    }

    pub(super) fn queue(&self, rank: usize) -> Arc<Queue> {
        self.queues[rank].clone()
    }

    /// Fails the run, unless another rank has already.
    pub(super) fn fail(&self, rank: usize, message: String) {
        if self.failure.set((rank, message)).is_ok() {
            self.ring_all();
        }
    }

    /// This rank will publish nothing more.
    pub(super) fn leave(&self, rank: usize) {
        self.left[rank].store(true, Ordering::SeqCst);
        self.ring_all();
    }

    pub(super) fn failed_first(&self) -> Option<usize> {
        self.failure.get().map(|(rank, _)| *rank)
    }

    pub(super) fn failure(&self) -> Option<Error> {
        self.failure.get().map(|(rank, message)| Error::RankFailed { rank: *rank, message: message.clone() })
    }

    pub(super) fn check(&self) -> Result<()> {
        self.failure().map_or(Ok(()), Err)
    }

    fn gone(&self, rank: usize, what: String) -> Error {
        let message =
            format!("it has returned, while others wait for it in {what}; all ranks must issue the same calls");
        self.failure().unwrap_or(Error::RankFailed { rank, message })
    }

    fn ring_all(&self) {
        self.queues.iter().for_each(|queue| queue.ring());
    }
}
