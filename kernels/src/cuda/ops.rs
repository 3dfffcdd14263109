//! The functions of `kernels/cuda/block.cu`, with the shapes that each takes. All tensors are contiguous, on one device, and
//! begin at a multiple of 16 bytes, weights of norms and labels excepted.

use tch::{Device, Kind, Tensor};

use super::{Arg, BLOCK, Kernel, Launch, kernel};
use crate::{Error, Result};

const THREADS: i64 = 256;

/// Blocks of a pass that goes over its numbers with a stride.
const STRIDED: i64 = 2048;

fn plain(device: Device, name: &str) -> Result<Kernel> {
    kernel(device, &BLOCK, &[], name)
}

/// A function for which a constant of the file matters; its usual value is that of [`plain`], compiled once for all.
fn variant(device: Device, constant: &str, value: i64, usual: i64, name: &str) -> Result<Kernel> {
    if value == usual {
        return plain(device, name);
    }
    kernel(device, &BLOCK, &[format!("{constant}={value}")], name)
}

fn blocks_of(numbers: i64, each: i64) -> u32 {
    ((numbers + each - 1) / each) as u32
}

fn strided(numbers: i64) -> u32 {
    blocks_of(numbers, THREADS * 8).clamp(1, STRIDED as u32)
}

fn line(blocks: u32) -> Launch {
    Launch { grid: [blocks, 1, 1], block: THREADS as u32, shared: 0 }
}

/// A launch's contract, checked: kind, size and layout of each tensor.
fn check(tensor: &'static str, x: &Tensor, kind: Kind, numbers: i64) -> Result<()> {
    if x.kind() != kind {
        return Err(Error::Kind { tensor, found: x.kind(), expected: format!("{kind:?}") });
    }
    if x.numel() as i64 != numbers || !x.is_contiguous() {
        let expected = format!("{numbers} numbers, contiguous");
        return Err(Error::Shape { tensor, found: x.size(), expected });
    }
    if kind != Kind::Int64 && !aligned(x) {
        return Err(Error::Unsupported(format!("{tensor}: expected to begin at a multiple of 16 bytes")));
    }
    Ok(())
}

pub(crate) fn aligned(x: &Tensor) -> bool {
    (x.data_ptr() as usize).is_multiple_of(16)
}

/// A weight where the kernels can read it: one that lies across 16 bytes in the flat parameters is copied.
fn weight_of(x: &Tensor, numbers: i64) -> Result<Tensor> {
    let x = if aligned(x) { x.shallow_clone() } else { x.f_detach_copy()? };
    check("norm weight", &x, Kind::BFloat16, numbers)?;
    Ok(x)
}

/// `(rows, width)` of a tensor seen as a matrix.
fn matrix(x: &Tensor) -> (i64, i64) {
    let width = x.size().last().copied().unwrap_or(1).max(1);
    (x.numel() as i64 / width, width)
}

/// The widest row of [`norm_forward`] and [`norm_backward`], and of [`heads_forward`] and [`heads_backward`].
pub const NORM_WIDTH: i64 = 8 * THREADS * 8;
pub const HEAD_WIDTH: i64 = 256;

fn norm_kernel(device: Device, width: i64, name: &str) -> Result<Kernel> {
    if width % 8 != 0 || width > NORM_WIDTH {
        return Err(Error::Unsupported(format!(
            "a norm over {width} numbers: expected a multiple of 8 up to {NORM_WIDTH}"
        )));
    }
    variant(device, "VECS", (width + THREADS * 8 - 1) / (THREADS * 8), 1, name)
}

/// x `[.., D]` bf16 -> y, and rstd `[rows]` f32.
pub fn norm_forward(x: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let (rows, d) = matrix(x);
    check("x", x, Kind::BFloat16, rows * d)?;
    let weight = &weight_of(weight, d)?;
    let kernel = norm_kernel(x.device(), d, "norm_forward")?;
    let (y, rstd) = (x.f_empty_like()?, Tensor::f_empty([rows], (Kind::Float, x.device()))?);
    let args = [
        Arg::Tensor(x),
        Arg::Tensor(weight),
        Arg::Tensor(&y),
        Arg::Tensor(&rstd),
        Arg::I32(d as i32),
        Arg::F32(eps as f32),
    ];
    // SAFETY: one block a row; sizes, kinds and layouts were checked or are made here.
    unsafe { kernel.launch(line(rows as u32), &args)? };
    Ok((y, rstd))
}

