//! What is needed of the CUDA driver, opened at run time: streams and events of the context that libtorch uses. And what is
//! needed of libtorch's CUDA part: which stream it computes on.

use super::library::{Loaded, table};
use crate::{Error, Result, pending::lock};
use libloading::os::unix::{Library, RTLD_NOW};
use std::{
    ffi::{CStr, c_char, c_void},
    ptr,
    sync::{Arc, Mutex, OnceLock},
};
use tch::Tensor;

type Handle = *mut c_void;

/// Words of 64 bits in a name under which another process opens this one's memory.
pub(super) const SHARED_WORDS: usize = 8;

#[repr(C)]
#[derive(Clone, Copy)]
struct Shared([i64; SHARED_WORDS]);

/// CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.
const FROM_ANY_GPU: u32 = 1;
/// CU_STREAM_WAIT_VALUE_GEQ, which counts round.
const AT_LEAST: u32 = 0;

const SUCCESS: i32 = 0;
const NOT_READY: i32 = 600;
/// Does not wait for the legacy default stream, on which libtorch computes.
const NON_BLOCKING: u32 = 1;

table! {
    /// Functions of libcuda.so.1.
    struct Driver {
        init: fn(u32) -> i32 = "cuInit",
        error_string: fn(i32, *mut *const c_char) -> i32 = "cuGetErrorString",
        device: fn(*mut i32, i32) -> i32 = "cuDeviceGet",
        uuid: fn(*mut [u8; 16], i32) -> i32 = "cuDeviceGetUuid_v2",
        retain: fn(*mut Handle, i32) -> i32 = "cuDevicePrimaryCtxRetain",
        push: fn(Handle) -> i32 = "cuCtxPushCurrent_v2",
        pop: fn(*mut Handle) -> i32 = "cuCtxPopCurrent_v2",
        priorities: fn(*mut i32, *mut i32) -> i32 = "cuCtxGetStreamPriorityRange",
        stream: fn(*mut Handle, u32, i32) -> i32 = "cuStreamCreateWithPriority",
        wait: fn(Handle, Handle, u32) -> i32 = "cuStreamWaitEvent",
        event: fn(*mut Handle, u32) -> i32 = "cuEventCreate",
        record: fn(Handle, Handle) -> i32 = "cuEventRecord",
        query: fn(Handle) -> i32 = "cuEventQuery",
        synchronize: fn(Handle) -> i32 = "cuEventSynchronize",
        elapsed: fn(*mut f32, Handle, Handle) -> i32 = "cuEventElapsedTime",
        allocate: fn(*mut u64, usize) -> i32 = "cuMemAlloc_v2",
        fill: fn(u64, u8, usize) -> i32 = "cuMemsetD8_v2",
        export: fn(*mut Shared, u64) -> i32 = "cuIpcGetMemHandle",
        import: fn(*mut u64, Shared, u32) -> i32 = "cuIpcOpenMemHandle_v2",
        copy: fn(u64, u64, usize, Handle) -> i32 = "cuMemcpyDtoDAsync_v2",
        write: fn(Handle, u64, u32, u32) -> i32 = "cuStreamWriteValue32_v2",
        wait_for: fn(Handle, u64, u32, u32) -> i32 = "cuStreamWaitValue32_v2",
    }
}

table! {
    /// Functions of libtorch_cuda.so, which the program must have opened for all to see.
    struct Torch {
        current_stream: fn(i32, *mut Handle) -> i32 = "aoti_torch_get_current_cuda_stream",
        set_current_stream: fn(Handle, i32) -> i32 = "torch_set_current_cuda_stream",
        stream_from_pool: fn(bool, i32, *mut Handle) -> i32 = "torch_get_cuda_stream_from_pool",
    }
}

impl Driver {
    fn get() -> Result<&'static Driver> {
        static DRIVER: OnceLock<std::result::Result<Driver, String>> = OnceLock::new();
        let open = || {
            // SAFETY: the driver's library, whose initialisers any CUDA program runs; it stays open for good.
            let library = unsafe { Library::open(Some("libcuda.so.1"), RTLD_NOW) }.map_err(|e| e.to_string())?;
            Driver::load(library).map_err(|e| e.to_string())
        };
        match DRIVER.get_or_init(open) {
            Ok(driver) => Ok(driver),
            Err(message) => Err(Error::Cuda { call: "opening libcuda.so.1", code: 0, message: message.clone() }),
        }
    }

    fn check(&self, call: &'static str, code: i32) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        let mut text = ptr::null();
        // SAFETY: `text` is a local variable; the function gives a constant string, or null for a code it does not know.
        let known = unsafe { (self.error_string)(code, &mut text) } == SUCCESS && !text.is_null();
        let message = match known {
            // SAFETY: a constant C string of the driver.
            true => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
            false => "unknown error".into(),
        };
        Err(Error::Cuda { call, code, message })
    }
}

