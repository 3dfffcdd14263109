//! One rank's GPU: the operations in flight on it and the thread that watches them.
//!
//! The watchdog asks the events of what is in flight, every millisecond while there is anything. It frees what ended, gives the
//! recorder its times, and notices what never ends, what NCCL reports beside its calls, and ranks that disagree.

use super::{
    Options,
    api::Library,
    cuda::{Context, Event, Stream},
    lane::Lane,
};
use crate::{Error, Pending, Recorder, Result, pending::lock};
use std::{
    mem::{self, ManuallyDrop},
    sync::{
        Arc, Condvar, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};
use tch::{Device, Kind, Tensor};

const POLL: Duration = Duration::from_millis(1);
const IDLE: Duration = Duration::from_millis(100);
/// For communicators to be freed, in which other ranks have a part.
const GRACE: Duration = Duration::from_secs(10);
/// Times are floats of milliseconds since an event; this old, they are still exact to a microsecond.
const ANCHORED: Duration = Duration::from_secs(5);

/// With how long was waited.
pub(super) const NOT_MADE: &str = "not all of its ranks have come to make a communicator";

/// An operation, for the recorder and for messages.
#[derive(Clone)]
pub(super) struct About {
    pub op: &'static str,
    /// How many device operations of this sort came before it on the group.
    pub number: u64,
    pub group: Arc<str>,
    pub bytes: (u64, u64),
    pub seq: u64,
}

/// An operation on its way through the GPU, with the tensors that it needs.
pub(super) struct Flight {
    pub about: About,
    /// Its input is there, and the memory of its result is free.
    pub ready: Event,
    pub lane: Arc<Lane>,
    stage: Mutex<Stage>,
    changed: Condvar,
    arrived: Arc<AtomicBool>,
    held: Mutex<Vec<Tensor>>,
    issued: Instant,
}

enum Stage {
    Queued,
    Launched { begun: Event, done: Event, seen: Option<Instant> },
    Failed(Option<Error>),
}

impl Flight {
    pub(super) fn new(about: About, ready: Event, lane: Arc<Lane>, held: Vec<Tensor>) -> Arc<Flight> {
        Arc::new(Flight {
            about,
            ready,
            lane,
            stage: Mutex::new(Stage::Queued),
            changed: Condvar::new(),
            arrived: Arc::default(),
            held: Mutex::new(held),
            issued: Instant::now(),
        })
    }

    /// Set once waiting for it does not block the host.
    pub(super) fn arrived(&self) -> Arc<AtomicBool> {
        self.arrived.clone()
    }

    pub(super) fn launched(&self, begun: Event, done: Event) {
        self.set(Stage::Launched { begun, done, seen: None });
    }

    /// It will not be launched. `None`: because of the failure that the GPU knows.
    pub(super) fn fail(&self, error: Option<Error>) {
        if !matches!(*lock(&self.stage), Stage::Launched { .. }) {
            self.set(Stage::Failed(error));
        }
    }

    fn set(&self, stage: Stage) {
        *lock(&self.stage) = stage;
        self.arrived.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// What is enqueued on `stream` from now on sees the result. Blocks the host until the operation is launched, which it is
    /// already, but for the first of a lane. Gives the places in `stream` before and after the wait.
    pub(super) fn join(&self, gpu: &Gpu, stream: &Stream) -> Result<(Event, Event)> {
        let mut stage = lock(&self.stage);
        loop {
            match &mut *stage {
                Stage::Queued => stage = self.changed.wait(stage).unwrap_or_else(PoisonError::into_inner),
                Stage::Failed(error) => {
                    return Err(error
                        .take()
                        .or_else(|| gpu.failure())
                        .unwrap_or(Error::Stopped { op: self.about.op, group: self.about.group.clone() }));
                }
                Stage::Launched { done, .. } => {
                    let before = stream.record()?;
                    stream.wait(done)?;
                    let after = stream.record()?;
                    // From here on their memory is used again only after the wait.
                    lock(&self.held).clear();
                    return Ok((before, after));
                }
            }
        }
    }
}

pub(crate) struct Gpu {
    /// In the world.
    pub(super) rank: usize,
    pub(super) context: Arc<Context>,
    pub(super) library: &'static Library,
    pub(super) options: Options,
    pub(super) recorder: Recorder,
    state: Mutex<Watched>,
    lanes: Mutex<Vec<Weak<Lane>>>,
    /// To the watchdog: there is something to watch. From it: something ended.
    changed: Condvar,
    failed: OnceLock<Failure>,
    side: OnceLock<Stream>,
    /// A number that anybody may overwrite, in memory that is never anything else's, nor freed: the watchdog may be the last to hold
    /// this, when libtorch has ended.
    scratch: Mutex<ManuallyDrop<Tensor>>,
    /// Of communicators that are being freed.
    ending: Mutex<Vec<mpsc::Receiver<()>>>,
}

/// What the watchdog looks after.
#[derive(Default)]
struct Watched {
    flights: Vec<Arc<Flight>>,
    waits: Vec<(About, Event, Event)>,
    spans: Vec<(&'static str, Event, Event)>,
    checks: Vec<(About, Pending<Tensor>)>,
    /// It has taken some of the above, and not yet brought back what remains.
    taken: bool,
}

impl Watched {
    fn is_idle(&self) -> bool {
        !self.taken
            && self.flights.is_empty()
            && self.waits.is_empty()
            && self.spans.is_empty()
            && self.checks.is_empty()
    }
}

struct Failure {
    about: About,
    problem: String,
}

impl Gpu {
    pub(super) fn new(
        rank: usize,
        context: Arc<Context>,
        library: &'static Library,
        options: Options,
        recorder: Recorder,
    ) -> Result<Arc<Gpu>> {
        let clock = Clock::new(&context, &recorder)?;
        let scratch = Tensor::f_zeros([1], (Kind::Float, Device::Cuda(context.index)))?;
        let gpu = Arc::new(Gpu {
            rank,
            context,
            library,
            options,
            recorder,
            state: Mutex::default(),
            lanes: Mutex::default(),
            changed: Condvar::new(),
            failed: OnceLock::new(),
            side: OnceLock::new(),
            scratch: Mutex::new(ManuallyDrop::new(scratch)),
            ending: Mutex::default(),
        });
        let watched = Arc::downgrade(&gpu);
        let named = thread::Builder::new().name(format!("rank {rank} gpu"));
        named.spawn(move || watch(&watched, clock)).map_err(|source| Error::Spawn { rank, source })?;
        Ok(gpu)
    }

    pub(super) fn failure(&self) -> Option<Error> {
        self.failed.get().map(|failure| self.error(&failure.about, failure.problem.clone()))
    }

    pub(super) fn error(&self, about: &About, problem: String) -> Error {
        let About { op, number, group, bytes: (sent, received), .. } = about.clone();
        Error::OnGpu { rank: self.rank, op, number, group, bytes: sent.max(received), problem }
    }

    pub(super) fn watch_lane(&self, lane: &Arc<Lane>) {
        let mut lanes = lock(&self.lanes);
        lanes.retain(|lane| lane.strong_count() > 0);
        lanes.push(Arc::downgrade(lane));
    }

    pub(super) fn scratch(&self) -> Tensor {
        lock(&self.scratch).shallow_clone()
    }

    /// `ended` tells when a communicator has been freed.
    pub(super) fn watch_end(&self, ended: mpsc::Receiver<()>) {
        lock(&self.ending).push(ended);
    }

    /// Waits for the communicators that are being freed, for a while.
    pub(super) fn until_ended(&self) {
        let until = Instant::now() + GRACE;
        let ending = mem::take(&mut *lock(&self.ending));
        for ended in ending {
            let _ = ended.recv_timeout(until.saturating_duration_since(Instant::now()));
        }
    }

    pub(super) fn watch_flight(&self, flight: Arc<Flight>) {
        lock(&self.state).flights.push(flight);
        self.changed.notify_all();
    }

    /// The host goes on while the ranks agree; that they do not ends the job.
    pub(super) fn watch_check(&self, about: About, check: Pending<Tensor>) {
        lock(&self.state).checks.push((about, check));
    }

    /// The stream on which messages in flight are waited for, and on which what lies between them is computed.
    pub(super) fn side(&self) -> Result<&Stream> {
        if let Some(side) = self.side.get() {
            return Ok(side);
        }
        let made = self.context.side_stream()?;
        Ok(self.side.get_or_init(|| made))
    }

    /// The stream on which this rank computes waited for an operation between the two.
    pub(super) fn waited(&self, about: About, before: Event, after: Event) {
        lock(&self.state).waits.push((about, before, after));
        self.changed.notify_all();
    }

    /// The place in the work of the calling thread's stream; none if the GPU cannot be asked.
    pub(crate) fn mark(&self) -> Option<Event> {
        let _entered = self.context.enter().ok()?;
        self.context.current_stream().ok()?.record().ok()
    }

    pub(crate) fn span(&self, name: &'static str, from: Event, to: Event) {
        lock(&self.state).spans.push((name, from, to));
        self.changed.notify_all();
    }

    /// Blocks until all that was issued has ended and has been recorded. `false`: something failed.
    pub(crate) fn settle(&self) -> bool {
        self.settle_until(None)
    }

    /// Before communicators are freed: what is under way has ended, or will not soon.
    pub(super) fn settle_for_a_while(&self) {
        self.settle_until(Some(Instant::now() + GRACE));
    }

    fn settle_until(&self, until: Option<Instant>) -> bool {
        let mut state = lock(&self.state);
        let goes_on = || until.is_none_or(|until| Instant::now() < until);
        while !state.is_idle() && self.failed.get().is_none() && goes_on() {
            state = self.changed.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner).0;
        }
        self.failed.get().is_none()
    }

    /// Ends the job: tells the user, and should that return, unblocks what waits.
    pub(super) fn fail(&self, about: &About, error: Error) {
        let problem = match &error {
            Error::OnGpu { problem, .. } => problem.clone(),
            other => other.to_string(),
        };
        if self.failed.set(Failure { about: about.clone(), problem: problem.clone() }).is_err() {
            return;
        }
        (self.options.on_failure)(self.error(about, problem));
        let lanes: Vec<_> = lock(&self.lanes).iter().filter_map(Weak::upgrade).collect();
        lanes.iter().for_each(|lane| lane.abort());
        let flights = mem::take(&mut lock(&self.state).flights);
        flights.iter().for_each(|flight| flight.fail(None));
        self.changed.notify_all();
    }
}

fn watch(gpu: &Weak<Gpu>, mut clock: Clock) {
    let mut asked = Instant::now();
    while let Some(gpu) = gpu.upgrade() {
        {
            let state = lock(&gpu.state);
            if state.is_idle() {
                drop(gpu.changed.wait_timeout(state, IDLE));
            }
        }
        if gpu.failed.get().is_none() {
            let look_for_errors = asked.elapsed() > IDLE;
            if look_for_errors {
                asked = Instant::now();
            }
            if let Err(blamed) = gpu.poll(&mut clock, look_for_errors) {
                let (about, error) = *blamed;
                gpu.fail(&about, error);
            }
        }
        drop(gpu);
        thread::sleep(POLL);
    }
}

/// An error, and the operation in which it showed.
type Blamed<T> = std::result::Result<T, Box<(About, Error)>>;

fn blame(about: About, error: Error) -> Box<(About, Error)> {
    Box::new((about, error))
}

impl Gpu {
    fn poll(&self, clock: &mut Clock, look_for_errors: bool) -> Blamed<()> {
        let taken = {
            let mut state = lock(&self.state);
            if state.is_idle() {
                return Ok(());
            }
            mem::replace(&mut *state, Watched { taken: true, ..Watched::default() })
        };
        let mut left = Watched::default();
        let polled = self.poll_all(clock, look_for_errors, taken, &mut left);
        let mut state = lock(&self.state);
        // New ones have come behind them.
        left.flights.append(&mut state.flights);
        left.waits.append(&mut state.waits);
        left.spans.append(&mut state.spans);
        left.checks.append(&mut state.checks);
        *state = left;
        drop(state);
        self.changed.notify_all();
        polled
    }

    fn poll_all(&self, clock: &mut Clock, look_for_errors: bool, watched: Watched, left: &mut Watched) -> Blamed<()> {
        let Watched { flights, waits, spans, checks, .. } = watched;
        let nobody = || About { op: "watching", number: 0, group: "".into(), bytes: (0, 0), seq: u64::MAX };
        let _entered = self.context.enter().map_err(|error| blame(nobody(), error))?;
        clock.renew().map_err(|error| blame(nobody(), error))?;
        let mut blamed = Ok(());
        for flight in flights {
            match self.has_ended(&flight, clock) {
                Ok(true) => {}
                Ok(false) => left.flights.push(flight),
                Err(error) => {
                    if blamed.is_ok() {
                        blamed = Err(blame(flight.about.clone(), error));
                    }
                    left.flights.push(flight);
                }
            }
        }
        for (about, before, after) in waits {
            match clock.times(&before, &after) {
                Ok(Some(times)) => {
                    let About { op, group, seq, .. } = about;
                    self.recorder.exposed(seq, group, op, times);
                }
                Ok(None) => left.waits.push((about, before, after)),
                Err(error) if blamed.is_ok() => blamed = Err(blame(about, error)),
                Err(_) => {}
            }
        }
        for (name, from, to) in spans {
            match clock.times(&from, &to) {
                Ok(Some(times)) => self.recorder.computed(name, times),
                Ok(None) => left.spans.push((name, from, to)),
                Err(error) if blamed.is_ok() => blamed = Err(blame(nobody(), error)),
                Err(_) => {}
            }
        }
        for (about, check) in checks {
            if !check.is_ready() {
                left.checks.push((about, check));
            } else if let Err(error) = check.wait()
                && blamed.is_ok()
            {
                blamed = Err(blame(about, error));
            }
        }
        if look_for_errors {
            for flight in &left.flights {
                if let Err(error) = flight.lane.asynchronous_error()
                    && blamed.is_ok()
                {
                    blamed = Err(blame(flight.about.clone(), error));
                }
            }
        }
        blamed
    }

    /// Records it and frees its tensors if so.
    fn has_ended(&self, flight: &Flight, clock: &Clock) -> Result<bool> {
        let About { op, group, bytes, seq, .. } = flight.about.clone();
        let waited = self.options.timeout;
        let late = |what: &str| Err(self.error(&flight.about, format!("{what} within {} s", waited.as_secs())));
        let mut stage = lock(&flight.stage);
        let (ok, times) = match &mut *stage {
            Stage::Queued if flight.issued.elapsed() > waited => return late(NOT_MADE),
            Stage::Queued => return Ok(false),
            Stage::Failed(_) => (false, None),
            Stage::Launched { begun, done, seen } => match clock.times(begun, done)? {
                Some(times) => (true, Some(times)),
                None if seen.is_some_and(|seen| seen.elapsed() > waited) => return late("it has not ended"),
                None => {
                    // The time counts from when its input was there.
                    if seen.is_none() && begun.has_come()? {
                        *seen = Some(Instant::now());
                    }
                    return Ok(false);
                }
            },
        };
        drop(stage);
        lock(&flight.held).clear();
        if let Some(times) = times {
            self.recorder.ran(seq, times);
        }
        self.recorder.ended(seq, group, op, bytes, ok);
        Ok(true)
    }
}

/// The recorder's clock on the GPU.
struct Clock {
    stream: Stream,
    anchor: Event,
    ns: f64,
    since: Instant,
}

impl Clock {
    fn new(context: &Arc<Context>, recorder: &Recorder) -> Result<Clock> {
        let _entered = context.enter()?;
        let stream = context.stream()?;
        // The first use of a stream and an event takes longer.
        stream.record()?.synchronize()?;
        let anchor = stream.record()?;
        anchor.synchronize()?;
        Ok(Clock { stream, anchor, ns: recorder.now() as f64, since: Instant::now() })
    }

    fn renew(&mut self) -> Result<()> {
        if self.since.elapsed() > ANCHORED {
            let anchor = self.stream.record()?;
            anchor.synchronize()?;
            self.ns += self.anchor.until(&anchor)?;
            self.anchor = anchor;
            self.since = Instant::now();
        }
        Ok(())
    }

    /// Nanoseconds of both, once both have come.
    fn times(&self, from: &Event, to: &Event) -> Result<Option<(u64, u64)>> {
        if !to.has_come()? || !from.has_come()? {
            return Ok(None);
        }
        let at = |event: &Event| Ok::<_, Error>((self.ns + self.anchor.until(event)?).max(0.0) as u64);
        let from = at(from)?;
        Ok(Some((from, at(to)?.max(from))))
    }
}