/// -> dx in the place of `dy`, and `[n, D]` f32, whose sum over n is dw. `residual` is added to dx.
pub fn norm_backward(
    x: &Tensor,
    weight: &Tensor,
    rstd: &Tensor,
    dy: Tensor,
    residual: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let (rows, d) = matrix(x);
    for (name, tensor) in [("x", Some(x)), ("dy", Some(&dy)), ("residual", residual)] {
        tensor.map(|t| check(name, t, Kind::BFloat16, rows * d)).transpose()?;
    }
    let weight = &weight_of(weight, d)?;
    check("rstd", rstd, Kind::Float, rows)?;
    let kernel = norm_kernel(x.device(), d, "norm_backward")?;
    let blocks = rows.min(i64::from(kernel.gpu().multiprocessors) * 4);
    let sums = Tensor::f_empty([blocks, d], (Kind::Float, x.device()))?;
    let args = [
        Arg::Tensor(x),
        Arg::Tensor(weight),
        Arg::Tensor(rstd),
        Arg::Tensor(&dy),
        residual.map_or(Arg::Null, Arg::Tensor),
        Arg::Tensor(&dy),
        Arg::Tensor(&sums),
        Arg::I32(rows as i32),
        Arg::I32(d as i32),
    ];
    // SAFETY: sizes, kinds and layouts were checked or are made here; a thread reads what it overwrites before it does.
    unsafe { kernel.launch(line(blocks as u32), &args)? };
    Ok((dy, sums))
}

fn heads_kernel(device: Device, width: i64, name: &str) -> Result<(Kernel, i64)> {
    if width % 8 != 0 || width > HEAD_WIDTH {
        return Err(Error::Unsupported(format!(
            "heads of {width} numbers: expected a multiple of 8 up to {HEAD_WIDTH}"
        )));
    }
    let lanes = (width / 8).max(1).unsigned_abs().next_power_of_two() as i64;
    Ok((variant(device, "LANES", lanes, 16, name)?, THREADS / lanes))
}

/// x `[.., V]` bf16, weight `[V]`, gate as many numbers as x -> y.
pub fn heads_forward(x: &Tensor, weight: &Tensor, gate: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let (rows, d) = matrix(x);
    for (name, tensor) in [("x", Some(x)), ("gate", gate)] {
        tensor.map(|t| check(name, t, Kind::BFloat16, rows * d)).transpose()?;
    }
    let weight = &weight_of(weight, d)?;
    let (kernel, per_block) = heads_kernel(x.device(), d, "heads_forward")?;
    let y = x.f_empty_like()?;
    let args = [
        Arg::Tensor(x),
        Arg::Tensor(weight),
        gate.map_or(Arg::Null, Arg::Tensor),
        Arg::Tensor(&y),
        Arg::I64(rows),
        Arg::I32(d as i32),
        Arg::F32(eps as f32),
    ];
    // SAFETY: sizes, kinds and layouts were checked or are made here.
    unsafe { kernel.launch(line(blocks_of(rows, per_block)), &args)? };
    Ok(y)
}

/// In place: `x` becomes y, `gate` its gradient, `dy` that of x. -> `[n, V]` f32, whose sum over n is dw.
pub fn heads_backward(x: &Tensor, weight: &Tensor, gate: Option<&Tensor>, dy: &Tensor, eps: f64) -> Result<Tensor> {
    let (rows, d) = matrix(x);
    for (name, tensor) in [("x", Some(x)), ("gate", gate), ("dy", Some(dy))] {
        tensor.map(|t| check(name, t, Kind::BFloat16, rows * d)).transpose()?;
    }
    let weight = &weight_of(weight, d)?;
    let (kernel, per_block) = heads_kernel(x.device(), d, "heads_backward")?;
    let blocks = i64::from(blocks_of(rows, per_block)).min(i64::from(kernel.gpu().multiprocessors) * 8);
    let sums = Tensor::f_empty([blocks, d], (Kind::Float, x.device()))?;
    let args = [
        Arg::Tensor(x),
        Arg::Tensor(weight),
        gate.map_or(Arg::Null, Arg::Tensor),
        Arg::Tensor(dy),
        Arg::Tensor(&sums),
        Arg::I64(rows),
        Arg::I32(d as i32),
        Arg::F32(eps as f32),
    ];
    // SAFETY: as above; a thread reads what it overwrites before it does.
    unsafe { kernel.launch(line(blocks as u32), &args)? };
    Ok(sums)
}

