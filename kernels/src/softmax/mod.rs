//! Softmax attention of one rank over tiles: what LASP-2H, Ring Attention and Ulysses compute between their
//! collectives.
//!
//! A tile is a run of queries that sees a run of keys, so packed documents, the visible prefix of a gathered sequence
//! and one step of a ring are all lists of tiles. This file checks the arguments, brings the heads of one KV head
//! together, walks over the tiles and merges partial results; `cpu` (libtorch's flash attention), `cuda` (cuDNN's, bf16) and
//! `blockwise` (plain tensor operations, any device) attend within one tile. `oracle` is the slow truth. Communication is left to the
//! callers, and so is autograd: nothing here is recorded, gradients come from `backward`.
//!
//! Letters beside those of algorithms.md: Tq and Tk are the numbers of queries and keys, Hkv that of KV heads.

pub mod blockwise;
mod cpu;
mod cuda;
mod layout;
pub mod oracle;

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use self::layout::{Dims, Layout};
use crate::{Error, Result};

/// A run of queries that attends to a run of keys: one document's part, or the whole sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tile {
    pub q: Range<i64>,
    pub k: Range<i64>,
    /// Aligned at the bottom right: the last query of the tile sees its last key, and query i of n sees the keys
    /// `..= len_k - n + i`. So a causal tile has at least as many keys as queries.
    pub causal: bool,
}

impl Tile {
    fn queries(&self) -> i64 {
        self.q.end - self.q.start
    }

    fn keys(&self) -> i64 {
        self.k.end - self.k.start
    }
}

/// What attends within one tile.
#[derive(Clone, Copy)]
enum Engine {
    Cpu,
    Blockwise,
}

impl Engine {
    fn of(device: Device) -> Engine {
        if device == Device::Cpu { Engine::Cpu } else { Engine::Blockwise }
    }
}

/// Softmax attention, forward: `o_i = sum_j softmax_j(scale * <q_i, k_j>) v_j` over the keys that the tile of query i
/// shows it.
///
/// `q`: `[B, Tq, H, K]`, `k`: `[B, Tk, Hkv, K]`, `v`: `[B, Tk, Hkv, V]`, of one kind (f32, bf16, f16 or f64) and one
/// device. Hkv divides H, and query head h uses KV head `h / (H / Hkv)`. `tiles` have disjoint query ranges; their key
/// ranges may overlap.
///
/// Returns `o` `[B, Tq, H, V]` in the kind of `q`, and the log-sum-exp of the scaled scores, `[B, H, Tq]`, in the
/// accumulation kind: f32, or f64 for f64 inputs, in which everything in between is computed too; on CUDA bf16 and f16
/// inputs go through fused kernels, whose results for each tile are of their kind. Rows in no tile, or
/// in a tile without keys, have `o = 0` and `lse = -inf`.
///
/// Errors: shapes or kinds that disagree, tiles that overlap or leave the tensors, a causal tile with more queries than
/// keys.
///
/// Source: FlashAttention-2 (arXiv 2307.08691), Algorithm 1.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, tiles: &[Tile], scale: f64) -> Result<(Tensor, Tensor)> {
    let (o, lse) = forward_any(q, k, v, tiles, scale)?;
    Ok((o.f_to_kind(q.kind())?, lse))
}

/// [`forward`] over some of the keys: `o` stays in the accumulation kind, so that [`merge`] rounds nothing.
pub fn forward_partial(q: &Tensor, k: &Tensor, v: &Tensor, tiles: &[Tile], scale: f64) -> Result<(Tensor, Tensor)> {
    let (o, lse) = forward_any(q, k, v, tiles, scale)?;
    Ok((o.f_to_kind(lse.kind())?, lse))
}

/// `o` in the accumulation kind, or already in that of `q` where that loses nothing.
fn forward_any(q: &Tensor, k: &Tensor, v: &Tensor, tiles: &[Tile], scale: f64) -> Result<(Tensor, Tensor)> {
    if cuda::takes(q, v) {
        return cuda::forward(q, k, v, tiles, scale);
    }
    forward_with(Engine::of(q.device()), q, k, v, tiles, scale)
}

