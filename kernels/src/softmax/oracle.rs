//! The slow truth: one `Tq` by `Tk` matrix of scores in f64, masked by the tiles, and the gradients by their formulas.
//!
//! Shares nothing with the fast versions but the arguments and their checks. Everything is returned in f64.

use tch::{Kind, Tensor};

use super::Tile;
use super::layout::Dims;
use crate::Result;

/// [`super::forward`] in f64: `P = softmax(scale * q k^T)` row by row over the keys seen, `o = P v`.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, tiles: &[Tile], scale: f64) -> Result<(Tensor, Tensor)> {
    let _no_grad = tch::no_grad_guard();
    let dims = Dims::check(q, k, v, tiles)?;
    let scores = scores(dims, q, k, tiles, scale)?;
    let lse = scores.f_logsumexp([-1].as_slice(), false)?; // [B, H, Tq]
    let o = weights(&scores, &lse)?.f_matmul(&per_query_head(dims, v)?)?; // [B, H, Tq, V]
    Ok((o.f_transpose(1, 2)?.f_contiguous()?, lse))
}

/// [`super::backward`] in f64: with `P = exp(scale * q k^T - lse)` and `D_i = <o_i, do_i>`,
/// `dS = P * (do v^T - D)`, `dq = scale * dS k`, `dk = scale * dS^T q`, `dv = P^T do`.
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
    let _no_grad = tch::no_grad_guard();
    let dims = Dims::check(q, k, v, tiles)?;
    let (o, d_o) = (heads_first(o)?, heads_first(d_o)?);
    let weights = weights(&scores(dims, q, k, tiles, scale)?, &lse.f_to_kind(Kind::Double)?)?;
    let delta = o.f_mul(&d_o)?.f_sum_dim_intlist([-1].as_slice(), true, None)?; // [B, H, Tq, 1]
    let d_weights = d_o.f_matmul(&per_query_head(dims, v)?.f_transpose(2, 3)?)?; // [B, H, Tq, Tk]
    let d_scores = d_weights.f_sub(&delta)?.f_mul(&weights)?.f_mul_scalar(scale)?;

    let dq = d_scores.f_matmul(&per_query_head(dims, k)?)?.f_transpose(1, 2)?.f_contiguous()?;
    let dk = d_scores.f_transpose(2, 3)?.f_matmul(&heads_first(q)?)?;
    let dv = weights.f_transpose(2, 3)?.f_matmul(&d_o)?;
    Ok((dq, per_kv_head(dims, &dk)?, per_kv_head(dims, &dv)?))
}

/// `[B, H, Tq, Tk]`, minus infinity where a query does not see a key.
fn scores(dims: Dims, q: &Tensor, k: &Tensor, tiles: &[Tile], scale: f64) -> Result<Tensor> {
    let hidden = Tensor::f_ones([dims.tq, dims.tk], (Kind::Bool, q.device()))?;
    for tile in tiles {
        for (i, query) in tile.q.clone().enumerate() {
            let seen = if tile.causal { tile.keys() - tile.queries() + i as i64 + 1 } else { tile.keys() };
            let _ = hidden.f_narrow(0, query, 1)?.f_narrow(1, tile.k.start, seen)?.f_fill_(0)?;
        }
    }
    let scores = heads_first(q)?.f_matmul(&per_query_head(dims, k)?.f_transpose(2, 3)?)?.f_mul_scalar(scale)?;
    Ok(scores.f_masked_fill(&hidden, f64::NEG_INFINITY)?)
}

/// `exp(scores - lse)`, and 0 in rows without keys, whose `lse` is minus infinity.
fn weights(scores: &Tensor, lse: &Tensor) -> Result<Tensor> {
    let empty = lse.f_eq(f64::NEG_INFINITY)?.f_unsqueeze(-1)?;
    Ok(scores.f_sub(&lse.f_unsqueeze(-1)?)?.f_exp()?.f_masked_fill(&empty, 0.0)?)
}

/// `[B, T, heads, X]` to `[B, heads, T, X]` in f64.
fn heads_first(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_to_kind(Kind::Double)?.f_transpose(1, 2)?)
}

/// `[B, Tk, Hkv, X]` to `[B, H, Tk, X]`, each KV head repeated for the query heads that use it.
fn per_query_head(dims: Dims, x: &Tensor) -> Result<Tensor> {
    Ok(heads_first(x)?.f_repeat_interleave_self_int(dims.h / dims.hkv, 1, None)?)
}

/// `[B, H, Tk, X]` to `[B, Tk, Hkv, X]`, the sum over the query heads that use a KV head.
fn per_kv_head(dims: Dims, x: &Tensor) -> Result<Tensor> {
    let size = x.size();
    let grouped = x.f_reshape([size[0], dims.hkv, dims.h / dims.hkv, size[2], size[3]])?;
    Ok(grouped.f_sum_dim_intlist([2].as_slice(), false, None)?.f_transpose(1, 2)?.f_contiguous()?)
}
