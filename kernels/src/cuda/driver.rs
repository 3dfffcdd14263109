//! The CUDA driver, opened at run time: devices, modules, launches. One function of this file is one call of the driver's
//! API, with its errors in words. Contexts are the devices' primary ones, which libtorch uses too.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::sync::OnceLock;

use super::library::{self, functions};
use super::message;
use crate::{Error, Result};

type Status = c_int;

/// A device's primary context, a loaded program, one of its kernels: the driver's own pointers, which it accepts from any
/// thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context(*mut c_void);
#[derive(Clone, Copy, Debug)]
pub struct Module(*mut c_void);
#[derive(Clone, Copy, Debug)]
pub struct Function(*mut c_void);

// SAFETY: opaque handles; the driver's API is thread-safe and nothing here reads through them.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}
// SAFETY: as above.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}
// SAFETY: as above.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// A place in a stream, with its time. Never destroyed: a timer has two for the life of the process.
#[derive(Clone, Copy, Debug)]
pub struct Event(*mut c_void);

/// What a device is asked for; the numbers are CUdevice_attribute's.
#[derive(Clone, Copy, Debug)]
pub enum Attribute {
    MaxSharedPerBlock = 97,
    Multiprocessors = 16,
    Major = 75,
    Minor = 76,
}

const MAX_DYNAMIC_SHARED_SIZE_BYTES: c_int = 8;

/// `cuLaunchKernel`'s geometry.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    pub grid: [u32; 3],
    pub block: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared: u32,
}

/// `CUtensorMap`: a tensor as Hopper's copy engine (TMA) reads and writes tiles of it.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub struct TileMap(pub [u64; 16]);

functions! {
    /// Functions of libcuda.so.1.
    Calls {
        init = b"cuInit" (c_uint) -> Status;
        error_name = b"cuGetErrorName" (Status, *mut *const c_char) -> Status;
        error_string = b"cuGetErrorString" (Status, *mut *const c_char) -> Status;
        device_count = b"cuDeviceGetCount" (*mut c_int) -> Status;
        device_name = b"cuDeviceGetName" (*mut c_char, c_int, c_int) -> Status;
        device_get = b"cuDeviceGet" (*mut c_int, c_int) -> Status;
        device_attribute = b"cuDeviceGetAttribute" (*mut c_int, c_int, c_int) -> Status;
        primary_retain = b"cuDevicePrimaryCtxRetain" (*mut *mut c_void, c_int) -> Status;
        set_current = b"cuCtxSetCurrent" (*mut c_void) -> Status;
        get_current = b"cuCtxGetCurrent" (*mut *mut c_void) -> Status;
        module_load = b"cuModuleLoadData" (*mut *mut c_void, *const c_void) -> Status;
        module_function = b"cuModuleGetFunction" (*mut *mut c_void, *mut c_void, *const c_char) -> Status;
        function_set = b"cuFuncSetAttribute" (*mut c_void, c_int, c_int) -> Status;
        encode_tiled = b"cuTensorMapEncodeTiled" (
            *mut c_void, c_int, c_uint, *mut c_void, *const u64, *const u64, *const c_uint, *const c_uint,
            c_int, c_int, c_int, c_int
        ) -> Status;
        event_create = b"cuEventCreate" (*mut *mut c_void, c_uint) -> Status;
        event_record = b"cuEventRecord" (*mut c_void, *mut c_void) -> Status;
        event_synchronize = b"cuEventSynchronize" (*mut c_void) -> Status;
        event_elapsed = b"cuEventElapsedTime" (*mut f32, *mut c_void, *mut c_void) -> Status;
        launch_kernel = b"cuLaunchKernel" (
            *mut c_void, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, *mut c_void, *mut *mut c_void, *mut *mut c_void
        ) -> Status;
    }
}

pub(super) struct Driver {
    calls: Calls,
    /// Of kernels/emulator: device 0 is the CPU.
    pub(super) emulated: bool,
}