/// Launches a kernel over as many numbers as `tensors` have, a multiple of 8: the tensors, then their number.
fn elementwise(name: &str, tensors: &[&Tensor]) -> Result<()> {
    let Some(first) = tensors.first() else { return Ok(()) };
    let numbers = first.numel() as i64;
    if numbers % 8 != 0 {
        return Err(Error::Unsupported(format!("{name} of {numbers} numbers: expected a multiple of 8")));
    }
    for tensor in tensors {
        check("an operand", tensor, Kind::BFloat16, numbers)?;
    }
    let mut args: Vec<Arg> = tensors.iter().map(|t| Arg::Tensor(t)).collect();
    args.push(Arg::I64(numbers));
    // SAFETY: kinds, sizes and layouts were checked; these kernels take tensors and then a number.
    unsafe { plain(first.device(), name)?.launch(line(blocks_of(numbers, THREADS * 8)), &args) }
}

pub fn silu_forward(x: &Tensor) -> Result<Tensor> {
    let y = x.f_empty_like()?;
    elementwise("silu_forward", &[x, &y])?;
    Ok(y)
}

/// `dy` becomes dx.
pub fn silu_backward(x: &Tensor, dy: &Tensor) -> Result<()> {
    elementwise("silu_backward", &[x, dy])
}

pub fn swiglu_forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let hidden = gate.f_empty_like()?;
    elementwise("swiglu_forward", &[gate, up, &hidden])?;
    Ok(hidden)
}

/// In place: `gate` and `up` become their gradients, `d_hidden` becomes hidden.
pub fn swiglu_backward(gate: &Tensor, up: &Tensor, d_hidden: &Tensor) -> Result<()> {
    elementwise("swiglu_backward", &[gate, up, d_hidden])
}

/// x `[B, T, H, K]` turned by the angles cos, sin `[T, 1, K / 2]`, or back.
pub fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor, back: bool) -> Result<Tensor> {
    let (b, t, h, d) = crate::linear::shape4("x", x, "[B, T, H, K]")?;
    if d % 16 != 0 {
        return Err(Error::Unsupported(format!("rotary angles of heads of {d}: expected a multiple of 16")));
    }
    check("x", x, Kind::BFloat16, b * t * h * d)?;
    check("cos", cos, Kind::BFloat16, t * d / 2)?;
    check("sin", sin, Kind::BFloat16, t * d / 2)?;
    let y = x.f_empty_like()?;
    let n = b * t * h * d;
    let args = [
        Arg::Tensor(x),
        Arg::Tensor(cos),
        Arg::Tensor(sin),
        Arg::Tensor(&y),
        Arg::I64(n),
        Arg::I64(t),
        Arg::I32(h as i32),
        Arg::I32(d as i32),
        Arg::F32(if back { -1.0 } else { 1.0 }),
    ];
    // SAFETY: kinds, sizes and layouts were checked.
    unsafe { plain(x.device(), "rotary")?.launch(line(blocks_of(n / 16, THREADS)), &args)? };
    Ok(y)
}

/// The losses `[rows]` f32 of logits `[rows, vocab]` bf16 against labels `[rows]` i64; with `gradient`, the logits become
/// their gradient. vocab: a multiple of 8.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor, ignore: i64, gradient: bool) -> Result<Tensor> {
    let (rows, vocab) = matrix(logits);
    if vocab % 8 != 0 {
        return Err(Error::Unsupported(format!("a vocabulary of {vocab}: expected a multiple of 8")));
    }
    check("logits", logits, Kind::BFloat16, rows * vocab)?;
    check("labels", labels, Kind::Int64, rows)?;
    let loss = Tensor::f_empty([rows], (Kind::Float, logits.device()))?;
    let args = [
        Arg::Tensor(logits),
        Arg::Tensor(labels),
        Arg::Tensor(&loss),
        Arg::I32(vocab as i32),
        Arg::I64(ignore),
        Arg::I32(i32::from(gradient)),
    ];
    let launch = Launch { grid: [rows as u32, 1, 1], block: 512, shared: 0 };
    // SAFETY: one block a row; kinds, sizes and layouts were checked. Labels are tokens of the vocabulary or `ignore`.
    unsafe { plain(logits.device(), "cross_entropy")?.launch(launch, &args)? };
    Ok(loss)
}

