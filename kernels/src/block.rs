//! What a block computes between its matrix products, as pairs of forward and backward: RMSNorm, SiLU, SwiGLU, the norm of
//! each head with its gate, rotary angles, the cross-entropy of logits.
//!
//! On CUDA in bf16 each is one kernel of [`crate::cuda::ops`]; elsewhere plain tensor operations, in the accumulation kind.
//! Nothing is recorded for autograd. Where a backward takes a tensor by value, it may use its memory.

use tch::{Kind, Tensor};

use crate::Result;
use crate::cuda::{matmul, ops, runs_on};
use crate::linear::accumulation_kind;

/// Whether x `[.., width]` is for the kernels: where they run, bf16, and in 16-byte pieces.
fn fused(x: &Tensor, most: i64) -> bool {
    let width = x.size().last().copied().unwrap_or(0);
    runs_on(x.device()) && x.kind() == Kind::BFloat16 && width % 8 == 0 && width > 0 && width <= most
}

const ANY: i64 = i64::MAX;

fn wide(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_to_kind(accumulation_kind(x.kind()))?)
}

/// `[rows, 1]` to broadcast against x `[.., D]`.
fn per_row(rstd: &Tensor, x: &Tensor) -> Result<Tensor> {
    let mut shape = x.size();
    if let Some(last) = shape.last_mut() {
        *last = 1;
    }
    Ok(rstd.f_view(shape.as_slice())?)
}

fn rstd_of(x: &Tensor, eps: f64) -> Result<Tensor> {
    let mean = x.f_square()?.f_mean_dim([-1].as_slice(), true, None)?;
    Ok(mean.f_add_scalar(eps)?.f_rsqrt()?.f_flatten(0, -1)?)
}

fn over_rows(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_flatten(0, -2)?.f_sum_dim_intlist([0].as_slice(), false, None)?)
}

/// `y = x / rms(x) * weight` over the last dimension: y, and `1 / rms` `[rows]` in the accumulation kind. RMSNorm (arXiv
/// 1910.07467).
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    if fused(x, ops::NORM_WIDTH) {
        return ops::norm_forward(&x.f_contiguous()?, weight, eps);
    }
    let wide_x = wide(x)?;
    let rstd = rstd_of(&wide_x, eps)?;
    let y = wide_x.f_mul(&per_row(&rstd, x)?)?.f_mul(&wide(weight)?)?;
    Ok((y.f_to_kind(x.kind())?, rstd))
}

/// dx, to which `residual` is added, in the kind of x; and `[n, D]` in the accumulation kind, whose sum over n is dweight: see
/// [`add_rows`].
pub fn rms_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    rstd: &Tensor,
    dy: Tensor,
    residual: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    if fused(x, ops::NORM_WIDTH) {
        let residual = residual.map(|r| r.f_contiguous()).transpose()?;
        return ops::norm_backward(&x.f_contiguous()?, weight, rstd, dy.f_contiguous()?, residual.as_ref());
    }
    let rstd = per_row(rstd, x)?;
    let (hat, dy) = (wide(x)?.f_mul(&rstd)?, wide(&dy)?);
    let d_weight = over_rows(&dy.f_mul(&hat)?)?.f_unsqueeze(0)?;
    let grad = dy.f_mul(&wide(weight)?)?;
    let mean = grad.f_mul(&hat)?.f_mean_dim([-1].as_slice(), true, None)?;
    let mut dx = grad.f_sub(&hat.f_mul(&mean)?)?.f_mul(&rstd)?;
    if let Some(residual) = residual {
        dx = dx.f_add(residual)?;
    }
    Ok((dx.f_to_kind(x.kind())?, d_weight))
}

/// `x sigmoid(x)`.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if fused(x, ANY) {
        return ops::silu_forward(&x.f_contiguous()?);
    }
    Ok(x.f_silu()?)
}

/// `silu'(x)`.
fn silu_slope(x: &Tensor) -> Result<Tensor> {
    let s = x.f_sigmoid()?;
    Ok(x.f_mul(&s.f_neg()?.f_add_scalar(1.0)?)?.f_add_scalar(1.0)?.f_mul(&s)?)
}

pub fn silu_backward(x: &Tensor, dy: Tensor) -> Result<Tensor> {
    if fused(x, ANY) {
        let dy = dy.f_contiguous()?;
        ops::silu_backward(&x.f_contiguous()?, &dy)?;
        return Ok(dy);
    }
    Ok(wide(&dy)?.f_mul(&silu_slope(&wide(x)?)?)?.f_to_kind(x.kind())?)
}

