//! The one comparison that every test of this workspace uses.

use tch::{Kind, Tensor};

/// Root mean square of the error over that of the reference; absolute where the reference is zero. Both in f64 on the CPU.
pub fn relative_rms(ours: &Tensor, reference: &Tensor) -> f64 {
    let ours = ours.to_device(tch::Device::Cpu).to_kind(Kind::Double);
    let reference = reference.to_device(tch::Device::Cpu).to_kind(Kind::Double);
    if reference.numel() == 0 {
        return 0.0;
    }
    let rms = |x: &Tensor| (x * x).mean(Kind::Double).sqrt().double_value(&[]);
    let scale = rms(&reference);
    let error = rms(&(ours - reference));
    if scale > 0.0 { error / scale } else { error }
}

/// Panics unless shapes agree, everything is finite, and the relative RMS error is within `tolerance`.
/// The message has the ratio, the maximum error and the index where it is.
#[track_caller]
pub fn assert_close(name: &str, ours: &Tensor, reference: &Tensor, tolerance: f64) {
    assert_eq!(ours.size(), reference.size(), "{name}: shapes differ (ours, reference)");
    if reference.numel() == 0 {
        return;
    }
    let ratio = relative_rms(ours, reference);
    let difference = (ours.to_device(tch::Device::Cpu).to_kind(Kind::Double)
        - reference.to_device(tch::Device::Cpu).to_kind(Kind::Double))
    .abs();
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