impl Torch {
    fn get() -> Result<&'static Torch> {
        static TORCH: OnceLock<Torch> = OnceLock::new();
        if let Some(torch) = TORCH.get() {
            return Ok(torch);
        }
        let missing = |error| Error::Cuda {
            call: "looking for libtorch_cuda",
            code: 0,
            message: format!("it is not open, though the program must open it first ({error})"),
        };
        let torch = Torch::load(Library::this()).map_err(missing)?;
        Ok(TORCH.get_or_init(|| torch))
    }
}

/// The context that libtorch uses on one GPU, with spare events.
pub(super) struct Context {
    pub index: usize,
    driver: &'static Driver,
    torch: &'static Torch,
    raw: Handle,
    spare: Mutex<Vec<Handle>>,
}

// SAFETY: a context, and the streams and events in it, may be used from any thread.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks what it shares.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn new(index: usize) -> Result<Arc<Context>> {
        let (driver, torch) = (Driver::get()?, Torch::get()?);
        let (mut device, mut raw) = (0, ptr::null_mut());
        // SAFETY: the results are local variables. The context is the one that libtorch retains as well; it is never released.
        unsafe {
            driver.check("cuInit", (driver.init)(0))?;
            driver.check("cuDeviceGet", (driver.device)(&mut device, index as i32))?;
            driver.check("cuDevicePrimaryCtxRetain", (driver.retain)(&mut raw, device))?;
        }
        Ok(Arc::new(Context { index, driver, torch, raw, spare: Mutex::default() }))
    }

    /// Tells this GPU from all others.
    pub(super) fn uuid(&self) -> Result<[u8; 16]> {
        let (mut device, mut uuid) = (0, [0; 16]);
        // SAFETY: the results are local variables.
        unsafe {
            self.driver.check("cuDeviceGet", (self.driver.device)(&mut device, self.index as i32))?;
            self.driver.check("cuDeviceGetUuid", (self.driver.uuid)(&mut uuid, device))?;
        }
        Ok(uuid)
    }

    /// Makes the context that of the calling thread until the guard is dropped.
    pub(super) fn enter(&self) -> Result<Entered> {
        // SAFETY: the context is live.
        self.driver.check("cuCtxPushCurrent", unsafe { (self.driver.push)(self.raw) })?;
        Ok(Entered(self.driver))
    }

    /// The stream on which libtorch enqueues what the calling thread computes.
    pub(super) fn current_stream(self: &Arc<Context>) -> Result<Stream> {
        let mut raw = ptr::null_mut();
        // SAFETY: the result is a local variable. The stream is libtorch's, which never destroys one.
        let code = unsafe { (self.torch.current_stream)(self.index as i32, &mut raw) };
        match code {
            0 => Ok(Stream { raw, context: self.clone() }),
            code => Err(Error::Cuda {
                call: "aoti_torch_get_current_cuda_stream",
                code,
                message: format!("no current stream on GPU {}", self.index),
            }),
        }
    }

    /// One of libtorch's own streams beside that on which it computes; its short kernels go first.
    pub(super) fn side_stream(self: &Arc<Context>) -> Result<Stream> {
        let mut raw = ptr::null_mut();
        // SAFETY: the result is a local variable. The stream is libtorch's, which never destroys one.
        let code = unsafe { (self.torch.stream_from_pool)(true, self.index as i32, &mut raw) };
        self.torch_check("torch_get_cuda_stream_from_pool", code)?;
        Ok(Stream { raw, context: self.clone() })
    }

    /// Lets libtorch enqueue on `stream`, one of its own, what the calling thread computes, until the guard is dropped.
    pub(super) fn compute_on(self: &Arc<Context>, stream: &Stream) -> Result<Elsewhere> {
        let before = self.current_stream()?;
        self.set_current_stream(stream)?;
        Ok(Elsewhere(before))
    }

    fn set_current_stream(&self, stream: &Stream) -> Result<()> {
        // SAFETY: a stream that libtorch gave.
        let code = unsafe { (self.torch.set_current_stream)(stream.raw, self.index as i32) };
        self.torch_check("torch_set_current_cuda_stream", code)
    }

    fn torch_check(&self, call: &'static str, code: i32) -> Result<()> {
        let message = format!("libtorch refused on GPU {}", self.index);
        if code == 0 { Ok(()) } else { Err(Error::Cuda { call, code, message }) }
    }

    /// A stream beside libtorch's, whose short kernels go first. It is never destroyed.
    pub(super) fn stream(self: &Arc<Context>) -> Result<Stream> {
        let _entered = self.enter()?;
        let (mut least, mut greatest, mut raw) = (0, 0, ptr::null_mut());
        // SAFETY: the results are local variables.
        unsafe {
            self.driver.check("cuCtxGetStreamPriorityRange", (self.driver.priorities)(&mut least, &mut greatest))?;
            self.driver.check("cuStreamCreate", (self.driver.stream)(&mut raw, NON_BLOCKING, greatest))?;
        }
        Ok(Stream { raw, context: self.clone() })
    }

    /// Zeroed memory that other processes may open, kept until this one ends. The caller has entered the context.
    pub(super) fn allocate(&self, bytes: usize) -> Result<(Memory, [i64; SHARED_WORDS])> {
        let (mut start, mut name) = (0, Shared([0; SHARED_WORDS]));
        // SAFETY: the results are local variables, the second of the size of a CUipcMemHandle; `start` has `bytes` bytes.
        unsafe {
            self.driver.check("cuMemAlloc", (self.driver.allocate)(&mut start, bytes))?;
            self.driver.check("cuMemsetD8", (self.driver.fill)(start, 0, bytes))?;
            self.driver.check("cuIpcGetMemHandle", (self.driver.export)(&mut name, start))?;
        }
        Ok((Memory { start, bytes }, name.0))
    }

    /// Memory of `bytes` bytes that another process of this machine has allocated, and keeps as long as it lives.
    pub(super) fn import(&self, name: [i64; SHARED_WORDS], bytes: usize) -> Result<Memory> {
        let mut start = 0;
        // SAFETY: the result is a local variable; a name that is none is an error.
        let code = unsafe { (self.driver.import)(&mut start, Shared(name), FROM_ANY_GPU) };
        self.driver.check("cuIpcOpenMemHandle", code)?;
        Ok(Memory { start, bytes })
    }

    fn event(self: &Arc<Context>) -> Result<Event> {
        if let Some(raw) = lock(&self.spare).pop() {
            return Ok(Event { raw, context: self.clone() });
        }
        let mut raw = ptr::null_mut();
        // SAFETY: the result is a local variable; the caller has entered the context. The event keeps times.
        self.driver.check("cuEventCreate", unsafe { (self.driver.event)(&mut raw, 0) })?;
        Ok(Event { raw, context: self.clone() })
    }
}

