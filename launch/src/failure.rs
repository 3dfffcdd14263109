//! Ends the whole job when one rank fails, by an error or a panic, quickly and with that rank's message alone.
//!
//! Under MPI the others would wait for ever, so the job is aborted; over TCP they are told; as threads they all end with this
//! process. Ranks that fail because another one did stay quiet.

use std::cell::RefCell;
use std::panic::PanicHookInfo;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Error;
use collectives::{Group, Recorder};

use crate::identity::Launcher;

/// Operations of the flight recorder that are shown with LASP_LOG=debug.
const TAIL: usize = 20;

/// `(rank, size)` as far as the launcher told; once ranks are up, each thread knows better.
static PROCESS: OnceLock<(usize, usize)> = OnceLock::new();
static RECORDER: OnceLock<Recorder> = OnceLock::new();
static ENDING: AtomicBool = AtomicBool::new(false);
static UNDER_MPI: AtomicBool = AtomicBool::new(false);

thread_local! {
    static RANK: RefCell<Option<(usize, usize, Recorder)>> = const { RefCell::new(None) };
}

/// Makes every panic from now on end the job.
pub fn install(launcher: &Launcher) {
    let _ = PROCESS.set((launcher.rank().unwrap_or(0), launcher.size().unwrap_or(1)));
    std::panic::set_hook(Box::new(|info: &PanicHookInfo| {
        let payload = info.payload();
        let text = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
        let text = text.unwrap_or("no message");
        let place = info.location().map(|at| format!(" at {at}")).unwrap_or_default();
        stop(&format!("panic{place}: {text}"), true);
    }));
}

/// Tells the calling thread which rank it is.
pub fn this_is(world: &Group) {
    UNDER_MPI.store(world.backend() == "mpi", Ordering::SeqCst);
    let recorder = world.recorder().clone();
    let _ = RECORDER.set(recorder.clone());
    RANK.with(|rank| *rank.borrow_mut() = Some((world.rank(), world.size(), recorder)));
}

/// Prints `error` and its causes, unless it only says that another rank failed, and ends the job with status 1.
pub fn end(error: &Error) -> ! {
    let follows = error
        .chain()
        .any(|cause| matches!(cause.downcast_ref::<collectives::Error>(), Some(collectives::Error::RankFailed { .. })));
    stop(&message(error), !follows)
}

/// The error and its causes on one line. Some errors show their cause themselves: it is not repeated.
fn message(error: &Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text += if text.is_empty() { "" } else { ": " };
            text += &cause;
        }
    }
    text
}

fn stop(message: &str, speaks: bool) -> ! {
    let known = RANK.with(|rank| rank.try_borrow().ok().and_then(|rank| rank.clone()));
    let process = PROCESS.get().copied().unwrap_or((0, 1));
    let who = match &known {
        Some((_, 1, _)) => "error".to_owned(),
        Some((rank, _, _)) => format!("rank {rank}"),
        None => helper_thread()
            .unwrap_or_else(|| if process.1 > 1 { format!("rank {}", process.0) } else { "error".to_owned() }),
    };
    // What all processes find out at once, rank 0 says; the others are gone before it is their turn.
    if process.0 > 0 {
        thread::sleep(Duration::from_millis(200 + 20 * process.0.min(10) as u64));
    }
    if !speaks {
        // The rank that failed first has something better to say, and ends the job; if it does not, this one must.
        thread::sleep(Duration::from_secs(1));
    }
    if ENDING.swap(true, Ordering::SeqCst) {
        // Another thread of this process is on its way out.
        loop {
            thread::park();
        }
    }
    eprintln!("{who}: {message}");
    if let Some(recorder) = known.as_ref().map(|(_, _, recorder)| recorder).or(RECORDER.get()) {
        let tail = recorder.tail(TAIL);
        if !tail.is_empty() {
            tracing::debug!("the last operations of {who}:\n{tail}");
        }
    }
    leave(message)
}

/// `rank 1`, of a thread named `rank 1 progress`.
fn helper_thread() -> Option<String> {
    let thread = thread::current();
    let number = thread.name()?.strip_prefix("rank ")?.split(' ').next()?;
    Some(format!("rank {number}"))
}

fn leave(message: &str) -> ! {
    collectives::tcp::abort(message);
    #[cfg(feature = "mpi")]
    if UNDER_MPI.load(Ordering::SeqCst) {
        collectives::mpi::abort(1);
    }
    kernels::bridge::exit(1)
}