/// The driver of this process; an error where there is none.
pub(super) fn driver() -> Result<&'static Driver> {
    static DRIVER: OnceLock<std::result::Result<Driver, String>> = OnceLock::new();
    let opened = DRIVER.get_or_init(|| {
        let driver = Driver::open().map_err(message)?;
        // SAFETY: cuInit takes no pointer.
        driver.check("cuInit", unsafe { (driver.calls.init)(0) }).map_err(message)?;
        Ok(driver)
    });
    opened.as_ref().map_err(|message| Error::Cuda(message.clone()))
}

impl Driver {
    fn open() -> Result<Self> {
        let emulator = library::emulator();
        let name = emulator.unwrap_or(Path::new("libcuda.so.1"));
        let library = library::open_any(&[name.to_owned()], "the CUDA driver")?;
        // SAFETY: the signatures are those of cuda.h.
        Ok(Self { calls: unsafe { Calls::of(library) }?, emulated: emulator.is_some() })
    }

    fn check(&self, call: &str, status: Status) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        let text = |of: unsafe extern "C" fn(Status, *mut *const c_char) -> Status| {
            let mut text = std::ptr::null();
            // SAFETY: `text` takes a pointer to a string that the driver owns for ever, or stays null.
            unsafe {
                of(status, &mut text);
                if text.is_null() { "?".to_owned() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
            }
        };
        Err(Error::Cuda(format!("{call}: {} ({})", text(self.calls.error_string), text(self.calls.error_name))))
    }

    pub fn attribute(&self, device: usize, attribute: Attribute) -> Result<i32> {
        let (mut handle, mut value) = (0, 0);
        // SAFETY: both calls write one int.
        self.check("cuDeviceGet", unsafe { (self.calls.device_get)(&mut handle, device as c_int) })?;
        // SAFETY: as above.
        let status = unsafe { (self.calls.device_attribute)(&mut value, attribute as c_int, handle) };
        self.check("cuDeviceGetAttribute", status)?;
        Ok(value)
    }

