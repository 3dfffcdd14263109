//! How softmax layers attend to keys and values that lie on other ranks: one method a file.

mod lasp2h;

use kernels::softmax::Tile;
use tch::{Kind, Tensor};

pub use lasp2h::Lasp2h;

use super::{Error, Plan, Result, Shard};

/// This rank's tokens of one layer, detached: q `[B, T, H, K]`, k `[B, T, Hkv, K]`, v `[B, T, Hkv, V]`; Hkv divides H.
#[derive(Debug)]
pub struct Inputs {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub scale: f64,
    pub causal: bool,
}

impl Inputs {
    pub fn new(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, causal: bool) -> Result<Self> {
        let ((b, t, h, dk), kv) = (size4("q", q)?, size4("k", k)?);
        if (kv.0, kv.1, kv.3) != (b, t, dk) || kv.2 == 0 || h % kv.2 != 0 {
            let expected = format!("[{b}, {t}, Hkv, {dk}], where Hkv divides the {h} heads of q");
            return Err(Error::Shape { tensor: "k", found: k.size(), expected });
        }
        let found = size4("v", v)?;
        if (found.0, found.1, found.2) != (b, t, kv.2) {
            let expected = format!("[{b}, {t}, {}, V], as k has", kv.2);
            return Err(Error::Shape { tensor: "v", found: v.size(), expected });
        }
        Ok(Self { q: q.f_detach()?, k: k.f_detach()?, v: v.f_detach()?, scale, causal })
    }

    /// Query heads of one KV head.
    pub fn queries_per_kv(&self) -> i64 {
        self.q.size()[2] / self.k.size()[2]
    }
}

fn size4(tensor: &'static str, x: &Tensor) -> Result<(i64, i64, i64, i64)> {
    x.size4().map_err(|_| Error::Shape {
        tensor,
        found: x.size(),
        expected: "four dimensions, [B, T, H, K]".to_owned(),
    })
}

/// What a method keeps for backward: the inputs, its output and the log-sum-exp `[B, H, T]`.
pub struct Saved {
    pub inputs: Inputs,
    pub o: Tensor,
    pub lse: Tensor,
}

pub struct Forward {
    pub o: Tensor,
    pub saved: Saved,
}

/// Gradients of this rank's tokens, in the kind of the inputs.
pub struct Grads {
    pub dq: Tensor,
    pub dk: Tensor,
    pub dv: Tensor,
}

/// A way of attending to the keys and values of all ranks.
pub trait Attention: Send + Sync {
    fn forward(&self, shard: &Shard, x: &Inputs) -> Result<Forward>;
    fn backward(&self, shard: &Shard, saved: Saved, d_o: &Tensor) -> Result<Grads>;
}

/// What this rank's queries see of the whole sequence's keys: of their document all, or all up to themselves.
pub fn tiles(plan: &Plan, causal: bool) -> Vec<Tile> {
    let tile = |piece: &super::Piece| {
        let document = plan.document(piece.document);
        let end = if causal { piece.global.end } else { document.end };
        Tile { q: piece.local.clone(), k: document.start..end, causal }
    };
    plan.pieces.iter().map(tile).collect()
}

/// The kind in which gradients are summed over ranks: f64 for f64, else f32.
pub(super) fn sum_kind(x: &Tensor) -> Kind {
    kernels::linear::accumulation_kind(x.kind())
}
