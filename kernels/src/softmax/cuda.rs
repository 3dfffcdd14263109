//! Tiles on CUDA through libtorch's fused attentions: cuDNN's, and flash attention where cuDNN declines or a tile is small.
//!
//! As on the CPU (`cpu`), the causal mask is aligned at the top left, so a causal tile with more keys than queries is two
//! parts, merged by log-sum-exp, and backward hands both the merged `o` and `lse`. Heads of one KV group get copies of their
//! keys; their gradients are summed in f32. Parts are computed in bf16 (f16), sums over them in f32.

use tch::{Kind, Tensor};

use super::layout::Dims;
use super::{Tile, expect, merge_rows};
use crate::Result;
use crate::bridge::{self, Fused};

/// Queries and keys from which on a tile is cuDNN's.
const CUDNN: i64 = 64;

/// Whether this file computes a call: bf16 or f16 on CUDA, heads of one width in 16-byte pieces.
pub(super) fn takes(q: &Tensor, v: &Tensor) -> bool {
    let (width, value) = (q.size().last().copied().unwrap_or(0), v.size().last().copied().unwrap_or(0));
    q.device().is_cuda()
        && matches!(q.kind(), Kind::BFloat16 | Kind::Half)
        && width == value
        && width % 8 == 0
        && (8..=256).contains(&width)
}

/// One part of a tile: a range of keys under a mask that libtorch knows.
#[derive(Clone, Copy)]
struct Part {
    start: i64,
    keys: i64,
    causal: bool,
}

/// The parts of a tile, the causal square first.
fn parts(tile: &Tile) -> Vec<Part> {
    let (queries, keys) = (tile.queries(), tile.keys());
    if !tile.causal {
        return vec![Part { start: tile.k.start, keys, causal: false }];
    }
    let before = keys - queries;
    let mut all = vec![Part { start: tile.k.start + before, keys: queries, causal: true }];
    if before > 0 {
        all.push(Part { start: tile.k.start, keys: before, causal: false });
    }
    all
}

fn engines(queries: i64, keys: i64, width: i64) -> &'static [Fused] {
    if queries >= CUDNN && keys >= CUDNN && width <= 128 { &[Fused::Cudnn, Fused::Flash] } else { &[Fused::Flash] }
}

/// `[B, T, heads, X]` as `[B, H, T, X]`, each KV head once for every query head that uses it; a view where it can be.
fn heads(x: &Tensor, h: i64) -> Result<Tensor> {
    let size = x.size();
    let (b, t, hkv, width) = (size[0], size[1], size[2], size[3]);
    let x = if h == hkv {
        x.shallow_clone()
    } else {
        x.f_unsqueeze(3)?.f_expand([b, t, hkv, h / hkv, width], false)?.f_reshape([b, t, h, width])?
    };
    Ok(x.f_transpose(1, 2)?)
}

/// The first of the engines that takes it.
fn try_each<T>(engines: &[Fused], f: impl Fn(Fused) -> Result<T>) -> Result<T> {
    let (last, before) = engines.split_last().unwrap_or((&Fused::Flash, &[]));
    for engine in before {
        if let Ok(result) = f(*engine) {
            return Ok(result);
        }
    }
    f(*last)
}

