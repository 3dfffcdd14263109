//! Our own CUDA kernels: compiled by NVRTC when they are first needed, kept on disk, launched on libtorch's current stream.
//!
//! Nothing links to CUDA. [`driver`] and [`nvrtc`] are the two libraries, opened at run time; [`cache`] keeps what was compiled;
//! this file puts them together: a [`Program`] is a file of `kernels/cuda`, [`kernel`] finds one of its functions for a device,
//! and [`Kernel::launch`] enqueues it. What a kernel computes is written beside its caller, in [`ops`] and the files of mixers.
//! Large products of matrices are cuBLASLt's ([`matmul`]).
//!
//! Tests where there is no GPU put `kernels/emulator` in the place of both libraries ([`emulate`]) and the CPU in that of the
//! device. It checks what kernels compute, in several orders of threads and at several times of asynchronous instructions;
//! where threads wait; bounds and alignment of shared memory; limits of launches. It does not check the fences that the memory
//! model asks for, nor what ptxas makes of a kernel.

pub mod cache;
mod driver;
mod library;
pub mod linear;
pub mod matmul;
pub mod mma;
mod nvrtc;
pub mod ops;
mod segments;

use std::collections::HashMap;
use std::ffi::c_void;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use tch::{Device, Tensor};

pub use cache::keep_in;
pub use driver::Launch;
use driver::{Attribute, Context, Event, Function, Module, driver};
pub use library::emulate;
use nvrtc::Nvrtc;

use crate::{Error, Result};

/// A source file of `kernels/cuda`.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    pub name: &'static str,
    pub source: &'static str,
    /// `(name, text)` of what it may include.
    pub headers: &'static [(&'static str, &'static str)],
}

/// The fused operations of a block, the loss and the optimizer.
pub const BLOCK: Program = Program { name: "block", source: include_str!("../../cuda/block.cu"), headers: &[NUMBERS] };

/// What all programs include.
pub(crate) const NUMBERS: (&str, &str) = ("numbers.cuh", include_str!("../../cuda/numbers.cuh"));

/// What a kernel is given.
#[derive(Clone, Copy)]
pub enum Arg<'a> {
    /// The address of a tensor's first number.
    Tensor(&'a Tensor),
    /// No tensor: a null pointer.
    Null,
    I32(i32),
    I64(i64),
    F32(f32),
    F64(f64),
    /// A struct passed by value; aligned to 8 bytes.
    Bytes(&'a [u64]),
}

/// What is known of a device.
#[derive(Clone, Copy, Debug)]
pub struct Gpu {
    pub index: usize,
    /// The architecture that kernels are compiled for, such as `sm_90a`.
    pub major: i32,
    pub minor: i32,
    pub multiprocessors: i32,
    /// Most shared memory of a block, in bytes.
    pub shared: i32,
    context: Context,
}

impl Gpu {
    pub fn arch(&self) -> String {
        arch(self.major, self.minor)
    }
}

/// The architecture with all instructions of a device: Hopper's own are only in `sm_90a`.
fn arch(major: i32, minor: i32) -> String {
    format!("sm_{major}{minor}{}", if (major, minor) == (9, 0) { "a" } else { "" })
}

/// How many GPUs the driver has; 0 without a driver. Cheap: opens nothing of libtorch.
pub fn devices() -> usize {
    driver().and_then(|driver| driver.devices()).unwrap_or(0)
}

/// What the driver calls a device, such as `NVIDIA H200`.
pub fn name(device: Device) -> Result<String> {
    driver()?.name(gpu(device)?.index)
}

/// Whether kernels run on this device: a GPU, or the CPU of a test that has called [`emulate`].
pub fn runs_on(device: Device) -> bool {
    device.is_cuda() || (device == Device::Cpu && emulated())
}

fn emulator() -> Option<&'static Path> {
    library::emulator().filter(|_| driver().is_ok_and(|driver| driver.emulated))
}

fn emulated() -> bool {
    emulator().is_some()
}