/// Softmax attention, backward: the gradients that the keys of `tiles` contribute.
///
/// `q`, `k`, `v`, `tiles`, `scale` as in [`forward`]; `o`, `d_o`: `[B, Tq, H, V]`, `lse`: `[B, H, Tq]`, in any
/// floating-point kind. `o` and `lse` may be those of more keys than `tiles` covers, as in a ring after merging: the
/// gradients then are the exact partial sums, and those of disjoint key ranges add up to the whole. `dq` and `dk` are
/// as accurate as `o`: one rounded to bf16 costs them about 1e-3.
///
/// Returns `dq` `[B, Tq, H, K]` in the kind of `q`, and `dk` `[B, Tk, Hkv, K]`, `dv` `[B, Tk, Hkv, V]` in the
/// accumulation kind, since a reduce_scatter still has to add them up across ranks.
///
/// Errors: as [`forward`].
///
/// Source: FlashAttention-2 (arXiv 2307.08691), Algorithm 2.
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
    let (dq, dk, dv) = backward_partial(q, k, v, o, lse, d_o, tiles, scale)?;
    Ok((dq.f_to_kind(q.kind())?, dk, dv))
}

/// [`backward`] over some of the keys: `dq` too stays in the accumulation kind, since those of other keys are still to
/// be added.
#[allow(clippy::too_many_arguments)]
pub fn backward_partial(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    d_o: &Tensor,
    tiles: &[Tile],
    scale: f64,
) -> Result<(Tensor, Tensor, Tensor)> {
    if cuda::takes(q, v) {
        return cuda::backward(q, k, v, o, lse, d_o, tiles, scale);
    }
    backward_with(Engine::of(q.device()), q, k, v, o, lse, d_o, tiles, scale)
}

/// Merges two partial results of the same queries over disjoint key ranges by their log-sum-exps.
///
/// `o1`, `o2`: `[B, T, H, V]`, `lse1`, `lse2`: `[B, H, T]`, in any floating-point kinds. Returns `o` and `lse` of the
/// same shapes in the accumulation kind: f64 if any of the four is, else f32. A side with `lse = -inf` counts for
/// nothing, whatever finite numbers its `o` has; both so give `o = 0` and `lse = -inf`.
///
/// Source: the rescaling of FlashAttention-2 (arXiv 2307.08691), section 3.1, between ranks instead of blocks.
pub fn merge(o1: &Tensor, lse1: &Tensor, o2: &Tensor, lse2: &Tensor) -> Result<(Tensor, Tensor)> {
    let _no_grad = tch::no_grad_guard();
    let &[b, t, h, _] = o1.size().as_slice() else {
        return Err(shape("o1", o1, "[B, T, H, V]"));
    };
    expect("o2", o2, &o1.size())?;
    expect("lse1", lse1, &[b, h, t])?;
    expect("lse2", lse2, &[b, h, t])?;
    let kind = if [o1, lse1, o2, lse2].iter().any(|x| x.kind() == Kind::Double) { Kind::Double } else { Kind::Float };
    let rows = |x: &Tensor| x.f_to_kind(kind)?.f_transpose(1, 2); // [B, H, T, V]
    let (o, lse) = merge_rows(&rows(o1)?, &lse1.f_to_kind(kind)?, &rows(o2)?, &lse2.f_to_kind(kind)?)?;
    Ok((o.f_transpose(1, 2)?.f_contiguous()?, lse))
}

/// [`merge`] with the rows' dimensions in one order: `o1`, `o2` `[.., T, V]`, `lse1`, `lse2` `[.., T]`.
fn merge_rows(o1: &Tensor, lse1: &Tensor, o2: &Tensor, lse2: &Tensor) -> Result<(Tensor, Tensor)> {
    let lse = lse1.f_logaddexp(lse2)?;
    // Where neither side saw a key, any finite number in place of -inf keeps the weights at e^-inf = 0 instead of NaN.
    let finite = lse.f_masked_fill(&lse.f_eq(f64::NEG_INFINITY)?, 0.0)?;
    let weighted = |o: &Tensor, lse: &Tensor| o.f_mul(&lse.f_sub(&finite)?.f_exp_()?.f_unsqueeze(-1)?);
    let o = weighted(o1, lse1)?.f_add_(&weighted(o2, lse2)?)?;
    Ok((o, lse))
}

