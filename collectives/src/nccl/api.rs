//! NCCL's functions as far as they are used, opened at run time; its communicators, safe to use but for the tensors that
//! must outlive the call's work on the stream, which `flight` keeps.

use super::{
    cuda::Stream,
    library::{Loaded, table},
};
use crate::{Error, Reduce, Result, pending::lock};
use libloading::os::unix::{Library as Opened, RTLD_LOCAL, RTLD_NOW};
use std::{
    ffi::{CStr, c_char, c_void},
    fmt, fs,
    path::{Path, PathBuf},
    ptr,
    sync::{Mutex, OnceLock},
};
use tch::{Kind, Tensor};

type Raw = *mut c_void;
/// Not an enum: a newer library may know more codes.
type Code = i32;

const SUCCESS: Code = 0;
const IN_PROGRESS: Code = 7;
const NAME: &str = "libnccl.so.2";

/// Words of 64 bits in a unique id.
pub(super) const ID_WORDS: usize = 16;

#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([i64; ID_WORDS]);

table! {
    /// Functions of libnccl.so.2, 2.18 or later.
    struct Api {
        get_version: fn(*mut i32) -> Code = "ncclGetVersion",
        error_string: fn(Code) -> *const c_char = "ncclGetErrorString",
        last_error: fn(Raw) -> *const c_char = "ncclGetLastError",
        unique_id: fn(*mut UniqueId) -> Code = "ncclGetUniqueId",
        init: fn(*mut Raw, i32, UniqueId, i32) -> Code = "ncclCommInitRank",
        destroy: fn(Raw) -> Code = "ncclCommDestroy",
        abort: fn(Raw) -> Code = "ncclCommAbort",
        async_error: fn(Raw, *mut Code) -> Code = "ncclCommGetAsyncError",
        group_start: fn() -> Code = "ncclGroupStart",
        group_end: fn() -> Code = "ncclGroupEnd",
        all_gather: fn(*const c_void, *mut c_void, usize, i32, Raw, Raw) -> Code = "ncclAllGather",
        reduce_scatter: fn(*const c_void, *mut c_void, usize, i32, i32, Raw, Raw) -> Code = "ncclReduceScatter",
        all_reduce: fn(*const c_void, *mut c_void, usize, i32, i32, Raw, Raw) -> Code = "ncclAllReduce",
        reduce: fn(*const c_void, *mut c_void, usize, i32, i32, i32, Raw, Raw) -> Code = "ncclReduce",
        broadcast: fn(*const c_void, *mut c_void, usize, i32, i32, Raw, Raw) -> Code = "ncclBroadcast",
        send: fn(*const c_void, usize, i32, i32, Raw, Raw) -> Code = "ncclSend",
        recv: fn(*mut c_void, usize, i32, i32, Raw, Raw) -> Code = "ncclRecv",
    }
}

/// The NCCL of this process. There is one at most: two would share symbols and hang.
pub struct Library {
    api: Api,
    path: PathBuf,
    version: Version,
}

/// Ordered as releases are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl Version {
    /// NCCL_VERSION_CODE, which had one digit for the minor version up to 2.8.
    fn of_code(code: u32) -> Version {
        let thousands = if code < 10_000 { 1000 } else { 10_000 };
        Version { major: code / thousands, minor: code % thousands / 100, patch: code % 100 }
    }
}

impl Library {
    /// Opens NCCL, once a process; later calls give the same. `path`: the file to open, before libtorch's CUDA part is opened,
    /// which would bring its own. None: what is loaded already, lies where the loader looks, or beside libtorch.
    pub fn open(path: Option<&Path>) -> Result<&'static Library> {
        static LIBRARY: OnceLock<std::result::Result<Library, String>> = OnceLock::new();
        let found = LIBRARY.get_or_init(|| match path {
            Some(path) => Library::at(path),
            None => Library::at(Path::new(NAME)).or_else(|why| {
                let beside = beside_libtorch().filter(|path| path.exists());
                beside.map_or(Err(why), |path| Library::at(&path))
            }),
        });
        match found {
            Ok(library) => Ok(library),
            Err(problem) => Err(Error::NoNccl { problem: problem.clone() }),
        }
    }

    fn at(path: &Path) -> std::result::Result<Library, String> {
        // SAFETY: NCCL's library, whose initialisers any program that links it runs; it stays open for good.
        let opened = unsafe { Opened::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|e| e.to_string())?;
        let api = Api::load(opened).map_err(|e| format!("{}: {e}; it is too old", path.display()))?;
        let mut code = 0;
        // SAFETY: the result is a local variable.
        if unsafe { (api.get_version)(&mut code) } != SUCCESS {
            return Err(format!("{} does not tell its version", path.display()));
        }
        let path = match loaded().as_slice() {
            [one] => one.clone(),
            [] => path.to_owned(),
            several => {
                let paths: Vec<_> = several.iter().map(|path| path.display().to_string()).collect();
                return Err(format!("{} are loaded: a process must have one", paths.join(" and ")));
            }
        };
        Ok(Library { api, path, version: Version::of_code(code as u32) })
    }

    pub fn version(&self) -> Version {
        self.version
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn check(&self, call: &'static str, code: Code) -> Result<()> {
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: both give C strings that live on; NCCL takes null for the last error of any communicator.
        let [text, last] = unsafe {
            [(self.api.error_string)(code), (self.api.last_error)(ptr::null_mut())].map(|text| match text.is_null() {
                true => String::new(),
                false => CStr::from_ptr(text).to_string_lossy().trim().to_owned(),
            })
        };
        let message = if last.is_empty() { text } else { format!("{text}: {last}") };
        Err(Error::Nccl { call, code, message })
    }

    /// A name for a communicator to be made, by which its ranks meet.
    pub(super) fn unique_id(&self) -> Result<[i64; ID_WORDS]> {
        let mut id = UniqueId([0; ID_WORDS]);
        // SAFETY: `id` has the 128 bytes of an ncclUniqueId.
        self.check("ncclGetUniqueId", unsafe { (self.api.unique_id)(&mut id) })?;
        Ok(id.0)
    }
}

