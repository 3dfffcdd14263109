//! The few things that tch lacks, through a small C++ file: an autograd node whose backward is Rust, backward from
//! a given gradient, activation checkpointing built on the two, and opening libtorch_cuda at run time with what only it has:
//! the current stream, memory statistics, attention with its log-sum-exp; and libtorch's profiler.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use tch::{Device, Tensor};
use torch_sys::C_tensor;

use crate::{Error, Result};

/// The backward of one node: gradients of its outputs in, gradients of its inputs out, in the order of [`attach`].
///
/// `None` stands for zero in both directions. It runs once, in no-grad mode; on CUDA it runs on libtorch's own thread.
pub trait Backward: Send + 'static {
    fn backward(self: Box<Self>, grads: Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>>;
}

impl<F> Backward for F
where
    F: FnOnce(Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> + Send + 'static,
{
    fn backward(self: Box<Self>, grads: Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> {
        self(grads)
    }
}

#[repr(C)]
struct Callbacks {
    state: *mut c_void,
    call: unsafe extern "C" fn(*mut c_void, *mut *mut C_tensor, usize, *mut *mut C_tensor, usize) -> *mut c_char,
    drop: unsafe extern "C" fn(*mut c_void),
}

unsafe extern "C" {
    fn lasp_attach(
        inputs: *const *const C_tensor,
        n: usize,
        outputs: *const *const C_tensor,
        m: usize,
        rust: Callbacks,
    ) -> *mut c_char;
    fn lasp_backward(output: *const C_tensor, grad: *const C_tensor) -> *mut c_char;
    fn lasp_open_cuda() -> *mut c_char;
    fn lasp_libtorch_path() -> *mut c_char;
    fn lasp_current_stream(device: c_int, stream: *mut *mut c_void) -> *mut c_char;
    fn lasp_device_memory(device: c_int, now: *mut i64, peak: *mut i64, reserved: *mut i64) -> *mut c_char;
    fn lasp_reset_peak_memory(device: c_int) -> *mut c_char;
    fn lasp_profile_begin(cuda: c_int) -> *mut c_char;
    fn lasp_profile_end(path: *const c_char) -> *mut c_char;
    fn lasp_set_grad(x: *const C_tensor, grad: *const C_tensor) -> *mut c_char;
    fn lasp_upload(x: *const C_tensor, device: c_int, out: *mut *mut C_tensor) -> *mut c_char;
    fn lasp_attention(
        cudnn: c_int,
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        causal: c_int,
        scale: f64,
        o: *mut *mut C_tensor,
        lse: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn lasp_attention_backward(
        cudnn: c_int,
        d_o: *const C_tensor,
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        o: *const C_tensor,
        lse: *const C_tensor,
        causal: c_int,
        scale: f64,
        dq: *mut *mut C_tensor,
        dk: *mut *mut C_tensor,
        dv: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn lasp_keep_freed_memory();
    fn lasp_free(message: *mut c_char);
    fn strdup(text: *const c_char) -> *mut c_char;
    safe fn _exit(status: c_int) -> !;
    safe fn malloc_trim(pad: usize) -> c_int;
}

/// What a node holds until its backward has run.
struct NodeState(Option<Box<dyn Backward>>);

/// Records in the autograd graph that `outputs` were computed from `inputs`, with `backward` as the derivative.
///
/// `outputs` must be fresh tensors, computed in no-grad mode. Where no input requires a gradient, or grad mode is off,
/// nothing is recorded and `backward` is dropped.
pub fn attach(inputs: &[&Tensor], outputs: &[&Tensor], backward: impl Backward) -> Result<()> {
    let ins: Vec<_> = inputs.iter().map(|t| t.as_ptr()).collect();
    let outs: Vec<_> = outputs.iter().map(|t| t.as_ptr()).collect();
    let state = Box::into_raw(Box::new(NodeState(Some(Box::new(backward)))));
    let rust = Callbacks { state: state.cast(), call: call_backward, drop: drop_state };
    // SAFETY: the pointers are of live tensors for the duration of the call; the node takes `state` over and frees it
    // once, through `drop_state`.
    unsafe { check(lasp_attach(ins.as_ptr(), ins.len(), outs.as_ptr(), outs.len(), rust)) }
}

/// Runs backward from `output` with `grad` as its gradient, accumulating into the `.grad` of the leaves.
pub fn backward(output: &Tensor, grad: &Tensor) -> Result<()> {
    // SAFETY: both tensors outlive the call, which only reads them.
    unsafe { check(lasp_backward(output.as_ptr(), grad.as_ptr())) }
}

/// Activation checkpointing: computes `first` of `x`, the output and what little is to be kept beside x, without keeping the rest of
/// what its backward needs. In backward `again` is given x, what was kept and the gradient of the output, computes the output
/// once more and gives it with its gradient; or another tensor with its own, from which backward comes to the same.
///
/// Parameters used inside `again` accumulate their gradients during that second run. Collectives inside it are issued then, in the
/// same order on every rank.
pub fn checkpoint<Kept: Send + 'static>(
    x: &Tensor,
    first: impl FnOnce(&Tensor) -> Result<(Tensor, Kept)>,
    again: impl FnOnce(&Tensor, Kept, Tensor) -> Result<(Tensor, Tensor)> + Send + 'static,
) -> Result<Tensor> {
    let (out, kept) = {
        let _guard = tch::no_grad_guard();
        first(&x.f_detach()?)?
    };
    let saved = x.f_detach()?;
    attach(&[x], &[&out], move |mut grads: Vec<Option<Tensor>>| {
        let Some(grad) = grads.swap_remove(0) else { return Ok(vec![None]) };
        let x = saved.f_detach()?.f_set_requires_grad(true)?;
        let (output, grad) = tch::with_grad(|| again(&x, kept, grad))?;
        backward(&output, &grad)?;
        Ok(vec![Some(x.f_grad()?)])
    })?;
    Ok(out)
}

/// Makes a GPU visible to libtorch, if it has one. To be called once, before the first tensor.
pub fn open_cuda() -> Result<()> {
    // SAFETY: opens a shared library that libtorch itself is made to load in this way.
    unsafe { check(lasp_open_cuda()) }
}

/// Where libtorch_cpu was loaded from.
pub(crate) fn libtorch_path() -> Option<PathBuf> {
    // SAFETY: null or a string from `strdup`, ours to free.
    unsafe {
        let path = lasp_libtorch_path();
        if path.is_null() {
            return None;
        }
        let text = CStr::from_ptr(path).to_string_lossy().into_owned();
        lasp_free(path);
        Some(PathBuf::from(text))
    }
}

/// The CUDA stream on which libtorch enqueues for this thread.
pub fn current_stream(device: usize) -> Result<*mut c_void> {
    let mut stream = std::ptr::null_mut();
    // SAFETY: writes one pointer.
    unsafe { check(lasp_current_stream(device as c_int, &mut stream))? };
    Ok(stream)
}

/// Bytes that tensors take on a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceMemory {
    pub now: u64,
    /// At most, since the start or the last [`reset_peak_memory`].
    pub peak: u64,
    /// At most held by libtorch's allocator, what it keeps for reuse included.
    pub reserved: u64,
}

/// What libtorch's allocator has given out on CUDA device `device`.
pub fn device_memory(device: usize) -> Result<DeviceMemory> {
    let (mut now, mut peak, mut reserved) = (0, 0, 0);
    // SAFETY: writes three numbers.
    unsafe { check(lasp_device_memory(device as c_int, &mut now, &mut peak, &mut reserved))? };
    Ok(DeviceMemory { now: now as u64, peak: peak as u64, reserved: reserved as u64 })
}

pub fn reset_peak_memory(device: usize) -> Result<()> {
    // SAFETY: takes no pointer.
    unsafe { check(lasp_reset_peak_memory(device as c_int)) }
}

/// Whether a thread of this process profiles; libtorch's profiler takes one at a time.
static PROFILING: AtomicBool = AtomicBool::new(false);

/// Records, until [`profile_end`] on the same thread, what libtorch does there and, with `cuda`, what the GPUs do. `false`, and
/// nothing is recorded, while another thread of this process does that.
pub fn profile_begin(cuda: bool) -> Result<bool> {
    if PROFILING.swap(true, Ordering::AcqRel) {
        return Ok(false);
    }
    // SAFETY: takes no pointer.
    let begun = unsafe { check(lasp_profile_begin(c_int::from(cuda))) };
    if begun.is_err() {
        PROFILING.store(false, Ordering::Release);
    }
    begun.map(|()| true)
}

/// Writes what was recorded to `path`, in the trace format of Chrome and Perfetto. Only after a [`profile_begin`] that was true.
pub fn profile_end(path: &Path) -> Result<()> {
    PROFILING.store(false, Ordering::Release);
    let path = CString::new(path.to_string_lossy().as_bytes()).map_err(|e| Error::Libtorch(e.to_string()))?;
    // SAFETY: `path` outlives the call.
    unsafe { check(lasp_profile_end(path.as_ptr())) }
}

/// Makes `grad` the tensor into which backward adds the gradient of the leaf `x`; of its shape, in any floating-point kind.
pub fn set_grad(x: &Tensor, grad: &Tensor) -> Result<()> {
    if x.size() != grad.size() {
        let expected = format!("that of the leaf, {:?}", x.size());
        return Err(Error::Shape { tensor: "grad", found: grad.size(), expected });
    }
    // SAFETY: both tensors outlive the call; the leaf takes a reference of its own.
    unsafe { check(lasp_set_grad(x.as_ptr(), grad.as_ptr())) }
}

/// Which of libtorch's fused attentions on CUDA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fused {
    Cudnn,
    Flash,
}

/// q `[B, H, Tq, K]`, k `[B, H, Tk, K]`, v `[B, H, Tk, V]`, bf16 or f16 on CUDA -> o `[B, H, Tq, V]` and the log-sum-exp
/// f32 of `B H Tq` rows. `causal` is aligned at the top left: it wants as many keys as queries.
pub(crate) fn attention(
    by: Fused,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    causal: bool,
    scale: f64,
) -> Result<(Tensor, Tensor)> {
    let (mut o, mut lse) = (std::ptr::null_mut(), std::ptr::null_mut());
    let (by, causal) = (c_int::from(by == Fused::Cudnn), c_int::from(causal));
    // SAFETY: the inputs outlive the call; on success both outputs are new tensors, which become ours.
    unsafe {
        check(lasp_attention(by, q.as_ptr(), k.as_ptr(), v.as_ptr(), causal, scale, &mut o, &mut lse))?;
        Ok((Tensor::from_ptr(o), Tensor::from_ptr(lse)))
    }
}

/// The gradients of [`attention`], of the shapes of q, k and v. `o` and `lse` may be those of more keys.
#[allow(clippy::too_many_arguments)]
pub(crate) fn attention_backward(
    by: Fused,
    d_o: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    causal: bool,
    scale: f64,
) -> Result<[Tensor; 3]> {
    let [mut dq, mut dk, mut dv] = [std::ptr::null_mut(); 3];
    let (by, causal) = (c_int::from(by == Fused::Cudnn), c_int::from(causal));
    // SAFETY: as in `attention`.
    unsafe {
        check(lasp_attention_backward(
            by,
            d_o.as_ptr(),
            q.as_ptr(),
            k.as_ptr(),
            v.as_ptr(),
            o.as_ptr(),
            lse.as_ptr(),
            causal,
            scale,
            &mut dq,
            &mut dk,
            &mut dv,
        ))?;
        Ok([dq, dk, dv].map(|x| Tensor::from_ptr(x)))
    }
}

/// x, of the CPU, on `device`; a GPU copies it when its stream gets there, and nobody waits for that.
pub fn upload(x: &Tensor, device: Device) -> Result<Tensor> {
    let Device::Cuda(index) = device else { return Ok(x.f_to_device(device)?) };
    let mut out = std::ptr::null_mut();
    // SAFETY: x outlives the call; on success the output is a new tensor, which becomes ours.
    unsafe {
        check(lasp_upload(x.as_ptr(), index as c_int, &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}

/// Ends this process at once, whatever its other threads do. `std::process::exit` would first destroy libtorch's globals,
/// and threads that still compute then crash.
pub fn exit(status: i32) -> ! {
    _exit(status)
}

/// Gives memory that is freed but kept by the C library, as it keeps a part of what tensors took, back to the system: what
/// this process then has resident is in use.
pub fn release_freed_memory() {
    malloc_trim(0);
}

/// Makes the allocator keep what is freed, where it would give large blocks back to the system and fault in their pages
/// anew: activations on the CPU are such blocks. To be called once, before the first tensor.
pub fn keep_freed_memory() {
    // SAFETY: sets two parameters of glibc's allocator; they take no pointer and cannot fail in a way that matters.
    unsafe { lasp_keep_freed_memory() }
}

unsafe extern "C" fn call_backward(
    state: *mut c_void,
    grads: *mut *mut C_tensor,
    n: usize,
    results: *mut *mut C_tensor,
    m: usize,
) -> *mut c_char {
    // SAFETY: `state` came from `attach` and is freed only by `drop_state`; `grads` and `results` are arrays of the
    // given lengths, each entry of `grads` null or a tensor that is handed over.
    let (state, grads, results) = unsafe {
        (
            &mut *state.cast::<NodeState>(),
            if n == 0 { &[][..] } else { std::slice::from_raw_parts(grads, n) },
            if m == 0 { &mut [][..] } else { std::slice::from_raw_parts_mut(results, m) },
        )
    };
    // SAFETY: a non-null entry is a tensor of which nobody else has the pointer.
    let grads: Vec<_> = grads.iter().map(|&p| (!p.is_null()).then(|| unsafe { Tensor::from_ptr(p) })).collect();
    let run = || -> Result<Vec<Option<Tensor>>> {
        let backward =
            state.0.take().ok_or_else(|| Error::Unsupported("a second backward through one node".to_owned()))?;
        let out = backward.backward(grads)?;
        if out.len() != m {
            return Err(Error::Unsupported(format!("a backward returned {} gradients for {m} inputs", out.len())));
        }
        Ok(out)
    };
    let message = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(out)) => {
            for (place, tensor) in results.iter_mut().zip(out) {
                // Ownership of the boxed at::Tensor passes to C++, which deletes it.
                *place = tensor.map_or(std::ptr::null_mut(), |t| {
                    let pointer = t.as_ptr().cast_mut();
                    std::mem::forget(t);
                    pointer
                });
            }
            return std::ptr::null_mut();
        }
        Ok(Err(error)) => error.to_string(),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            format!("panic in backward: {}", text.unwrap_or_else(|| "no message".to_owned()))
        }
    };
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    // SAFETY: copies a valid C string; C++ frees the copy.
    unsafe { strdup(message.as_ptr()) }
}

unsafe extern "C" fn drop_state(state: *mut c_void) {
    // SAFETY: `state` came from `Box::into_raw` in `attach`; C++ calls this once.
    drop(unsafe { Box::from_raw(state.cast::<NodeState>()) });
}

/// SAFETY: `message` is null or a string from `strdup`, owned by the caller.
unsafe fn check(message: *mut c_char) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: not null, hence a C string that is ours to free.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
    unsafe { lasp_free(message) };
    Err(Error::Libtorch(text))
}