/// `silu(gate) * up`. SwiGLU (arXiv 2002.05202).
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if fused(gate, ANY) {
        return ops::swiglu_forward(&gate.f_contiguous()?, &up.f_contiguous()?);
    }
    Ok(gate.f_silu()?.f_mul(up)?)
}

/// Of [`swiglu`]: its output again, and the gradients of its inputs.
pub struct SwigluGrads {
    pub hidden: Tensor,
    pub d_gate: Tensor,
    pub d_up: Tensor,
}

pub fn swiglu_backward(gate: Tensor, up: Tensor, d_hidden: Tensor) -> Result<SwigluGrads> {
    if fused(&gate, ANY) {
        let (gate, up, d_hidden) = (gate.f_contiguous()?, up.f_contiguous()?, d_hidden.f_contiguous()?);
        ops::swiglu_backward(&gate, &up, &d_hidden)?;
        return Ok(SwigluGrads { hidden: d_hidden, d_gate: gate, d_up: up });
    }
    let kind = gate.kind();
    let (g, u, d) = (wide(&gate)?, wide(&up)?, wide(&d_hidden)?);
    let silu = g.f_silu()?;
    let back = |x: Tensor| x.f_to_kind(kind);
    Ok(SwigluGrads {
        hidden: back(silu.f_mul(&u)?)?,
        d_gate: back(d.f_mul(&u)?.f_mul(&silu_slope(&g)?)?)?,
        d_up: back(d.f_mul(&silu)?)?,
    })
}

/// The norm of each head's output and its gate: `o / rms(o) * weight * silu(gate)`. o `[B, T, H, V]`, weight `[V]`, gate
/// as many numbers as o.
pub fn gated_norm(o: &Tensor, weight: &Tensor, gate: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    if fused(o, ops::HEAD_WIDTH) {
        let gate = gate.map(|g| g.f_contiguous()).transpose()?;
        return ops::heads_forward(&o.f_contiguous()?, weight, gate.as_ref(), eps);
    }
    let wide_o = wide(o)?;
    let rstd = per_row(&rstd_of(&wide_o, eps)?, o)?;
    let mut y = wide_o.f_mul(&rstd)?.f_mul(&wide(weight)?)?;
    if let Some(gate) = gate {
        y = y.f_mul(&wide(gate)?.f_silu()?.f_view(o.size().as_slice())?)?;
    }
    Ok(y.f_to_kind(o.kind())?)
}

/// Of [`gated_norm`]: its output again, and the gradients of its inputs; that of the weight as `[n, V]` in the accumulation kind,
/// to be summed over n: see [`add_rows`].
pub struct GatedNormGrads {
    pub y: Tensor,
    pub d_o: Tensor,
    pub d_weight: Tensor,
    pub d_gate: Option<Tensor>,
}

pub fn gated_norm_backward(
    o: Tensor,
    weight: &Tensor,
    gate: Option<Tensor>,
    dy: Tensor,
    eps: f64,
) -> Result<GatedNormGrads> {
    if fused(&o, ops::HEAD_WIDTH) {
        let (o, dy) = (o.f_contiguous()?, dy.f_contiguous()?);
        let gate = gate.map(|g| g.f_contiguous()).transpose()?;
        let d_weight = ops::heads_backward(&o, weight, gate.as_ref(), &dy, eps)?;
        return Ok(GatedNormGrads { y: o, d_o: dy, d_weight, d_gate: gate });
    }
    let (kind, shape) = (o.kind(), o.size());
    let wide_o = wide(&o)?;
    let rstd = rstd_of(&wide_o, eps)?;
    let normed = wide_o.f_mul(&per_row(&rstd, &o)?)?.f_mul(&wide(weight)?)?;
    let mut dy = wide(&dy)?.f_view(shape.as_slice())?;
    let (mut y, mut d_gate) = (normed.shallow_clone(), None);
    if let Some(gate) = gate {
        let wide_gate = wide(&gate)?.f_view(shape.as_slice())?;
        let silu = wide_gate.f_silu()?;
        let grad = dy.f_mul(&normed)?.f_mul(&silu_slope(&wide_gate)?)?;
        d_gate = Some(grad.f_to_kind(kind)?.f_view(gate.size().as_slice())?);
        y = normed.f_mul(&silu)?;
        dy = dy.f_mul(&silu)?;
    }
    let (d_o, d_weight) = rms_norm_backward(&wide_o, &wide(weight)?, &rstd, dy, None)?;
    Ok(GatedNormGrads { y: y.f_to_kind(kind)?, d_o: d_o.f_to_kind(kind)?, d_weight, d_gate })
}

