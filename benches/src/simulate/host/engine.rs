//! Threads that share the cores of one machine: a discrete-event simulation of tasks that wait for each other. More threads than
//! cores take turns, in slices of time, as a fair scheduler has them.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

/// A task, by the order in which it was added.
pub type Id = usize;

/// What the cores of a machine give to its threads.
#[derive(Clone, Copy, Debug)]
pub struct Cores {
    pub number: usize,
    /// Speed of a core while the others are idle, in that of one among busy ones.
    pub alone: f64,
    /// Seconds that a thread keeps its core when others wait for one.
    pub slice: f64,
    /// Seconds until a waiting thread runs that is handed something: with a core idle, and with all of them busy.
    pub wake: [f64; 2],
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// On a thread, which carries out one task at a time, in the order in which they can start.
    Work {
        thread: usize,
        seconds: f64,
    },
    Time {
        seconds: f64,
    },
    Wake,
    Message {
        from: usize,
        to: usize,
        latency: f64,
        passing: f64,
    },
}

#[derive(Debug)]
struct Task {
    kind: Kind,
    missing: usize,
    next: Vec<Id>,
}

/// Tasks, each added after those that it waits for.
#[derive(Debug, Default)]
pub struct Engine {
    tasks: Vec<Task>,
}

impl Engine {
    fn add(&mut self, kind: Kind, after: &[Id]) -> Id {
        let id = self.tasks.len();
        for &before in after {
            self.tasks[before].next.push(id);
        }
        self.tasks.push(Task { kind, missing: after.len(), next: Vec::new() });
        id
    }

    pub fn work(&mut self, thread: usize, seconds: f64, after: &[Id]) -> Id {
        self.add(Kind::Work { thread, seconds }, after)
    }

    /// Time that passes without a core.
    pub fn time(&mut self, seconds: f64, after: &[Id]) -> Id {
        self.add(Kind::Time { seconds }, after)
    }

    pub fn wake(&mut self, after: &[Id]) -> Id {
        self.add(Kind::Wake, after)
    }

    /// A message between two ranks: it leaves when those that its sender sent before have left, and comes in when those to
    /// its receiver that left before have come in.
    pub fn message(&mut self, from: usize, to: usize, latency: f64, passing: f64, after: &[Id]) -> Id {
        self.add(Kind::Message { from, to, latency, passing }, after)
    }

    /// When each task ends, in seconds.
    pub fn run(mut self, cores: Cores) -> Vec<f64> {
        let mut run = Run::new(cores, self.tasks.len());
        let mut done: Vec<Id> = Vec::new();
        for id in 0..self.tasks.len() {
            if self.tasks[id].missing == 0 {
                run.begin(id, self.tasks[id].kind);
            }
        }
        loop {
            if !run.advance(&mut done) {
                return run.ends;
            }
            for id in std::mem::take(&mut done) {
                run.ends[id] = run.now;
                for next in std::mem::take(&mut self.tasks[id].next) {
                    self.tasks[next].missing -= 1;
                    if self.tasks[next].missing == 0 {
                        run.begin(next, self.tasks[next].kind);
                    }
                }
            }
            if !run.rings() {
                run.leave();
            }
        }
    }
}

/// Moments so close are the same.
const ROUNDING: f64 = 2e-12;

/// Seconds as a whole number, so that they have an order.
fn picoseconds(seconds: f64) -> u64 {
    (seconds * 1e12).round() as u64
}

/// A thread of the machine. Next is whose turn ends first, by what it will have had of the cores then; a turn that another one
/// interrupts goes on after it. A thread that wakes interrupts one that has had more.
#[derive(Clone, Debug, Default)]
struct Thread {
    tasks: VecDeque<(Id, f64)>,
    /// What the first task still needs.
    left: f64,
    /// What it has had of the cores; one that slept counts as having had as much as the least of those that did not.
    had: f64,
    /// What it will have had at the end of its turn.
    until: f64,
}

struct Run {
    now: f64,
    cores: Cores,
    ends: Vec<f64>,
    threads: Vec<Thread>,
    /// Threads on a core, and those that wait for one.
    running: Vec<usize>,
    waiting: Vec<usize>,
    timers: BinaryHeap<Reverse<(u64, Id)>>,
    /// By rank: since when its way out and its way in are free.
    links: Vec<[f64; 2]>,
}