/// `sum += scale x` of as many numbers, a multiple of 8: sum bf16 or f32, x f32, scale a single f32.
pub fn add_scaled(sum: &Tensor, x: &Tensor, scale: &Tensor) -> Result<()> {
    let numbers = sum.numel() as i64;
    if numbers % 8 != 0 {
        return Err(Error::Unsupported(format!("a scaled sum of {numbers} numbers: expected a multiple of 8")));
    }
    let name = by_kind(sum, "add_scaled_bf16", "add_scaled_f32")?;
    check("sum", sum, sum.kind(), numbers)?;
    check("x", x, Kind::Float, numbers)?;
    if scale.kind() != Kind::Float || scale.numel() != 1 {
        return Err(Error::Shape { tensor: "scale", found: scale.size(), expected: "a single f32".to_owned() });
    }
    let args = [Arg::Tensor(sum), Arg::Tensor(x), Arg::Tensor(scale), Arg::I64(numbers)];
    // SAFETY: kinds, sizes and layouts were checked.
    unsafe { plain(sum.device(), name)?.launch(line(blocks_of(numbers, THREADS * 8)), &args) }
}

/// `sum += x.sum(0)`, in place. sum `[D]` bf16 or f32, x `[n, D]` f32.
pub fn add_rows(sum: &Tensor, x: &Tensor) -> Result<()> {
    const BLOCK: u32 = 1024;
    let (rows, d) = x.size2()?;
    let name = by_kind(sum, "add_rows_bf16", "add_rows_f32")?;
    check("x", x, Kind::Float, rows * d)?;
    // Read number by number, it may begin anywhere.
    if sum.size() != [d] || !sum.is_contiguous() || sum.device() != x.device() {
        return Err(Error::Shape {
            tensor: "sum",
            found: sum.size(),
            expected: format!("[{d}], contiguous, beside x"),
        });
    }
    let grid = [d.unsigned_abs().div_ceil(32) as u32, 1, 1];
    let args = [Arg::Tensor(sum), Arg::Tensor(x), Arg::I32(rows as i32), Arg::I32(d as i32)];
    // SAFETY: kinds, sizes and layouts were checked.
    unsafe { plain(sum.device(), name)?.launch(Launch { grid, block: BLOCK, shared: 0 }, &args) }
}

/// `[2]` f64 on the device: `scale |grad|`, and what the gradient is to be multiplied by so that its norm is at most `clip`
/// (0: as it is), `scale` included. grad: bf16 or f32.
pub fn clipping(grad: &Tensor, scale: f64, clip: f64) -> Result<Tensor> {
    let (numbers, device) = (grad.numel() as i64, grad.device());
    let name = by_kind(grad, "squares_bf16", "squares_f32")?;
    check("grad", grad, grad.kind(), numbers)?;
    let blocks = strided(numbers);
    let partial = Tensor::f_empty([i64::from(blocks)], (Kind::Double, device))?;
    let out = Tensor::f_empty([2], (Kind::Double, device))?;
    // SAFETY: `partial` has a number for each block; kind and layout were checked.
    unsafe {
        plain(device, name)?.launch(line(blocks), &[Arg::Tensor(grad), Arg::Tensor(&partial), Arg::I64(numbers)])?;
    }
    let args = [Arg::Tensor(&partial), Arg::I32(blocks as i32), Arg::F64(scale), Arg::F64(clip), Arg::Tensor(&out)];
    // SAFETY: as above; `out` has two numbers.
    unsafe { plain(device, "clipping")?.launch(Launch { grid: [1, 1, 1], block: 32, shared: 0 }, &args)? };
    Ok(out)
}

