//! A result on its way: what a collective returns while the progress thread runs it.
//!
//! Also the one-shot slot by which the progress thread hands the result over.

use crate::{Error, Result};
use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

/// The result of an operation that may still be running. Dropping it does not stop the operation.
///
/// The input of the operation must stay as it is until `wait` has returned; from then on it may be overwritten.
#[must_use = "the operation runs on, but its result is lost and its input may not be overwritten until `wait` returns"]
pub struct Pending<T>(State<T>);

enum State<T> {
    Here(Result<T>),
    Coming { arrived: Arc<AtomicBool>, take: Box<dyn FnOnce() -> Result<T> + Send> },
}

impl<T> Pending<T> {
    /// A result that is there already.
    pub fn ready(value: T) -> Pending<T> {
        Pending(State::Here(Ok(value)))
    }

    pub(crate) fn coming(arrived: Arc<AtomicBool>, take: impl FnOnce() -> Result<T> + Send + 'static) -> Pending<T> {
        Pending(State::Coming { arrived, take: Box::new(take) })
    }

    /// Blocks until the operation has ended.
    pub fn wait(self) -> Result<T> {
        match self.0 {
            State::Here(result) => result,
            State::Coming { take, .. } => take(),
        }
    }

    /// Whether `wait` would return without blocking on communication.
    pub fn is_ready(&self) -> bool {
        match &self.0 {
            State::Here(_) => true,
            State::Coming { arrived, .. } => arrived.load(Ordering::Acquire),
        }
    }

    /// Applies `f` to the result, on the thread that waits, inside `wait`.
    pub fn map<U>(self, f: impl FnOnce(T) -> Result<U> + Send + 'static) -> Pending<U>
    where
        T: 'static,
    {
        match self.0 {
            State::Here(result) => Pending(State::Here(result.and_then(f))),
            State::Coming { arrived, take } => Pending::coming(arrived, move || take().and_then(f)),
        }
    }
}

/// A lock whose holder panicked still guards data in a usable state here: every update is a single assignment.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Slot<T> {
    value: Mutex<Option<Result<T>>>,
    filled: Condvar,
    arrived: Arc<AtomicBool>,
}

impl<T> Slot<T> {
    fn fill(&self, value: Result<T>) {
        *lock(&self.value) = Some(value);
        self.arrived.store(true, Ordering::Release);
        self.filled.notify_all();
    }
}

/// The progress thread's end of a result. Dropped unfulfilled, it reports that the thread has ended.
pub(crate) struct Promise<T> {
    slot: Option<Arc<Slot<T>>>,
    op: &'static str,
    group: Arc<str>,
}

/// The rank's end of a result.
pub(crate) struct Receipt<T>(Arc<Slot<T>>);

pub(crate) fn promise<T>(op: &'static str, group: Arc<str>) -> (Promise<T>, Receipt<T>) {
    let slot =
        Arc::new(Slot { value: Mutex::new(None), filled: Condvar::new(), arrived: Arc::new(AtomicBool::new(false)) });
    (Promise { slot: Some(slot.clone()), op, group }, Receipt(slot))
}

impl<T> Promise<T> {
    pub(crate) fn fulfil(mut self, value: Result<T>) {
        if let Some(slot) = self.slot.take() {
            slot.fill(value);
        }
    }
}

impl<T> Drop for Promise<T> {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            slot.fill(Err(Error::Stopped { op: self.op, group: self.group.clone() }));
        }
    }
}

impl<T> Receipt<T> {
    pub(crate) fn arrived(&self) -> Arc<AtomicBool> {
        self.0.arrived.clone()
    }

    pub(crate) fn take(self) -> Result<T> {
        let mut value = lock(&self.0.value);
        loop {
            if let Some(result) = value.take() {
                return result;
            }
            value = self.0.filled.wait(value).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_applies_to_results_that_are_here_and_to_those_that_come() {
        let here = Pending::ready(20).map(|x| Ok(x + 1));
        assert!(here.is_ready());
        assert_eq!(here.wait().unwrap(), 21);

        let (promise, receipt) = promise::<i32>("all_gather", "sp".into());
        let coming = Pending::coming(receipt.arrived(), move || receipt.take()).map(|x| Ok(x * 2));
        assert!(!coming.is_ready());
        promise.fulfil(Ok(4));
        assert!(coming.is_ready());
        assert_eq!(coming.wait().unwrap(), 8);
    }

    #[test]
    fn a_dropped_promise_is_an_error_and_not_a_hang() {
        let (promise, receipt) = promise::<i32>("all_gather", "sp".into());
        drop(promise);
        assert!(matches!(receipt.take(), Err(Error::Stopped { op: "all_gather", .. })));
    }
}
