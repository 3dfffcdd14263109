//! The ranks of a machine as threads, as `collectives::local` has them: each computes on one thread, a second one carries out
//! its messages and copies them, a third one flies (`collectives::flight`). Between them is nothing, or an emulated network,
//! whose times are those of `collectives::local::delay`.

use collectives::local::Network;

use super::Host;
use super::engine::{Engine, Id};
use crate::simulate::Result;

pub struct Ranks<'a> {
    pub engine: Engine,
    host: &'a Host,
    network: Option<Network>,
    pub number: usize,
    /// Of each rank, the last thing that its computing thread does.
    main: Vec<Id>,
    /// Of each rank, when its last collective was over, and when it was due.
    last: Vec<Option<[Id; 2]>>,
}

/// What members of a group do in a collective, beside waiting for the network; in seconds.
pub struct Local {
    /// Copying what they need out of what all have brought.
    pub read: f64,
    /// Adding it up, once it is there.
    pub sum: f64,
}

impl<'a> Ranks<'a> {
    pub fn new(host: &'a Host, network: Option<Network>, number: usize) -> Self {
        let mut engine = Engine::default();
        let main = (0..number).map(|_| engine.time(0.0, &[])).collect();
        Ranks { engine, host, network, number, main, last: vec![None; number] }
    }

    pub fn now(&self, rank: usize) -> Id {
        self.main[rank]
    }

    pub fn all_now(&self) -> Vec<Id> {
        self.main.clone()
    }

    /// On the rank's computing thread.
    pub fn compute(&mut self, rank: usize, seconds: f64) -> Id {
        self.main[rank] = self.engine.work(rank, seconds, &[self.main[rank]]);
        self.main[rank]
    }

    pub fn compute_all(&mut self, seconds: f64) {
        for rank in 0..self.number {
            self.compute(rank, seconds);
        }
    }

    /// The rank computes no further before `until`.
    pub fn wait(&mut self, rank: usize, until: Id) {
        let woken = self.engine.wake(&[until]);
        self.main[rank] = self.engine.time(0.0, &[self.main[rank], woken]);
    }

    fn progress(&mut self, rank: usize, seconds: f64, after: &[Id]) -> Id {
        let there = self.engine.time(0.0, after);
        let woken = self.engine.wake(&[there]);
        self.engine.work(self.number + rank, seconds, &[woken])
    }

    /// On the rank's flight, when all of `after` is there.
    pub fn fly(&mut self, rank: usize, seconds: f64, after: &[Id]) -> Id {
        let there = self.engine.time(0.0, after);
        let woken = self.engine.wake(&[there]);
        self.engine.work(2 * self.number + rank, seconds, &[woken])
    }

    /// Sends `bytes`, from when they are `issued`. Returns when the receiver has them.
    pub fn send(&mut self, from: usize, to: usize, bytes: f64, issued: Id) -> Result<Id> {
        let copied = self.progress(from, self.host.copy(bytes)?, &[issued]);
        if self.network.is_none() {
            return Ok(self.progress(to, 0.0, &[copied]));
        }
        let (latency, passing) = (self.latency(from, to), self.passing(from, to, bytes));
        let arrived = self.engine.message(from, to, latency, passing, &[issued]);
        Ok(self.progress(to, 0.0, &[copied, arrived]))
    }

    /// A collective of `members` that takes the network `seconds`, from when each has `issued` it. Returns when each has its
    /// result.
    pub fn collective(&mut self, members: &[usize], seconds: f64, locals: &[Local], issued: &[Id]) -> Vec<Id> {
        if members.len() < 2 {
            return issued.to_vec();
        }
        let dues = members.iter().filter_map(|&rank| Some(self.last[rank]?[1]));
        let since: Vec<Id> = issued.iter().copied().chain(dues).collect();
        let due = self.engine.time(seconds, &since);
        let mut published = Vec::new();
        for (&rank, &issued) in members.iter().zip(issued) {
            let after: Vec<Id> = self.last[rank].iter().map(|last| last[0]).chain([issued]).collect();
            published.push(self.progress(rank, 0.0, &after));
        }
        let published = self.engine.time(0.0, &published);
        let read: Vec<Id> =
            members.iter().zip(locals).map(|(&rank, local)| self.progress(rank, local.read, &[published])).collect();
        let there = self.engine.time(0.0, &[read.as_slice(), &[due]].concat());
        let mut ends = Vec::new();
        for (&rank, local) in members.iter().zip(locals) {
            let end = self.progress(rank, local.sum, &[there]);
            self.last[rank] = Some([end, due]);
            ends.push(end);
        }
        ends
    }

    /// AllGather of `bytes` of each of `members`.
    pub fn all_gather(&mut self, members: &[usize], bytes: f64, issued: &[Id]) -> Result<Vec<Id>> {
        let read = self.host.copy(members.len() as f64 * bytes)?;
        let locals: Vec<Local> = members.iter().map(|_| Local { read, sum: 0.0 }).collect();
        Ok(self.collective(members, self.doubling(members, bytes), &locals, issued))
    }

    /// ReduceScatter of all ranks that leaves `bytes` on each.
    pub fn reduce_scatter(&mut self, bytes: f64, issued: &[Id]) -> Result<Vec<Id>> {
        let members: Vec<usize> = (0..self.number).collect();
        let (read, sum) = (self.host.copy(self.number as f64 * bytes)?, self.number as f64 * self.host.add(bytes)?);
        let locals: Vec<Local> = members.iter().map(|_| Local { read, sum }).collect();
        Ok(self.collective(&members, self.doubling(&members, bytes), &locals, issued))
    }

    /// All-to-all of all ranks, `bytes` from each to each.
    pub fn all_to_all(&mut self, bytes: f64, issued: &[Id]) -> Result<Vec<Id>> {
        let (members, w): (Vec<usize>, usize) = ((0..self.number).collect(), self.number);
        let read = self.host.copy(w as f64 * bytes)?;
        let locals: Vec<Local> = members.iter().map(|_| Local { read, sum: 0.0 }).collect();
        let round = |distance: usize| {
            let takes = |from: usize| {
                let to = (from + distance) % w;
                self.latency(from, to) + self.passing(from, to, bytes)
            };
            (0..w).map(takes).fold(0.0, f64::max)
        };
        let seconds = (1..w).map(round).sum();
        Ok(self.collective(&members, seconds, &locals, issued))
    }

    fn latency(&self, from: usize, to: usize) -> f64 {
        self.network.map_or(0.0, |network| self.link(&network, from, to).latency.as_secs_f64())
    }

    fn passing(&self, from: usize, to: usize, bytes: f64) -> f64 {
        self.network.map_or(0.0, |network| bytes / self.link(&network, from, to).bytes_per_s)
    }

    fn link(&self, network: &Network, a: usize, b: usize) -> collectives::local::Link {
        if a / network.node == b / network.node { network.intra } else { network.inter }
    }

    /// Bruck's algorithm, each member with `bytes` that all others need.
    fn doubling(&self, members: &[usize], bytes: f64) -> f64 {
        let w = members.len();
        let round = |distance: usize| {
            let passed_on = distance.min(w - distance) as f64 * bytes;
            let takes = |from: usize| {
                let (from, to) = (members[from], members[(from + distance) % w]);
                self.latency(from, to) + self.passing(from, to, passed_on)
            };
            (0..w).map(takes).fold(0.0, f64::max)
        };
        (0..usize::BITS).map(|i| 1usize << i).take_while(|&distance| distance < w).map(round).sum()
    }
}
