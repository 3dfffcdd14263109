//! The MPI calls that the back end makes, behind an interface that is safe to use.
//!
//! [`Moving`] owns every buffer that MPI may touch until the requests on it have completed; if they never do, it leaks
//! the buffers rather than free them. Lengths are bytes, so that one code serves all kinds. An exchange is made of sends
//! and receives and not of MPI_Ialltoallv: each pair of ranks knows how long its message is and so into how many parts it
//! goes, while whether the whole fits 32-bit displacements is not known alike to all ranks. Open MPI's own is the same.

use crate::{Error, Result, progress::nothing};
use mpi::ffi;
use std::{
    mem,
    os::raw::{c_char, c_int, c_void},
    sync::atomic::{AtomicBool, Ordering},
};
use tch::{Device, Kind, Tensor};

/// Set by the first call that fails: MPI makes no promise afterwards, not even that it can be finalized.
static FAILED: AtomicBool = AtomicBool::new(false);

/// Tag of the parts of a collective. One is enough: parts between two ranks arrive in the order in which they were sent.
const PART: c_int = 1;

pub(super) fn has_failed() -> bool {
    FAILED.load(Ordering::Relaxed)
}

fn check(call: &'static str, code: c_int) -> Result<()> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    FAILED.store(true, Ordering::Relaxed);
    let mut text = [0 as c_char; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut length = 0;
    // SAFETY: `text` has the MPI_MAX_ERROR_STRING characters that MPI_Error_string may write.
    let known = unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr(), &mut length) };
    let length = if known == ffi::MPI_SUCCESS as c_int { length as usize } else { 0 };
    let bytes: Vec<u8> = text[..length.min(text.len())].iter().map(|&c| c as u8).collect();
    Err(Error::Mpi { call, code, message: String::from_utf8_lossy(&bytes).into_owned() })
}

/// Rank and size of MPI_COMM_WORLD.
pub(super) fn place_in_world() -> Result<(usize, usize)> {
    // SAFETY: a constant that the shim library defines and nobody writes.
    place(unsafe { ffi::RSMPI_COMM_WORLD })
}

fn place(comm: ffi::MPI_Comm) -> Result<(usize, usize)> {
    let (mut rank, mut size) = (0, 0);
    // SAFETY: MPI is initialised, `comm` is a live communicator, and the result is a local variable.
    check("MPI_Comm_rank", unsafe { ffi::MPI_Comm_rank(comm, &mut rank) })?;
    // SAFETY: as above.
    check("MPI_Comm_size", unsafe { ffi::MPI_Comm_size(comm, &mut size) })?;
    Ok((rank as usize, size as usize))
}

pub(super) fn abort(code: i32) {
    // SAFETY: MPI is initialised at level Multiple, which allows the call on any thread; the communicator is a constant.
    unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code) };
}

/// A communicator that this process uses alone. Freed by MPI_Finalize only, since freeing is itself collective.
#[derive(Clone, Copy)]
pub(super) struct Comm {
    raw: ffi::MPI_Comm,
    rank: usize,
    size: usize,
    longest: usize,
}

impl Comm {
    /// A communicator like MPI_COMM_WORLD, whose traffic mixes with nobody else's. Collective.
    pub(super) fn world(longest: usize) -> Result<Comm> {
        // SAFETY: a constant that the shim library defines and nobody writes.
        Comm::duplicate_of(unsafe { ffi::RSMPI_COMM_WORLD }, longest)
    }

    /// Collective over this communicator.
    pub(super) fn duplicate(&self) -> Result<Comm> {
        Comm::duplicate_of(self.raw, self.longest)
    }

    fn duplicate_of(comm: ffi::MPI_Comm, longest: usize) -> Result<Comm> {
        let mut raw = comm;
        // SAFETY: `comm` is a live communicator and `raw` a local variable.
        check("MPI_Comm_dup", unsafe { ffi::MPI_Comm_dup(comm, &mut raw) })?;
        Comm::new(raw, longest)
    }

    /// MPI_Comm_split. Collective over this communicator; it blocks until all ranks have come.
    pub(super) fn split(&self, color: i64, key: i64) -> Result<Comm> {
        let narrow = |number: i64| {
            let message = format!("color and key of a split must fit 31 bits, found {number}");
            c_int::try_from(number).map_err(|_| Error::Mpi { call: "MPI_Comm_split", code: 0, message })
        };
        let (color, key, mut raw) = (narrow(color)?, narrow(key)?, self.raw);
        // SAFETY: `self.raw` is a live communicator and `raw` a local variable.
        check("MPI_Comm_split", unsafe { ffi::MPI_Comm_split(self.raw, color, key, &mut raw) })?;
        Comm::new(raw, self.longest)
    }

    fn new(raw: ffi::MPI_Comm, longest: usize) -> Result<Comm> {
        // SAFETY: `raw` is a live communicator; the handler is a constant.
        let code = unsafe { ffi::MPI_Comm_set_errhandler(raw, ffi::RSMPI_ERRORS_RETURN) };
        check("MPI_Comm_set_errhandler", code)?;
        let (rank, size) = place(raw)?;
        Ok(Comm { raw, rank, size, longest })
    }

