//! Causal linear attention without the right-product trick, as the left product `o = (q k^T * mask) v`: quadratic in the
//! length. It is how LASP-2 (arXiv 2502.07563) ran Ring Attention and Megatron-SP on its linear model; with a
//! constant decay per head the mask holds `e^{(i - j) log a}`.
//!
//! A tile is a run of queries against a run of keys. Nothing normalises a row, so what tiles contribute simply adds up. It
//! is computed in blocks of queries by keys, so no more scores than one block's exist at a time. In a block whose keys all
//! come before its queries the decay splits at the block's first query into a factor of each query and one of each key;
//! both exponents are at most 0, and no score is touched but by the matrix products.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::{Decay, Grads, accumulation_kind};
use crate::{Error, Result};

/// Most queries, and most keys, of a block.
const BLOCK: i64 = 512;

/// A run of queries and a run of keys of one document, both without gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tile {
    pub q: Range<i64>,
    pub k: Range<i64>,
    /// Positions from the first key to the first query. A query sees the keys at its position and before.
    pub ahead: i64,
}

/// What the keys of `tiles` contribute to `o_i = scale sum_{j <= i} a^{i-j} <q_i, k_j> v_j`.
///
/// `q`: `[B, Tq, H, K]`, `k`: `[B, Tk, H, K]`, `v`: `[B, Tk, H, V]`, of one kind. Ranges of tiles may overlap. Returns
/// `[B, Tq, H, V]` in the accumulation kind.
///
/// Errors: shapes that disagree, tiles that leave the tensors, a decay per token or channel.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, decay: &Decay, tiles: &[Tile], scale: f64) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let sides = Sides::new(q, k, v, decay, tiles, scale)?;
    let o = sides.zeros(q, v)?;
    for block in tiles.iter().flat_map(Block::of) {
        let part = match sides.apart(&block)? {
            Some((q_factor, k_factor)) => {
                let scores =
                    block.queries(&sides.q)?.f_bmm(&times(&block.keys(&sides.k)?, &k_factor)?.f_transpose(1, 2)?)?;
                times(&scores.f_bmm(&block.keys(&sides.v)?)?, &q_factor)?
            }
            None => {
                let scores = block.queries(&sides.q)?.f_bmm(&block.keys(&sides.k)?.f_transpose(1, 2)?)?;
                scores.f_mul(&sides.mask(&block)?)?.f_bmm(&block.keys(&sides.v)?)?
            }
        };
        let _ = block.queries(&o)?.f_add_(&part)?;
    }
    sides.restore(&o)
}

