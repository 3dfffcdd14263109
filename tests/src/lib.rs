//! The parity list of algorithms.md, section 7: one operator on one sharded sequence, every rank's outputs and gradients
//! against the f64 oracle over the whole sequence. The back ends run the same list; with NCCL the tensors are on the rank's
//! GPU, and the oracle stays on the CPU.

pub mod determinism;
mod hold;
mod left_product;
mod linear;
pub mod mpirun;
pub mod overlap;
mod softmax;
mod textbook;
pub mod training;

use std::collections::BTreeMap;

use anyhow::Result;
use collectives::Group;
pub use kernels::testing::randn;
use kernels::testing::{assert_close_at, rms};
use runtime::config::LayoutKind;
use runtime::sequence::{Count, Layout, Messages, Plan};
use tch::{Kind, Tensor};

pub use hold::{going_on_after_failures, hold, is_held};
pub use left_product::{LeftProductCase, left_product_cases};
pub use linear::{LinearCase, Scans, bf16_linear_cases, cuda_linear_cases, linear_cases, scans};
pub use softmax::{Bf16SoftmaxCase, SoftmaxCase, softmax_cases};

pub const LAYOUTS: [LayoutKind; 2] = [LayoutKind::Contiguous, LayoutKind::Zigzag];

/// Tensors by name.
type Results = BTreeMap<&'static str, Tensor>;

/// Sizes of one case. `documents`: lengths of the packed documents, or none for one sequence.
#[derive(Clone, Debug)]
pub struct Sizes {
    pub b: i64,
    pub tokens: i64,
    pub h: i64,
    pub kv_heads: i64,
    pub dk: i64,
    pub dv: i64,
    pub documents: Option<Vec<i64>>,
}

impl Sizes {
    pub fn cu_seqlens(&self) -> Option<Vec<i64>> {
        let lengths = self.documents.as_ref()?;
        let mut cu = vec![0];
        for length in lengths {
            cu.push(cu[cu.len() - 1] + length);
        }
        Some(cu)
    }

    /// Rows of initial and final states.
    pub fn states(&self) -> i64 {
        self.documents.as_ref().map_or(self.b, |d| d.len() as i64)
    }
}

/// The lengths that must work: odd, shorter than the chunk, fewer tokens than ranks; batches; packed documents that cross
/// ranks, fill several, end at a shard's edge, or are empty.
pub fn sizes() -> Vec<Sizes> {
    let whole = |b, tokens, dk, dv| Sizes { b, tokens, h: 4, kv_heads: 4, dk, dv, documents: None };
    let packed = |lengths: &[i64]| Sizes { documents: Some(lengths.to_vec()), ..whole(1, lengths.iter().sum(), 12, 7) };
    vec![
        whole(2, 67, 12, 7),
        whole(1, 128, 16, 16),
        whole(1, 5, 3, 9),
        packed(&[67]),
        packed(&[3, 40, 1, 0, 25, 20, 7]),
        packed(&[16, 16, 16, 16]),
        packed(&[90, 3]),
        packed(&[1; 11]),
    ]
}

pub fn plan(group: &Group, sizes: &Sizes, layout: LayoutKind) -> Result<Plan> {
    let layout = Layout::new(layout, sizes.tokens, group.size())?;
    Ok(Plan::new(layout, sizes.cu_seqlens().as_deref(), group.rank())?)
}

/// From here on [`moved`] counts.
pub fn count_from_here(group: &Group) {
    group.recorder().settle();
    group.recorder().clear();
}

/// What this rank has sent and received since [`count_from_here`]; `group` is called sp, as in a mesh.
pub fn moved(group: &Group) -> Messages {
    group.recorder().settle();
    let mut messages = Messages::default();
    for ((name, op), totals) in group.recorder().totals_by_op() {
        let name = if &*name == group.name() { "sp" } else { "node" };
        messages.count_on(name, op, totals.messages, totals.bytes_sent, totals.bytes_received);
    }
    messages
}

/// Whether what was moved is what the formula says, `at_most` or exactly.
pub fn fits(moved: &Messages, formula: &Messages, at_most: bool) -> bool {
    let most = |key| formula.iter().find(|(other, _)| *other == key).map(|(_, count)| count).unwrap_or_default();
    let within = |((group, op), count): ((&'static str, &'static str), Count)| {
        let (most, bytes) = (most((group, op)), count.bytes);
        count.messages <= most.messages && bytes.sent <= most.bytes.sent && bytes.received <= most.bytes.received
    };
    if at_most { moved.iter().all(within) } else { moved == formula }
}

/// This rank's tokens of a tensor `[B, T of all ranks, ..]`, where the rank computes.
fn share(group: &Group, plan: &Plan, whole: &Tensor) -> Result<Tensor> {
    Ok(plan.layout.shard(whole, 1, plan.rank)?.to_device(group.device()))
}

/// Compares this rank's tokens with those of the whole. A share that is zero but for rounding is held against a hundredth of
/// the whole's RMS; where the whole may be zero too, against `floor`.
pub fn close(name: &str, plan: &Plan, ours: &Tensor, whole: &Tensor, floor: f64, tolerance: f64) -> Result<()> {
    let reference = plan.layout.shard(whole, 1, plan.rank)?;
    let scale = rms(&reference).max(0.01 * rms(whole)).max(floor);
    hold(|| assert_close_at(name, ours, &reference, scale, tolerance));
    Ok(())
}

pub fn tolerance(kind: Kind) -> f64 {
    if kind == Kind::Double { 1e-10 } else { 1e-5 }
}

/// A leaf of the autograd graph.
pub fn leaf(x: &Tensor) -> Tensor {
    x.detach().copy().set_requires_grad(true)
}