/// Files of this name in this process.
fn loaded() -> Vec<PathBuf> {
    let mut paths = mapped("libnccl.so");
    paths.dedup();
    paths
}

/// Of the files mapped into this process, those whose names start so; each once.
fn mapped(prefix: &str) -> Vec<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let path = |line: &str| line.find('/').map(|at| PathBuf::from(&line[at..]));
    let named = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
    let mut paths: Vec<PathBuf> = maps.lines().filter_map(path).filter(named).collect();
    paths.sort();
    paths.dedup();
    paths
}

/// Where PyTorch's wheels have it: `nvidia/nccl/lib` beside `torch`.
fn beside_libtorch() -> Option<PathBuf> {
    let torch = mapped("libtorch_cpu.so").into_iter().next()?;
    Some(torch.parent()?.parent()?.parent()?.join("nvidia/nccl/lib").join(NAME))
}

pub(super) struct Comm {
    raw: Raw,
    library: &'static Library,
    /// Aborted or destroyed.
    gone: Mutex<bool>,
}

// SAFETY: NCCL allows calls on a communicator from any thread; `Lane` makes them one at a time, but for aborting and asking
// for errors, which it allows beside others.
unsafe impl Send for Comm {}
// SAFETY: as above.
unsafe impl Sync for Comm {}

/// An operation's memory on one rank: flat, contiguous tensors on the communicator's GPU.
pub(super) struct Buffers<'a> {
    pub x: &'a Tensor,
    pub out: &'a Tensor,
    pub stream: &'a Stream,
}

impl Comm {
    /// Blocks until all ranks have come. The caller has entered the GPU's context.
    pub(super) fn new(library: &'static Library, id: [i64; ID_WORDS], rank: usize, size: usize) -> Result<Comm> {
        let mut raw = ptr::null_mut();
        // SAFETY: the result is a local variable.
        let code = unsafe { (library.api.init)(&mut raw, size as i32, UniqueId(id), rank as i32) };
        library.check("ncclCommInitRank", code)?;
        Ok(Comm { raw, library, gone: Mutex::new(false) })
    }

    /// What went wrong since, beside any call.
    pub(super) fn asynchronous_error(&self) -> Result<()> {
        let gone = lock(&self.gone);
        if *gone {
            return Ok(());
        }
        let mut code = SUCCESS;
        // SAFETY: the communicator is live while `gone` is locked and false.
        let asked = unsafe { (self.library.api.async_error)(self.raw, &mut code) };
        self.library.check("ncclCommGetAsyncError", asked)?;
        self.library.check("a peer or the network", code)
    }

    /// Makes its kernels end, and calls of other threads return, as NCCL's guide on fault tolerance has it.
    pub(super) fn abort(&self) {
        self.end(self.library.api.abort);
    }

    /// All of its work has ended.
    pub(super) fn destroy(&self) {
        self.end(self.library.api.destroy);
    }

    fn end(&self, end: unsafe extern "C" fn(Raw) -> Code) {
        let mut gone = lock(&self.gone);
        if !*gone {
            *gone = true;
            // SAFETY: the communicator is live, and nothing is begun on it after this: a lane launches nothing once its GPU
            // has failed, and destroys when nobody refers to it.
            unsafe { end(self.raw) };
        }
    }

    pub(super) fn all_gather(&self, on: &Buffers) -> Result<()> {
        let (n, kind) = (on.x.numel(), code(on.x)?);
        // SAFETY: `x` has n elements and `out` n for each rank, on the GPU, kept until the stream has passed; so below.
        let code =
            unsafe { (self.library.api.all_gather)(at(on.x, 0), at(on.out, 0), n, kind, self.raw, on.stream.raw()) };
        self.library.check("ncclAllGather", code)
    }