/// o `[B, Tq, H, V]`, in the kind of q where one part covers everything and else in f32; lse `[B, H, Tq]` f32.
pub(super) fn forward(q: &Tensor, k: &Tensor, v: &Tensor, tiles: &[Tile], scale: f64) -> Result<(Tensor, Tensor)> {
    let _no_grad = tch::no_grad_guard();
    let dims = Dims::check(q, k, v, tiles)?;
    let (queries, keys, values) = (heads(q, dims.h)?, heads(k, dims.h)?, heads(v, dims.h)?);
    let attend = |tile: &Tile, part: Part| -> Result<(Tensor, Tensor)> {
        let q = queries.f_narrow(2, tile.q.start, tile.queries())?;
        let (k, v) = (keys.f_narrow(2, part.start, part.keys)?, values.f_narrow(2, part.start, part.keys)?);
        let (o, lse) = try_each(engines(tile.queries(), part.keys, dims.k), |by| {
            bridge::attention(by, &q, &k, &v, part.causal, scale)
        })?;
        Ok((o, lse.f_view([dims.b, dims.h, tile.queries()])?))
    };
    if let [tile] = tiles
        && let [part] = parts(tile)[..]
        && (tile.q.start, tile.queries()) == (0, dims.tq)
        && dims.b * dims.tq * part.keys > 0
    {
        let (o, lse) = attend(tile, part)?;
        return Ok((o.f_transpose(1, 2)?.f_contiguous()?, lse));
    }
    let options = (Kind::Float, q.device());
    let o = Tensor::f_zeros([dims.b, dims.h, dims.tq, dims.v], options)?;
    let lse = Tensor::f_full([dims.b, dims.h, dims.tq], f64::NEG_INFINITY, options)?;
    for tile in tiles.iter().filter(|tile| dims.b > 0 && tile.queries() > 0 && tile.keys() > 0) {
        let mut merged: Option<(Tensor, Tensor)> = None;
        for part in parts(tile) {
            let (o, lse) = attend(tile, part)?;
            let o = o.f_to_kind(Kind::Float)?;
            merged = Some(match merged {
                None => (o, lse),
                Some((o_before, lse_before)) => merge_rows(&o_before, &lse_before, &o, &lse)?,
            });
        }
        if let Some((tile_o, tile_lse)) = merged {
            o.f_narrow(2, tile.q.start, tile.queries())?.f_copy_(&tile_o)?;
            lse.f_narrow(2, tile.q.start, tile.queries())?.f_copy_(&tile_lse)?;
        }
    }
    Ok((o.f_transpose(1, 2)?.f_contiguous()?, lse))
}

/// dq `[B, Tq, H, K]`, dk `[B, Tk, Hkv, K]`, dv `[B, Tk, Hkv, V]`, in f32.
#[allow(clippy::too_many_arguments)]
pub(super) fn backward(
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
    expect("o", o, &[dims.b, dims.tq, dims.h, dims.v])?;
    expect("d_o", d_o, &[dims.b, dims.tq, dims.h, dims.v])?;
    expect("lse", lse, &[dims.b, dims.h, dims.tq])?;
    let (queries, keys, values) = (heads(q, dims.h)?, heads(k, dims.h)?, heads(v, dims.h)?);
    let in_kind = |x: &Tensor| -> Result<Tensor> { Ok(x.f_to_kind(q.kind())?.f_transpose(1, 2)?) };
    let (outputs, d_outputs, sums) = (in_kind(o)?, in_kind(d_o)?, lse.f_to_kind(Kind::Float)?);

    let options = (Kind::Float, q.device());
    let dq = Tensor::f_zeros([dims.b, dims.tq, dims.h, dims.k], options)?;
    let dk = Tensor::f_zeros([dims.b, dims.tk, dims.hkv, dims.k], options)?;
    let dv = Tensor::f_zeros([dims.b, dims.tk, dims.hkv, dims.v], options)?;
    for tile in tiles.iter().filter(|tile| dims.b > 0 && tile.queries() > 0 && tile.keys() > 0) {
        let on_q = |x: &Tensor| x.f_narrow(2, tile.q.start, tile.queries());
        let (q, o, d_o) = (on_q(&queries)?, on_q(&outputs)?, on_q(&d_outputs)?);
        let lse = on_q(&sums)?.f_contiguous()?;
        for part in parts(tile) {
            let (k, v) = (keys.f_narrow(2, part.start, part.keys)?, values.f_narrow(2, part.start, part.keys)?);
            let [here_q, here_k, here_v] = try_each(engines(tile.queries(), part.keys, dims.k), |by| {
                // cuDNN has its log-sum-exp as a column.
                let lse = if by == Fused::Cudnn { lse.f_unsqueeze(-1)? } else { lse.shallow_clone() };
                bridge::attention_backward(by, &d_o, &q, &k, &v, &o, &lse, part.causal, scale)
            })?;
            let _ = dq.f_narrow(1, tile.q.start, tile.queries())?.f_add_(&here_q.f_transpose(1, 2)?)?;
            for (sum, share) in [(&dk, here_k), (&dv, here_v)] {
                let share = share.f_transpose(1, 2)?; // [B, keys, H, X]
                let width = share.size()[3];
                let groups = share.f_reshape([dims.b, part.keys, dims.hkv, dims.h / dims.hkv, width])?;
                let share = groups.f_sum_dim_intlist([3].as_slice(), false, Kind::Float)?;
                let _ = sum.f_narrow(1, part.start, part.keys)?.f_add_(&share)?;
            }
        }
    }
    Ok((dq, dk, dv))
}
