//! LASP-2H (arXiv 2502.07563, section 3.5; Llama-3's context parallelism, arXiv 2407.21783, section 3.3.2): AllGather the keys
//! and values, which GQA keeps small, and attend with the rank's own queries. Backward gathers them again instead of keeping
//! them, and a ReduceScatter in f32 adds up what all ranks found for each key.
//!
//! The KV heads go in groups, in a pipeline: group g + 1 is gathered while group g attends.
//!
//! Bytes of one rank, with e those of a number and s those of a sum (4; 8 for f64):
//!
//! | | sent | received |
//! |---|---|---|
//! | forward | T B Hkv (K + V) e | (L - T) B Hkv (K + V) e |
//! | backward, k, v | T B Hkv (K + V) e | (L - T) B Hkv (K + V) e |
//! | backward, dk, dv | (L - T) B Hkv (K + V) s | (W-1) T B Hkv (K + V) s |

use collectives::Pending;
use kernels::softmax;
use tch::Tensor;

use super::super::traffic;
use super::super::whole::{self, Gathering};
use super::{Attention, Forward, Grads, Inputs, LayerSizes, Plan, Result, Saved, Shard, Traffic, sum_kind, tiles};

#[derive(Clone, Copy, Debug)]
pub struct Lasp2h {
    /// Most stages of the pipeline; no more than there are KV heads.
    pub stages: usize,
}

impl Default for Lasp2h {
    fn default() -> Self {
        Self { stages: 4 }
    }
}

impl Lasp2h {
    /// `(first KV head, number)` of each stage.
    pub fn stages(&self, kv_heads: i64) -> Vec<(i64, i64)> {
        let stages = (self.stages as i64).clamp(1, kv_heads.max(1));
        let start = |stage: i64| stage * kv_heads / stages;
        (0..stages).map(|s| (start(s), start(s + 1) - start(s))).collect()
    }
}

/// Starts gathering the keys and values of some KV heads, `[L, B, heads, K + V]`.
fn gather(shard: &Shard, x: &Inputs, (head, heads): (i64, i64)) -> Result<Gathering> {
    let of = |x: &Tensor| -> Result<Tensor> { Ok(x.f_narrow(2, head, heads)?.f_transpose(0, 1)?) };
    whole::gather(shard, &Tensor::f_cat(&[of(&x.k)?, of(&x.v)?], -1)?)
}

/// `[B, L, heads, K]` and `[B, L, heads, V]`.
fn arrive(x: &Inputs, gathered: Gathering) -> Result<(Tensor, Tensor)> {
    let whole = gathered.wait()?.f_transpose(0, 1)?;
    let (dk, dv) = (x.k.size()[3], x.v.size()[3]);
    Ok((whole.f_narrow(-1, 0, dk)?, whole.f_narrow(-1, dk, dv)?))
}

/// The query heads of some KV heads: dimension `dim` of `x`.
fn queries(x: &Tensor, dim: i64, per_kv: i64, (head, heads): (i64, i64)) -> Result<Tensor> {
    Ok(x.f_narrow(dim, head * per_kv, heads * per_kv)?)
}

impl Attention for Lasp2h {
    fn attends_once(&self) -> bool {
        true
    }

    fn forward(&self, shard: &Shard, x: &Inputs) -> Result<Forward> {
        let _guard = tch::no_grad_guard();
        let tiles = tiles(&shard.plan, x.causal);
        let stages = self.stages(x.k.size()[2]);
        let per_kv = x.queries_per_kv();
        let (mut os, mut lses) = (Vec::new(), Vec::new());
        let mut next = Some(gather(shard, x, stages[0])?);
        for (i, &stage) in stages.iter().enumerate() {
            let Some(here) = next.take() else { break };
            let (k, v) = arrive(x, here)?;
            next = stages.get(i + 1).map(|&stage| gather(shard, x, stage)).transpose()?;
            let _span = shard.group.recorder().span("softmax");
            let (o, lse) = softmax::forward(&queries(&x.q, 2, per_kv, stage)?, &k, &v, &tiles, x.scale)?;
            os.push(o);
            lses.push(lse);
        }
        let (o, lse) = (Tensor::f_cat(&os, 2)?, Tensor::f_cat(&lses, 1)?);
        Ok(Forward { saved: Saved::of(x, &o, lse)?, o })
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
            let (k, v) = arrive(x, here)?;
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

    fn traffic(&self, plan: &Plan, layer: &LayerSizes) -> Traffic {
        let stages = self.stages(layer.kv_heads).len() as u64;
        let forward = traffic::gather(plan, layer.kv()).in_parts(stages);
        let sums = traffic::scatter(plan, layer.kv_sums()).in_parts(stages);
        Traffic::exactly(forward.clone(), forward + sums)
    }
}

/// Starts adding up all ranks' shares of dk, dv `[B, L, heads, ..]` and handing each rank its tokens: `[T, B, heads, K + V]`.
fn scatter(shard: &Shard, dk: &Tensor, dv: &Tensor) -> Result<Pending<Tensor>> {
    let kind = sum_kind(dk);
    let sums = Tensor::f_cat(&[dk.f_to_kind(kind)?, dv.f_to_kind(kind)?], -1)?;
    whole::scatter(shard, &sums.f_transpose(0, 1)?)
}