/// Turns the halves of x `[B, T, H, K]` against each other by the angles whose cos and sin `[T, 1, K / 2]` are given; `back`:
/// the other way, which is the gradient. RoPE (arXiv 2104.09864).
pub fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor, back: bool) -> Result<Tensor> {
    if fused(x, ANY) && x.size().last().is_some_and(|k| k % 16 == 0) && cos.kind() == Kind::BFloat16 {
        return ops::rotary(&x.f_contiguous()?, &cos.f_contiguous()?, &sin.f_contiguous()?, back);
    }
    let half = x.size()[3] / 2;
    let (a, b) = (x.f_narrow(-1, 0, half)?, x.f_narrow(-1, half, half)?);
    let sin = if back { sin.f_neg()? } else { sin.shallow_clone() };
    let turned = [a.f_mul(cos)?.f_sub(&b.f_mul(&sin)?)?, b.f_mul(cos)?.f_add(&a.f_mul(&sin)?)?];
    Ok(Tensor::f_cat(&turned, -1)?)
}

/// The cross-entropy of logits `[rows, vocab]` against labels `[rows]` i64: losses `[rows]` in the accumulation kind, 0 where
/// the label is `ignore`; and, if wanted, the gradient of their sum, in the kind of the logits and in their memory.
pub fn cross_entropy(logits: Tensor, labels: &Tensor, ignore: i64, gradient: bool) -> Result<(Tensor, Option<Tensor>)> {
    if fused(&logits, ANY) {
        let logits = logits.f_contiguous()?;
        let loss = ops::cross_entropy(&logits, labels, ignore, gradient)?;
        return Ok((loss, gradient.then_some(logits)));
    }
    let kind = accumulation_kind(logits.kind());
    let logs = logits.f_log_softmax(-1, kind)?;
    let counted = labels.f_ne(ignore)?.f_to_kind(kind)?;
    let column = labels.f_clamp_min(0)?.f_unsqueeze(1)?;
    let loss = logs.f_gather(1, &column, false)?.f_squeeze_dim(1)?.f_neg()?.f_mul(&counted)?;
    if !gradient {
        return Ok((loss, None));
    }
    let mut grad = logs.f_exp()?;
    let ones = Tensor::f_ones_like(&column.f_to_kind(kind)?)?.f_neg()?;
    let _ = grad.f_scatter_add_(1, &column, &ones)?;
    let _ = grad.f_mul_(&counted.f_unsqueeze(1)?)?;
    Ok((loss, Some(grad.f_to_kind(logits.kind())?)))
}

/// `a b` of a `[M, K]` and b `[K, N]`, in their kind.
pub fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let out = Tensor::f_empty([a.size()[0], b.size()[1]], (a.kind(), a.device()))?;
    product_into(&out, a, b)?;
    Ok(out)
}

/// `out = a b`, of a and b as in [`product`]; out may be wider.
pub fn product_into(out: &Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
    if matmul::product(out, a, b, None)? {
        return Ok(());
    }
    let mut out = out.shallow_clone();
    if out.kind() != a.kind() {
        let _ = out.f_zero_()?;
        return add_product(&mut out, a, b);
    }
    let _ = a.f_mm_out(&out, b)?;
    Ok(())
}

/// `c + a b`, all of one kind: c `[M, N]`, a `[M, K]`, b `[K, N]`.
pub fn product_plus(c: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let out = c.f_empty_like()?;
    if matmul::product(&out, a, b, Some(c))? {
        return Ok(out);
    }
    drop(out);
    Ok(c.f_addmm(a, b)?)
}

/// `sum + a b` of a `[M, K]` and b `[K, N]`, in place where the sum is wider than the factors and the device can: bf16
/// products on CUDA add to f32 sums.
pub fn add_product(sum: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
    if matmul::product(sum, a, b, Some(sum))? {
        return Ok(());
    }
    if sum.kind() == a.kind() {
        let _ = sum.f_addmm_(a, b)?;
    } else if a.device().is_cuda() && sum.kind() == Kind::Float {
        let _ = sum.f_addmm_dtype_out(sum, a, b, Kind::Float)?;
    } else {
        let _ = sum.f_addmm_(&a.f_to_kind(sum.kind())?, &b.f_to_kind(sum.kind())?)?;
    }
    Ok(())
}