/// The device of a tensor; an error where kernels do not run and where there is no driver.
pub fn gpu(device: Device) -> Result<Gpu> {
    static GPUS: OnceLock<Mutex<HashMap<usize, Gpu>>> = OnceLock::new();
    let index = match device {
        Device::Cuda(index) if !emulated() => index,
        Device::Cpu if emulated() => 0,
        _ => return Err(Error::Unsupported(format!("a CUDA kernel for a tensor on {device:?}"))),
    };
    let mut gpus = lock(GPUS.get_or_init(Mutex::default));
    if let Some(gpu) = gpus.get(&index) {
        return Ok(*gpu);
    }
    let driver = driver()?;
    let of = |attribute| driver.attribute(index, attribute);
    let gpu = Gpu {
        index,
        major: of(Attribute::Major)?,
        minor: of(Attribute::Minor)?,
        multiprocessors: of(Attribute::Multiprocessors)?,
        shared: of(Attribute::MaxSharedPerBlock)?,
        context: driver.context(index)?,
    };
    if gpu.major < 8 {
        return Err(Error::Cuda(format!(
            "device {index} has compute capability {}.{}: bf16 kernels need 8.0 or later; train.device = \"cpu\" does without",
            gpu.major, gpu.minor
        )));
    }
    gpus.insert(index, gpu);
    Ok(gpu)
}

/// Compiles a program for an architecture such as `sm_90a`, with `defines` such as `WIDTH=2048`. Needs no GPU.
pub fn compile(program: &Program, arch: &str, defines: &[String]) -> Result<Vec<u8>> {
    compile_by(nvrtc::nvrtc()?, program, arch, defines)
}

static ALSO_DEFINED: OnceLock<Vec<String>> = OnceLock::new();

/// What all programs are compiled with besides their own `defines` from now on. The first call counts. For tests that run under
/// a tool which takes the usual instructions for errors.
pub fn also_define(defines: &[&str]) {
    let _ = ALSO_DEFINED.set(defines.iter().map(|&define| define.to_owned()).collect());
}

fn compile_by(nvrtc: &Nvrtc, program: &Program, arch: &str, defines: &[String]) -> Result<Vec<u8>> {
    let mut options = vec![format!("--gpu-architecture={arch}"), "--std=c++17".to_owned()];
    let all = defines.iter().chain(ALSO_DEFINED.get().into_iter().flatten());
    options.extend(all.map(|define| format!("-D{define}")));
    nvrtc.compile(&format!("{}.cu", program.name), program.source, program.headers, &options)
}

/// Whether kernels can be compiled here.
pub fn has_compiler() -> bool {
    nvrtc::nvrtc().is_ok()
}

/// The version of NVRTC, `(major, minor)`; an error that says what was looked for where there is none.
pub fn compiler() -> Result<(i32, i32)> {
    nvrtc::nvrtc()?.version()
}

/// [`compile`], or what an earlier run has left of it.
fn cubin(program: &Program, arch: &str, defines: &[String]) -> Result<Vec<u8>> {
    if let Some(library) = emulator() {
        // Which keeps what it has compiled itself.
        return compile_by(nvrtc::emulated(library)?, program, arch, defines);
    }
    let Some(folder) = cache::folder() else { return compile(program, arch, defines) };
    let (major, minor) = nvrtc::nvrtc()?.version()?;
    let version = format!("nvrtc {major}.{minor}");
    let (own, all) = (defines.join(" "), ALSO_DEFINED.get().map_or_else(String::new, |all| all.join(" ")));
    let mut parts = vec![version.as_str(), own.as_str(), all.as_str(), program.source];
    parts.extend(program.headers.iter().flat_map(|(name, text)| [*name, *text]));
    let name = cache::name(program.name, arch, "cubin", &parts);
    if let Some(cubin) = cache::read(folder, &name) {
        return Ok(cubin);
    }
    let cubin = compile(program, arch, defines)?;
    // A cache that cannot be written to is slower, not wrong.
    let _ = cache::write(folder, &name, &cubin);
    Ok(cubin)
}

/// Leaves in the cache what `program` is with each of several `defines` for a device, compiled side by side: [`kernel`] compiles one
/// when it is first launched, while others wait. What does not compile fails there.
pub fn compile_ahead(device: Device, program: &Program, all: &[Vec<String>]) -> Result<()> {
    let (arch, next) = (gpu(device)?.arch(), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from).min(all.len()) {
            scope.spawn(|| {
                while let Some(defines) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let _ = cubin(program, &arch, defines);
                }
            });
        }
    });
    Ok(())
}

/// One function of a program on one device.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    gpu: Gpu,
    function: Function,
}