    /// `x`: `[counts[rank]]`. Gives `[sum(counts)]`, in rank order.
    pub(super) fn gather(&self, x: Tensor, counts: &[i64]) -> Result<Moving> {
        let out = empty(counts.iter().sum(), x.f_kind()?)?;
        let lengths = Runs::of(counts, out.f_kind()?);
        if lengths.total() > self.longest {
            let whole = vec![(0, lengths.length(self.rank)); self.size];
            return self.exchange_runs(x, &Runs(whole), out, &lengths);
        }
        let sent = lengths.length(self.rank) as c_int;
        let mut moving = Moving::new(out);
        let received = moving.keep(lengths.0.iter().map(|&(_, length)| length as c_int).collect());
        let offsets = moving.keep(lengths.0.iter().map(|&(start, _)| start as c_int).collect());
        let (from, to) = (address(&x), address(&moving.output).cast_mut());
        moving.inputs.push(x);
        let mut request = null_request();
        // SAFETY: the send buffer has `sent` bytes and the receive buffer the sum of the counts, both contiguous and in
        // host memory; `moving` keeps them and the two arrays alive and in place until the request has completed.
        let code = unsafe {
            let byte = ffi::RSMPI_UINT8_T;
            ffi::MPI_Iallgatherv(from, sent, byte, to, received, offsets, byte, self.raw, &mut request)
        };
        moving.started("MPI_Iallgatherv", code, request)
    }

    /// `x`: `[sum(send)]`. Gives `[sum(recv)]`, the runs from all ranks in rank order.
    pub(super) fn exchange(&self, x: Tensor, send: &[i64], recv: &[i64]) -> Result<Moving> {
        let kind = x.f_kind()?;
        let out = empty(recv.iter().sum(), kind)?;
        self.exchange_runs(x, &Runs::of(send, kind), out, &Runs::of(recv, kind))
    }

    fn exchange_runs(&self, x: Tensor, send: &Runs, out: Tensor, recv: &Runs) -> Result<Moving> {
        let width = x.f_kind()?.elt_size_in_bytes();
        let own = |x: &Tensor, (start, length): (usize, usize)| {
            x.f_narrow(0, (start / width) as i64, (length / width) as i64)
        };
        own(&out, recv.0[self.rank])?.f_copy_(&own(&x, send.0[self.rank])?)?;
        let mut moving = Moving::new(out);
        moving.inputs.push(x);
        for away in 1..self.size {
            let peer = (self.rank + self.size - away) % self.size;
            moving = self.receive_parts(moving, recv.0[peer], peer, PART)?;
        }
        for away in 1..self.size {
            let peer = (self.rank + away) % self.size;
            moving = self.send_parts(moving, send.0[peer], peer, PART)?;
        }
        Ok(moving)
    }

    /// Gives a copy of the root's `x`.
    pub(super) fn broadcast(&self, x: Tensor, root: usize) -> Result<Moving> {
        let mut out = empty(x.numel() as i64, x.f_kind()?)?;
        if root == self.rank {
            out.f_copy_(&x)?;
        }
        let mut moving = Moving::new(out);
        for (start, length) in parts((0, bytes(&moving.output)?), self.longest) {
            let buffer = address(&moving.output).cast_mut().wrapping_byte_add(start);
            let mut request = null_request();
            // SAFETY: the buffer has `length` bytes from `start` on, contiguous and in host memory, and `moving` keeps
            // it alive and in place until the request has completed.
            let code = unsafe {
                ffi::MPI_Ibcast(buffer, length as c_int, ffi::RSMPI_UINT8_T, root as c_int, self.raw, &mut request)
            };
            moving = moving.started("MPI_Ibcast", code, request)?;
        }
        Ok(moving)
    }

    /// Sends all of `x`; `then` keeps what was sent before under way.
    pub(super) fn send(&self, then: Moving, x: Tensor, to: usize, tag: c_int) -> Result<Moving> {
        let length = bytes(&x)?;
        let mut moving = then;
        moving.inputs.push(x);
        self.send_parts(moving, (0, length), to, tag)
    }

    /// Receives `count` elements.
    pub(super) fn receive(&self, count: i64, kind: Kind, from: usize, tag: c_int) -> Result<Moving> {
        let out = empty(count, kind)?;
        let length = bytes(&out)?;
        self.receive_parts(Moving::new(out), (0, length), from, tag)
    }

    /// Sends a run of the last input.
    fn send_parts(&self, mut moving: Moving, run: (usize, usize), to: usize, tag: c_int) -> Result<Moving> {
        for (start, length) in parts(run, self.longest) {
            let Some(x) = moving.inputs.last() else { break };
            let buffer = address(x).wrapping_byte_add(start);
            let mut request = null_request();
            // SAFETY: the input has `length` bytes from `start` on, contiguous and in host memory, and `moving` keeps
            // it alive and in place until the request has completed.
            let code = unsafe {
                let byte = ffi::RSMPI_UINT8_T;
                ffi::MPI_Isend(buffer, length as c_int, byte, to as c_int, tag, self.raw, &mut request)
            };
            moving = moving.started("MPI_Isend", code, request)?;
        }
        Ok(moving)
    }