/// `sum + scale x`, in place: x of as many numbers as the sum and at least as wide, scale a single number of the kind of x. One
/// pass over memory on CUDA, from f32 to bf16 too.
pub fn add_scaled(sum: &mut Tensor, x: &Tensor, scale: &Tensor) -> Result<()> {
    let kinds = matches!(sum.kind(), Kind::BFloat16 | Kind::Float) && x.kind() == Kind::Float;
    let whole = [&*sum, x].iter().all(|x| x.is_contiguous() && ops::aligned(x)) && sum.numel().is_multiple_of(8);
    let together = [x, scale].iter().all(|x| x.device() == sum.device());
    if runs_on(sum.device()) && kinds && whole && together {
        return ops::add_scaled(sum, x, scale);
    }
    let _ = sum.f_addcmul_(x, scale)?;
    Ok(())
}

/// `sum + x.sum(0)`, in place: sum `[D]`, x `[n, D]` at least as wide. One pass on CUDA, from f32 to bf16 too.
pub fn add_rows(sum: &mut Tensor, x: &Tensor) -> Result<()> {
    let kinds = matches!(sum.kind(), Kind::BFloat16 | Kind::Float) && x.kind() == Kind::Float;
    let whole = sum.is_contiguous() && x.is_contiguous() && ops::aligned(x);
    if runs_on(sum.device()) && kinds && whole && x.device() == sum.device() {
        return ops::add_rows(sum, x);
    }
    let _ = sum.f_add_(&x.f_sum_dim_intlist([0].as_slice(), false, None)?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bridge;
    use crate::testing::{assert_close, rand, randn};
    use tch::Device;

    const F64: (Kind, Device) = (Kind::Double, Device::Cpu);
    const EPS: f64 = 1e-5;

    fn leaf(seed: u64, shape: &[i64]) -> Tensor {
        randn(seed, shape).set_requires_grad(true)
    }

    /// libtorch's own result and derivatives of `f`, in f64.
    fn truth(f: impl Fn() -> Tensor, dy: &Tensor) -> Tensor {
        let y = f();
        bridge::backward(&y, dy).unwrap();
        y.detach()
    }

    #[test]
    fn norms() {
        let (x, w, dy) = (leaf(1, &[2, 5, 24]), leaf(2, &[24]), randn(3, &[2, 5, 24]));
        let y = truth(|| x.rms_norm([24], Some(&w), EPS), &dy);
        let (ours, rstd) = rms_norm(&x.detach(), &w.detach(), EPS).unwrap();
        assert_close("y", &ours, &y, 1e-12);
        let residual = dy.flip([1]);
        let (dx, dw) = rms_norm_backward(&x.detach(), &w.detach(), &rstd, dy.copy(), Some(&residual)).unwrap();
        assert_close("dx", &(dx - residual), &x.grad(), 1e-12);
        assert_close("dweight", &dw.sum_dim_intlist(0, false, None), &w.grad(), 1e-12);
    }

    #[test]
    fn silu_and_swiglu() {
        let (gate, up, dy) = (leaf(1, &[3, 8]), leaf(2, &[3, 8]), randn(3, &[3, 8]));
        let y = truth(|| gate.silu() * &up, &dy);
        assert_close("hidden", &swiglu(&gate.detach(), &up.detach()).unwrap(), &y, 1e-12);
        let grads = swiglu_backward(gate.detach(), up.detach(), dy.copy()).unwrap();
        assert_close("hidden again", &grads.hidden, &y, 1e-12);
        assert_close("dgate", &grads.d_gate, &gate.grad(), 1e-12);
        assert_close("dup", &grads.d_up, &up.grad(), 1e-12);
        let x = leaf(4, &[3, 8]);
        assert_close("silu", &silu(&x.detach()).unwrap(), &truth(|| x.silu(), &dy), 1e-12);
        assert_close("dx", &silu_backward(&x.detach(), dy.copy()).unwrap(), &x.grad(), 1e-12);
    }

    #[test]
    fn gated_norms() {
        for with_gate in [true, false] {
            let (o, w, gate) = (leaf(1, &[2, 3, 4, 6]), leaf(2, &[6]), leaf(3, &[2, 3, 24]));
            let dy = randn(4, &[2, 3, 4, 6]);
            let plain = || {
                let y = o.rms_norm([6], Some(&w), EPS);
                if with_gate { y * gate.silu().view([2, 3, 4, 6]) } else { y }
            };
            let y = truth(plain, &dy);
            let given = with_gate.then(|| gate.detach());
            assert_close("y", &gated_norm(&o.detach(), &w.detach(), given.as_ref(), EPS).unwrap(), &y, 1e-12);
            let grads = gated_norm_backward(o.detach(), &w.detach(), given, dy, EPS).unwrap();
            assert_close("y again", &grads.y, &y, 1e-12);
            assert_close("do", &grads.d_o, &o.grad(), 1e-12);
            assert_close("dweight", &grads.d_weight.sum_dim_intlist(0, false, None), &w.grad(), 1e-12);
            assert_eq!(grads.d_gate.is_some(), with_gate);
            if let Some(d_gate) = grads.d_gate {
                assert_close("dgate", &d_gate, &gate.grad(), 1e-12);
            }
        }
    }

    #[test]
    fn losses() {
        let (logits, ignore) = (leaf(1, &[7, 11]), -100);
        let labels = (rand(2, &[7]) * 11.0).to_kind(Kind::Int64);
        let _ = labels.narrow(0, 2, 2).fill_(ignore);
        let plain = || logits.cross_entropy_loss(&labels, None::<&Tensor>, tch::Reduction::None, ignore, 0.0);
        let loss = truth(plain, &Tensor::ones([7], F64));
        let (ours, grad) = cross_entropy(logits.detach(), &labels, ignore, true).unwrap();
        assert_close("loss", &ours, &loss, 1e-12);
        assert_close("dlogits", &grad.unwrap(), &logits.grad(), 1e-12);
    }

    #[test]
    fn turning_back_undoes_turning() {
        let (x, angles) = (randn(1, &[2, 5, 3, 8]), randn(2, &[5, 1, 4]));
        let turned = rotary(&x, &angles.cos(), &angles.sin(), false).unwrap();
        assert_close("x", &rotary(&turned, &angles.cos(), &angles.sin(), true).unwrap(), &x, 1e-12);
        assert_close("norm", &turned.norm(), &x.norm(), 1e-12);
    }

    #[test]
    fn scaled_sums() {
        let (mut sum, x, scale) = (randn(1, &[5, 3]), randn(2, &[5, 3]), Tensor::from(0.25f64));
        let expected = &sum + &x * 0.25;
        add_scaled(&mut sum, &x, &scale).unwrap();
        assert_close("sum", &sum, &expected, 1e-15);
        let mut narrow = sum.to_kind(Kind::BFloat16);
        let expected = narrow.to_kind(Kind::Double) + &x * 0.25;
        add_scaled(&mut narrow, &x.to_kind(Kind::Float), &scale.to_kind(Kind::Float)).unwrap();
        assert_close("narrow sum", &narrow, &expected, 2.5e-3);
    }

    #[test]
    fn products_add_up_in_the_wider_kind() {
        let (a, b) = (randn(1, &[5, 3]), randn(2, &[3, 4]));
        let mut sum = Tensor::ones([5, 4], F64);
        add_product(&mut sum, &a, &b).unwrap();
        assert_close("sum", &sum, &(a.matmul(&b) + 1.0), 1e-12);
        let narrow = |x: &Tensor| x.to_kind(Kind::BFloat16);
        let mut wide = Tensor::zeros([5, 4], (Kind::Float, Device::Cpu));
        add_product(&mut wide, &narrow(&a), &narrow(&b)).unwrap();
        let expected = narrow(&a).to_kind(Kind::Double).matmul(&narrow(&b).to_kind(Kind::Double));
        assert_close("bf16 to f32", &wide, &expected, 1e-6);
        product_into(&wide, &narrow(&a), &narrow(&b)).unwrap();
        assert_close("bf16 into f32", &wide, &expected, 1e-6);
        assert_close("product", &product(&a, &b).unwrap(), &a.matmul(&b), 1e-12);
        assert_close("product plus", &product_plus(&sum, &a, &b).unwrap(), &(a.matmul(&b) * 2.0 + 1.0), 1e-12);
    }
}
