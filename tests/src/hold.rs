//! Assertions that a rank may fail and go on: its part in what follows is awaited by others, and on a rare machine one run
//! should show all that is wrong.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

thread_local! {
    static GOING_ON: Cell<bool> = const { Cell::new(false) };
    static HELD: Cell<bool> = const { Cell::new(false) };
}

static FAILED: AtomicUsize = AtomicUsize::new(0);

/// Runs an assertion that is about this rank alone. It panics as ever, unless within [`going_on_after_failures`].
#[track_caller]
pub fn hold(assertion: impl FnOnce()) {
    if !GOING_ON.get() {
        return assertion();
    }
    HELD.set(true);
    let held = catch_unwind(AssertUnwindSafe(assertion));
    HELD.set(false);
    if held.is_err() {
        FAILED.fetch_add(1, Ordering::Relaxed);
    }
}

/// Whether the panic of this thread, for a hook that asks, is of an assertion after which the rank goes on.
pub fn is_held() -> bool {
    HELD.get()
}

/// Runs `f` on this thread; how many assertions failed in it.
pub fn going_on_after_failures<T>(f: impl FnOnce() -> T) -> (T, usize) {
    let before = FAILED.load(Ordering::Relaxed);
    GOING_ON.set(true);
    let result = f();
    GOING_ON.set(false);
    (result, FAILED.load(Ordering::Relaxed) - before)
}

#[cfg(test)]
mod tests {
    use super::{going_on_after_failures, hold};

    #[test]
    fn failures_are_counted_or_panics() {
        let ((), failed) = going_on_after_failures(|| {
            hold(|| assert_eq!(1, 2, "on purpose"));
            hold(|| ());
            hold(|| assert_eq!(1, 3, "on purpose"));
        });
        assert_eq!(failed, 2);
        assert!(std::panic::catch_unwind(|| hold(|| assert_eq!(1, 2, "on purpose"))).is_err());
    }
}