/// What the keys of `tiles` contribute to the gradients, given `d_o` `[B, Tq, H, V]`.
///
/// Other arguments and errors as in [`forward`]. All gradients are in the accumulation kind; `dlog_decay`, where `decay`
/// is one per head and `decay_grad` asks for it, is `[H]`: partial sums like the others.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    decay: &Decay,
    decay_grad: bool,
    d_o: &Tensor,
    tiles: &[Tile],
    scale: f64,
) -> Result<Grads> {
    let _no_grad = tch::no_grad_guard();
    let sides = Sides::new(q, k, v, decay, tiles, scale)?;
    let expected = [q.size()[0], q.size()[1], q.size()[2], v.size()[3]];
    if d_o.size() != expected {
        return Err(Error::Shape { tensor: "d_o", found: d_o.size(), expected: format!("{expected:?}") });
    }
    let d_o = sides.heads_first(d_o)?;
    let (dq, dk, dv) = (sides.zeros(q, q)?, sides.zeros(k, k)?, sides.zeros(v, v)?);
    let wanted = decay_grad && sides.log_decay.is_some();
    let mut dg = Tensor::f_zeros([d_o.size()[0]], (sides.kind, q.device()))?; // [B H]
    for block in tiles.iter().flat_map(Block::of) {
        let (q, d_o) = (block.queries(&sides.q)?, block.queries(&d_o)?);
        let (k, v) = (block.keys(&sides.k)?, block.keys(&sides.v)?);
        let d_scores = d_o.f_bmm(&v.f_transpose(1, 2)?)?; // [B H, queries, keys]
        let (block_dq, block_dk, scores) = match sides.apart(&block)? {
            Some((q_factor, k_factor)) => {
                let (q, k) = (times(&q, &q_factor)?, times(&k, &k_factor)?);
                let scores = q.f_bmm(&k.f_transpose(1, 2)?)?;
                let block_dq = times(&d_scores.f_bmm(&k)?, &q_factor)?;
                (block_dq, times(&d_scores.f_transpose(1, 2)?.f_bmm(&q)?, &k_factor)?, scores)
            }
            None => {
                let mask = sides.mask(&block)?;
                let scores = q.f_bmm(&k.f_transpose(1, 2)?)?.f_mul_(&mask)?;
                if wanted {
                    // The distance of each pair is at least 0 where the scores are not.
                    let distance = block.distances(&q)?.f_to_kind(sides.kind)?;
                    let pairs = d_scores.f_mul(&scores)?.f_mul_(&distance)?;
                    let _ = dg.f_add_(&pairs.f_sum_dim_intlist([1, 2].as_slice(), false, sides.kind)?)?;
                }
                let d_scores = d_scores.f_mul(&mask)?;
                (d_scores.f_bmm(&k)?, d_scores.f_transpose(1, 2)?.f_bmm(&q)?, scores)
            }
        };
        if wanted && block.is_apart() {
            // A pair's distance is that of its query from the block's first query, plus that of the latter from its key:
            // two sums over tokens in place of one over pairs, and no term is negative.
            let [from_first, to_first] = block.parts(&q)?;
            for (x, dx, distance) in [(&q, &block_dq, from_first), (&k, &block_dk, to_first)] {
                let tokens = x.f_mul(dx)?.f_sum_dim_intlist(-1, false, sides.kind)?;
                let sum = tokens.f_mul(&distance.f_to_kind(sides.kind)?)?.f_sum_dim_intlist(-1, false, sides.kind)?;
                let _ = dg.f_add_(&sum)?;
            }
        }
        let _ = block.queries(&dq)?.f_add_(&block_dq)?;
        let _ = block.keys(&dk)?.f_add_(&block_dk)?;
        let _ = block.keys(&dv)?.f_baddbmm_(&scores.f_transpose(1, 2)?, &d_o)?;
    }
    let dlog_decay = if wanted {
        let h = q.size()[2];
        Some(dg.f_view([sides.batch, h])?.f_sum_dim_intlist(0, false, sides.kind)?)
    } else {
        None
    };
    Ok(Grads {
        dq: sides.restore(&dq)?.f_mul_scalar(scale)?,
        dk: sides.restore(&dk)?,
        dv: sides.restore(&dv)?,
        dlog_decay,
    })
}

/// The tensors of one call as `[B H, T, ..]` in the accumulation kind. `q` carries the scale.
struct Sides {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// `[B H, 1]`, f64.
    log_decay: Option<Tensor>,
    kind: Kind,
    batch: i64,
}

impl Sides {
    fn new(q: &Tensor, k: &Tensor, v: &Tensor, decay: &Decay, tiles: &[Tile], scale: f64) -> Result<Self> {
        let (b, tq, h, dk) = super::shape4("q", q, "[B, Tq, H, K]")?;
        let tk = k.size().get(1).copied().unwrap_or(0);
        for (tensor, x, width) in [("k", k, Some(dk)), ("v", v, None)] {
            let found = x.size();
            let fits = found.len() == 4 && found[..3] == [b, tk, h] && width.is_none_or(|width| found[3] == width);
            if !fits {
                let width = width.map_or_else(|| "V".to_owned(), |width| width.to_string());
                return Err(Error::Shape { tensor, found, expected: format!("[{b}, Tk, {h}, {width}]") });
            }
        }
        for tile in tiles {
            if tile.q.start < 0 || tile.q.end > tq || tile.k.start < 0 || tile.k.end > tk {
                let text = format!("{tile:?}: expected queries within 0..{tq} and keys within 0..{tk}");
                return Err(Error::Unsupported(text));
            }
        }
        let log_decay = match decay {
            Decay::None => None,
            Decay::Head(g) => Some(g.f_to_kind(Kind::Double)?.f_repeat([b])?.f_unsqueeze(1)?),
            Decay::Token(g) | Decay::Channel(g) => {
                return Err(Error::Shape {
                    tensor: "log_decay",
                    found: g.size(),
                    expected: format!("[H] = [{h}] or none, with which the left product can be computed"),
                });
            }
        };
        let kind = accumulation_kind(q.kind());
        let mut sides =
            Self { q: q.shallow_clone(), k: k.shallow_clone(), v: v.shallow_clone(), log_decay, kind, batch: b };
        sides.q = sides.heads_first(q)?.f_mul_scalar(scale)?;
        (sides.k, sides.v) = (sides.heads_first(k)?, sides.heads_first(v)?);
        Ok(sides)
    }

    /// `[B, T, H, X]` to `[B H, T, X]`.
    fn heads_first(&self, x: &Tensor) -> Result<Tensor> {
        let (b, t, h, width) = x.size4()?;
        Ok(x.f_to_kind(self.kind)?.f_transpose(1, 2)?.f_reshape([b * h, t, width])?)
    }