impl Run {
    fn new(cores: Cores, tasks: usize) -> Self {
        Run {
            now: 0.0,
            cores,
            ends: vec![f64::NAN; tasks],
            threads: vec![],
            running: vec![],
            waiting: vec![],
            timers: BinaryHeap::new(),
            links: vec![],
        }
    }

    fn begin(&mut self, id: Id, kind: Kind) {
        let until = match kind {
            Kind::Work { thread, seconds } => return self.enqueue(thread, id, seconds),
            Kind::Time { seconds } => self.now + seconds,
            Kind::Wake => self.now + self.cores.wake[usize::from(self.busy() >= self.cores.number)],
            Kind::Message { from, to, latency, passing } => {
                if self.links.len() <= from.max(to) {
                    self.links.resize(from.max(to) + 1, [0.0; 2]);
                }
                let leaves = self.links[from][0].max(self.now);
                self.links[from][0] = leaves + passing;
                let arrives = self.links[to][1].max(leaves + latency) + passing;
                self.links[to][1] = arrives;
                arrives
            }
        };
        self.timers.push(Reverse((picoseconds(until), id)));
    }

    fn enqueue(&mut self, thread: usize, id: Id, seconds: f64) {
        if self.threads.len() <= thread {
            self.threads.resize_with(thread + 1, Default::default);
        }
        self.threads[thread].tasks.push_back((id, seconds));
        if self.threads[thread].tasks.len() > 1 {
            return;
        }
        if self.running.contains(&thread) {
            // It has just ended its last task, and goes on.
            self.threads[thread].left = seconds;
            return;
        }
        let awake = self.running.iter().chain(&self.waiting).map(|&other| self.threads[other].had);
        let least = awake.fold(f64::INFINITY, f64::min);
        let woken = &mut self.threads[thread];
        woken.left = seconds;
        let had = woken.had;
        if least.is_finite() {
            woken.had = woken.had.max(least);
        }
        woken.until = woken.had + self.cores.slice;
        if self.running.len() < self.cores.number {
            return self.running.push(thread);
        }
        let most = (0..self.running.len()).max_by(|&a, &b| self.had(a).total_cmp(&self.had(b)));
        match most.filter(|&place| self.had(place) > had) {
            Some(place) => {
                self.waiting.insert(0, self.running.remove(place));
                self.running.push(thread);
            }
            None => self.waiting.push(thread),
        }
    }

    /// Cores that are at work.
    fn busy(&self) -> usize {
        self.running.iter().filter(|&&thread| !self.threads[thread].tasks.is_empty()).count()
    }

    /// What the thread at a place of `running` has had.
    fn had(&self, place: usize) -> f64 {
        self.threads[self.running[place]].had
    }

    /// The place in `waiting` of the thread whose turn ends first.
    fn next(&self) -> Option<usize> {
        let until = |place: usize| self.threads[self.waiting[place]].until;
        (0..self.waiting.len()).min_by(|&a, &b| until(a).total_cmp(&until(b)))
    }

    fn fill(&mut self) {
        while self.running.len() < self.cores.number {
            let Some(next) = self.next() else { return };
            self.running.push(self.waiting.remove(next));
        }
    }

    /// Whether a timer ends now.
    fn rings(&self) -> bool {
        self.timers.peek().is_some_and(|Reverse((at, _))| *at as f64 / 1e12 <= self.now + ROUNDING)
    }

    /// Threads with nothing more to do leave their cores.
    fn leave(&mut self) {
        let threads = &self.threads;
        self.running.retain(|&thread| !threads[thread].tasks.is_empty());
        self.fill();
    }

