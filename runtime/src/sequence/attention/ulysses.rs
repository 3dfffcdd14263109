//! DeepSpeed-Ulysses (arXiv 2309.14509): an all-to-all turns shards of the sequence with all heads into shards of the heads
//! with the whole sequence, attention is local to a head, and an all-to-all turns its output back. Backward does the same
//! with do, and with dq, dk and dv. W must divide the query heads.
//!
//! Of KV heads each rank gets those that its query heads use. With fewer KV heads than ranks, or groups of GQA that ranks
//! cut, some are sent to several ranks; their gradients are summed, in f32, when they are back. What is kept for backward
//! is sharded by heads, so K and V do not travel again.
//!
//! Bytes of one rank, with e those of a number and n the KV heads that a rank gets (Hkv / W where W divides it); in backward
//! dk and dv travel in f32 where KV heads were repeated:
//!
//! | | sent | received |
//! |---|---|---|
//! | forward, q, k, v | (W-1) T B (H/W K + n (K + V)) e | (L - T) B (H/W K + n (K + V)) e |
//! | forward, o | (L - T) B H/W V e | (W-1) T B H/W V e |
//! | backward, do | (W-1) T B H/W V e | (L - T) B H/W V e |
//! | backward, dq, dk, dv | (L - T) B (H/W K + n (K + V)) e | (W-1) T B (H/W K + n (K + V)) e |

use kernels::linear::accumulation_kind;
use kernels::softmax;
use tch::{Kind, Tensor};

use super::super::traffic::{self, width};
use super::heads::Heads;
use super::{Attention, Error, Forward, Grads, Inputs, LayerSizes, Plan, Result, Saved, Shard, Traffic, documents};

#[derive(Clone, Copy, Debug, Default)]
pub struct Ulysses;

impl Attention for Ulysses {
    fn check(&self, heads: i64, sp: usize) -> Result<()> {
        if heads % sp as i64 == 0 {
            return Ok(());
        }
        let divisors: Vec<String> = (1..=heads).filter(|d| heads % d == 0).map(|d| d.to_string()).collect();
        Err(Error::Unsupported(format!(
            "ulysses needs the sp degree to divide the heads: {heads} heads, sp = {sp} (parallel.sp); use lasp2h, or one \
             of {}",
            divisors.join(", ")
        )))
    }

    fn forward(&self, shard: &Shard, x: &Inputs) -> Result<Forward> {
        let _guard = tch::no_grad_guard();
        let (all, kv_heads) = (x.q.size()[2], x.k.size()[2]);
        self.check(all, shard.group.size())?;
        let heads = cut(all, kv_heads, shard.group.size());
        let whole = to_heads(shard, &[&x.q, &heads.keys(&x.k)?, &heads.keys(&x.v)?])?;
        let [q, k, v] = [0, 1, 2].map(|i: usize| whole[i].shallow_clone());
        let (o, lse) = {
            let _span = shard.group.recorder().span("softmax");
            softmax::forward(&q, &k, &v, &documents(&shard.plan, x.causal), x.scale)?
        };
        let mine = to_tokens(shard, &[&o])?.swap_remove(0);
        let inputs = Inputs { q, k, v, scale: x.scale, causal: x.causal };
        Ok(Forward { o: mine, saved: Saved { inputs, o, lse, heads: all, kv_heads } })
    }

    fn backward(&self, shard: &Shard, saved: Saved, d_o: &Tensor) -> Result<Grads> {
        let _guard = tch::no_grad_guard();
        let (x, heads) = (&saved.inputs, cut(saved.heads, saved.kv_heads, shard.group.size()));
        let d_o = to_heads(shard, &[d_o])?.swap_remove(0);
        let (dq, dk, dv) = {
            let _span = shard.group.recorder().span("softmax_grad");
            let tiles = documents(&shard.plan, x.causal);
            softmax::backward(&x.q, &x.k, &x.v, &saved.o, &saved.lse, &d_o, &tiles, x.scale)?
        };
        let kind = kv_kind(&heads, x.k.kind());
        let dq = to_tokens(shard, &[&dq])?.swap_remove(0);
        let entries = to_tokens(shard, &[&dk.f_to_kind(kind)?, &dv.f_to_kind(kind)?])?;
        let own = |entries: &Tensor| -> Result<Tensor> {
            let mut size = entries.size();
            size[2] = saved.kv_heads;
            let sums = Tensor::f_zeros(size, (kind, entries.device()))?;
            heads.add_keys(&sums, entries)?;
            Ok(sums.f_to_kind(x.k.kind())?)
        };
        Ok(Grads { dq, dk: own(&entries[0])?, dv: own(&entries[1])? })
    }