/// `o` and `lse` in the accumulation kind.
fn forward_with(
    engine: Engine,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    tiles: &[Tile],
    scale: f64,
) -> Result<(Tensor, Tensor)> {
    let _no_grad = tch::no_grad_guard();
    let dims = Dims::check(q, k, v, tiles)?;
    let layout = Layout::new(dims, q);
    let (queries, keys, values) = (layout.queries(q)?, layout.keys(k)?, layout.keys(v)?);

    let o = layout.zeros_queries(dims.v)?;
    let lse = layout.full_rows(f64::NEG_INFINITY)?;
    for tile in layout.with_work(tiles) {
        let on_q = |x: &Tensor| x.f_narrow(2, tile.q.start, tile.queries());
        let on_k = |x: &Tensor| x.f_narrow(1, tile.k.start, tile.keys());
        let (q, k, v) = (on_q(&queries)?, on_k(&keys)?, on_k(&values)?);
        let inputs = Inputs { q, k, v, causal: tile.causal, scale };
        let (tile_o, tile_lse) = match engine {
            Engine::Cpu => cpu::forward(&inputs)?,
            Engine::Blockwise => blockwise::forward_tile(&inputs)?,
        };
        on_q(&o)?.f_copy_(&tile_o)?;
        on_q(&lse)?.f_copy_(&tile_lse)?;
    }
    Ok((layout.restore_queries(&o)?, layout.restore_rows(&lse)?))
}

/// All gradients in the accumulation kind.
#[allow(clippy::too_many_arguments)]
fn backward_with(
    engine: Engine,
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
    let layout = Layout::new(dims, q);
    let (queries, keys, values) = (layout.queries(q)?, layout.keys(k)?, layout.keys(v)?);
    let (outputs, sums, d_outputs) = (layout.queries(o)?, layout.rows(lse)?, layout.queries(d_o)?);

    let dq = layout.zeros_queries(dims.k)?;
    let dk = layout.zeros_keys(dims.k)?;
    let dv = layout.zeros_keys(dims.v)?;
    for tile in layout.with_work(tiles) {
        let on_q = |x: &Tensor| x.f_narrow(2, tile.q.start, tile.queries());
        let on_k = |x: &Tensor| x.f_narrow(1, tile.k.start, tile.keys());
        let (q, k, v) = (on_q(&queries)?, on_k(&keys)?, on_k(&values)?);
        let inputs = Inputs { q, k, v, causal: tile.causal, scale };
        let (o, lse, d_o) = (on_q(&outputs)?, on_q(&sums)?, on_q(&d_outputs)?);
        let grads = Grads { dq: on_q(&dq)?, dk: on_k(&dk)?, dv: on_k(&dv)? };
        match engine {
            Engine::Cpu => cpu::backward(&inputs, &o, &lse, &d_o, grads)?,
            Engine::Blockwise => blockwise::backward_tile(&inputs, &o, &lse, &d_o, grads)?,
        }
    }
    Ok((layout.restore_queries(&dq)?, layout.restore_keys(&dk)?, layout.restore_keys(&dv)?))
}

/// What a tile attends with: views into the call's tensors in the accumulation kind.
struct Inputs {
    q: Tensor, // [B*Hkv, H/Hkv, Tq of the tile, K]
    k: Tensor, // [B*Hkv, Tk of the tile, K]
    v: Tensor, // [B*Hkv, Tk of the tile, V]
    causal: bool,
    scale: f64,
}

/// Views into the gradients of the whole call, to which a tile adds its share.
struct Grads {
    dq: Tensor, // [B*Hkv, H/Hkv, Tq of the tile, K]
    dk: Tensor, // [B*Hkv, Tk of the tile, K]
    dv: Tensor, // [B*Hkv, Tk of the tile, V]
}

fn shape(tensor: &'static str, found: &Tensor, expected: impl Into<String>) -> Error {
    Error::Shape { tensor, found: found.size(), expected: expected.into() }
}

fn expect(tensor: &'static str, found: &Tensor, expected: &[i64]) -> Result<()> {
    if found.size() == expected { Ok(()) } else { Err(shape(tensor, found, format!("{expected:?}"))) }
}