    /// Up to the next moment at which something happens; tasks that end go to `done`. Whether anything is left.
    fn advance(&mut self, done: &mut Vec<Id>) -> bool {
        let speed = if self.busy() == 1 { self.cores.alone } else { 1.0 };
        let contended = !self.waiting.is_empty();
        let until = |&thread: &usize| {
            let Thread { left, had, until, .. } = &self.threads[thread];
            let turn = if contended { (until - had).max(0.0) } else { f64::INFINITY };
            left.min(turn) / speed
        };
        let work = self.running.iter().map(until).fold(f64::INFINITY, f64::min);
        let timer = self.timers.peek().map_or(f64::INFINITY, |Reverse((at, _))| *at as f64 / 1e12);
        let then = f64::min(self.now + work, timer.max(self.now));
        if then.is_infinite() {
            return false;
        }
        let worked = (then - self.now) * speed;
        self.now = then;
        for &thread in &self.running {
            let thread = &mut self.threads[thread];
            thread.left -= worked;
            thread.had += worked;
        }
        for place in (0..self.running.len()).rev() {
            let thread = &mut self.threads[self.running[place]];
            let mut over = thread.had + 1e-12 >= thread.until;
            if over {
                thread.until = thread.had + self.cores.slice;
            }
            if thread.left <= 1e-12 {
                done.extend(thread.tasks.pop_front().map(|(id, _)| id));
                match thread.tasks.front() {
                    Some((_, seconds)) => thread.left = *seconds,
                    None => over = false,
                }
            }
            if over {
                let until = self.threads[self.running[place]].until;
                if self.next().is_some_and(|next| self.threads[self.waiting[next]].until <= until) {
                    self.waiting.push(self.running.remove(place));
                }
            }
        }
        self.fill();
        while self.rings() {
            done.extend(self.timers.pop().map(|Reverse((_, id))| id));
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: Cores = Cores { number: 2, alone: 1.0, slice: 0.25, wake: [0.0; 2] };

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-9, "{found} {expected}");
    }

    #[test]
    fn threads_share_the_cores_in_slices() {
        // Two at a time, then the other two; at last one alone.
        for (slice, expected) in [(0.25, [1.75, 1.75, 2.0, 4.0]), (9.0, [1.0, 1.0, 2.0, 4.0])] {
            let mut engine = Engine::default();
            for (thread, seconds) in [1.0, 1.0, 1.0, 3.0].into_iter().enumerate() {
                engine.work(thread, seconds, &[]);
            }
            let ends = engine.run(Cores { slice, ..TWO });
            for (found, expected) in ends.iter().zip(expected) {
                close(*found, expected);
            }
        }
    }

    #[test]
    fn one_core_alone_is_quicker_and_waiting_takes_none() {
        let mut engine = Engine::default();
        let first = engine.work(0, 1.0, &[]);
        let second = engine.work(1, 1.0, &[]);
        let both = engine.time(5.0, &[first, second]);
        engine.work(0, 1.5, &[both]);
        let ends = engine.run(Cores { alone: 1.5, ..TWO });
        close(ends[3], 1.0 + 5.0 + 1.0);
    }

    #[test]
    fn a_thread_that_slept_goes_before_those_that_worked() {
        let mut engine = Engine::default();
        for thread in 0..2 {
            engine.work(thread, 4.0, &[]);
        }
        let later = engine.time(1.0, &[]);
        engine.work(2, 0.5, &[later]);
        let ends = engine.run(Cores { slice: 9.0, ..TWO });
        close(ends[3], 1.5);
        close(ends[0].min(ends[1]), 4.0);
        close(ends[0].max(ends[1]), 4.5);
    }

    #[test]
    fn a_thread_wakes_later_when_all_cores_are_busy() {
        let mut engine = Engine::default();
        let early = engine.work(0, 1.0, &[]);
        let busy = engine.work(1, 3.0, &[]);
        let also = engine.work(0, 2.0, &[]);
        engine.wake(&[early]);
        let idle = engine.time(0.0, &[busy, also]);
        engine.wake(&[idle]);
        let ends = engine.run(Cores { wake: [0.25, 0.75], ..TWO });
        close(ends[3], 1.75);
        close(ends[5], 3.25);
    }

    #[test]
    fn links_carry_one_message_at_a_time_each_way() {
        let mut engine = Engine::default();
        engine.message(0, 1, 1.0, 2.0, &[]);
        engine.message(0, 2, 1.0, 2.0, &[]);
        engine.message(3, 2, 1.0, 2.0, &[]);
        engine.message(2, 0, 1.0, 2.0, &[]);
        let ends = engine.run(TWO);
        for (found, expected) in ends.iter().zip([3.0, 5.0, 7.0, 3.0]) {
            close(*found, expected);
        }
    }
}
