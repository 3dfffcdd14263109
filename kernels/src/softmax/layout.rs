//! The sizes of one call, checked, and the layout in which tiles are computed.
//!
//! The query heads of one KV head form a group of size `H / Hkv`; tensors are brought to the accumulation kind and to
//! `[B*Hkv, group, Tq, ..]` for queries and `[B*Hkv, Tk, ..]` for keys, so that both engines see plain batches without
//! copies of the KV heads. The copies made here are linear in the length and vanish beside the attention.

use tch::{Device, Kind, Tensor};

use super::{Tile, expect, shape};
use crate::{Error, Result};

/// The sizes of one call, in the letters of algorithms.md.
#[derive(Clone, Copy)]
pub(super) struct Dims {
    pub b: i64,
    pub tq: i64,
    pub tk: i64,
    pub h: i64,
    pub hkv: i64,
    pub k: i64,
    pub v: i64,
}

impl Dims {
    pub fn check(q: &Tensor, k: &Tensor, v: &Tensor, tiles: &[Tile]) -> Result<Dims> {
        let &[b, tq, h, key_dim] = q.size().as_slice() else {
            return Err(shape("q", q, "[B, Tq, H, K]"));
        };
        let &[_, tk, hkv, _] = k.size().as_slice() else {
            return Err(shape("k", k, "[B, Tk, Hkv, K]"));
        };
        expect("k", k, &[b, tk, hkv, key_dim])?;
        let &[_, _, _, value_dim] = v.size().as_slice() else {
            return Err(shape("v", v, "[B, Tk, Hkv, V]"));
        };
        expect("v", v, &[b, tk, hkv, value_dim])?;
        if key_dim == 0 || value_dim == 0 {
            return Err(shape("v", v, format!("K and V of at least 1, with K = {key_dim}")));
        }
        if hkv == 0 || h % hkv != 0 {
            return Err(shape("k", k, format!("a number of KV heads that divides the {h} query heads")));
        }
        if !matches!(q.kind(), Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Half) {
            return Err(Error::Kind { tensor: "q", found: q.kind(), expected: "f32, f64, bf16 or f16".into() });
        }
        for (tensor, x) in [("k", k), ("v", v)] {
            if x.kind() != q.kind() {
                return Err(Error::Kind {
                    tensor,
                    found: x.kind(),
                    expected: format!("{:?}, the kind of q", q.kind()),
                });
            }
        }
        check_tiles(tiles, tq, tk)?;
        Ok(Dims { b, tq, tk, h, hkv, k: key_dim, v: value_dim })
    }
}

fn check_tiles(tiles: &[Tile], tq: i64, tk: i64) -> Result<()> {
    let error = |index: usize, expected: String| Error::Tile { index, tile: tiles[index].clone(), expected };
    for (index, tile) in tiles.iter().enumerate() {
        if !(0 <= tile.q.start && tile.q.start <= tile.q.end && tile.q.end <= tq) {
            return Err(error(index, format!("a range of queries within 0..{tq}")));
        }
        if !(0 <= tile.k.start && tile.k.start <= tile.k.end && tile.k.end <= tk) {
            return Err(error(index, format!("a range of keys within 0..{tk}")));
        }
        if tile.causal && tile.queries() > tile.keys() {
            let (n, m) = (tile.queries(), tile.keys());
            return Err(error(index, format!("at least as many keys as queries when causal, not {m} for {n}")));
        }
    }
    let mut order: Vec<usize> = (0..tiles.len()).filter(|&index| tiles[index].queries() > 0).collect();
    order.sort_by_key(|&index| tiles[index].q.start);
    for pair in order.windows(2) {
        if tiles[pair[1]].q.start < tiles[pair[0]].q.end {
            let other = &tiles[pair[0]].q;
            return Err(error(pair[1], format!("queries disjoint from those of tile {}, {other:?}", pair[0])));
        }
    }
    Ok(())
}

/// Takes tensors to the grouped layout and back.
pub(super) struct Layout {
    dims: Dims,
    group: i64,
    options: (Kind, Device),
}

impl Layout {
    pub fn new(dims: Dims, q: &Tensor) -> Layout {
        let kind = if q.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        Layout { dims, group: dims.h / dims.hkv, options: (kind, q.device()) }
    }

    /// The tiles in which there is anything to compute.
    pub fn with_work<'a>(&self, tiles: &'a [Tile]) -> impl Iterator<Item = &'a Tile> {
        let any_rows = self.dims.b * self.dims.h > 0;
        tiles.iter().filter(move |tile| any_rows && tile.queries() > 0 && tile.keys() > 0)
    }

    /// `[B, Tq, H, X]` to `[B*Hkv, group, Tq, X]`, X being K or V.
    pub fn queries(&self, x: &Tensor) -> Result<Tensor> {
        let Dims { b, tq, hkv, .. } = self.dims;
        let width = x.size()[3];
        let x = x.f_to_kind(self.options.0)?.f_reshape([b, tq, hkv, self.group, width])?;
        Ok(x.f_permute([0, 2, 3, 1, 4])?.f_contiguous()?.f_view([b * hkv, self.group, tq, width])?)
    }

    /// `[B, Tk, Hkv, X]` to `[B*Hkv, Tk, X]`.
    pub fn keys(&self, x: &Tensor) -> Result<Tensor> {
        let Dims { b, tk, hkv, .. } = self.dims;
        let width = x.size()[3];
        let x = x.f_to_kind(self.options.0)?.f_transpose(1, 2)?.f_contiguous()?; // [B, Hkv, Tk, X]
        Ok(x.f_view([b * hkv, tk, width])?)
    }

    /// `[B, H, Tq]` to `[B*Hkv, group, Tq]`.
    pub fn rows(&self, x: &Tensor) -> Result<Tensor> {
        let Dims { b, tq, hkv, .. } = self.dims;
        Ok(x.f_to_kind(self.options.0)?.f_reshape([b * hkv, self.group, tq])?)
    }

    /// The inverse of `queries`, still in the accumulation kind.
    pub fn restore_queries(&self, x: &Tensor) -> Result<Tensor> {
        let Dims { b, tq, h, hkv, .. } = self.dims;
        let width = x.size()[3];
        let x = x.f_view([b, hkv, self.group, tq, width])?.f_permute([0, 3, 1, 2, 4])?;
        Ok(x.f_contiguous()?.f_view([b, tq, h, width])?)
    }

    /// The inverse of `keys`, still in the accumulation kind.
    pub fn restore_keys(&self, x: &Tensor) -> Result<Tensor> {
        let Dims { b, tk, hkv, .. } = self.dims;
        Ok(x.f_view([b, hkv, tk, x.size()[2]])?.f_transpose(1, 2)?.f_contiguous()?)
    }

    /// The inverse of `rows`.
    pub fn restore_rows(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_view([self.dims.b, self.dims.h, self.dims.tq])?)
    }

    pub fn zeros_queries(&self, width: i64) -> Result<Tensor> {
        Ok(Tensor::f_zeros([self.dims.b * self.dims.hkv, self.group, self.dims.tq, width], self.options)?)
    }

    pub fn zeros_keys(&self, width: i64) -> Result<Tensor> {
        Ok(Tensor::f_zeros([self.dims.b * self.dims.hkv, self.dims.tk, width], self.options)?)
    }

    pub fn full_rows(&self, value: f64) -> Result<Tensor> {
        Ok(Tensor::f_full([self.dims.b * self.dims.hkv, self.group, self.dims.tq], value, self.options)?)
    }
}
