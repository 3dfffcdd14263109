//! The flight recorder: what this rank sent, when, and for how long it had to wait.
//!
//! One [`Recorder`] a rank, shared by all its groups. It keeps the last 4096 communication and compute spans and counts
//! everything. Drawing traces and printing tables are the business of others.

use crate::{
    nccl::{Event, Gpu},
    pending::lock,
};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, OnceLock, Weak},
    thread,
    time::{Duration, Instant},
};

const KEPT: usize = 4096;

/// One finished operation. Times are nanoseconds on the clock of [`Recorder::now`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommSpan {
    /// Counts the operations of this rank, over all its groups, in program order.
    pub seq: u64,
    pub group: Arc<str>,
    /// `all_gather`, `reduce_scatter`, ...
    pub op: &'static str,
    /// Payload by formula: see [`Totals`].
    pub bytes_sent: u64,
    pub bytes_received: u64,
    /// When the rank's thread enqueued it.
    pub issued_ns: u64,
    /// When the progress thread took it up.
    pub started_ns: u64,
    /// When its result was there.
    pub ended_ns: u64,
    /// For how long the rank's thread was blocked in `wait`: communication that no computation hid.
    pub exposed_ns: u64,
    /// What the rank was at when it was issued: see [`Recorder::place`]. Empty if nothing was said.
    pub place: &'static str,
}

/// One stretch of computation that [`Recorder::span`] enclosed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ComputeSpan {
    pub name: &'static str,
    pub started_ns: u64,
    pub ended_ns: u64,
}

/// Sums over all operations that succeeded since the start, or the last [`Recorder::clear`].
///
/// Bytes are payload, counted as an ideal algorithm moves it, whatever the back end does. With n the bytes of the input
/// on this rank and W the size of the group (0 for W = 1, except `send` and `recv`):
///
/// | operation | sent | received |
/// |---|---|---|
/// | all_gather | n | (W-1) n |
/// | all_gather_v | n | the sum of the others' n |
/// | reduce_scatter | n (W-1)/W | n (W-1)/W |
/// | reduce_scatter_v | n less the own rows | (W-1) times the own rows |
/// | all_reduce | 2n (W-1)/W | 2n (W-1)/W |
/// | all_to_all | n (W-1)/W | n (W-1)/W |
/// | all_to_all_v | n less the rows kept | the result less the rows kept |
/// | broadcast | n on the root, else 0 | 0 on the root, else n |
/// | send, recv | n, 0 | 0, n |
/// | barrier, split | 0 | 0 |
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Operations, of whatever kind.
    pub messages: u64,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub exposed_ns: u64,
}

/// How often [`Recorder::settle`] looks, and for how long.
const LOOK: Duration = Duration::from_micros(20);
const SETTLED: Duration = Duration::from_secs(60);

/// Records one rank's communication and computation; clones share the record.
#[derive(Clone, Default)]
pub struct Recorder(Arc<Mutex<Record>>);

#[derive(Default)]
struct Record {
    next: u64,
    comm: VecDeque<Entry>,
    compute: VecDeque<ComputeSpan>,
    waits: VecDeque<(u64, u64)>,
    totals: BTreeMap<(Arc<str>, &'static str), Totals>,
    gpu: Weak<Gpu>,
    place: &'static str,
}

struct Entry {
    span: CommSpan,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Queued,
    Running,
    Done,
    Failed,
}

impl Record {
    /// The entry of an operation, unless it is too old to be kept.
    fn entry(&mut self, seq: u64) -> Option<&mut Entry> {
        let oldest = self.comm.front()?.span.seq;
        self.comm.get_mut(usize::try_from(seq.checked_sub(oldest)?).ok()?)
    }
}

fn push<T>(ring: &mut VecDeque<T>, value: T) {
    if ring.len() == KEPT {
        ring.pop_front();
    }
    ring.push_back(value);
}

impl Recorder {
    pub fn new() -> Recorder {
        Recorder::default()
    }

    /// Nanoseconds since the process first asked; ranks that are threads of one process share the clock.
    pub fn now(&self) -> u64 {
        static EPOCH: OnceLock<Instant> = OnceLock::new();
        EPOCH.get_or_init(Instant::now).elapsed().as_nanos() as u64
    }

    /// Records a compute span that lasts until the guard is dropped. On a rank with a GPU it is the work that the calling
    /// thread enqueues meanwhile on its current stream.
    pub fn span(&self, name: &'static str) -> SpanGuard {
        let mark = self.gpu().and_then(|gpu| gpu.mark());
        SpanGuard { recorder: self.clone(), name, started_ns: self.now(), mark }
    }

    /// Says what the rank is at until the guard is dropped: the `place` of operations issued meanwhile.
    pub fn place(&self, name: &'static str) -> PlaceGuard {
        let before = std::mem::replace(&mut lock(&self.0).place, name);
        PlaceGuard { recorder: self.clone(), before }
    }

