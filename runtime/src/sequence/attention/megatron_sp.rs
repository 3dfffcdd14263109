//! Megatron-LM's sequence parallelism (arXiv 2205.05198, section 4.2.2) around attention: every rank gathers the whole
//! sequence, computes its share of the heads, and a ReduceScatter hands each rank its tokens of the sum. Backward is the
//! mirror: do is gathered, dq, dk and dv are reduce-scattered. Heads are shared out as evenly as W allows.
//!
//! In a layer, what is gathered is the layer's input `[L, B, D]`, before a rank's columns of the projections; what is summed
//! are the ranks' partial output projections; and backward gathers the input once more, for the gradients of the weights.
//! Here the operator begins after the projections. So q, k and v with all heads take the input's place, (H K + Hkv (K + V)) /
//! D times its size, of which a rank uses its heads and drops the rest; and a rank's sum is its heads' output with zeros for
//! the others. The ReduceScatter of a layer has the same size, H V = D. The volume grows with L and does not shrink with W,
//! as the layer's does.
//!
//! Kept for backward are the whole sequence's q, k and v of a rank's heads, as tensor parallelism keeps them.
//!
//! Bytes of one rank, with e those of a number and s those of a sum (4; 8 for f64):
//!
//! | | sent | received |
//! |---|---|---|
//! | forward, q, k, v | T B (H K + Hkv (K + V)) e | (L - T) B (H K + Hkv (K + V)) e |
//! | forward, o | (L - T) B H V e | (W-1) T B H V e |
//! | backward, do | T B H V e | (L - T) B H V e |
//! | backward, dq | (L - T) B H K e | (W-1) T B H K e |
//! | backward, dk, dv | (L - T) B Hkv (K + V) s | (W-1) T B Hkv (K + V) s |

use kernels::softmax;
use tch::{Kind, Tensor};

use super::super::{traffic, whole};
use super::heads::Heads;
use super::{Attention, Forward, Grads, Inputs, LayerSizes, Plan, Result, Saved, Shard, Traffic, documents, sum_kind};

#[derive(Clone, Copy, Debug, Default)]
pub struct MegatronSp;

impl Attention for MegatronSp {
    fn forward(&self, shard: &Shard, x: &Inputs) -> Result<Forward> {
        let _guard = tch::no_grad_guard();
        let (all, kv_heads) = (x.q.size()[2], x.k.size()[2]);
        let mine = share(shard, all, kv_heads);
        let [q, k, v] = &whole::gather_heads(shard, [&x.q, &x.k, &x.v])?;
        let (q, k, v) = (mine.queries(q)?.f_contiguous()?, mine.keys(k)?, mine.keys(v)?);
        let inputs = Inputs { q, k, v, scale: x.scale, causal: x.causal };
        let (o, lse) = attend(shard, &inputs)?;
        let sum = in_place(&o, &mine, all)?.f_transpose(0, 1)?;
        let sum = whole::scatter(shard, &sum)?.wait()?.f_transpose(0, 1)?.f_contiguous()?;
        Ok(Forward { o: sum, saved: Saved { inputs, o, lse, heads: all, kv_heads } })
    }

    fn backward(&self, shard: &Shard, saved: Saved, d_o: &Tensor) -> Result<Grads> {
        let _guard = tch::no_grad_guard();
        let x = &saved.inputs;
        let mine = share(shard, saved.heads, saved.kv_heads);
        let [d_o] = &whole::gather_heads(shard, [d_o])?;
        let (dq, entries) = attend_grad(shard, &saved, &mine.queries(d_o)?)?;
        let dq = in_place(&dq, &mine, saved.heads)?.f_transpose(0, 1)?;
        let dq = whole::scatter(shard, &dq)?;

        let mut size = entries.size();
        size[2] = saved.kv_heads;
        let sums = Tensor::f_zeros(size, (entries.kind(), entries.device()))?;
        mine.add_keys(&sums, &entries)?;
        let sums = whole::scatter(shard, &sums.f_transpose(0, 1)?)?.wait()?.f_transpose(0, 1)?;
        let part = |start: i64, width: i64| -> Result<Tensor> {
            Ok(sums.f_narrow(-1, start, width)?.f_to_kind(x.k.kind())?.f_contiguous()?)
        };
        let (dk, dv) = (x.k.size()[3], x.v.size()[3]);
        let dq = dq.wait()?.f_transpose(0, 1)?.f_contiguous()?;
        Ok(Grads { dq, dk: part(0, dk)?, dv: part(dk, dv)? })
    }

    fn traffic(&self, plan: &Plan, layer: &LayerSizes) -> Traffic {
        Traffic::exactly(
            traffic::gather(plan, layer.q() + layer.kv()) + traffic::scatter(plan, layer.o()),
            traffic::gather(plan, layer.o())
                + traffic::scatter(plan, layer.q())
                + traffic::scatter(plan, layer.kv_sums()),
        )
    }
}

fn share(shard: &Shard, heads: i64, kv_heads: i64) -> Heads {
    Heads::share(heads, shard.group.size(), shard.group.rank(), heads / kv_heads)
}

/// o `[B, L, heads of this rank, V]` and the log-sum-exp; of nothing where the rank has no head.
fn attend(shard: &Shard, x: &Inputs) -> Result<(Tensor, Tensor)> {
    let (b, l, heads, _) = x.q.size4()?;
    if heads == 0 {
        let lse = Tensor::f_zeros([b, 0, l], (sum_kind(&x.q), x.q.device()))?;
        return Ok((Tensor::f_zeros([b, l, 0, x.v.size()[3]], (x.q.kind(), x.q.device()))?, lse));
    }
    let _span = shard.group.recorder().span("softmax");
    Ok(softmax::forward(&x.q, &x.k, &x.v, &documents(&shard.plan, x.causal), x.scale)?)
}

/// dq `[B, L, heads, K]`, and dk beside dv `[B, L, entries, K + V]`. do: `[B, L, heads, V]`.
fn attend_grad(shard: &Shard, saved: &Saved, d_o: &Tensor) -> Result<(Tensor, Tensor)> {
    let x = &saved.inputs;
    let (b, l, heads, dk) = x.q.size4()?;
    if heads == 0 {
        let none = |width: i64, kind: Kind| Tensor::f_zeros([b, l, 0, width], (kind, x.q.device()));
        return Ok((none(dk, x.q.kind())?, none(dk + x.v.size()[3], sum_kind(&x.q))?));
    }
    let _span = shard.group.recorder().span("softmax_grad");
    let tiles = documents(&shard.plan, x.causal);
    let (dq, dk, dv) = softmax::backward(&x.q, &x.k, &x.v, &saved.o, &saved.lse, d_o, &tiles, x.scale)?;
    Ok((dq, Tensor::f_cat(&[dk, dv], -1)?))
}

/// `x` `[B, L, heads of this rank, X]` at its place among all heads, zeros elsewhere.
fn in_place(x: &Tensor, mine: &Heads, heads: i64) -> Result<Tensor> {
    whole::in_place(x, 2, mine.range.start, heads)
}