pub(super) struct Entered(&'static Driver);

impl Drop for Entered {
    fn drop(&mut self) {
        let mut raw = ptr::null_mut();
        // SAFETY: this guard pushed a context on this thread, and guards end in the order of blocks.
        unsafe { (self.0.pop)(&mut raw) };
    }
}

/// The thread computes on another stream than this one.
pub(super) struct Elsewhere(Stream);

impl Drop for Elsewhere {
    fn drop(&mut self) {
        // It was current before, and so is one that libtorch takes.
        let _ = self.0.context.set_current_stream(&self.0);
    }
}

pub(super) struct Stream {
    raw: Handle,
    context: Arc<Context>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Stream {}
// SAFETY: as for `Context`.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn raw(&self) -> *mut c_void {
        self.raw
    }

    /// An event that comes when all work so far on the stream has ended. The caller has entered the context.
    pub(super) fn record(&self) -> Result<Event> {
        let event = self.context.event()?;
        let driver = self.context.driver;
        // SAFETY: event and stream are live and of the same context.
        driver.check("cuEventRecord", unsafe { (driver.record)(event.raw, self.raw) })?;
        Ok(event)
    }

    /// Work enqueued from now on starts after `event`. The host goes on.
    pub(super) fn wait(&self, event: &Event) -> Result<()> {
        let driver = self.context.driver;
        // SAFETY: as above.
        driver.check("cuStreamWaitEvent", unsafe { (driver.wait)(self.raw, event.raw, 0) })
    }
}

