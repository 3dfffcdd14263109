//! Messages that depend on each other, in flight while the rank computes. On the CPU a second thread of the rank waits for one
//! and sends the next; it starts with the first flight and ends with the rank's groups. With NCCL a second stream does so.

use crate::{Error, Group, Pending, Result, Tensor, pending::lock, pending::promise};
use std::{
    cell::RefCell,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, mpsc},
    thread,
};

type Work = Box<dyn FnOnce() + Send>;

/// The thread, once there is one.
#[derive(Clone, Default)]
pub(crate) struct Flight(Arc<Mutex<Option<mpsc::Sender<Work>>>>);

/// An operation that was waited for.
pub(crate) struct Awaited {
    pub seq: u64,
    pub group: Arc<str>,
    pub op: &'static str,
}

thread_local! {
    /// Within a flight: the last operation that it waited for.
    static LAST: RefCell<Option<Option<Awaited>>> = const { RefCell::new(None) };
}

/// Whether this thread is within a flight, whose waits hold up no computation; then it notes what it waited for.
pub(crate) fn awaited_in_flight(awaited: &dyn Fn() -> Awaited) -> bool {
    LAST.with_borrow_mut(|last| last.as_mut().map(|last| *last = Some(awaited()))).is_some()
}

/// What `dependent` gives, and the last operation that it waited for.
pub(crate) fn noting_waits<T>(dependent: impl FnOnce() -> T) -> (T, Option<Awaited>) {
    LAST.set(Some(None));
    let result = dependent();
    (result, LAST.take().flatten())
}

impl Flight {
    fn start(&self, rank: usize, work: Work) -> Result<()> {
        let mut thread = lock(&self.0);
        let sender = match thread.take() {
            Some(sender) => sender,
            None => {
                let (sender, jobs) = mpsc::channel::<Work>();
                let named = thread::Builder::new().name(format!("rank {rank} flight"));
                named.spawn(move || fly(&jobs)).map_err(|source| Error::Spawn { rank, source })?;
                sender
            }
        };
        // The thread outlives every panic of its work, and so it is there.
        let _ = sender.send(work);
        *thread = Some(sender);
        Ok(())
    }
}

fn fly(jobs: &mpsc::Receiver<Work>) {
    let _no_grad = tch::no_grad_guard();
    for work in jobs {
        // Whoever waits learns of it from the promise that was dropped.
        let _ = catch_unwind(AssertUnwindSafe(work));
    }
}

impl Group {
    /// Runs `dependent` while the rank computes: messages of this rank's groups of which one depends on the result of
    /// another, as in a scan over ranks, with the arithmetic between them. `reads`: the tensors made before that it reads.
    /// Flights run one after another. `dependent` issues all its messages itself, and while it is in the air the rank issues
    /// none, or ranks could disagree on their order.
    ///
    /// That the rank was blocked in [`Pending::wait`] is recorded with the last operation for which `dependent` waited.
    pub fn in_flight<T: Send + 'static>(
        &self,
        reads: Vec<Tensor>,
        dependent: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<Pending<T>> {
        if let Some(lanes) = self.lanes().filter(|_| reads.iter().any(|x| x.device().is_cuda())) {
            return lanes.in_flight(reads, dependent);
        }
        let (promise, receipt) = promise("messages in flight", self.name().into());
        let work = move || {
            let (result, last) = noting_waits(dependent);
            promise.fulfil(result.map(|value| (value, last)));
        };
        self.flight().start(self.rank(), Box::new(work))?;
        let recorder = self.recorder().clone();
        Ok(Pending::coming(receipt.arrived(), move || {
            let from = recorder.now();
            let (value, last) = receipt.take()?;
            if let Some(Awaited { seq, group, op }) = last {
                recorder.exposed(seq, group, op, (from, recorder.now()));
            }
            Ok(value)
        }))
    }
}

#[cfg(test)]
mod tests {
    use crate::{Error, Group, local};
    use std::time::Duration;
    use tch::Tensor;

    /// A message goes round the ring, each rank adding its number.
    fn round(group: Group) -> crate::Result<(f64, u64, u64)> {
        let (rank, size) = (group.rank(), group.size());
        let (before, after) = ((rank + size - 1) % size, (rank + 1) % size);
        let ring = group.clone();
        let pending = group.in_flight(vec![], move || {
            let mut sum = Tensor::zeros([1], (tch::Kind::Double, tch::Device::Cpu));
            if rank > 0 {
                sum = ring.recv(&[1], tch::Kind::Double, before)?.wait()?;
            }
            sum += rank as i64;
            ring.send(&sum, after)?.wait()?;
            if rank == 0 { ring.recv(&[1], tch::Kind::Double, before)?.wait() } else { Ok(sum) }
        })?;
        std::thread::sleep(Duration::from_millis(100));
        let hidden = group.recorder().totals().exposed_ns;
        let sum = pending.wait()?.double_value(&[0]);
        Ok((sum, hidden, group.recorder().totals().exposed_ns))
    }

    #[test]
    fn dependent_messages_travel_while_the_rank_is_busy() {
        for (rank, (sum, hidden, exposed)) in local::run(4, round).unwrap().into_iter().enumerate() {
            let expected = if rank == 0 { 6 } else { (0..=rank).sum() };
            assert_eq!(sum, expected as f64, "rank {rank}");
            assert_eq!(hidden, 0, "rank {rank} was not blocked before it waited");
            assert!(exposed < 50_000_000, "rank {rank} was blocked for {exposed} ns, though all had arrived");
        }
    }

    #[test]
    fn errors_and_panics_end_the_wait() {
        let failed =
            local::run(1, |group| group.in_flight(vec![], || -> crate::Result<()> { Err(Error::NoRanks) })?.wait());
        assert!(matches!(failed, Err(Error::NoRanks)));
        let panicked = local::run(1, |group| {
            let first = group.in_flight(vec![], || -> crate::Result<()> { panic!("on purpose") })?.wait();
            assert!(matches!(first, Err(Error::Stopped { op: "messages in flight", .. })));
            group.in_flight(vec![], || Ok(7))?.wait()
        });
        assert_eq!(panicked.unwrap(), [7]);
    }
}
