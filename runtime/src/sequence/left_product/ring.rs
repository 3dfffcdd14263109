//! Ring Attention (arXiv 2310.01889) on a linear layer without the right-product trick, as LASP-2 (arXiv 2502.07563)
//! timed it: K and V go round, each rank adds what its queries take from the block that it has. A block that no query here
//! sees is passed on but not computed. Backward sends K and V round again, followed by the sums of dk and dv.
//!
//! Bytes of one rank, with e those of a number, s those of a sum (4; 8 for f64), T' the tokens of the rank after and T'' those
//! of the rank before:
//!
//! | | sent | received |
//! |---|---|---|
//! | forward | (L - T') B H (K + V) e | (L - T) B H (K + V) e |
//! | backward | forward + (L - T) B H (K + V) s | forward + (L - T'') B H (K + V) s |

use collectives::Group;
use kernels::linear::left_product::{self, Tile};
use kernels::linear::{Grads, Inputs, accumulation_kind};
use tch::Tensor;

use super::super::{linear, ring, traffic};
use super::{Forward, LayerSizes, LeftProduct, Plan, Result, Saved, Shard, Traffic, check, decay_grad, in_kind};

#[derive(Clone, Copy, Debug, Default)]
pub struct RingLeftProduct;

impl LeftProduct for RingLeftProduct {
    fn connect(&self, group: &Group) -> Result<()> {
        ring::connect(group)
    }

    fn name(&self) -> &'static str {
        "ring_left_product"
    }

    fn forward(&self, shard: &Shard, x: Inputs, scale: f64) -> Result<Forward> {
        let _guard = tch::no_grad_guard();
        linear::check(&shard.plan, &x)?;
        check(self, &x)?;
        let heads = x.q.size()[2];
        let mut o = Tensor::f_zeros(x.v.size(), (accumulation_kind(x.q.kind()), x.q.device()))?;
        ring::go_round(shard, &ring::block(&x.k, &x.v)?, |owner, block| {
            let tiles = tiles(&shard.plan, owner);
            if tiles.is_empty() {
                return Ok(());
            }
            let (k, v) = ring::unblock(block, x.k.size()[3])?;
            let _span = shard.group.recorder().span("left_product");
            let _ = o.f_add_(&left_product::forward(&x.q, &k, &v, &x.decay, &tiles, scale)?)?;
            Ok(())
        })?;
        Ok(Forward { o: in_kind(&o, &x.q)?, saved: Saved { x, scale, heads } })
    }

    fn backward(&self, shard: &Shard, saved: Saved, d_o: &Tensor) -> Result<Grads> {
        let _guard = tch::no_grad_guard();
        let Saved { x, scale, .. } = &saved;
        let kind = accumulation_kind(x.q.kind());
        let mut sum_dq = Tensor::f_zeros(x.q.size(), (kind, x.q.device()))?;
        let mut dlog_decay = match x.decay.tensor() {
            Some(_) if x.decay_grad => Some(Tensor::f_zeros([saved.heads], (kind, x.q.device()))?),
            _ => None,
        };
        let sums = ring::go_round_and_home(shard, &ring::block(&x.k, &x.v)?, kind, |owner, block| {
            let tiles = tiles(&shard.plan, owner);
            if tiles.is_empty() {
                return Ok(None);
            }
            let (k, v) = ring::unblock(block, x.k.size()[3])?;
            let _span = shard.group.recorder().span("left_product_grad");
            let grads = left_product::backward(&x.q, &k, &v, &x.decay, x.decay_grad, d_o, &tiles, *scale)?;
            let _ = sum_dq.f_add_(&grads.dq)?;
            if let (Some(sum), Some(part)) = (&mut dlog_decay, &grads.dlog_decay) {
                let _ = sum.f_add_(part)?;
            }
            Ok(Some(ring::block(&grads.dk, &grads.dv)?))
        })?;
        let (dk, dv) = ring::unblock(&sums, x.k.size()[3])?;
        Ok(Grads {
            dq: in_kind(&sum_dq, &x.q)?,
            dk: in_kind(&dk, &x.k)?,
            dv: in_kind(&dv, &x.v)?,
            dlog_decay: decay_grad(dlog_decay.as_ref(), &x.decay)?,
        })
    }

    fn traffic(&self, plan: &Plan, layer: &LayerSizes) -> Traffic {
        let forward = traffic::go_round(plan, layer.kv());
        Traffic::exactly(forward.clone(), forward + traffic::come_home(plan, layer.kv_sums()))
    }
}

/// What this rank's queries see of `owner`'s keys. Decays count positions, so every pair of pieces is a tile of its own.
fn tiles(plan: &Plan, owner: usize) -> Vec<Tile> {
    let keys = plan.pieces_of(owner);
    let mut tiles = Vec::new();
    for q in &plan.pieces {
        for k in keys.iter().filter(|k| k.document == q.document && k.global.start < q.global.end) {
            let ahead = q.global.start - k.global.start;
            tiles.push(Tile { q: q.local.clone(), k: k.local.clone(), ahead });
        }
    }
    tiles
}
