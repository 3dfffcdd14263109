//! LASP-2H (arXiv 2502.07563, section 3.5; Llama-3's context parallelism, arXiv 2407.21783, section 3.3.2): AllGather the keys
//! and values, which GQA keeps small, and attend with the rank's own queries. Backward gathers them again instead of keeping
//! them, and a ReduceScatter in f32 adds up what all ranks found for each key.
//!
//! The KV heads go in groups, in a pipeline: group g + 1 is gathered while group g attends.

use collectives::Pending;
use kernels::softmax;
use tch::Tensor;

use super::{Attention, Forward, Grads, Inputs, Result, Saved, Shard, sum_kind, tiles};

#[derive(Clone, Copy, Debug)]
pub struct Lasp2h {
    /// Most stages of the pipeline; no more than there are KV heads.
    pub stages: i64,
}

impl Default for Lasp2h {
    fn default() -> Self {
        Self { stages: 4 }
    }
}

impl Lasp2h {
    /// `(first KV head, number)` of each stage.
    fn stages(&self, kv_heads: i64) -> Vec<(i64, i64)> {
        let stages = self.stages.clamp(1, kv_heads.max(1));
        let start = |stage: i64| stage * kv_heads / stages;
        (0..stages).map(|s| (start(s), start(s + 1) - start(s))).collect()
    }
}

/// Keys and values of some KV heads of the whole sequence: `[B, L, heads, K]` and `[B, L, heads, V]`.
type Gathered = Pending<Tensor>;

/// Starts gathering `[L, B, heads, K + V]`, rank after rank.
fn gather(shard: &Shard, x: &Inputs, (head, heads): (i64, i64)) -> Result<Gathered> {
    let of = |x: &Tensor| -> Result<Tensor> { Ok(x.f_narrow(2, head, heads)?.f_transpose(0, 1)?) };
    let mine = Tensor::f_cat(&[of(&x.k)?, of(&x.v)?], -1)?;
    if shard.group.size() == 1 {
        return Ok(Pending::ready(mine));
    }
    Ok(shard.group.all_gather_v(&mine, &shard.plan.layout.tokens_per_rank())?)
}

fn arrive(shard: &Shard, x: &Inputs, gathered: Gathered) -> Result<(Tensor, Tensor)> {
    let whole = shard.plan.layout.in_sequence_order(&gathered.wait()?, 0)?.f_transpose(0, 1)?;
    let (dk, dv) = (x.k.size()[3], x.v.size()[3]);
    Ok((whole.f_narrow(-1, 0, dk)?, whole.f_narrow(-1, dk, dv)?))
}

/// The query heads of some KV heads: dimension `dim` of `x`.
fn queries(x: &Tensor, dim: i64, per_kv: i64, (head, heads): (i64, i64)) -> Result<Tensor> {
    Ok(x.f_narrow(dim, head * per_kv, heads * per_kv)?)
}

impl Attention for Lasp2h {
    fn forward(&self, shard: &Shard, x: &Inputs) -> Result<Forward> {
        let _guard = tch::no_grad_guard();
        let tiles = tiles(&shard.plan, x.causal);
        let stages = self.stages(x.k.size()[2]);
        let per_kv = x.queries_per_kv();
        let (mut os, mut lses) = (Vec::new(), Vec::new());
        let mut next = Some(gather(shard, x, stages[0])?);
        for (i, &stage) in stages.iter().enumerate() {
            let Some(here) = next.take() else { break };
            let (k, v) = arrive(shard, x, here)?;
            next = stages.get(i + 1).map(|&stage| gather(shard, x, stage)).transpose()?;
            let _span = shard.group.recorder().span("softmax");
            let (o, lse) = softmax::forward(&queries(&x.q, 2, per_kv, stage)?, &k, &v, &tiles, x.scale)?;
            os.push(o);
            lses.push(lse);
        }
        let (o, lse) = (Tensor::f_cat(&os, 2)?, Tensor::f_cat(&lses, 1)?);
        let inputs = Inputs {
            q: x.q.shallow_clone(),
            k: x.k.shallow_clone(),
            v: x.v.shallow_clone(),
            scale: x.scale,
            causal: x.causal,
        };
        let saved = Saved { inputs, o: o.shallow_clone(), lse };
        Ok(Forward { o, saved })
    }

    fn backward(&self, shard: &Shard, saved: Saved, d_o: &Tensor) -> Result<Grads> {
        let _guard = tch::no_grad_guard();
        let x = &saved.inputs;
        let tiles = tiles(&shard.plan, x.causal);
        let stages = self.stages(x.k.size()[2]);
        let per_kv = x.queries_per_kv();
        let (mut dqs, mut sums) = (Vec::new(), Vec::new());
        let mut next = Some(gather(shard, x, stages[0])?);
        for (i, &stage) in stages.iter().enumerate() {
            let Some(here) = next.take() else { break };
            let (k, v) = arrive(shard, x, here)?;
            next = stages.get(i + 1).map(|&stage| gather(shard, x, stage)).transpose()?;
            let _span = shard.group.recorder().span("softmax_grad");
            let (dq, dk, dv) = softmax::backward(
                &queries(&x.q, 2, per_kv, stage)?,
                &k,
                &v,
                &queries(&saved.o, 2, per_kv, stage)?,
                &queries(&saved.lse, 1, per_kv, stage)?,
                &queries(d_o, 2, per_kv, stage)?,
                &tiles,
                x.scale,
            )?;
            dqs.push(dq);
            sums.push(scatter(shard, &dk, &dv)?);
        }
        let (mut dks, mut dvs) = (Vec::new(), Vec::new());
        for sum in sums {
            let sum = sum.wait()?.f_transpose(0, 1)?; // [B, T, heads, K + V]
            dks.push(sum.f_narrow(-1, 0, x.k.size()[3])?);
            dvs.push(sum.f_narrow(-1, x.k.size()[3], x.v.size()[3])?);
        }
        let joined = |parts: &[Tensor]| -> Result<Tensor> { Ok(Tensor::f_cat(parts, 2)?.f_to_kind(x.k.kind())?) };
        Ok(Grads { dq: Tensor::f_cat(&dqs, 2)?, dk: joined(&dks)?, dv: joined(&dvs)? })
    }
}

/// Starts adding up all ranks' shares of dk, dv `[B, L, heads, ..]` and handing each rank its tokens: `[T, B, heads, K + V]`.
fn scatter(shard: &Shard, dk: &Tensor, dv: &Tensor) -> Result<Pending<Tensor>> {
    let kind = sum_kind(dk);
    let whole = Tensor::f_cat(&[dk.f_to_kind(kind)?, dv.f_to_kind(kind)?], -1)?.f_transpose(0, 1)?;
    let whole = shard.plan.layout.in_rank_order(&whole, 0)?.f_contiguous()?;
    if shard.group.size() == 1 {
        return Ok(Pending::ready(whole));
    }
    Ok(shard.group.reduce_scatter_v(&whole, &shard.plan.layout.tokens_per_rank())?)
}