    /// Blocks until all that was issued has ended and is recorded: till then spans and totals may lack what nobody waits for. What
    /// does not end within a minute, as a message that nobody sends, is left.
    pub fn settle(&self) {
        if let Some(gpu) = self.gpu()
            && !gpu.settle()
        {
            return;
        }
        let under_way = || lock(&self.0).comm.iter().any(|e| matches!(e.stage, Stage::Queued | Stage::Running));
        let began = Instant::now();
        while under_way() && began.elapsed() < SETTLED {
            thread::sleep(LOOK);
        }
    }

    fn gpu(&self) -> Option<Arc<Gpu>> {
        lock(&self.0).gpu.upgrade()
    }

    /// From now on spans are those of the work on this GPU.
    pub(crate) fn attach(&self, gpu: &Arc<Gpu>) {
        lock(&self.0).gpu = Arc::downgrade(gpu);
    }

    /// The last finished operations, oldest first. Those that failed or are still running are only in [`Recorder::tail`].
    pub fn comm_spans(&self) -> Vec<CommSpan> {
        let record = lock(&self.0);
        record.comm.iter().filter(|e| e.stage == Stage::Done).map(|e| e.span.clone()).collect()
    }

    /// The last compute spans, in the order in which they ended.
    pub fn compute_spans(&self) -> Vec<ComputeSpan> {
        lock(&self.0).compute.iter().cloned().collect()
    }

    /// From when to when the rank's thread was blocked in `wait`: the last such stretches, in order.
    pub fn waits(&self) -> Vec<(u64, u64)> {
        lock(&self.0).waits.iter().copied().collect()
    }

    pub fn totals(&self) -> Totals {
        lock(&self.0).totals.values().fold(Totals::default(), |sum, each| Totals {
            messages: sum.messages + each.messages,
            bytes_sent: sum.bytes_sent + each.bytes_sent,
            bytes_received: sum.bytes_received + each.bytes_received,
            exposed_ns: sum.exposed_ns + each.exposed_ns,
        })
    }

    /// Totals by group and operation.
    pub fn totals_by_op(&self) -> BTreeMap<(Arc<str>, &'static str), Totals> {
        lock(&self.0).totals.clone()
    }

    /// Forgets all spans and totals. Sequence numbers go on.
    pub fn clear(&self) {
        let mut record = lock(&self.0);
        record.comm.clear();
        record.compute.clear();
        record.waits.clear();
        record.totals.clear();
    }

    /// The last `n` operations as lines to read, the youngest last: what a failing rank was doing.
    pub fn tail(&self, n: usize) -> String {
        let record = lock(&self.0);
        let skipped = record.comm.len().saturating_sub(n);
        let line = |entry: &Entry| {
            let CommSpan { seq, group, op, bytes_sent, bytes_received, issued_ns, .. } = &entry.span;
            let at = *issued_ns as f64 / 1e6;
            let took = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e6;
            let outcome = match entry.stage {
                Stage::Queued => "queued".to_string(),
                Stage::Running => format!("running for {:.3} ms", took(entry.span.started_ns, self.now())),
                Stage::Done => format!(
                    "done in {:.3} ms, {:.3} ms of it exposed",
                    took(entry.span.started_ns, entry.span.ended_ns),
                    entry.span.exposed_ns as f64 / 1e6
                ),
                Stage::Failed => "failed".to_string(),
            };
            format!("{at:>12.3} ms  #{seq} {op} on {group}, {bytes_sent} B out, {bytes_received} B in: {outcome}\n")
        };
        record.comm.iter().skip(skipped).map(line).collect()
    }

    pub(crate) fn issued(&self, group: Arc<str>, op: &'static str, (sent, received): (u64, u64)) -> u64 {
        let issued_ns = self.now();
        let mut record = lock(&self.0);
        let seq = record.next;
        record.next += 1;
        let span = CommSpan {
            seq,
            group,
            op,
            bytes_sent: sent,
            bytes_received: received,
            issued_ns,
            started_ns: 0,
            ended_ns: 0,
            exposed_ns: 0,
            place: record.place,
        };
        push(&mut record.comm, Entry { span, stage: Stage::Queued });
        seq
    }

    pub(crate) fn started(&self, seq: u64) {
        let now = self.now();
        if let Some(entry) = lock(&self.0).entry(seq) {
            entry.span.started_ns = now;
            entry.stage = Stage::Running;
        }
    }

