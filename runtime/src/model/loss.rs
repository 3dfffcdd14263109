//! The output projection and the cross-entropy as one node: the logits exist for one chunk of tokens at a time, and their
//! gradient is taken while they do. Memory of `[T, vocab]` would exceed that of the rest for a vocabulary of 128,256.

use kernels::block;
use tch::{Kind, Reduction, Tensor};

use super::Result;
use crate::data::IGNORE_INDEX;

/// Logits of one chunk, in numbers: on the CPU a part of its cache, on a GPU 1 GiB in bf16, for products that fill it.
const CHUNK: i64 = 1 << 22;
const CHUNK_CUDA: i64 = 1 << 29;

/// Tokens whose logits exist at once, of `tokens`.
pub(crate) fn chunk(vocab: i64, tokens: i64) -> i64 {
    (CHUNK / vocab).clamp(1, tokens.max(1))
}

/// The same on a GPU: a multiple of 128, for whole tiles of a product.
pub(crate) fn chunk_cuda(vocab: i64, tokens: i64) -> i64 {
    (CHUNK_CUDA / vocab / 128 * 128).max(128).clamp(1, tokens.max(1))
}

/// `sum_i -log softmax(h_i W^T)[label_i]` over the labels that are not [`IGNORE_INDEX`]; scalar in f32, or f64 for f64.
///
/// hidden `[B, T, D]`, weight `[vocab, D]`, labels `[B, T]` i64. Logits, sums and the gradient of the weight are kept in
/// the kind of the result.
pub fn linear_cross_entropy(hidden: &Tensor, weight: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let kind = kernels::linear::accumulation_kind(hidden.kind());
    let (loss, grads) = {
        let with_grad = hidden.requires_grad();
        let _guard = tch::no_grad_guard();
        if hidden.device().is_cuda() {
            let tokens = labels.numel() as i64;
            fused(hidden, weight, labels, kind, with_grad, chunk_cuda(weight.size()[0], tokens))?
        } else {
            forward(hidden, weight, labels, kind, with_grad)?
        }
    };
    if let Some((d_hidden, d_weight)) = grads {
        let leaf = weight.shallow_clone();
        kernels::bridge::attach(&[hidden, weight], &[&loss], move |mut grads: Vec<Option<Tensor>>| {
            let Some(grad) = grads.swap_remove(0) else { return Ok(vec![None, None]) };
            let (mut d_hidden, mut d_weight) = (d_hidden, d_weight);
            let _ = d_hidden.f_mul_(&grad.f_to_kind(d_hidden.kind())?)?;
            let mut sum = leaf.f_grad()?;
            if sum.defined() {
                // The vocabulary's gradient is large: one pass over it.
                block::add_scaled(&mut sum, &d_weight, &grad)?;
                return Ok(vec![Some(d_hidden), None]);
            }
            let d_weight = d_weight.f_mul_(&grad)?.f_to_kind(leaf.kind())?;
            Ok(vec![Some(d_hidden), Some(d_weight)])
        })?;
    }
    Ok(loss)
}

/// Of hidden, in its kind and shape, and of the weight, in the kind of the result.
type Grads = Option<(Tensor, Tensor)>;

fn forward(hidden: &Tensor, weight: &Tensor, labels: &Tensor, kind: Kind, with_grad: bool) -> Result<(Tensor, Grads)> {
    let (vocab, d) = weight.size2()?;
    let rows = hidden.f_reshape([-1, d])?;
    let labels = labels.f_reshape([-1])?;
    let count = rows.size()[0];
    let step = chunk(vocab, count);
    let mut loss = Tensor::f_zeros([], (kind, hidden.device()))?;
    let grads = if with_grad {
        let sum = Tensor::f_zeros([vocab, d], (kind, hidden.device()))?;
        Some((rows.f_zeros_like()?, sum))
    } else {
        None
    };
    for start in (0..count).step_by(step as usize) {
        let length = step.min(count - start);
        let (h, labels) = (rows.f_narrow(0, start, length)?, labels.f_narrow(0, start, length)?);
        let logs = h.f_linear(weight, None::<&Tensor>)?.f_log_softmax(-1, kind)?; // [chunk, vocab]
        let nll = logs.f_nll_loss(&labels, None::<&Tensor>, Reduction::Sum, IGNORE_INDEX)?;
        let _ = loss.f_add_(&nll)?;
        if let Some((d_hidden, d_weight)) = &grads {
            // d logits = softmax - one_hot(label), and 0 where there is no label.
            let counted = labels.f_ne(IGNORE_INDEX)?;
            let mut d_logits = logs.f_exp()?;
            let minus = counted.f_to_kind(kind)?.f_neg()?.f_unsqueeze(1)?;
            let _ = d_logits.f_scatter_add_(1, &labels.f_clamp_min(0)?.f_unsqueeze(1)?, &minus)?;
            let _ = d_logits.f_mul_(&counted.f_to_kind(kind)?.f_unsqueeze(1)?)?;
            d_hidden.f_narrow(0, start, length)?.f_copy_(&d_logits.f_to_kind(weight.kind())?.f_matmul(weight)?)?;
            let _ = d_weight.shallow_clone().f_addmm_(&d_logits.f_transpose(0, 1)?, &h.f_to_kind(kind)?)?;
        }
    }
    let grads = match grads {
        Some((d_hidden, d_weight)) => Some((d_hidden.f_view(hidden.size().as_slice())?, d_weight)),
        None => None,
    };
    Ok((loss, grads))
}

