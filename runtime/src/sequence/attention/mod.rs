//! How softmax layers attend to keys and values that lie on other ranks: one method a file.

mod heads;
mod lasp2h;
mod megatron_sp;
mod ring;
mod ulysses;

use collectives::Group;
use kernels::softmax::Tile;
use tch::{Kind, Tensor};

pub use lasp2h::Lasp2h;
pub use megatron_sp::MegatronSp;
pub use ring::{Ring, tiles as ring_tiles};
pub use ulysses::Ulysses;

use super::{Error, LayerSizes, Piece, Plan, Result, Shard, Traffic};

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

    pub fn shallow_clone(&self) -> Self {
        let (q, k, v) = (self.q.shallow_clone(), self.k.shallow_clone(), self.v.shallow_clone());
        Self { q, k, v, ..*self }
    }
}

fn size4(tensor: &'static str, x: &Tensor) -> Result<(i64, i64, i64, i64)> {
    x.size4().map_err(|_| Error::Shape {
        tensor,
        found: x.size(),
        expected: "four dimensions, [B, T, H, K]".to_owned(),
    })
}

/// What a method keeps for backward: q, k, v, o and the log-sum-exp, of this rank's tokens `[B, H, T]` with all heads, or of
/// all tokens `[B, heads, L]` with this rank's heads.
pub struct Saved {
    pub inputs: Inputs,
    pub o: Tensor,
    pub lse: Tensor,
    /// H and Hkv of the layer.
    pub heads: i64,
    pub kv_heads: i64,
}

impl Saved {
    /// Of this rank's tokens. `o`, which a node may give as its output, is not kept as such: a node that owns its own output is
    /// never freed.
    fn of(x: &Inputs, o: &Tensor, lse: Tensor) -> Result<Self> {
        let (heads, kv_heads) = (x.q.size()[2], x.k.size()[2]);
        Ok(Self { inputs: x.shallow_clone(), o: o.f_detach()?, lse, heads, kv_heads })
    }
}

pub struct Forward {
    pub o: Tensor,
    pub saved: Saved,
}

/// o and the log-sum-exp of [`Saved`], for a layer whose activations are computed again: with q, k and v, all but these is quick
/// (DistFlashAttn's checkpoints, arXiv 2310.03294).
pub struct Attended {
    o: Tensor,
    lse: Tensor,
}

impl Attended {
    /// None where the method cannot do with it.
    pub(crate) fn of(attention: &dyn Attention, saved: &Saved) -> Option<Self> {
        let Saved { o, lse, .. } = saved;
        attention.attends_once().then(|| Self { o: o.shallow_clone(), lse: lse.shallow_clone() })
    }
}

/// [`Attention::forward`], or what it gave of the same x `before`.
pub(crate) fn forward(shard: &Shard, x: &Inputs, before: Option<Attended>) -> Result<Forward> {
    match before {
        Some(Attended { o, lse }) => Ok(Forward { saved: Saved::of(x, &o, lse)?, o: o.f_to_kind(x.q.kind())? }),
        None => shard.attention.forward(shard, x),
    }
}

/// Gradients of this rank's tokens, in the kind of the inputs.
pub struct Grads {
    pub dq: Tensor,
    pub dk: Tensor,
    pub dv: Tensor,
}

/// A way of attending to the keys and values of all ranks.
pub trait Attention: Send + Sync {
    /// Whether a layer of `heads` query heads can be laid over `sp` ranks.
    fn check(&self, _heads: i64, _sp: usize) -> Result<()> {
        Ok(())
    }

    /// Makes ready what it sends by ([`Group::connect`]): collectives, if nothing else. Collective, before anything is under way.
    fn connect(&self, group: &Group) -> Result<()> {
        Ok(group.connect(&[], &[])?)
    }

    /// Whether what it keeps is [`Saved::of`] the layer's own inputs and o, which may be wider, on every rank alike: then a checkpointed
    /// layer attends once and keeps [`Attended`].
    fn attends_once(&self) -> bool {
        false
    }

    fn forward(&self, shard: &Shard, x: &Inputs) -> Result<Forward>;
    fn backward(&self, shard: &Shard, saved: Saved, d_o: &Tensor) -> Result<Grads>;

    /// What the plan's rank sends and receives for one layer.
    fn traffic(&self, plan: &Plan, layer: &LayerSizes) -> Traffic;
}

/// What this rank's queries see of the whole sequence's keys: of their document all, or all up to themselves.
pub fn tiles(plan: &Plan, causal: bool) -> Vec<Tile> {
    let tile = |piece: &Piece| {
        let document = plan.document(piece.document);
        let end = if causal { piece.global.end } else { document.end };
        Tile { q: piece.local.clone(), k: document.start..end, causal }
    };
    plan.pieces.iter().map(tile).collect()
}

/// The tiles of whole documents, all of whose tokens are here.
pub fn documents(plan: &Plan, causal: bool) -> Vec<Tile> {
    let documents = (0..plan.documents()).map(|n| plan.document(n)).filter(|document| !document.is_empty());
    documents.map(|document| Tile { q: document.clone(), k: document, causal }).collect()
}

/// The kind in which gradients are summed over ranks: f64 for f64, else f32.
pub(super) fn sum_kind(x: &Tensor) -> Kind {
    kernels::linear::accumulation_kind(x.kind())
}
