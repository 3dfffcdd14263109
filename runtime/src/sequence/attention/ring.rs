//! Ring Attention (arXiv 2310.01889): keys and values go round the ranks, and each rank attends to the block that it has with
//! all its queries; partial results are merged by log-sum-exp, in f32. The next block is under way meanwhile. A block that no
//! query here sees, by the causal mask or for its documents, is passed on but not computed. Backward sends K and V round
//! again, followed by the sums of dk and dv, which end at home.
//!
//! The layout decides what the method is: on contiguous shards the last rank of a causal layer has twice the mean work, on
//! zigzag every rank has the same, as in ring-flash-attention's balanced variant. A rank's two segments lie side by side,
//! so what one run of queries sees of a block is one run of its keys.
//!
//! Bytes of one rank, with e those of a number, s those of a sum (4; 8 for f64), T' the tokens of the rank after and T'' those
//! of the rank before:
//!
//! | | sent | received |
//! |---|---|---|
//! | forward | (L - T') B Hkv (K + V) e | (L - T) B Hkv (K + V) e |
//! | backward | forward + (L - T) B Hkv (K + V) s | forward + (L - T'') B Hkv (K + V) s |

use std::ops::Range;

use collectives::Group;
use kernels::softmax::{self, Tile};
use tch::Tensor;

use super::super::{ring, traffic};
use super::{Attention, Forward, Grads, Inputs, LayerSizes, Piece, Plan, Result, Saved, Shard, Traffic, sum_kind};

#[derive(Clone, Copy, Debug, Default)]
pub struct Ring;

impl Attention for Ring {
    fn connect(&self, group: &Group) -> Result<()> {
        ring::connect(group)
    }

    fn attends_once(&self) -> bool {
        true
    }

    fn forward(&self, shard: &Shard, x: &Inputs) -> Result<Forward> {
        let _guard = tch::no_grad_guard();
        let mut merged: Option<(Tensor, Tensor)> = None;
        ring::go_round(shard, &ring::block(&x.k, &x.v)?, |owner, block| {
            let tiles = tiles(&shard.plan, owner, x.causal);
            if tiles.is_empty() {
                return Ok(());
            }
            let (k, v) = ring::unblock(block, x.k.size()[3])?;
            let _span = shard.group.recorder().span("softmax");
            let (o, lse) = softmax::forward_partial(&x.q, &k, &v, &tiles, x.scale)?;
            merged = Some(match &merged {
                None => (o, lse),
                Some((o_before, lse_before)) => softmax::merge(o_before, lse_before, &o, &lse)?,
            });
            Ok(())
        })?;
        let (o, lse) = match merged {
            Some(merged) => merged,
            None => softmax::forward_partial(&x.q, &x.k, &x.v, &[], x.scale)?,
        };
        Ok(Forward { saved: Saved::of(x, &o, lse)?, o: o.f_to_kind(x.q.kind())? })
    }

    fn backward(&self, shard: &Shard, saved: Saved, d_o: &Tensor) -> Result<Grads> {
        let _guard = tch::no_grad_guard();
        let x = &saved.inputs;
        let kind = sum_kind(&x.q);
        let mut sum_dq = Tensor::f_zeros(x.q.size(), (kind, x.q.device()))?;
        let sums = ring::go_round_and_home(shard, &ring::block(&x.k, &x.v)?, kind, |owner, block| {
            let tiles = tiles(&shard.plan, owner, x.causal);
            if tiles.is_empty() {
                return Ok(None);
            }
            let (k, v) = ring::unblock(block, x.k.size()[3])?;
            let _span = shard.group.recorder().span("softmax_grad");
            let (dq, dk, dv) = softmax::backward_partial(&x.q, &k, &v, &saved.o, &saved.lse, d_o, &tiles, x.scale)?;
            let _ = sum_dq.f_add_(&dq)?;
            Ok(Some(ring::block(&dk, &dv)?))
        })?;
        let (dk, dv) = ring::unblock(&sums, x.k.size()[3])?;
        let back = |grad: &Tensor| -> Result<Tensor> { Ok(grad.f_to_kind(x.k.kind())?.f_contiguous()?) };
        Ok(Grads { dq: back(&sum_dq)?, dk: back(&dk)?, dv: back(&dv)? })
    }

    fn traffic(&self, plan: &Plan, layer: &LayerSizes) -> Traffic {
        let forward = traffic::go_round(plan, layer.kv());
        Traffic::exactly(forward.clone(), forward + traffic::come_home(plan, layer.kv_sums()))
    }
}

/// What this rank's queries see of `owner`'s keys, in the owner's local order.
///
/// A document that goes on from a rank's first segment to its second is one run there: it ends the one and starts the other.
pub fn tiles(plan: &Plan, owner: usize, causal: bool) -> Vec<Tile> {
    let keys = plan.pieces_of(owner);
    let seen = |queries: &Piece| -> Option<Tile> {
        let visible = |k: &&Piece| k.document == queries.document && (!causal || k.global.start < queries.global.end);
        let mut pieces = keys.iter().filter(visible);
        let first = pieces.next()?;
        let last = pieces.next_back().unwrap_or(first);
        let k: Range<i64> = first.local.start..last.local.end;
        Some(Tile { q: queries.local.clone(), k, causal: causal && last.global == queries.global })
    };
    plan.pieces.iter().filter_map(seen).collect()
}
