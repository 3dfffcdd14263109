//! The one comparison that every test of this workspace uses, numbers to test with, and the GPU to test on.

use tch::{Device, Kind, Tensor};

/// The first GPU; without one, `None`, and a line that says so.
pub fn cuda() -> Option<Device> {
    let there = crate::bridge::open_cuda().is_ok() && tch::Cuda::is_available();
    if !there {
        println!("not tested: no CUDA device");
    }
    there.then_some(Device::Cuda(0))
}

/// Numbers of 0..1 that depend on `seed` alone (splitmix64): the same in every thread, on every rank and in every process,
/// which libtorch's generator, shared by all threads, does not promise.
fn uniforms(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn filled(shape: &[i64], number: impl FnMut() -> f64) -> Tensor {
    let numbers: Vec<f64> = std::iter::repeat_with(number).take(shape.iter().product::<i64>() as usize).collect();
    Tensor::from_slice(&numbers).reshape(shape)
}

/// Numbers in f64, evenly spread over 0..1, that depend on `seed` and `shape` alone.
pub fn rand(seed: u64, shape: &[i64]) -> Tensor {
    filled(shape, uniforms(seed))
}

/// Normal numbers in f64 that depend on `seed` and `shape` alone.
pub fn randn(seed: u64, shape: &[i64]) -> Tensor {
    let mut uniform = uniforms(seed);
    filled(shape, || (-2.0 * (1.0 - uniform()).ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos())
}

fn double(x: &Tensor) -> Tensor {
    x.to_device(Device::Cpu).to_kind(Kind::Double)
}

/// Root mean square, in f64; 0 for a tensor without elements.
pub fn rms(x: &Tensor) -> f64 {
    let x = double(x);
    if x.numel() == 0 { 0.0 } else { (&x * &x).mean(Kind::Double).sqrt().double_value(&[]) }
}

/// RMS of the error over that of the reference; absolute where the reference is zero.
pub fn relative_rms(ours: &Tensor, reference: &Tensor) -> f64 {
    let scale = rms(reference);
    let error = rms(&(double(ours) - double(reference)));
    if scale > 0.0 { error / scale } else { error }
}

/// Panics unless shapes agree, everything is finite, and the relative RMS error is within `tolerance`.
/// The message has the ratio, the maximum error and the index where it is.
#[track_caller]
pub fn assert_close(name: &str, ours: &Tensor, reference: &Tensor, tolerance: f64) {
    assert_close_at(name, ours, reference, rms(reference), tolerance);
}

/// As [`assert_close`], relative to `scale`: for a part of a tensor that may by itself be all but zero.
#[track_caller]
pub fn assert_close_at(name: &str, ours: &Tensor, reference: &Tensor, scale: f64, tolerance: f64) {
    assert_eq!(ours.size(), reference.size(), "{name}: shapes differ (ours, reference)");
    if reference.numel() == 0 {
        return;
    }
    let difference = (double(ours) - double(reference)).abs();
    let ratio = rms(&difference) / if scale > 0.0 { scale } else { 1.0 };
    let maximum = difference.max().double_value(&[]);
    let mut flat = difference.flatten(0, -1).argmax(0, false).int64_value(&[]);
    let mut index = vec![0; difference.dim()];
    for (place, size) in index.iter_mut().zip(difference.size()).rev() {
        *place = flat % size;
        flat /= size;
    }
    // A NaN fails the comparison, as it must.
    assert!(
        ratio <= tolerance,
        "{name}: relative RMS {ratio:.3e} exceeds {tolerance:.1e}; maximum error {maximum:.3e} at {index:?} of {:?}",
        difference.size()
    );
}
