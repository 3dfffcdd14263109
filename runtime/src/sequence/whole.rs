//! The whole sequence on every rank: an AllGather of all ranks' tokens in sequence order, and the ReduceScatter that hands
//! their sums back.

use collectives::Pending;
use tch::Tensor;

use super::{Layout, Result, Shard};

/// A whole sequence on its way.
pub(super) struct Gathering {
    pending: Pending<Tensor>,
    layout: Layout,
}

impl Gathering {
    /// `[L, ..]`, in sequence order.
    pub fn wait(self) -> Result<Tensor> {
        self.layout.in_sequence_order(&self.pending.wait()?, 0)
    }
}

/// Starts gathering `mine` `[T, ..]`.
pub(super) fn gather(shard: &Shard, mine: &Tensor) -> Result<Gathering> {
    let layout = shard.plan.layout.clone();
    let pending = match shard.group.size() {
        1 => Pending::ready(mine.shallow_clone()),
        _ => shard.group.all_gather_v(mine, &layout.tokens_per_rank())?,
    };
    Ok(Gathering { pending, layout })
}

/// Starts adding up all ranks' `whole` `[L, ..]`, in sequence order, and handing each rank its tokens: `[T, ..]`.
pub(super) fn scatter(shard: &Shard, whole: &Tensor) -> Result<Pending<Tensor>> {
    let layout = &shard.plan.layout;
    let whole = layout.in_rank_order(whole, 0)?.f_contiguous()?;
    if shard.group.size() == 1 {
        return Ok(Pending::ready(whole));
    }
    Ok(shard.group.reduce_scatter_v(&whole, &layout.tokens_per_rank())?)
}

/// Gathers tensors of this rank's tokens, `[B, T, heads, X]` each, in one message: `[B, L, heads, X]` each.
pub(super) fn gather_heads<const N: usize>(shard: &Shard, tensors: [&Tensor; N]) -> Result<[Tensor; N]> {
    let flat = tensors.iter().map(|x| x.f_flatten(2, 3)).collect::<std::result::Result<Vec<_>, _>>()?;
    let whole = gather(shard, &Tensor::f_cat(&flat, 2)?.f_transpose(0, 1)?)?.wait()?.f_transpose(0, 1)?;
    let mut out = tensors.map(Tensor::shallow_clone);
    let mut start = 0;
    for x in &mut out {
        let (heads, width) = (x.size()[2], x.size()[3]);
        let part = whole.f_narrow(2, start, heads * width)?;
        *x = part.f_reshape([whole.size()[0], whole.size()[1], heads, width])?;
        start += heads * width;
    }
    Ok(out)
}

/// `x` at `start` of a dimension `dim` of length `length`, zeros elsewhere.
pub(super) fn in_place(x: &Tensor, dim: i64, start: i64, length: i64) -> Result<Tensor> {
    let mut size = x.size();
    let count = std::mem::replace(&mut size[dim as usize], length);
    let all = Tensor::f_zeros(size, (x.kind(), x.device()))?;
    all.f_narrow(dim, start, count)?.f_copy_(x)?;
    Ok(all)
}
