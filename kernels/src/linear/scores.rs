//! The products inside a chunk: `A_ij = <q_i e^{b_i - b_j}, k_j>` for j <= i, and its derivative.
//!
//! A scalar decay multiplies the scores by a lower-triangular matrix. A decay per channel stands inside the inner
//! product, where a factorisation `(q_i e^{b_i}) (k_j e^{-b_j})` would overflow. The chunk is halved instead, again and
//! again: between a right half and the left half before it, both factors are taken relative to the boundary, so that
//! every exponent is at most 0 and every block is one matrix product; the diagonal needs no decay at all.

use tch::{Kind, Tensor};

use super::chunks::{ChunkDecay, Chunked, Shape, factor};
use crate::Result;

/// The scores of all chunks, `[n G, C, C]`, lower triangular.
pub(super) fn scores(x: &Chunked) -> Result<Tensor> {
    match &x.decay {
        ChunkDecay::Channel { b, .. } => channel_scores(x, b),
        _ => decayed(x, x.q.f_bmm(&x.k.f_transpose(1, 2)?)?),
    }
}

/// From the scores `a` and the gradient of their sum over values, `d_a = do v^T` (both `[n G, C, C]`), adds to dq and dk
/// `[n G, C, K]` what comes from inside the chunk. Returns, if `decay_grad`, what comes to dlog_decay: for log a_t the sum
/// over all pairs j < t <= i, `[n G, C]` or `[n G, C, K]`.
///
/// The pairs are summed as they are. The shorter formula `sum_{i >= t} (q_i dq_i - k_i dk_i)` counts pairs that do not
/// cross t twice, with opposite signs, which under a strong decay leaves little but rounding.
pub(super) fn add_score_grads(
    x: &Chunked,
    a: &Tensor,
    d_a: Tensor,
    dq: &mut Tensor,
    dk: &mut Tensor,
    decay_grad: bool,
) -> Result<Option<Tensor>> {
    if let ChunkDecay::Channel { b, .. } = &x.decay {
        return add_channel_grads(x, b, &d_a, dq, dk, decay_grad);
    }
    let dg = if decay_grad { Some(crossing_pairs(a.f_mul(&d_a)?, x.kind)?) } else { None };
    let d_a = decayed(x, d_a)?;
    let _ = dq.f_baddbmm_(&d_a, &x.k)?;
    let _ = dk.f_baddbmm_(&d_a.f_transpose(1, 2)?, &x.q)?;
    Ok(dg)
}

/// `out_t = sum_{i >= t} sum_{j < t} p_ij` of `p` `[n G, C, C]`: `[n G, C]`.
fn crossing_pairs(p: Tensor, kind: Kind) -> Result<Tensor> {
    let c = p.size()[1];
    let before = p.f_cumsum(2, kind)?.f_tril_(-1)?.f_sum_dim_intlist(1, false, kind)?; // column t - 1 belongs to t
    Ok(before.f_narrow(1, 0, c - 1)?.f_constant_pad_nd([1, 0])?)
}

/// `a_ij e^{b_i - b_j}` for j <= i, else 0, in place; `a`: `[n G, C, C]`.
fn decayed(x: &Chunked, mut a: Tensor) -> Result<Tensor> {
    let Shape { n, b: batch, h, c, .. } = x.shape;
    let masked_exp = |difference: Tensor| -> Result<Tensor> {
        // Masked before the exponential: above the diagonal the difference is positive and may overflow.
        let above = Tensor::f_ones([c, c], (Kind::Bool, a.device()))?.f_triu(1)?;
        factor(difference.f_to_kind(x.kind)?.f_masked_fill_(&above, f64::NEG_INFINITY)?, x.kind)
    };
    match &x.decay {
        ChunkDecay::Scalar { constant: Some(g), .. } => {
            let place = Tensor::f_arange(c, (Kind::Double, a.device()))?;
            let distance = place.f_unsqueeze(1)?.f_sub(&place.f_unsqueeze(0)?)?;
            let d = masked_exp(g.f_view([-1, 1, 1])?.f_mul(&distance)?)?; // [H, C, C]
            let _ = a.f_view([n * batch, h, c, c])?.f_mul_(&d)?;
            Ok(a)
        }
        ChunkDecay::Scalar { b, constant: None, .. } => {
            let d = masked_exp(b.f_unsqueeze(2)?.f_sub(&b.f_unsqueeze(1)?)?)?;
            Ok(a.f_mul_(&d)?)
        }
        _ => Ok(a.f_tril_(0)?),
    }
}

/// One level of the halving: blocks of 2 s tokens, each with a left and a right half of s.
struct Level {
    s: i64,
    /// `[blocks, s, K]`: e^{b_i - b_mid} of the right halves and e^{b_mid - b_j} of the left ones; both at most 1.
    right: Tensor,
    left: Tensor,
}