    /// Receives a run of the output.
    fn receive_parts(&self, mut moving: Moving, run: (usize, usize), from: usize, tag: c_int) -> Result<Moving> {
        for (start, length) in parts(run, self.longest) {
            let buffer = address(&moving.output).cast_mut().wrapping_byte_add(start);
            let mut request = null_request();
            // SAFETY: the output has `length` bytes from `start` on, contiguous and in host memory, to which nobody else
            // writes, and `moving` keeps it alive and in place until the request has completed.
            let code = unsafe {
                let byte = ffi::RSMPI_UINT8_T;
                ffi::MPI_Irecv(buffer, length as c_int, byte, from as c_int, tag, self.raw, &mut request)
            };
            moving = moving.started("MPI_Irecv", code, request)?;
        }
        Ok(moving)
    }
}

/// MPI calls under way, and all that they read and write.
pub(super) struct Moving {
    requests: Vec<ffi::MPI_Request>,
    output: Tensor,
    inputs: Vec<Tensor>,
    counts: Vec<Vec<c_int>>,
}

impl Moving {
    fn new(output: Tensor) -> Moving {
        Moving { requests: vec![], output, inputs: vec![], counts: vec![] }
    }

    /// Nothing under way yet, and nothing to come out.
    pub(super) fn nothing() -> Result<Moving> {
        Ok(Moving::new(nothing()?))
    }

    fn keep(&mut self, counts: Vec<c_int>) -> *const c_int {
        // Moving a vector leaves its elements where they are.
        let at = counts.as_ptr();
        self.counts.push(counts);
        at
    }

    /// Takes on the request of a call that has just been made.
    fn started(mut self, call: &'static str, code: c_int, request: ffi::MPI_Request) -> Result<Moving> {
        check(call, code)?;
        self.requests.push(request);
        Ok(self)
    }

    /// The output, once everything has completed.
    pub(super) fn poll(&mut self) -> Result<Option<Tensor>> {
        if self.requests.is_empty() {
            return Ok(Some(self.output.shallow_clone()));
        }
        let mut done = 0;
        // SAFETY: the requests are live or null, each owned by this value alone; their buffers are alive.
        let code = unsafe {
            let statuses = ffi::RSMPI_STATUSES_IGNORE;
            ffi::MPI_Testall(self.requests.len() as c_int, self.requests.as_mut_ptr(), &mut done, statuses)
        };
        check("MPI_Testall", code)?;
        if done == 0 {
            return Ok(None);
        }
        self.requests.clear();
        Ok(Some(self.output.shallow_clone()))
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        if !self.requests.is_empty() {
            // MPI may still read or write them.
            mem::forget(self.output.shallow_clone());
            mem::forget(mem::take(&mut self.inputs));
            mem::forget(mem::take(&mut self.counts));
        }
    }
}

/// Start and length of each rank's run in a buffer, in bytes.
struct Runs(Vec<(usize, usize)>);

impl Runs {
    fn of(counts: &[i64], kind: Kind) -> Runs {
        let mut end = 0;
        let run = |&count: &i64| {
            let length = count as usize * kind.elt_size_in_bytes();
            let start = end;
            end += length;
            (start, length)
        };
        Runs(counts.iter().map(run).collect())
    }

    fn length(&self, rank: usize) -> usize {
        self.0[rank].1
    }

    fn total(&self) -> usize {
        self.0.iter().map(|(_, length)| length).sum()
    }
}

/// A run as parts of at most `longest` bytes; none if it is empty.
fn parts((start, length): (usize, usize), longest: usize) -> impl Iterator<Item = (usize, usize)> {
    let longest = longest.max(1);
    (start..start + length).step_by(longest).map(move |at| (at, longest.min(start + length - at)))
}

fn empty(count: i64, kind: Kind) -> Result<Tensor> {
    Ok(Tensor::f_empty([count], (kind, Device::Cpu))?)
}

fn bytes(x: &Tensor) -> Result<usize> {
    Ok(x.numel() * x.f_kind()?.elt_size_in_bytes())
}

/// Of a contiguous tensor in host memory; never null, which MPI takes for a buffer that somebody forgot.
fn address(x: &Tensor) -> *const c_void {
    static NOWHERE: u64 = 0;
    if x.numel() == 0 { (&raw const NOWHERE).cast() } else { x.data_ptr().cast_const() }
}

fn null_request() -> ffi::MPI_Request {
    // SAFETY: a constant that the shim library defines and nobody writes.
    unsafe { ffi::RSMPI_REQUEST_NULL }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_cover_a_run_in_order(start in 0usize..1000, length in 0usize..1000, longest in 1usize..100) {
            let mut at = start;
            for (from, part) in parts((start, length), longest) {
                prop_assert_eq!(from, at);
                prop_assert!(part > 0 && part <= longest);
                at += part;
            }
            prop_assert_eq!(at, start + length);
        }
    }
}
