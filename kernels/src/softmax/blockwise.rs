//! Attention by plain tensor operations, one block of queries at a time: for any device and kind.
//!
//! A block's scores against all keys that it sees are formed at once, so memory grows with the number of keys but never
//! with its square. It is what runs on CUDA where no fused kernel does, and a second opinion on the CPU.

use tch::{Kind, Tensor};

use super::{Engine, Grads, Inputs, Tile, backward_with, forward_with};
use crate::Result;

/// Rows of a block at most, and the scores of a block that it should not exceed: 256 MiB in f32.
const BLOCK: i64 = 512;
const SCORES: i64 = 1 << 26;

/// [`super::forward`], computed by this file whatever the device.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, tiles: &[Tile], scale: f64) -> Result<(Tensor, Tensor)> {
    let (o, lse) = forward_with(Engine::Blockwise, q, k, v, tiles, scale)?;
    Ok((o.f_to_kind(q.kind())?, lse))
}

/// [`super::backward`], computed by this file whatever the device.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    d_o: &Tensor,
    tiles: &[Tile],
    scale: f64,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (dq, dk, dv) = backward_with(Engine::Blockwise, q, k, v, o, lse, d_o, tiles, scale)?;
    Ok((dq.f_to_kind(q.kind())?, dk, dv))
}

/// `inputs` in f32 or f64, with at least one query and one key.
/// Returns `o` `[B*Hkv, group, Tq, V]` and `lse` `[B*Hkv, group, Tq]`.
pub(super) fn forward_tile(inputs: &Inputs) -> Result<(Tensor, Tensor)> {
    let (mut outputs, mut sums) = (Vec::new(), Vec::new());
    for block in inputs.blocks() {
        let mut scores = inputs.scores(block)?;
        let lse = scores.f_logsumexp([-1].as_slice(), true)?; // [B*Hkv, group, rows, 1]
        let weights = scores.f_sub_(&lse)?.f_exp_()?;
        outputs.push(inputs.unfold(&inputs.fold(&weights)?.f_bmm(&block.keys(&inputs.v)?)?)?);
        sums.push(lse.f_squeeze_dim(-1)?);
    }
    Ok((Tensor::f_cat(&outputs, 2)?, Tensor::f_cat(&sums, 2)?))
}

/// Adds the gradients to `grads`.
/// `o`, `d_o`: `[B*Hkv, group, Tq, V]`, `lse`: `[B*Hkv, group, Tq]`, in the kind of `inputs`.
pub(super) fn backward_tile(inputs: &Inputs, o: &Tensor, lse: &Tensor, d_o: &Tensor, grads: Grads) -> Result<()> {
    let delta = o.f_mul(d_o)?.f_sum_dim_intlist([-1].as_slice(), true, None)?; // [B*Hkv, group, Tq, 1]
    let lse = lse.f_unsqueeze(-1)?;
    for block in inputs.blocks() {
        let (k, v) = (block.keys(&inputs.k)?, block.keys(&inputs.v)?); // [B*Hkv, seen, K], [B*Hkv, seen, V]
        let (q, d_o) = (inputs.fold(&block.queries(&inputs.q)?)?, inputs.fold(&block.queries(d_o)?)?);
        let weights = inputs.scores(block)?.f_sub_(&block.queries(&lse)?)?.f_exp_()?; // [B*Hkv, group, rows, seen]
        let d_weights = inputs.unfold(&d_o.f_bmm(&v.f_transpose(1, 2)?)?)?;
        let d_scores = d_weights.f_sub(&block.queries(&delta)?)?.f_mul_(&weights)?.f_mul_scalar_(inputs.scale)?;
        let (weights, d_scores) = (inputs.fold(&weights)?, inputs.fold(&d_scores)?); // [B*Hkv, group*rows, seen]

        let dq = inputs.unfold(&d_scores.f_bmm(&k)?)?;
        let _ = block.queries(&grads.dq)?.f_add_(&dq)?;
        let _ = block.keys(&grads.dk)?.f_baddbmm_(&d_scores.f_transpose(1, 2)?, &q)?;
        let _ = block.keys(&grads.dv)?.f_baddbmm_(&weights.f_transpose(1, 2)?, &d_o)?;
    }
    Ok(())
}

/// Some queries of a tile, and how many of its keys the last of them sees.
#[derive(Clone, Copy)]
struct Block {
    start: i64,
    rows: i64,
    seen: i64,
}

impl Block {
    fn queries(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_narrow(2, self.start, self.rows)?)
    }

    fn keys(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_narrow(1, 0, self.seen)?)
    }
}

impl Inputs {
    fn blocks(&self) -> impl Iterator<Item = Block> {
        let (heads, queries, keys) = (self.q.size()[0] * self.q.size()[1], self.q.size()[2], self.k.size()[1]);
        let (causal, most) = (self.causal, (SCORES / (heads * keys)).clamp(16, BLOCK));
        (0..queries).step_by(most as usize).map(move |start| {
            let rows = most.min(queries - start);
            let seen = if causal { keys - queries + start + rows } else { keys };
            Block { start, rows, seen }
        })
    }

    /// Scaled and masked scores, `[B*Hkv, group, rows, seen]`.
    fn scores(&self, block: Block) -> Result<Tensor> {
        let q = self.fold(&block.queries(&self.q)?)?;
        let scores = self.unfold(&q.f_bmm(&block.keys(&self.k)?.f_transpose(1, 2)?)?.f_mul_scalar_(self.scale)?)?;
        if self.causal {
            let ahead = Tensor::f_ones([block.rows, block.rows], (Kind::Bool, self.q.device()))?.f_triu(1)?;
            let mut square = scores.f_narrow(3, block.seen - block.rows, block.rows)?;
            let _ = square.f_masked_fill_(&ahead, f64::NEG_INFINITY)?;
        }
        Ok(scores)
    }

    /// `[B*Hkv, group, rows, X]` to `[B*Hkv, group*rows, X]`: a KV head's group is one longer run of queries.
    fn fold(&self, x: &Tensor) -> Result<Tensor> {
        let size = x.size();
        Ok(x.f_reshape([size[0], size[1] * size[2], size[3]])?)
    }

    fn unfold(&self, x: &Tensor) -> Result<Tensor> {
        let (size, group) = (x.size(), self.q.size()[1]);
        Ok(x.f_view([size[0], group, size[1] / group, size[2]])?)
    }
}