impl Level {
    fn new(b: &Tensor, s: i64, x: &Chunked) -> Result<Self> {
        let b = b.f_view([-1, 2 * s, x.shape.dk])?;
        let middle = b.f_narrow(1, s - 1, 1)?;
        let right = factor(b.f_narrow(1, s, s)?.f_sub(&middle)?, x.kind)?;
        let left = factor(middle.f_sub(&b.f_narrow(1, 0, s)?)?, x.kind)?;
        Ok(Self { s, right, left })
    }

    /// Half `0` (left) or `1` (right) of every block of `x` `[n G, C, K]`, as a view `[blocks, s, K]`.
    fn half(&self, x: &Tensor, half: i64) -> Result<Tensor> {
        let width = x.size()[2];
        Ok(x.f_view([-1, 2 * self.s, width])?.f_narrow(1, half * self.s, self.s)?)
    }

    /// The blocks of `a` `[n G, C, C]` with queries in a right half and keys in the left half before it, as a view
    /// `[n G, C / 2s, s, s]`.
    fn blocks(&self, a: &Tensor, c: i64) -> Result<Tensor> {
        let (s, m) = (self.s, c / (2 * self.s));
        let diagonal = a.f_view([-1, m, 2 * s, m, 2 * s])?.f_diagonal(0, 1, 3)?; // [n G, 2s, 2s, m]
        Ok(diagonal.f_narrow(1, s, s)?.f_narrow(2, 0, s)?.f_permute([0, 3, 1, 2])?)
    }
}

/// Half-lengths C/2, C/4, .., 1.
fn halvings(c: i64) -> impl Iterator<Item = i64> {
    std::iter::successors(Some(c / 2), |s| Some(s / 2)).take_while(|s| *s >= 1)
}

fn channel_scores(x: &Chunked, b: &Tensor) -> Result<Tensor> {
    let Shape { n, c, .. } = x.shape;
    let a = Tensor::f_zeros([n * x.shape.g(), c, c], (x.kind, x.q.device()))?;
    let diagonal = x.q.f_mul(&x.k)?.f_sum_dim_intlist(-1, false, x.kind)?;
    a.f_diagonal(0, 1, 2)?.f_copy_(&diagonal)?;
    for s in halvings(c) {
        let level = Level::new(b, s, x)?;
        let q = level.half(&x.q, 1)?.f_mul(&level.right)?;
        let k = level.half(&x.k, 0)?.f_mul(&level.left)?;
        let mut blocks = level.blocks(&a, c)?;
        let product = q.f_bmm(&k.f_transpose(1, 2)?)?;
        blocks.f_copy_(&product.f_view(blocks.size().as_slice())?)?;
    }
    Ok(a)
}

fn add_channel_grads(
    x: &Chunked,
    b: &Tensor,
    d_a: &Tensor,
    dq: &mut Tensor,
    dk: &mut Tensor,
    decay_grad: bool,
) -> Result<Option<Tensor>> {
    let diagonal = d_a.f_diagonal(0, 1, 2)?.f_unsqueeze(-1)?;
    let _ = dq.f_addcmul_(&diagonal, &x.k)?;
    let _ = dk.f_addcmul_(&diagonal, &x.q)?;
    let dg = if decay_grad { Some(dq.f_zeros_like()?) } else { None };
    for s in halvings(x.shape.c) {
        let level = Level::new(b, s, x)?;
        let q = level.half(&x.q, 1)?.f_mul(&level.right)?;
        let k = level.half(&x.k, 0)?.f_mul(&level.left)?;
        let blocks = level.blocks(d_a, x.shape.c)?.f_reshape([-1, s, s])?;
        let dq_here = blocks.f_bmm(&k)?;
        let dk_here = blocks.f_transpose(1, 2)?.f_bmm(&q)?;
        let _ = level.half(dq, 1)?.f_addcmul_(&dq_here, &level.right)?;
        let _ = level.half(dk, 0)?.f_addcmul_(&dk_here, &level.left)?;
        if let Some(dg) = &dg {
            // A pair of this level crosses t in the right half if its query is at or after t, in the left if its key is before.
            let (right, left) = (q.f_mul(&dq_here)?, k.f_mul(&dk_here)?);
            let _ = level.half(dg, 1)?.f_add_(&right.f_flip([1])?.f_cumsum(1, x.kind)?.f_flip([1])?)?;
            let _ = level.half(dg, 0)?.f_add_(&left.f_cumsum(1, x.kind)?.f_sub_(&left)?)?;
        }
    }
    Ok(dg)
}