    pub(crate) fn ended(&self, seq: u64, group: Arc<str>, op: &'static str, bytes: (u64, u64), ok: bool) {
        let now = self.now();
        let mut record = lock(&self.0);
        if let Some(entry) = record.entry(seq) {
            if entry.span.ended_ns == 0 {
                entry.span.ended_ns = now;
            }
            entry.stage = if ok { Stage::Done } else { Stage::Failed };
        }
        if ok {
            let totals = record.totals.entry((group, op)).or_default();
            totals.messages += 1;
            totals.bytes_sent += bytes.0;
            totals.bytes_received += bytes.1;
        }
    }

    /// When an operation ran on the GPU; before `ended`.
    pub(crate) fn ran(&self, seq: u64, (from, to): (u64, u64)) {
        if let Some(entry) = lock(&self.0).entry(seq) {
            entry.span.started_ns = from;
            entry.span.ended_ns = to;
        }
    }

    pub(crate) fn computed(&self, name: &'static str, (started_ns, ended_ns): (u64, u64)) {
        push(&mut lock(&self.0).compute, ComputeSpan { name, started_ns, ended_ns });
    }

    /// The rank was blocked from `from` to `to`.
    pub(crate) fn exposed(&self, seq: u64, group: Arc<str>, op: &'static str, (from, to): (u64, u64)) {
        let ns = to - from;
        let mut record = lock(&self.0);
        push(&mut record.waits, (from, to));
        if let Some(entry) = record.entry(seq) {
            entry.span.exposed_ns += ns;
        }
        record.totals.entry((group, op)).or_default().exposed_ns += ns;
    }
}

/// Ends a place when dropped; the one before it goes on.
#[must_use = "the place ends when this is dropped; bind it to a name such as `_place`"]
pub struct PlaceGuard {
    recorder: Recorder,
    before: &'static str,
}

impl Drop for PlaceGuard {
    fn drop(&mut self) {
        lock(&self.recorder.0).place = self.before;
    }
}

/// Ends a compute span when dropped.
#[must_use = "the span ends when this is dropped; bind it to a name such as `_span`"]
pub struct SpanGuard {
    recorder: Recorder,
    name: &'static str,
    started_ns: u64,
    /// Its start on the GPU.
    mark: Option<Event>,
}

impl Drop for SpanGuard {
    fn drop(&mut self) {
        if let (Some(mark), Some(gpu)) = (self.mark.take(), self.recorder.gpu())
            && let Some(end) = gpu.mark()
        {
            return gpu.span(self.name, mark, end);
        }
        self.recorder.computed(self.name, (self.started_ns, self.recorder.now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_last_spans_and_the_totals_keep_all() {
        let recorder = Recorder::new();
        let group: Arc<str> = "sp".into();
        for _ in 0..KEPT + 10 {
            let seq = recorder.issued(group.clone(), "send", (8, 0));
            recorder.started(seq);
            recorder.ended(seq, group.clone(), "send", (8, 0), true);
            recorder.exposed(seq, group.clone(), "send", (20, 25));
        }
        let spans = recorder.comm_spans();
        assert_eq!((spans.len(), spans[0].seq, spans[KEPT - 1].exposed_ns), (KEPT, 10, 5));
        assert_eq!((recorder.waits().len(), recorder.waits()[0]), (KEPT, (20, 25)));
        assert_eq!(recorder.totals().messages, KEPT as u64 + 10);
        assert_eq!(recorder.totals_by_op()[&(group, "send")].bytes_sent, 8 * (KEPT as u64 + 10));
    }

    #[test]
    fn operations_know_where_they_were_issued() {
        let recorder = Recorder::new();
        let issue = || recorder.issued("sp".into(), "send", (8, 0));
        let outer = recorder.place("backward");
        issue();
        let inner = recorder.place("forward");
        issue();
        drop(inner);
        issue();
        drop(outer);
        issue();
        (0..4).for_each(|seq| recorder.ended(seq, "sp".into(), "send", (8, 0), true));
        let places: Vec<&str> = recorder.comm_spans().iter().map(|span| span.place).collect();
        assert_eq!(places, ["backward", "forward", "backward", ""]);
    }

    #[test]
    fn clearing_in_mid_flight_is_harmless() {
        let recorder = Recorder::new();
        let old = recorder.issued("sp".into(), "send", (8, 0));
        recorder.clear();
        let new = recorder.issued("sp".into(), "recv", (0, 8));
        recorder.started(new);
        recorder.ended(old, "sp".into(), "send", (8, 0), true);
        assert!(recorder.comm_spans().is_empty());
        assert!(recorder.tail(5).contains("#1 recv on sp, 0 B out, 8 B in: running for"));
    }

    #[test]
    fn compute_spans_last_as_long_as_their_guard() {
        let recorder = Recorder::new();
        let before = recorder.now();
        drop(recorder.span("intra_rank"));
        let spans = recorder.compute_spans();
        assert_eq!(spans[0].name, "intra_rank");
        assert!(before <= spans[0].started_ns && spans[0].started_ns <= spans[0].ended_ns);
    }
}
