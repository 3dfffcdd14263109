//! Megatron-LM's sequence parallelism (arXiv 2205.05198, section 4.2.2) on a linear layer without the right-product trick, as
//! LASP-2 (arXiv 2502.07563) timed it: every rank gathers the whole sequence, computes its share of the heads, and
//! a ReduceScatter hands each rank its tokens of the sum. [`super::super::attention::MegatronSp`] says how this operator
//! relates to the layer of the paper.
//!
//! Bytes of one rank, with e those of a number; heads are disjoint, so sums need no wider kind:
//!
//! | | sent | received |
//! |---|---|---|
//! | forward, q, k, v | T B H (2 K + V) e | (L - T) B H (2 K + V) e |
//! | forward, o | (L - T) B H V e | (W-1) T B H V e |
//! | backward, do | T B H V e | (L - T) B H V e |
//! | backward, dq, dk, dv | (L - T) B H (2 K + V) e | (W-1) T B H (2 K + V) e |

use kernels::linear::left_product::{self, Tile};
use kernels::linear::{Decay, Grads, Inputs};
use tch::Tensor;

use super::super::{linear, traffic, whole};
use super::{Forward, LayerSizes, LeftProduct, Plan, Result, Saved, Shard, Traffic, check, decay_grad, in_kind};

#[derive(Clone, Copy, Debug, Default)]
pub struct MegatronSpLeftProduct;

impl LeftProduct for MegatronSpLeftProduct {
    fn name(&self) -> &'static str {
        "megatron_sp_left_product"
    }

    fn forward(&self, shard: &Shard, x: Inputs, scale: f64) -> Result<Forward> {
        let _guard = tch::no_grad_guard();
        linear::check(&shard.plan, &x)?;
        check(self, &x)?;
        let heads = x.q.size()[2];
        let (first, count) = share(shard, heads);
        let [q, k, v] = whole::gather_heads(shard, [&x.q, &x.k, &x.v])?;
        let of_mine = |x: &Tensor| -> Result<Tensor> { Ok(x.f_narrow(2, first, count)?.f_contiguous()?) };
        let decay = match &x.decay {
            Decay::Head(g) => Decay::Head(g.f_narrow(0, first, count)?),
            other => other.shallow_clone(),
        };
        let mine = Inputs { q: of_mine(&q)?, k: of_mine(&k)?, v: of_mine(&v)?, decay, decay_grad: x.decay_grad };
        let o = {
            let _span = shard.group.recorder().span("left_product");
            left_product::forward(&mine.q, &mine.k, &mine.v, &mine.decay, &tiles(&shard.plan), scale)?
        };
        let [o] = scatter(shard, [(&o, &x.v)], first, heads)?;
        Ok(Forward { o, saved: Saved { x: mine, scale, heads } })
    }

    fn backward(&self, shard: &Shard, saved: Saved, d_o: &Tensor) -> Result<Grads> {
        let _guard = tch::no_grad_guard();
        let Saved { x, scale, heads } = &saved;
        let (first, count) = share(shard, *heads);
        let [d_o] = whole::gather_heads(shard, [d_o])?;
        let d_o = d_o.f_narrow(2, first, count)?;
        let grads = {
            let _span = shard.group.recorder().span("left_product_grad");
            left_product::backward(&x.q, &x.k, &x.v, &x.decay, x.decay_grad, &d_o, &tiles(&shard.plan), *scale)?
        };
        let whole_decay = |grad: &Tensor| whole::in_place(grad, 0, first, *heads);
        let dlog_decay = grads.dlog_decay.as_ref().map(whole_decay).transpose()?;
        let parts = [(&grads.dq, &x.q), (&grads.dk, &x.k), (&grads.dv, &x.v)];
        let [dq, dk, dv] = scatter(shard, parts, first, *heads)?;
        Ok(Grads { dq, dk, dv, dlog_decay: decay_grad(dlog_decay.as_ref(), &x.decay)? })
    }

    fn traffic(&self, plan: &Plan, layer: &LayerSizes) -> Traffic {
        let qkv = layer.q() + layer.kv();
        Traffic::exactly(
            traffic::gather(plan, qkv) + traffic::scatter(plan, layer.o()),
            traffic::gather(plan, layer.o()) + traffic::scatter(plan, qkv),
        )
    }
}

/// The first of this rank's heads, and their number.
fn share(shard: &Shard, heads: i64) -> (i64, i64) {
    let start = |rank: usize| heads * rank as i64 / shard.group.size() as i64;
    let rank = shard.group.rank();
    (start(rank), start(rank + 1) - start(rank))
}

/// The documents, each one tile.
fn tiles(plan: &Plan) -> Vec<Tile> {
    (0..plan.documents()).map(|n| plan.document(n)).map(|range| Tile { q: range.clone(), k: range, ahead: 0 }).collect()
}

/// Hands each rank its tokens, with all heads, of tensors of this rank's heads `[B, L, heads of this rank, X]`, each in the
/// kind of the tensor beside it; one message. Returns `[B, T, H, X]` each.
fn scatter<const N: usize>(
    shard: &Shard,
    tensors: [(&Tensor, &Tensor); N],
    first: i64,
    heads: i64,
) -> Result<[Tensor; N]> {
    let widths = tensors.map(|(x, _)| x.size()[3]);
    let parts = tensors.iter().map(|(x, like)| in_kind(x, like)).collect::<Result<Vec<_>>>()?;
    let whole = whole::in_place(&Tensor::f_cat(&parts, 3)?, 2, first, heads)?; // [B, L, H, sum of X]
    let mine = whole::scatter(shard, &whole.f_transpose(0, 1)?)?.wait()?.f_transpose(0, 1)?;
    let mut out = tensors.map(|(x, _)| x.shallow_clone());
    let mut start = 0;
    for (out, width) in out.iter_mut().zip(widths) {
        *out = mine.f_narrow(3, start, width)?.f_contiguous()?;
        start += width;
    }
    Ok(out)
}
