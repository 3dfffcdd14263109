//! Unmasked (bidirectional) linear attention without decay: every token reads the sum over the whole document.
//! LASP-2 (arXiv 2502.07563), Algorithms 1 and 3, the latter with the sum over all chunks that its suffix should be.

use tch::Tensor;

use super::{Grads, Inputs, accumulation_kind};
use crate::Result;

/// `[B, T, H, D]` -> `[B, H, T, D]` in the accumulation kind.
fn heads_first(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_to_kind(accumulation_kind(x.kind()))?.f_transpose(1, 2)?)
}

/// `sum_i a_i^T b_i`: `[B, H, K, V]`, accumulation kind.
fn outer_sum(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok(heads_first(a)?.f_transpose(-1, -2)?.f_matmul(&heads_first(b)?)?)
}

fn product(x: &Tensor, state: &Tensor) -> Result<Tensor> {
    Ok(heads_first(x)?.f_matmul(state)?.f_transpose(1, 2)?.f_contiguous()?)
}

/// This run's part of the document's state, `sum_i k_i^T v_i` `[B, H, K, V]`.
pub fn summarize(x: &Inputs) -> Result<Tensor> {
    outer_sum(&x.k, &x.v)
}

/// o `[B, T, H, V]`, given the state of the whole document.
pub fn run(x: &Inputs, state: &Tensor, scale: f64) -> Result<Tensor> {
    Ok(product(&x.q, state)?.f_mul_scalar(scale)?.f_to_kind(x.q.kind())?)
}

/// This run's part of the gradient of the document's state, `scale sum_i q_i^T do_i`.
pub fn summarize_grad(x: &Inputs, d_o: &Tensor, scale: f64) -> Result<Tensor> {
    Ok(outer_sum(&x.q, d_o)?.f_mul_scalar(scale)?)
}

/// All gradients, given the state of the whole document and its gradient.
pub fn run_grad(x: &Inputs, d_o: &Tensor, state: &Tensor, state_grad: &Tensor, scale: f64) -> Result<Grads> {
    let kind = x.q.kind();
    let transposed = state_grad.f_transpose(-1, -2)?;
    Ok(Grads {
        dq: product(d_o, &state.f_transpose(-1, -2)?)?.f_mul_scalar(scale)?.f_to_kind(kind)?,
        dk: product(&x.v, &transposed)?.f_to_kind(kind)?,
        dv: product(&x.k, state_grad)?.f_to_kind(kind)?,
        dlog_decay: None,
    })
}