/// The same with the logits in the kind of `hidden`, and their gradient in their place, for a GPU; `step` tokens at once.
fn fused(
    hidden: &Tensor,
    weight: &Tensor,
    labels: &Tensor,
    kind: Kind,
    with_grad: bool,
    step: i64,
) -> Result<(Tensor, Grads)> {
    let (vocab, d) = weight.size2()?;
    let (rows, labels) = (hidden.f_reshape([-1, d])?, labels.f_reshape([-1])?);
    let count = rows.size()[0];
    let step = step.clamp(1, count.max(1));
    let mut loss = Tensor::f_zeros([], (kind, hidden.device()))?;
    let (d_hidden, mut d_weight) = match with_grad {
        true if count > 0 => (rows.f_empty_like()?, Tensor::f_empty([vocab, d], (kind, hidden.device()))?),
        true => (rows.f_empty_like()?, Tensor::f_zeros([vocab, d], (kind, hidden.device()))?),
        false => (Tensor::new(), Tensor::new()),
    };
    for start in (0..count).step_by(step as usize) {
        let length = step.min(count - start);
        let (h, labels) = (rows.f_narrow(0, start, length)?, labels.f_narrow(0, start, length)?);
        let logits = block::product(&h, &weight.f_transpose(0, 1)?)?; // [step, vocab]
        let (losses, d_logits) = block::cross_entropy(logits, &labels, IGNORE_INDEX, with_grad)?;
        let _ = loss.f_add_(&losses.f_sum(kind)?)?;
        if let Some(d_logits) = d_logits {
            block::product_into(&d_hidden.f_narrow(0, start, length)?, &d_logits, weight)?;
            match start {
                0 => block::product_into(&d_weight, &d_logits.f_transpose(0, 1)?, &h)?,
                _ => block::add_product(&mut d_weight, &d_logits.f_transpose(0, 1)?, &h)?,
            }
        }
    }
    if !with_grad {
        return Ok((loss, None));
    }
    Ok((loss, Some((d_hidden.f_view(hidden.size().as_slice())?, d_weight))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::testing::{assert_close, rand, randn};

    #[test]
    fn equals_the_plain_loss_and_its_gradients() {
        let leaf = |seed, shape: &[i64]| randn(seed, shape).set_requires_grad(true);
        let (h, w) = (leaf(1, &[2, 7, 5]), leaf(2, &[11, 5]));
        let labels = (rand(3, &[2, 7]) * 11.0).to_kind(Kind::Int64);
        let _ = labels.narrow(1, 3, 1).fill_(IGNORE_INDEX);
        let loss = linear_cross_entropy(&h, &w, &labels).unwrap();
        (&loss * 0.3).backward();
        let (ours_h, ours_w) = (h.grad().copy(), w.grad().copy());
        let (h2, w2) = (h.detach().copy().set_requires_grad(true), w.detach().copy().set_requires_grad(true));
        let logs = h2.reshape([-1, 5]).matmul(&w2.tr()).log_softmax(-1, Kind::Double);
        let plain = logs.g_nll_loss(&labels.reshape([-1]), None::<&Tensor>, Reduction::Sum, IGNORE_INDEX);
        (&plain * 0.3).backward();
        assert_close("loss", &loss, &plain, 1e-12);
        assert_close("d hidden", &ours_h, &h2.grad(), 1e-12);
        assert_close("d weight", &ours_w, &w2.grad(), 1e-12);
        (linear_cross_entropy(&h, &w, &labels).unwrap() * 0.3).backward();
        assert_close("d weight, added to what was there", &w.grad(), &(&ours_w * 2.0), 1e-12);
        for step in [1, 4, 100] {
            let (loss, grads) = fused(&h.detach(), &w.detach(), &labels, Kind::Double, true, step).unwrap();
            let (d_hidden, d_weight) = grads.unwrap();
            assert_close("fused loss", &loss, &plain, 1e-12);
            assert_close("fused d hidden", &(d_hidden * 0.3), &h2.grad(), 1e-12);
            assert_close("fused d weight", &(d_weight * 0.3), &w2.grad(), 1e-12);
        }
    }
}