/// Memory on a GPU that is never freed.
pub(super) struct Memory {
    start: u64,
    bytes: usize,
}

impl Memory {
    /// The address of `bytes` bytes from `offset` on.
    fn at(&self, offset: usize, bytes: usize) -> Result<u64> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            let message = format!("{bytes} bytes at {offset} are not within {}", self.bytes);
            return Err(Error::Cuda { call: "addressing shared memory", code: 0, message });
        }
        Ok(self.start + offset as u64)
    }
}

/// What peer copies enqueue, by the GPU's copy engines and not its multiprocessors. The caller has entered the context.
impl Stream {
    /// All of `x`, which is contiguous, on this GPU, and kept until the stream has passed.
    pub(super) fn copy_out(&self, x: &Tensor, to: &Memory, offset: usize) -> Result<()> {
        let bytes = x.numel() * x.f_kind()?.elt_size_in_bytes();
        let (to, driver) = (to.at(offset, bytes)?, self.context.driver);
        // SAFETY: both have so many bytes.
        let code = unsafe { (driver.copy)(to, x.data_ptr() as u64, bytes, self.raw) };
        driver.check("cuMemcpyDtoDAsync", code)
    }

    /// Fills the run of `x` that starts at byte `start`.
    pub(super) fn copy_in(&self, x: &Tensor, start: usize, bytes: usize, from: &Memory, offset: usize) -> Result<()> {
        let (from, driver) = (from.at(offset, bytes)?, self.context.driver);
        if start + bytes > x.numel() * x.f_kind()?.elt_size_in_bytes() {
            let message = format!("{bytes} bytes at {start} do not fit {:?}", x.size());
            return Err(Error::Cuda { call: "cuMemcpyDtoDAsync", code: 0, message });
        }
        // SAFETY: both have so many bytes; nobody else writes to `x`, which is kept until the stream has passed.
        let code = unsafe { (driver.copy)(x.data_ptr() as u64 + start as u64, from, bytes, self.raw) };
        driver.check("cuMemcpyDtoDAsync", code)
    }

    /// Writes a number once all before it is there for everyone to see.
    pub(super) fn write(&self, to: &Memory, offset: usize, value: u32) -> Result<()> {
        let (to, driver) = (to.at(offset, 4)?, self.context.driver);
        // SAFETY: an aligned word of memory that is never freed.
        driver.check("cuStreamWriteValue32", unsafe { (driver.write)(self.raw, to, value, 0) })
    }

    /// Work from now on waits until the number is at least `value`.
    pub(super) fn wait_for(&self, at: &Memory, offset: usize, value: u32) -> Result<()> {
        let (at, driver) = (at.at(offset, 4)?, self.context.driver);
        // SAFETY: as above.
        driver.check("cuStreamWaitValue32", unsafe { (driver.wait_for)(self.raw, at, value, AT_LEAST) })
    }
}

/// A recorded place in a stream. Dropped, it is used again: whoever was told to wait for it is not affected.
pub(crate) struct Event {
    raw: Handle,
    context: Arc<Context>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Event {}
// SAFETY: as for `Context`.
unsafe impl Sync for Event {}

impl Event {
    pub(super) fn has_come(&self) -> Result<bool> {
        let driver = self.context.driver;
        // SAFETY: the event is live.
        match unsafe { (driver.query)(self.raw) } {
            NOT_READY => Ok(false),
            code => driver.check("cuEventQuery", code).map(|()| true),
        }
    }

    /// Blocks until it has come.
    pub(super) fn synchronize(&self) -> Result<()> {
        let driver = self.context.driver;
        // SAFETY: the event is live.
        driver.check("cuEventSynchronize", unsafe { (driver.synchronize)(self.raw) })
    }

    /// From this event to `later`, which may also be earlier. Both have come.
    pub(super) fn until(&self, later: &Event) -> Result<f64> {
        let driver = self.context.driver;
        let mut milliseconds = 0.0;
        // SAFETY: both events are live and the result is a local variable.
        let code = unsafe { (driver.elapsed)(&mut milliseconds, self.raw, later.raw) };
        driver.check("cuEventElapsedTime", code)?;
        Ok(f64::from(milliseconds) * 1e6)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        lock(&self.context.spare).push(self.raw);
    }
}