fn by_kind(x: &Tensor, bf16: &'static str, f32: &'static str) -> Result<&'static str> {
    match x.kind() {
        Kind::BFloat16 => Ok(bf16),
        Kind::Float => Ok(f32),
        found => Err(Error::Kind { tensor: "gradient", found, expected: "bf16 or f32".to_owned() }),
    }
}

/// The numbers of one AdamW update.
#[derive(Clone, Copy, Debug)]
pub struct AdamStep {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Counted from 1.
    pub step: u64,
    /// How many numbers at the front weight decay applies to.
    pub decayed: i64,
}

/// One update of `high` `[P]` bf16 with its master's lower bits `low` `[P]` i16 and the moments `[P]` f32, by the gradient
/// `[P]` (bf16 or f32) times the second number of `clipping`.
pub fn adamw(
    high: &Tensor,
    low: &Tensor,
    moments: [&Tensor; 2],
    grad: &Tensor,
    clipping: &Tensor,
    a: AdamStep,
) -> Result<()> {
    let (numbers, device) = (high.numel() as i64, high.device());
    check("parameters", high, Kind::BFloat16, numbers)?;
    check("lower bits", low, Kind::Int16, numbers)?;
    for moment in moments {
        check("a moment", moment, Kind::Float, numbers)?;
    }
    check("grad", grad, grad.kind(), numbers)?;
    check("clipping", clipping, Kind::Double, 2)?;
    let name = by_kind(grad, "adamw_bf16", "adamw_f32")?;
    let correction = |beta: f64| 1.0 - beta.powf(a.step as f64);
    let settings =
        [1.0 - a.lr * a.weight_decay, a.lr / correction(a.beta1), 1.0 / correction(a.beta2), a.beta1, a.beta2, a.eps]
            .map(|x| u64::from((x as f32).to_bits()));
    let packed = [settings[0] | settings[1] << 32, settings[2] | settings[3] << 32, settings[4] | settings[5] << 32];
    let args = [
        Arg::Tensor(high),
        Arg::Tensor(low),
        Arg::Tensor(moments[0]),
        Arg::Tensor(moments[1]),
        Arg::Tensor(grad),
        Arg::Tensor(clipping),
        Arg::I64(numbers),
        Arg::I64(a.decayed),
        Arg::Bytes(&packed),
    ];
    // SAFETY: kinds, sizes and layouts were checked; `packed` is the struct `Settings`, six floats.
    unsafe { plain(device, name)?.launch(line(blocks_of(numbers, THREADS * 8).clamp(1, 1 << 16)), &args) }
}

/// f32 master weights `[P]` taken apart into bf16 weights and their lower bits i16.
pub fn split_master(master: &Tensor, high: &Tensor, low: &Tensor) -> Result<()> {
    masters("split_master", [master, high, low], [Kind::Float, Kind::BFloat16, Kind::Int16])
}

/// The inverse.
pub fn join_master(high: &Tensor, low: &Tensor) -> Result<Tensor> {
    let master = Tensor::f_empty(high.size(), (Kind::Float, high.device()))?;
    masters("join_master", [high, low, &master], [Kind::BFloat16, Kind::Int16, Kind::Float])?;
    Ok(master)
}

fn masters(name: &str, tensors: [&Tensor; 3], kinds: [Kind; 3]) -> Result<()> {
    let numbers = tensors[0].numel() as i64;
    for (tensor, kind) in tensors.into_iter().zip(kinds) {
        check("weights", tensor, kind, numbers)?;
    }
    let [a, b, c] = tensors.map(Arg::Tensor);
    // SAFETY: kinds, sizes and layouts were checked.
    unsafe { plain(tensors[0].device(), name)?.launch(line(strided(numbers)), &[a, b, c, Arg::I64(numbers)]) }
}

/// Normal numbers f32 that depend on `key` and their place alone.
pub fn normal(key: u64, count: i64, std: f64, device: Device) -> Result<Tensor> {
    let out = Tensor::f_empty([count], (Kind::Float, device))?;
    let args = [Arg::Tensor(&out), Arg::I64(key as i64), Arg::F64(std), Arg::I64(count)];
    // SAFETY: `out` has `count` numbers.
    unsafe { plain(device, "normal_f32")?.launch(line(strided(count)), &args)? };
    Ok(out)
}
