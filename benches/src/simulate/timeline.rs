//! When things happen: every rank has a compute stream, an outgoing and an incoming link, and each carries out its work in the
//! order in which it is issued. A task's start is therefore the latest of what it waits for and what its streams still do, known
//! at once when it is issued, so that the simulation of events needs no queue of them: callers issue tasks in program order.
//!
//! Sums of gradients and gathers of sharded weights have a stream of their own, at the same time on all ranks, that gives way
//! to the exchanges of layers: what those take while it is busy, it takes longer.

use std::ops::Range;

/// All times in seconds from the beginning of the step, all amounts in bytes.
#[derive(Clone, Debug)]
pub struct Timeline {
    compute: Vec<f64>,
    outgoing: Vec<f64>,
    incoming: Vec<f64>,
    background: f64,
    waited: Vec<f64>,
    received: Vec<f64>,
}

impl Timeline {
    /// `ranks` whose streams are free from `start` on.
    pub fn new(ranks: usize, start: f64) -> Self {
        let free = vec![start; ranks];
        Self {
            compute: free.clone(),
            outgoing: free.clone(),
            incoming: free,
            background: start,
            waited: vec![0.0; ranks],
            received: vec![0.0; ranks],
        }
    }

    pub fn ranks(&self) -> usize {
        self.compute.len()
    }

    /// When each rank's compute stream will have done all that was issued.
    pub fn computed(&self) -> &[f64] {
        &self.compute
    }

    /// When the last rank's compute stream will have.
    pub fn end(&self) -> f64 {
        latest(&self.compute)
    }

    /// Work on one rank's compute stream, not before `after`. Returns its end.
    pub fn compute(&mut self, rank: usize, after: f64, seconds: f64) -> f64 {
        let free = self.compute[rank];
        let start = free.max(after);
        self.waited[rank] += start - free;
        self.compute[rank] = start + seconds;
        start + seconds
    }

    /// The same work on every rank, none before its own `after`. Returns its ends.
    pub fn compute_all(&mut self, after: &[f64], seconds: f64) -> Vec<f64> {
        (0..self.ranks()).map(|rank| self.compute(rank, after[rank], seconds)).collect()
    }

    /// As `compute_all`, with nothing to wait for.
    pub fn work(&mut self, seconds: f64) -> Vec<f64> {
        (0..self.ranks()).map(|rank| self.compute(rank, 0.0, seconds)).collect()
    }

    /// A collective of neighbouring ranks: starts when the last of them is `ready` and has its links free, and ends at once
    /// on all. `ready` has an entry for every rank; each of `ranks` receives `bytes`.
    pub fn collective(&mut self, ranks: Range<usize>, ready: &[f64], seconds: f64, bytes: f64) -> f64 {
        let free = |rank: usize| ready[rank].max(self.outgoing[rank]).max(self.incoming[rank]);
        let start = ranks.clone().map(free).fold(0.0, f64::max);
        let end = start + seconds;
        // Groups side by side hold up the background together as long as one of all ranks.
        let share = ranks.len() as f64 / self.ranks() as f64;
        for rank in ranks {
            (self.outgoing[rank], self.incoming[rank]) = (end, end);
            self.received[rank] += bytes;
        }
        self.give_way(start, share * seconds);
        end
    }

    /// A message of one rank to another: starts when it is `ready`, the sender has sent all before and the receiver has
    /// received all before. Returns its arrival.
    pub fn message(&mut self, from: usize, to: usize, ready: f64, seconds: f64, bytes: f64) -> f64 {
        let end = ready.max(self.outgoing[from]).max(self.incoming[to]) + seconds;
        (self.outgoing[from], self.incoming[to]) = (end, end);
        self.received[to] += bytes;
        end
    }

    /// A collective of all ranks in the background. Returns its end, as if no exchange came in between.
    pub fn in_background(&mut self, ready: f64, seconds: f64) -> f64 {
        self.background = self.background.max(ready) + seconds;
        self.background
    }

    /// When the background will have done all that was issued.
    pub fn background(&self) -> f64 {
        self.background
    }

    /// The network is an exchange's for `seconds` from `start` on.
    pub fn give_way(&mut self, start: f64, seconds: f64) {
        self.background += seconds.min((self.background - start).max(0.0));
    }

    /// Enters what a rank did by itself, as the ring does: compute stream and links busy until `end`.
    pub fn advance(&mut self, rank: usize, end: f64, waited: f64, bytes: f64) {
        self.compute[rank] = self.compute[rank].max(end);
        self.outgoing[rank] = self.outgoing[rank].max(end);
        self.incoming[rank] = self.incoming[rank].max(end);
        self.waited[rank] += waited;
        self.received[rank] += bytes;
    }

    /// Time that compute streams stood still for others, the mean of all ranks.
    pub fn waited(&self) -> f64 {
        self.waited.iter().sum::<f64>() / self.ranks() as f64
    }

    /// By exchanges, of each rank.
    pub fn received(&self) -> &[f64] {
        &self.received
    }
}

pub fn latest(times: &[f64]) -> f64 {
    times.iter().copied().fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_work_and_exchange_in_parallel_take_as_long_as_one() {
        let mut timeline = Timeline::new(4, 0.0);
        let ready = timeline.work(1.0);
        let arrived = timeline.collective(0..4, &ready, 2.0, 8.0);
        timeline.work(2.0);
        timeline.compute_all(&[arrived; 4], 0.5);
        assert_eq!(timeline.end(), 3.5);
        assert_eq!(timeline.waited(), 0.0);
        assert_eq!(timeline.received(), [8.0; 4]);
    }

    #[test]
    fn a_collective_starts_with_the_last_rank() {
        let mut timeline = Timeline::new(3, 0.0);
        let ready: Vec<f64> = (0..3).map(|rank| timeline.compute(rank, 0.0, rank as f64)).collect();
        assert_eq!(timeline.collective(0..3, &ready, 1.0, 0.0), 3.0);
        assert_eq!(timeline.collective(0..2, &ready, 1.0, 0.0), 4.0);
        timeline.compute_all(&[4.0; 3], 0.0);
        assert_eq!(timeline.waited(), (4.0 + 3.0 + 2.0) / 3.0);
    }

    #[test]
    fn links_carry_one_message_at_a_time_in_each_direction() {
        let mut timeline = Timeline::new(3, 0.0);
        assert_eq!(timeline.message(0, 1, 0.0, 2.0, 1.0), 2.0);
        assert_eq!(timeline.message(0, 1, 0.0, 2.0, 1.0), 4.0);
        assert_eq!(timeline.message(1, 2, 0.0, 2.0, 1.0), 2.0);
    }

    #[test]
    fn the_background_gives_way() {
        let mut timeline = Timeline::new(2, 0.0);
        timeline.in_background(0.0, 10.0);
        timeline.collective(0..2, &[1.0; 2], 3.0, 0.0);
        assert_eq!(timeline.background(), 13.0);
        timeline.collective(0..1, &[6.0; 2], 3.0, 0.0);
        timeline.collective(1..2, &[6.0; 2], 3.0, 0.0);
        assert_eq!(timeline.background(), 16.0);
        timeline.collective(0..2, &[20.0; 2], 3.0, 0.0);
        assert_eq!(timeline.background(), 16.0);
    }
}