    fn traffic(&self, plan: &Plan, layer: &LayerSizes) -> Traffic {
        let ranks = plan.layout.ranks();
        let heads = cut(layer.heads, layer.kv_heads, ranks);
        let kv = layer.b * heads.entries() * (layer.dk + layer.dv);
        let (q, o, w) = (layer.q() / ranks as i64, layer.o() / ranks as i64, ranks as i64);
        let sums = kv * width(kv_kind(&heads, layer.kind));
        Traffic::exactly(
            traffic::to_heads(plan, q + kv * width(layer.kind) / w) + traffic::to_tokens(plan, o),
            traffic::to_heads(plan, o) + traffic::to_tokens(plan, q) + traffic::to_tokens(plan, sums / w),
        )
    }
}

/// All query heads, with as many copies of KV heads as let W ranks have the same number.
fn cut(heads: i64, kv_heads: i64, ranks: usize) -> Heads {
    Heads::in_runs(heads, heads / ranks as i64, heads / kv_heads)
}

/// The kind in which dk and dv travel: f32 (f64) where some are still to be summed.
fn kv_kind(heads: &Heads, kind: Kind) -> Kind {
    if heads.repeats() { accumulation_kind(kind) } else { kind }
}

/// Tensors of this rank's tokens with all heads, `[B, T, W n, X]` each, to the whole sequence with this rank's heads,
/// `[B, L, n, X]` each; one all-to-all.
fn to_heads(shard: &Shard, tensors: &[&Tensor]) -> Result<Vec<Tensor>> {
    let w = shard.group.size() as i64;
    let (b, t) = (tensors[0].size()[0], shard.plan.tokens());
    let mut parts = Vec::with_capacity(tensors.len());
    for x in tensors {
        let (_, _, heads, width) = x.size4()?;
        let by_rank = x.f_reshape([b, t, w, heads / w * width])?.f_permute([2, 1, 0, 3])?;
        parts.push(by_rank.f_reshape([w * t, b, heads / w * width])?);
    }
    let mine = Tensor::f_cat(&parts, 2)?; // [W T, B, sum of n X]
    let rows = shard.plan.layout.tokens_per_rank();
    let gathered = match w {
        1 => mine,
        _ => shard.group.all_to_all_v(&mine, &vec![t; rows.len()], &rows)?.wait()?,
    };
    let whole = shard.plan.layout.in_sequence_order(&gathered, 0)?.f_transpose(0, 1)?;
    let (mut start, mut out) = (0, Vec::with_capacity(tensors.len()));
    for x in tensors {
        let (heads, width) = (x.size()[2] / w, x.size()[3]);
        let part = whole.f_narrow(2, start, heads * width)?;
        out.push(part.f_reshape([b, whole.size()[1], heads, width])?);
        start += heads * width;
    }
    Ok(out)
}

/// The inverse of [`to_heads`].
fn to_tokens(shard: &Shard, tensors: &[&Tensor]) -> Result<Vec<Tensor>> {
    let w = shard.group.size() as i64;
    let (b, t) = (tensors[0].size()[0], shard.plan.tokens());
    let flat = tensors.iter().map(|x| x.f_flatten(2, 3)).collect::<std::result::Result<Vec<_>, _>>()?;
    let whole = Tensor::f_cat(&flat, 2)?.f_transpose(0, 1)?; // [L, B, sum of n X]
    let whole = shard.plan.layout.in_rank_order(&whole, 0)?;
    let rows = shard.plan.layout.tokens_per_rank();
    let mine = match w {
        1 => whole,
        _ => shard.group.all_to_all_v(&whole, &rows, &vec![t; rows.len()])?.wait()?,
    };
    let mine = mine.f_reshape([w, t, b, mine.size()[2]])?;
    let (mut start, mut out) = (0, Vec::with_capacity(tensors.len()));
    for x in tensors {
        let (heads, width) = (x.size()[2], x.size()[3]);
        let part = mine.f_narrow(3, start, heads * width)?.f_reshape([w, t, b, heads, width])?;
        out.push(part.f_permute([2, 1, 0, 3, 4])?.f_reshape([b, t, w * heads, width])?);
        start += heads * width;
    }
    Ok(out)
}
