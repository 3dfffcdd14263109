//! One tile through libtorch's flash attention for CPUs, `aten::_scaled_dot_product_flash_attention_for_cpu`.
//!
//! Its causal mask is aligned at the top left, so a causal tile with more keys than queries is two parts: the keys
//! before the square, which all queries see, and the causal square. Forward merges the parts by log-sum-exp; backward
//! hands both the merged `o` and `lse`, with which the gradients of each part are exact. It wants one head dimension,
//! so K and V are padded with zeros to the larger of the two.
//!
//! bf16 inputs are computed in f32. On a Zen with avx512_bf16 libtorch's bf16 forward is no faster, and its bf16
//! backward, 1.35 times as fast, rounds dk and dv to bf16 after every block of queries: an error of 3e-3 in partial
//! sums still to be added up.

use tch::Tensor;

use super::{Grads, Inputs, merge_rows};
use crate::Result;

/// `inputs` in f32 or f64, with at least one query and one key.
/// Returns `o` `[B*Hkv, group, Tq, V]` and `lse` `[B*Hkv, group, Tq]`.
pub(super) fn forward(inputs: &Inputs) -> Result<(Tensor, Tensor)> {
    let padded = inputs.padded()?;
    let (last, before) = padded.parts();
    let (mut o, mut lse) = padded.attend(last)?;
    if let Some(before) = before {
        let (o_before, lse_before) = padded.attend(before)?;
        (o, lse) = merge_rows(&o_before, &lse_before, &o, &lse)?;
    }
    Ok((o.f_narrow(3, 0, inputs.v.size()[2])?, lse))
}

/// Adds the gradients to `grads`.
/// `o`, `d_o`: `[B*Hkv, group, Tq, V]`, `lse`: `[B*Hkv, group, Tq]`, in the kind of `inputs`.
pub(super) fn backward(inputs: &Inputs, o: &Tensor, lse: &Tensor, d_o: &Tensor, mut grads: Grads) -> Result<()> {
    let padded = inputs.padded()?;
    let width = padded.v.size()[2];
    let (o, d_o) = (pad(o, width)?, pad(d_o, width)?);
    let (last, before) = padded.parts();
    for part in [Some(last), before].into_iter().flatten() {
        let (dq, dk, dv) = Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu_backward(
            &d_o,
            &padded.q,
            &padded.on_part(&padded.k, part)?,
            &padded.on_part(&padded.v, part)?,
            &o,
            lse,
            0.0,
            part.causal,
            None::<&Tensor>,
            padded.scale,
        )?;
        // [B*Hkv, Tk of the part, max(K, V)]
        let group_sum = |x: Tensor| x.f_sum_dim_intlist([1].as_slice(), false, None);
        let _ = grads.dq.f_add_(&dq.f_narrow(3, 0, grads.dq.size()[3])?)?;
        for (sum, share) in [(&grads.dk, group_sum(dk)?), (&grads.dv, group_sum(dv)?)] {
            let width = sum.size()[2];
            let _ = sum.f_narrow(1, part.start, part.keys)?.f_add_(&share.f_narrow(2, 0, width)?)?;
        }
    }
    Ok(())
}

/// Keys of a tile under a mask that libtorch knows: none, or causal with as many queries as keys.
#[derive(Clone, Copy)]
struct Part {
    start: i64,
    keys: i64,
    causal: bool,
}

impl Inputs {
    fn padded(&self) -> Result<Inputs> {
        let width = self.k.size()[2].max(self.v.size()[2]);
        let (q, k, v) = (pad(&self.q, width)?, pad(&self.k, width)?, pad(&self.v, width)?);
        Ok(Inputs { q, k, v, ..*self })
    }

    /// The last part, and the one before it if there is one.
    fn parts(&self) -> (Part, Option<Part>) {
        let (queries, keys) = (self.q.size()[2], self.k.size()[1]);
        if !self.causal {
            return (Part { start: 0, keys, causal: false }, None);
        }
        let start = keys - queries;
        let before = Part { start: 0, keys: start, causal: false };
        (Part { start, keys: queries, causal: true }, (start > 0).then_some(before))
    }

    /// The part's rows of k or v for every head of the group, without a copy.
    fn on_part(&self, x: &Tensor, part: Part) -> Result<Tensor> {
        let (n, group, width) = (x.size()[0], self.q.size()[1], x.size()[2]);
        Ok(x.f_narrow(1, part.start, part.keys)?.f_unsqueeze(1)?.f_expand([n, group, part.keys, width], false)?)
    }

    fn attend(&self, part: Part) -> Result<(Tensor, Tensor)> {
        Ok(Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu(
            &self.q,
            &self.on_part(&self.k, part)?,
            &self.on_part(&self.v, part)?,
            0.0,
            part.causal,
            None::<&Tensor>,
            self.scale,
        )?)
    }
}

/// Zeros after the last dimension, up to `width`.
fn pad(x: &Tensor, width: i64) -> Result<Tensor> {
    let missing = width - x.size()[x.dim() - 1];
    if missing == 0 { Ok(x.shallow_clone()) } else { Ok(x.f_constant_pad_nd([0, missing])?) }
}