    /// The inverse of `heads_first`, but for the kind.
    fn restore(&self, x: &Tensor) -> Result<Tensor> {
        let (heads, t, width) = x.size3()?;
        Ok(x.f_view([self.batch, heads / self.batch.max(1), t, width])?.f_transpose(1, 2)?.f_contiguous()?)
    }

    /// `[B H, T of tokens, width of widths]`.
    fn zeros(&self, tokens: &Tensor, widths: &Tensor) -> Result<Tensor> {
        let (b, t, h, _) = tokens.size4()?;
        Ok(Tensor::f_zeros([b * h, t, widths.size()[3]], (self.kind, tokens.device()))?)
    }

    /// For a block whose keys all come before its queries, the factors of its queries and of its keys, `[B H, tokens, 1]`,
    /// or none without a decay.
    fn apart(&self, block: &Block) -> Result<Option<(Option<Tensor>, Option<Tensor>)>> {
        if !block.is_apart() {
            return Ok(None);
        }
        let Some(g) = &self.log_decay else { return Ok(Some((None, None))) };
        let factor = |distance: &Tensor| -> Result<Option<Tensor>> {
            Ok(Some(distance.f_mul(g)?.f_exp()?.f_to_kind(self.kind)?.f_unsqueeze(-1)?))
        };
        let [from_first, to_first] = block.parts(&self.q)?;
        Ok(Some((factor(&from_first)?, factor(&to_first)?)))
    }

    /// `a^{i-j}` where query i sees key j, else 0: `[B H or 1, queries, keys]`.
    fn mask(&self, block: &Block) -> Result<Tensor> {
        let distance = block.distances(&self.q)?;
        let hidden = distance.f_lt(0.0)?;
        let weights = match &self.log_decay {
            Some(g) => distance.f_clamp_min(0.0)?.f_mul(&g.f_unsqueeze(-1)?)?.f_exp()?.f_to_kind(self.kind)?,
            None => Tensor::f_ones([1, block.rows, block.columns], (self.kind, self.q.device()))?,
        };
        Ok(weights.f_masked_fill(&hidden, 0.0)?)
    }
}

fn times(x: &Tensor, factor: &Option<Tensor>) -> Result<Tensor> {
    Ok(match factor {
        Some(factor) => x.f_mul(factor)?,
        None => x.shallow_clone(),
    })
}

/// Some queries and some keys of a tile, of which at least one pair sees each other.
struct Block {
    query: i64,
    rows: i64,
    key: i64,
    columns: i64,
    /// As in [`Tile`].
    ahead: i64,
}

impl Block {
    fn of(tile: &Tile) -> impl Iterator<Item = Block> {
        let cut = |range: &Range<i64>| {
            let (start, end) = (range.start, range.end);
            (start..end).step_by(BLOCK as usize).map(move |at| (at, BLOCK.min(end - at))).collect::<Vec<_>>()
        };
        let (first_query, first_key, ahead) = (tile.q.start, tile.k.start, tile.ahead);
        let keys = cut(&tile.k);
        cut(&tile.q).into_iter().flat_map(move |(query, rows)| {
            let block = move |&(key, columns): &(i64, i64)| {
                let ahead = ahead + (query - first_query) - (key - first_key);
                Block { query, rows, key, columns, ahead }
            };
            let seen = |block: &Block| block.ahead + block.rows > 0;
            keys.iter().map(block).filter(seen).collect::<Vec<_>>()
        })
    }

    /// Whether every query sees every key.
    fn is_apart(&self) -> bool {
        self.ahead >= self.columns - 1
    }

    fn queries(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_narrow(1, self.query, self.rows)?)
    }

    fn keys(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_narrow(1, self.key, self.columns)?)
    }

    /// From the first query to each query, and from each key to the first query: `[1, queries]` and `[1, keys]`, f64.
    fn parts(&self, like: &Tensor) -> Result<[Tensor; 2]> {
        let options = (Kind::Double, like.device());
        let keys = Tensor::f_arange(self.columns, options)?.f_neg()?.f_add_scalar(self.ahead as f64)?;
        Ok([Tensor::f_arange(self.rows, options)?.f_unsqueeze(0)?, keys.f_unsqueeze(0)?])
    }

    /// Positions from each key to each query: `[1, queries, keys]`, f64.
    fn distances(&self, like: &Tensor) -> Result<Tensor> {
        let [queries, keys] = self.parts(like)?;
        Ok(queries.f_unsqueeze(-1)?.f_add(&keys.f_unsqueeze(1)?)?)
    }
}