    pub(super) fn reduce_scatter(&self, on: &Buffers) -> Result<()> {
        let (n, kind, sum) = (on.out.numel(), code(on.x)?, reduction(Reduce::Sum));
        // SAFETY: `out` has n elements and `x` n for each rank.
        let code = unsafe {
            (self.library.api.reduce_scatter)(at(on.x, 0), at(on.out, 0), n, kind, sum, self.raw, on.stream.raw())
        };
        self.library.check("ncclReduceScatter", code)
    }

    pub(super) fn all_reduce(&self, on: &Buffers, op: Reduce) -> Result<()> {
        let (n, kind, op) = (on.x.numel(), code(on.x)?, reduction(op));
        // SAFETY: both have n elements.
        let code = unsafe {
            (self.library.api.all_reduce)(at(on.x, 0), at(on.out, 0), n, kind, op, self.raw, on.stream.raw())
        };
        self.library.check("ncclAllReduce", code)
    }

    pub(super) fn broadcast(&self, on: &Buffers, root: usize) -> Result<()> {
        let (n, kind, root) = (on.x.numel(), code(on.x)?, root as i32);
        // SAFETY: both have n elements.
        let code = unsafe {
            (self.library.api.broadcast)(at(on.x, 0), at(on.out, 0), n, kind, root, self.raw, on.stream.raw())
        };
        self.library.check("ncclBroadcast", code)
    }

    /// Sums run r of `x` over all ranks into `out` on rank r, for every r.
    pub(super) fn reduce_runs(&self, on: &Buffers, counts: &[i64]) -> Result<()> {
        let (kind, sum) = (code(on.x)?, reduction(Reduce::Sum));
        self.grouped(|| {
            let mut start = 0;
            for (root, &count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
                // SAFETY: run `root` of `x` has `count` elements from `start` on; `out` has as many on rank `root`, and is not
                // looked at on the others.
                let code = unsafe {
                    let (from, to, stream) = (at(on.x, start), at(on.out, 0), on.stream.raw());
                    (self.library.api.reduce)(from, to, count as usize, kind, sum, root as i32, self.raw, stream)
                };
                self.library.check("ncclReduce", code)?;
                start += count;
            }
            Ok(())
        })
    }

    /// Run r of `x` goes to rank r, `out` gets the runs from all ranks in rank order. `same`: all of `x` goes to every rank.
    pub(super) fn exchange(&self, on: &Buffers, same: bool, send: &[i64], recv: &[i64]) -> Result<()> {
        self.grouped(|| {
            let (mut sent, mut received) = (0, 0);
            for (peer, (&to, &from)) in send.iter().zip(recv).enumerate() {
                self.send(on.x, sent, to, peer, on.stream)?;
                self.recv(on.out, received, from, peer, on.stream)?;
                received += from;
                sent += if same { 0 } else { to };
            }
            Ok(())
        })
    }

    /// `count` elements of `x` from `start` on; none are no message.
    pub(super) fn send(&self, x: &Tensor, start: i64, count: i64, to: usize, stream: &Stream) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        let kind = code(x)?;
        // SAFETY: `x` has so many elements from there on, on the GPU, kept until the stream has passed.
        let code =
            unsafe { (self.library.api.send)(at(x, start), count as usize, kind, to as i32, self.raw, stream.raw()) };
        self.library.check("ncclSend", code)
    }

    pub(super) fn recv(&self, out: &Tensor, start: i64, count: i64, from: usize, stream: &Stream) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        let kind = code(out)?;
        // SAFETY: as above, and nobody else writes there.
        let code = unsafe {
            (self.library.api.recv)(at(out, start), count as usize, kind, from as i32, self.raw, stream.raw())
        };
        self.library.check("ncclRecv", code)
    }

    /// One operation made of many.
    fn grouped(&self, calls: impl FnOnce() -> Result<()>) -> Result<()> {
        // SAFETY: takes nothing; ended below.
        self.library.check("ncclGroupStart", unsafe { (self.library.api.group_start)() })?;
        let called = calls();
        // SAFETY: as above.
        let ended = self.library.check("ncclGroupEnd", unsafe { (self.library.api.group_end)() });
        called.and(ended)
    }
}

/// ncclDataType_t.
fn code(x: &Tensor) -> Result<i32> {
    match x.f_kind()? {
        Kind::Int64 => Ok(4),
        Kind::Float => Ok(7),
        Kind::Double => Ok(8),
        Kind::BFloat16 => Ok(9),
        kind => Err(Error::UnsupportedKind { op: "nccl", group: "".into(), kind }),
    }
}

/// ncclRedOp_t.
fn reduction(op: Reduce) -> i32 {
    match op {
        Reduce::Sum => 0,
        Reduce::Max => 2,
        Reduce::Min => 3,
    }
}

/// Of element `start`.
fn at(x: &Tensor, start: i64) -> *mut c_void {
    let width = x.kind().elt_size_in_bytes();
    x.data_ptr().wrapping_byte_add(start as usize * width)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered() {
        let [old, wheel, shared] = [2708, 22809, 23007].map(Version::of_code);
        assert_eq!([old, wheel, shared].map(|v| v.to_string()), ["2.7.8", "2.28.9", "2.30.7"]);
        assert!(old < wheel && wheel < shared);
    }
}
