//! What every back end must do, as functions of one rank's world group; each runs at several numbers of ranks.
//!
//! They run on the CPU, and with NCCL on a GPU. Values are small whole numbers, exact in every kind, unless a case is about rounding; so results are compared exactly.

mod faults;
mod flight;
mod moves;
mod timings;

use anyhow::Result;
use collectives::{Group, Kind, Tensor};
use std::sync::OnceLock;
use tch::Device;

/// Where tensors are; on the CPU if not set.
#[allow(dead_code)]
pub static DEVICE: OnceLock<Device> = OnceLock::new();

pub fn device() -> Device {
    *DEVICE.get().unwrap_or(&Device::Cpu)
}

pub type Case = fn(&Group) -> Result<()>;

pub const CASES: &[(&str, Case)] = &[
    ("equal_shapes", moves::equal_shapes),
    ("uneven_rows", moves::uneven_rows),
    ("reductions_add_in_rank_order", moves::reductions_add_in_rank_order),
    ("reductions_in_place", moves::reductions_in_place),
    ("views_and_tracked_inputs", moves::views_and_tracked_inputs),
    ("splits", moves::splits),
    ("meshes", moves::meshes),
    ("many_in_flight", flight::many_in_flight),
    ("messages_that_depend_on_each_other", flight::messages_that_depend_on_each_other),
    ("rings_in_both_orders", flight::rings_in_both_orders),
    ("messages_pass_collectives", flight::messages_pass_collectives),
    ("inputs_may_be_overwritten_after_wait", flight::inputs_may_be_overwritten_after_wait),
    ("inputs_may_be_dropped_at_once", flight::inputs_may_be_dropped_at_once),
    ("progress_while_computing", flight::progress_while_computing),
    ("the_recorder_counts", flight::the_recorder_counts),
    ("a_rank_checks_its_own_arguments", faults::a_rank_checks_its_own_arguments),
    ("mismatches_are_named_on_every_rank", faults::mismatches_are_named_on_every_rank),
    ("a_message_must_be_as_expected", faults::a_message_must_be_as_expected),
    ("the_benchmark_runs", timings::the_benchmark_runs),
];

pub const KINDS: [Kind; 4] = [Kind::Double, Kind::Float, Kind::BFloat16, Kind::Int64];

/// Small whole numbers that depend on the rank and the place.
pub fn numbers(rank: usize, shape: &[i64], kind: Kind) -> Tensor {
    let n: i64 = shape.iter().product();
    (Tensor::arange(n, (Kind::Int64, device())) + 7 * rank as i64).remainder(13).to_kind(kind).reshape(shape)
}

pub fn ranks_numbers(size: usize, shape: &[i64], kind: Kind) -> Vec<Tensor> {
    (0..size).map(|rank| numbers(rank, shape, kind)).collect()
}

#[track_caller]
pub fn assert_same(ours: &Tensor, expected: &Tensor) {
    assert_eq!((ours.size(), ours.kind()), (expected.size(), expected.kind()));
    assert!(ours.equal(expected), "found {ours:?}, expected {expected:?}: {}", difference(ours, expected));
}

fn difference(ours: &Tensor, expected: &Tensor) -> String {
    let [a, b] = [ours, expected].map(|x| x.to_kind(Kind::Double).reshape([-1]));
    let gap = (a - b).abs();
    let at = gap.argmax(0, false).int64_value(&[]);
    format!("largest difference {} at flat index {at}", gap.double_value(&[at]))
}

/// The sum in rank order, as bf16 rounded once.
pub fn sum(xs: &[Tensor]) -> Tensor {
    let kind = xs[0].kind();
    let wide = if kind == Kind::BFloat16 { Kind::Float } else { kind };
    xs[1..].iter().fold(xs[0].to_kind(wide), |total, x| total + x.to_kind(wide)).to_kind(kind)
}