type Key = (usize, &'static str, String);

/// The function `name` of `program`, compiled with `defines` for the device; loaded once.
pub fn kernel(device: Device, program: &Program, defines: &[String], name: &str) -> Result<Kernel> {
    static MODULES: OnceLock<Mutex<HashMap<Key, Module>>> = OnceLock::new();
    static KERNELS: OnceLock<Mutex<HashMap<(Key, String), Kernel>>> = OnceLock::new();
    let gpu = gpu(device)?;
    let key: Key = (gpu.index, program.name, defines.join(" "));
    let mut kernels = lock(KERNELS.get_or_init(Mutex::default));
    if let Some(kernel) = kernels.get(&(key.clone(), name.to_owned())) {
        return Ok(*kernel);
    }
    let driver = driver()?;
    let mut modules = lock(MODULES.get_or_init(Mutex::default));
    let module = match modules.get(&key) {
        Some(module) => *module,
        None => {
            let cubin = cubin(program, &gpu.arch(), defines)?;
            let module = driver.within(gpu.context, || driver.load(&cubin))?;
            modules.insert(key.clone(), module);
            module
        }
    };
    let function = driver.within(gpu.context, || driver.function(module, name))?;
    let kernel = Kernel { gpu, function };
    kernels.insert((key, name.to_owned()), kernel);
    Ok(kernel)
}

impl Kernel {
    pub fn gpu(&self) -> Gpu {
        self.gpu
    }

    /// Allows this kernel up to `bytes` of dynamic shared memory a block: needed once, above 48 KiB.
    pub fn allow_shared(&self, bytes: u32) -> Result<()> {
        let driver = driver()?;
        driver.within(self.gpu.context, || driver.allow_shared(self.function, bytes))
    }

    /// Enqueues the kernel on libtorch's current stream of its device.
    ///
    /// The tensors may be dropped when this returns: libtorch hands their memory out again in the stream's order.
    ///
    /// # Safety
    /// `args` are the kernel's parameters in order and type; tensors are on its device, as large and as contiguous as the
    /// kernel takes them to be.
    pub unsafe fn launch(&self, launch: Launch, args: &[Arg]) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let mut values: Vec<u64> = Vec::with_capacity(args.len());
        for arg in args {
            values.push(match *arg {
                Arg::Tensor(x) => x.data_ptr() as u64,
                Arg::Null | Arg::Bytes(_) => 0,
                Arg::I32(x) => u64::from(x as u32),
                Arg::I64(x) => x as u64,
                Arg::F32(x) => u64::from(x.to_bits()),
                Arg::F64(x) => x.to_bits(),
            });
        }
        let mut pointers: Vec<*mut c_void> = Vec::with_capacity(args.len());
        for (arg, value) in args.iter().zip(&mut values) {
            pointers.push(match arg {
                Arg::Bytes(bytes) => bytes.as_ptr().cast_mut().cast(),
                _ => std::ptr::from_mut(value).cast(),
            });
        }
        let driver = driver()?;
        let stream = stream(self.gpu)?;
        // SAFETY: as the caller promises; `values` outlives the call.
        driver.within(self.gpu.context, || unsafe { driver.launch(self.function, launch, stream, &mut pointers) })
    }
}

/// libtorch's current stream of a device; the emulator has none.
fn stream(gpu: Gpu) -> Result<*mut c_void> {
    if emulated() { Ok(std::ptr::null_mut()) } else { crate::bridge::current_stream(gpu.index) }
}

/// Times work on libtorch's current stream of a device by the device's own clock.
pub struct Stopwatch {
    gpu: Gpu,
    events: [Event; 2],
}

impl Stopwatch {
    pub fn new(device: Device) -> Result<Self> {
        let (gpu, driver) = (gpu(device)?, driver()?);
        let events = driver.within(gpu.context, || Ok([driver.event()?, driver.event()?]))?;
        Ok(Self { gpu, events })
    }

    /// Milliseconds from when the device gets to what `body` enqueues until it is through with it.
    pub fn time<E: From<Error>>(
        &self,
        body: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<f64, E> {
        let driver = driver()?;
        let record = |event| {
            let stream = stream(self.gpu)?;
            driver.within(self.gpu.context, || driver.record(event, stream))
        };
        record(self.events[0])?;
        body()?;
        record(self.events[1])?;
        Ok(driver.within(self.gpu.context, || driver.elapsed(self.events[0], self.events[1]))?)
    }
}

/// What an error says, without the word that every error of this module begins with.
fn message(error: Error) -> String {
    match error {
        Error::Cuda(message) => message,
        other => other.to_string(),
    }
}

/// A lock whose holder panicked still guards a table that is whole: every update is one insertion.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// NVRTC finds only these; the emulator has files of its own.
    #[test]
    fn programs_bring_what_they_include() {
        for program in [&BLOCK, &linear::LINEAR, &mma::LINEAR_MMA] {
            for text in std::iter::once(program.source).chain(program.headers.iter().map(|(_, text)| *text)) {
                for line in text.lines().filter_map(|line| line.strip_prefix("#include \"")) {
                    let name = line.trim_end_matches('"');
                    assert!(program.headers.iter().any(|(header, _)| *header == name), "{}: {name}", program.name);
                }
            }
        }
    }
}