    pub fn devices(&self) -> Result<usize> {
        let mut count = 0;
        // SAFETY: writes one int.
        self.check("cuDeviceGetCount", unsafe { (self.calls.device_count)(&mut count) })?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    pub fn name(&self, device: usize) -> Result<String> {
        let (mut handle, mut name) = (0, [0u8; 256]);
        // SAFETY: writes one int.
        self.check("cuDeviceGet", unsafe { (self.calls.device_get)(&mut handle, device as c_int) })?;
        // SAFETY: writes at most 256 bytes, the last of them 0.
        let status = unsafe { (self.calls.device_name)(name.as_mut_ptr().cast(), name.len() as c_int, handle) };
        self.check("cuDeviceGetName", status)?;
        Ok(CStr::from_bytes_until_nul(&name).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default())
    }

    /// Retained for the life of the process, as libtorch does.
    pub fn context(&self, device: usize) -> Result<Context> {
        let (mut handle, mut context) = (0, std::ptr::null_mut());
        // SAFETY: writes one int, then one pointer.
        self.check("cuDeviceGet", unsafe { (self.calls.device_get)(&mut handle, device as c_int) })?;
        // SAFETY: as above.
        self.check("cuDevicePrimaryCtxRetain", unsafe { (self.calls.primary_retain)(&mut context, handle) })?;
        Ok(Context(context))
    }

    /// Runs `body` with `context` current on this thread, and puts back what was.
    pub fn within<T>(&self, context: Context, body: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut before = std::ptr::null_mut();
        // SAFETY: writes one pointer.
        self.check("cuCtxGetCurrent", unsafe { (self.calls.get_current)(&mut before) })?;
        if before == context.0 {
            return body();
        }
        // SAFETY: a context from `context`, and then the one that was current.
        self.check("cuCtxSetCurrent", unsafe { (self.calls.set_current)(context.0) })?;
        let result = body();
        // SAFETY: as above.
        self.check("cuCtxSetCurrent", unsafe { (self.calls.set_current)(before) })?;
        result
    }

    /// Loads a cubin into the current context, for the life of the process.
    pub fn load(&self, cubin: &[u8]) -> Result<Module> {
        let mut module = std::ptr::null_mut();
        // SAFETY: a cubin carries its own length; the driver copies it.
        self.check("cuModuleLoadData", unsafe { (self.calls.module_load)(&mut module, cubin.as_ptr().cast()) })?;
        Ok(Module(module))
    }

    pub fn function(&self, module: Module, name: &str) -> Result<Function> {
        let name = CString::new(name).map_err(|e| Error::Cuda(e.to_string()))?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is never unloaded; `name` outlives the call.
        let status = unsafe { (self.calls.module_function)(&mut function, module.0, name.as_ptr()) };
        self.check(&format!("cuModuleGetFunction {}", name.to_string_lossy()), status)?;
        Ok(Function(function))
    }

    /// Allows a kernel up to `bytes` of dynamic shared memory, which beyond 48 KiB it must be.
    pub fn allow_shared(&self, function: Function, bytes: u32) -> Result<()> {
        // SAFETY: a function of a module that is never unloaded.
        let status = unsafe { (self.calls.function_set)(function.0, MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes as c_int) };
        self.check("cuFuncSetAttribute", status)
    }

    /// Enqueues a kernel.
    ///
    /// # Safety
    /// `arguments` point to values of the kernel's parameter types, and device pointers among them to what the kernel reads
    /// and writes, alive until the stream has got there.
    pub unsafe fn launch(
        &self,
        function: Function,
        launch: Launch,
        stream: *mut c_void,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let Launch { grid: [x, y, z], block, shared } = launch;
        // SAFETY: as the caller promises; the driver copies the arguments before it returns.
        let status = unsafe {
            let none = std::ptr::null_mut();
            (self.calls.launch_kernel)(function.0, x, y, z, block, 1, 1, shared, stream, arguments.as_mut_ptr(), none)
        };
        self.check("cuLaunchKernel", status)
    }

    /// In the current context.
    pub fn event(&self) -> Result<Event> {
        let mut event = std::ptr::null_mut();
        // SAFETY: writes one pointer.
        self.check("cuEventCreate", unsafe { (self.calls.event_create)(&mut event, 0) })?;
        Ok(Event(event))
    }

    /// Records `event` on a stream of libtorch's.
    pub fn record(&self, event: Event, stream: *mut c_void) -> Result<()> {
        // SAFETY: an event that is never destroyed; the driver checks the stream.
        self.check("cuEventRecord", unsafe { (self.calls.event_record)(event.0, stream) })
    }

    /// Milliseconds between two recorded events, once the second has come.
    pub fn elapsed(&self, from: Event, to: Event) -> Result<f64> {
        let mut ms = 0.0;
        // SAFETY: events that are never destroyed.
        self.check("cuEventSynchronize", unsafe { (self.calls.event_synchronize)(to.0) })?;
        // SAFETY: as above; writes one float.
        self.check("cuEventElapsedTime", unsafe { (self.calls.event_elapsed)(&mut ms, from.0, to.0) })?;
        Ok(f64::from(ms))
    }

    /// Tiles of 64 tokens by 64 channels of a bf16 tensor `[B, T, H, D]` at `address`, with the 128-byte swizzle; zeros beyond
    /// its ends. `sizes`: of D, T, H, B; `strides`: of T, H, B, in bytes, multiples of 16.
    pub fn tile_map(&self, address: u64, sizes: [u64; 4], strides: [u64; 3]) -> Result<TileMap> {
        const BFLOAT16: c_int = 9;
        const NO_INTERLEAVE: c_int = 0;
        const SWIZZLE_128_BYTES: c_int = 3;
        const PROMOTE_TO_128_BYTES: c_int = 2;
        const ZEROS_OUTSIDE: c_int = 0;
        let mut map = TileMap([0; 16]);
        // SAFETY: writes 128 bytes, aligned to 64; reads four sizes, three strides, and twice four numbers.
        let status = unsafe {
            (self.calls.encode_tiled)(
                map.0.as_mut_ptr().cast(),
                BFLOAT16,
                4,
                address as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                [64, 64, 1, 1].as_ptr(),
                [1; 4].as_ptr(),
                NO_INTERLEAVE,
                SWIZZLE_128_BYTES,
                PROMOTE_TO_128_BYTES,
                ZEROS_OUTSIDE,
            )
        };
        self.check(&format!("cuTensorMapEncodeTiled of sizes {sizes:?}, strides {strides:?}"), status)?;
        Ok(map)
    }
}
