//! Half a block as one node of the autograd graph, `y = x + f(norm(x))`, on GPUs: with the operations of `kernels::block`
//! between the matrix products, and no more kept for backward than it needs. Norms, gates and feature maps are computed
//! again from what stands before them; of a linear layer remain x, the projections before their activation and o, of an MLP
//! x, gate and up, or under activation checkpointing x. Backward works in the memory of what it has read for the last time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kernels::block;
use kernels::linear::Inputs;
use tch::Tensor;

use super::block::Mlp;
use super::linear_layer::LinearLayer;
use super::softmax_layer::SoftmaxLayer;
use super::{Context, Error, Result};
use crate::config::LayerKind;
use crate::sequence::attention::{self, Attended};
use crate::sequence::{Place, linear};

type Grads = kernels::Result<Vec<Option<Tensor>>>;

/// x `[B, T, D]` as the rows of a matrix.
fn rows(x: &Tensor) -> kernels::Result<Tensor> {
    let width = x.size()[x.dim() - 1];
    Ok(x.f_reshape([-1, width])?)
}

fn clones(x: &[&Tensor]) -> Vec<Tensor> {
    x.iter().map(|x| x.shallow_clone()).collect()
}

/// `x w^T`.
fn project(rows: &Tensor, w: &Tensor) -> kernels::Result<Tensor> {
    block::product(rows, &w.f_transpose(0, 1)?)
}

/// Gradients `[out, in]` of weights to which nothing has been added yet: the first product is written there, whatever was there
/// before, which saves zeroing and reading them.
#[derive(Clone, Default)]
pub struct Unwritten(Arc<Mutex<HashMap<usize, Tensor>>>);

impl Unwritten {
    pub fn new(grads: impl IntoIterator<Item = Tensor>) -> Self {
        Self(Arc::new(Mutex::new(grads.into_iter().map(|grad| (grad.data_ptr() as usize, grad)).collect())))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<usize, Tensor>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is one of them, which it then is no more.
    fn take(&self, grad: &Tensor) -> bool {
        self.lock().remove(&(grad.data_ptr() as usize)).is_some()
    }

    /// Zeroes those that a backward has left, of weights that had no part in the loss, and says how many they were.
    pub(crate) fn zero_rest(&self) -> Result<usize> {
        let rest: Vec<Tensor> = self.lock().drain().map(|(_, grad)| grad).collect();
        for grad in &rest {
            let _ = grad.shallow_clone().f_zero_()?;
        }
        Ok(rest.len())
    }
}

/// The gradient of w, of `y = x w^T`: added to w's own where it has one, which saves a pass over it, else returned.
fn weight_grad(w: &Tensor, dy: &Tensor, x: &Tensor, unwritten: &Unwritten) -> kernels::Result<Option<Tensor>> {
    let (mut sum, dy) = (w.f_grad()?, dy.f_transpose(0, 1)?);
    if !sum.defined() {
        return Ok(Some(block::product(&dy, x)?));
    }
    if unwritten.take(&sum) {
        block::product_into(&sum, &dy, x)?;
    } else {
        block::add_product(&mut sum, &dy, x)?;
    }
    Ok(None)
}

/// The gradient of a norm's weight from `rows` `[n, D]`, of which it is the sum: as [`weight_grad`].
fn norm_grad(weight: &Tensor, rows: &Tensor) -> kernels::Result<Option<Tensor>> {
    let mut sum = weight.f_grad()?;
    if sum.defined() {
        block::add_rows(&mut sum, rows)?;
        return Ok(None);
    }
    Ok(Some(rows.f_sum_dim_intlist([0].as_slice(), false, None)?.f_to_kind(weight.kind())?))
}

/// `x + y w^T`, of x `[B, T, D]` and y `[rows, ..]`.
fn add_projection(x: &Tensor, y: &Tensor, w: &Tensor) -> kernels::Result<Tensor> {
    Ok(block::product_plus(&rows(x)?, y, &w.f_transpose(0, 1)?)?.f_view(x.size().as_slice())?)
}

/// The gradient of x, of the sum of `x w^T` over several `(dy, w)`.
fn input_grad(of: &[(&Tensor, &Tensor)]) -> kernels::Result<Tensor> {
    let mut sum = block::product(of[0].0, of[0].1)?;
    for (dy, w) in &of[1..] {
        block::add_product(&mut sum, dy, w)?;
    }
    Ok(sum)
}

/// What the norm before f keeps, and its backward, which ends every half.
struct Normed {
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    eps: f64,
}

impl Normed {
    /// And the normed rows.
    fn new(x: &Tensor, weight: &Tensor, eps: f64) -> kernels::Result<(Self, Tensor)> {
        let (y, rstd) = block::rms_norm(x, weight, eps)?;
        Ok((Self { x: x.f_detach()?, weight: weight.shallow_clone(), rstd, eps }, rows(&y)?))
    }

    fn again(&self) -> kernels::Result<Tensor> {
        rows(&block::rms_norm(&self.x, &self.weight, self.eps)?.0)
    }

    /// dx and what [`norm_grad`] gives of the norm's weight, from the gradient of the normed rows and dy.
    fn backward(&self, d_rows: Tensor, dy: &Tensor) -> kernels::Result<[Option<Tensor>; 2]> {
        let d_rows = d_rows.f_view(self.x.size().as_slice())?;
        let (dx, dw) = block::rms_norm_backward(&self.x, &self.weight, &self.rstd, d_rows, Some(dy))?;
        Ok([Some(dx), norm_grad(&self.weight, &dw)?])
    }
}

/// What backward needs of an MLP.
struct Gated {
    normed: Normed,
    gate: Tensor,
    up: Tensor,
}

impl Gated {
    fn new(layer: &Mlp, x: &Tensor) -> kernels::Result<Self> {
        let (normed, n) = Normed::new(x, &layer.norm, layer.eps)?;
        Ok(Self { normed, gate: project(&n, &layer.w_gate)?, up: project(&n, &layer.w_up)? })
    }

    fn output(&self, layer: &Mlp) -> kernels::Result<Tensor> {
        add_projection(&self.normed.x, &block::swiglu(&self.gate, &self.up)?, &layer.w_down)
    }

    /// The gradients of x, the norm, gate, up and down; of those of weights what [`weight_grad`] gives.
    fn backward(self, layer: &Mlp, dy: &Tensor, unwritten: &Unwritten) -> kernels::Result<[Option<Tensor>; 5]> {
        let Self { normed, gate, up } = self;
        let dy_rows = rows(dy)?;
        let d_hidden = block::product(&dy_rows, &layer.w_down)?;
        let block::SwigluGrads { hidden, d_gate, d_up } = block::swiglu_backward(gate, up, d_hidden)?;
        let d_down = weight_grad(&layer.w_down, &dy_rows, &hidden, unwritten)?;
        drop(hidden);
        let n = normed.again()?;
        let of = |w, dy| weight_grad(w, dy, &n, unwritten);
        let (dw_gate, dw_up) = (of(&layer.w_gate, &d_gate)?, of(&layer.w_up, &d_up)?);
        drop(n);
        let d_rows = input_grad(&[(&d_gate, &layer.w_gate), (&d_up, &layer.w_up)])?;
        drop((d_gate, d_up));
        let [dx, d_norm] = normed.backward(d_rows, dy)?;
        Ok([dx, d_norm, dw_gate, dw_up, d_down])
    }
}

/// `x + down(silu(gate(n)) * up(n))`, n the norm of x.
pub(super) fn mlp(layer: &Mlp, context: &Context, x: &Tensor) -> Result<Tensor> {
    let (y, gated) = {
        let _guard = tch::no_grad_guard();
        let gated = Gated::new(layer, x)?;
        (gated.output(layer)?, gated)
    };
    attach_mlp(layer, context, x, &y, |layer, dy, unwritten| gated.backward(layer, dy, unwritten))?;
    Ok(y)
}

fn attach_mlp(
    layer: &Mlp,
    context: &Context,
    x: &Tensor,
    y: &Tensor,
    backward: impl FnOnce(&Mlp, &Tensor, &Unwritten) -> kernels::Result<[Option<Tensor>; 5]> + Send + 'static,
) -> kernels::Result<()> {
    let inputs = [x, &layer.norm, &layer.w_gate, &layer.w_up, &layer.w_down];
    let (layer, unwritten) = (layer.shallow_clone(), context.unwritten.clone());
    kernels::bridge::attach(&inputs, &[y], move |mut grads: Vec<Option<Tensor>>| -> Grads {
        let Some(dy) = grads.swap_remove(0) else { return Ok((0..5).map(|_| None).collect()) };
        Ok(backward(&layer, &dy, &unwritten)?.into())
    })
}

/// [`mlp`], a part of the rows after the other, as [`Context::hidden_at_once`] says: what long sequences would need most memory for
/// never exists as a whole (tiled MLPs of Arctic Long Sequence Training, arXiv 2506.13996). Its backward is that of [`mlp_again`].
pub(super) fn mlp_in_parts(layer: &Mlp, context: &Context, x: &Tensor) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    let rows = rows(x)?;
    let of = |from, count| Gated::new(layer, &rows.f_narrow(0, from, count)?)?.output(layer);
    Ok(by_parts(&rows, rows_at_once(layer, context), of)?.f_view(x.size().as_slice())?)
}

/// The node of [`mlp_in_parts`], of which x and the gradient of the output are known: computes a part's gate and up when it gets
/// there, and lets go of both when it is done. In the place of the output is one zero, seen as a tensor of its shape, and
/// so is its gradient.
pub(super) fn mlp_again(layer: &Mlp, context: &Context, x: &Tensor, dy: Tensor) -> Result<(Tensor, Tensor)> {
    let zero = || -> Result<Tensor> { Ok(Tensor::f_zeros([1], (x.kind(), x.device()))?.f_expand(x.size(), false)?) };
    let (y, d_zero, x_rows) = {
        let _guard = tch::no_grad_guard();
        (zero()?, zero()?, rows(&x.f_detach()?)?)
    };
    let most = rows_at_once(layer, context);
    attach_mlp(layer, context, x, &y, move |layer, _, unwritten| {
        let (size, dy) = (dy.size(), rows(&dy)?);
        let mut weights: [Option<Tensor>; 4] = Default::default();
        let dx = by_parts(&x_rows, most, |from, count| {
            let gated = Gated::new(layer, &x_rows.f_narrow(0, from, count)?)?;
            let [dx, of_weights @ ..] = gated.backward(layer, &dy.f_narrow(0, from, count)?, unwritten)?;
            for (sum, part) in weights.iter_mut().zip(of_weights) {
                *sum = match (sum.take(), part) {
                    (Some(mut sum), Some(part)) => Some(sum.f_add_(&part)?),
                    (sum, part) => sum.or(part),
                };
            }
            dx.ok_or_else(|| kernels::Error::Unsupported("an MLP whose input has no gradient".to_owned()))
        })?;
        let [d_norm, dw_gate, dw_up, d_down] = weights;
        Ok([Some(dx.f_view(size.as_slice())?), d_norm, dw_gate, dw_up, d_down])
    })?;
    Ok((y, d_zero))
}

/// `(from, count)` of parts of some rows, at most `most` each but for what makes a multiple of 64, and about equal. Of no rows
/// one, whose products give weights' gradients of zero.
fn parts(rows: i64, most: i64) -> Vec<(i64, i64)> {
    if rows == 0 {
        return vec![(0, 0)];
    }
    let count = (rows + most.max(1) - 1) / most.max(1);
    let each = ((rows + count - 1) / count + 63) / 64 * 64;
    (0..rows).step_by(each as usize).map(|from| (from, each.min(rows - from))).collect()
}

fn rows_at_once(layer: &Mlp, context: &Context) -> i64 {
    context.hidden_at_once / layer.w_gate.size()[0]
}

/// What `of` makes of each part `(from, count)` of the rows of x, as one tensor of the shape of x.
fn by_parts(x: &Tensor, most: i64, mut of: impl FnMut(i64, i64) -> kernels::Result<Tensor>) -> kernels::Result<Tensor> {
    let parts = parts(x.size()[0], most);
    if let [(from, count)] = parts[..] {
        return of(from, count);
    }
    let all = x.f_empty_like()?;
    for (from, count) in parts {
        all.f_narrow(0, from, count)?.f_copy_(&of(from, count)?)?;
    }
    Ok(all)
}

/// `x + out(gated_norm(mix(silu(q), silu(k), v)))` of the projections of n, the norm of x. The sp group must have a scan.
pub(super) fn linear(layer: &LinearLayer, norm: &Tensor, context: &Context, x: &Tensor) -> Result<Tensor> {
    let (b, t, d) = x.size3()?;
    let (heads, eps) = (layer.heads, layer.eps);
    let by_heads = move |x: &Tensor| x.f_view([b, t, heads, d / heads]);
    let mut inputs = vec![x, norm, &layer.wq, &layer.wk, &layer.wv, &layer.wo, &layer.o_norm];
    inputs.extend(&layer.wg);
    let shard = context.shard.clone();
    let (y, normed, q, k, v, gate, o, mut saved) = {
        let _guard = tch::no_grad_guard();
        let (normed, n) = Normed::new(x, norm, eps)?;
        let (q, k, v) = (project(&n, &layer.wq)?, project(&n, &layer.wk)?, project(&n, &layer.wv)?);
        let gate = layer.wg.as_ref().map(|w| project(&n, w)).transpose()?;
        let log_decay = layer.log_decay(&n.f_view([b, t, d])?)?;
        drop(n);
        let (q_on, k_on) = (by_heads(&block::silu(&q)?)?, by_heads(&block::silu(&k)?)?);
        let mut given = Inputs::new(&q_on, &k_on, &by_heads(&v)?, log_decay.as_ref())?;
        given.decay_grad = layer.learns_decay();
        drop((q_on, k_on));
        let _place = shard.at(Place::Forward(LayerKind::Linear));
        let linear::Forward { o, saved, .. } = linear::forward(&shard, layer.mixer.as_ref(), given, None)?;
        let mixed = block::gated_norm(&o, &layer.o_norm, gate.as_ref(), eps)?;
        let y = add_projection(x, &mixed.f_view([b * t, d])?, &layer.wo)?;
        (y, normed, q, k, v, gate, o, saved)
    };
    // Computed again from q and k.
    (saved.inputs().q, saved.inputs().k) = (Tensor::new(), Tensor::new());
    let layer = layer.shallow_clone();
    let weights = clones(&[&layer.wq, &layer.wk, &layer.wv, &layer.wo]);
    let (count, unwritten) = (inputs.len(), context.unwritten.clone());
    kernels::bridge::attach(&inputs, &[&y], move |mut grads: Vec<Option<Tensor>>| -> Grads {
        let Some(dy) = grads.swap_remove(0) else { return Ok((0..count).map(|_| None).collect()) };
        drop(grads);
        let [wq, wk, wv, wo] = &weights[..] else { return Ok(vec![]) };
        let dy_rows = rows(&dy)?;
        let d_mixed = by_heads(&block::product(&dy_rows, wo)?)?;
        let block::GatedNormGrads { y, d_o, d_weight: d_o_norm, d_gate } =
            block::gated_norm_backward(o, &layer.o_norm, gate, d_mixed, eps)?;
        let d_wo = weight_grad(wo, &dy_rows, &y.f_view([b * t, d])?, &unwritten)?;
        drop(y);

        (saved.inputs().q, saved.inputs().k) = (by_heads(&block::silu(&q)?)?, by_heads(&block::silu(&k)?)?);
        let place = shard.at(Place::Backward(LayerKind::Linear));
        let back = linear::backward(&shard, layer.mixer.as_ref(), saved, &d_o).map_err(|e| e.into_kernels())?.grads;
        drop(place);
        drop((d_o, v));
        let (dq, dk) =
            (block::silu_backward(&q, rows_of(back.dq, d)?)?, block::silu_backward(&k, rows_of(back.dk, d)?)?);
        drop((q, k));
        let dv = rows_of(back.dv, d)?;

        let n = normed.again()?;
        let mut of = vec![(&dq, wq), (&dk, wk), (&dv, wv)];
        let weight = |w, dy| weight_grad(w, dy, &n, &unwritten);
        let mut d_weights = vec![weight(wq, &dq)?, weight(wk, &dk)?, weight(wv, &dv)?, d_wo];
        d_weights.push(norm_grad(&layer.o_norm, &d_o_norm)?);
        if let (Some(d_gate), Some(wg)) = (&d_gate, &layer.wg) {
            d_weights.push(weight(wg, d_gate)?);
            of.push((d_gate, wg));
        }
        let mut d_rows = input_grad(&of)?;
        if let Some(d_decay) = back.dlog_decay.filter(|_| layer.learns_decay()) {
            let _ = d_rows.f_add_(&decay_backward(&layer, &n.f_view([b, t, d])?, &d_decay)?.f_view([b * t, d])?)?;
        }
        let [dx, d_norm] = normed.backward(d_rows, &dy)?;
        Ok([dx, d_norm].into_iter().chain(d_weights).collect())
    })?;
    Ok(y)
}

/// `[B, T, H, ..]` as `[B T, D]`.
fn rows_of(x: Tensor, d: i64) -> kernels::Result<Tensor> {
    Ok(x.f_reshape([-1, d])?)
}

/// The gradient of the norm's output through a learned decay, which is small work: libtorch's own derivatives of it. Those of
/// the decay's parameters are added to their leaves.
fn decay_backward(layer: &LinearLayer, n: &Tensor, d_decay: &Tensor) -> kernels::Result<Tensor> {
    let n = n.f_detach()?.f_set_requires_grad(true)?;
    let log_decay = tch::with_grad(|| layer.log_decay(&n)).map_err(Error::into_kernels)?;
    if let Some(log_decay) = log_decay {
        kernels::bridge::backward(&log_decay, &d_decay.f_to_kind(log_decay.kind())?)?;
    }
    Ok(n.f_grad()?)
}

/// `x + out(attention(q, k, v))` of the projections of n, the norm of x; q and k turned by their angles. And what attention need not
/// compute again, or has `before`.
pub(super) fn softmax(
    layer: &SoftmaxLayer,
    (norm, eps): (&Tensor, f64),
    context: &Context,
    x: &Tensor,
    before: Option<Attended>,
) -> Result<(Tensor, Option<Attended>)> {
    let (b, t, d) = x.size3()?;
    let inputs = [x, norm, &layer.wq, &layer.wk, &layer.wv, &layer.wo];
    let (shard, head_dim) = (context.shard.clone(), layer.head_dim);
    let (cos, sin) = (context.cos.shallow_clone(), context.sin.shallow_clone());
    let by_heads = move |x: &Tensor| -> kernels::Result<Tensor> {
        let heads = x.size()[1] / head_dim;
        Ok(x.f_view([b, t, heads, head_dim])?)
    };
    let (y, normed, o, saved, attended) = {
        let _guard = tch::no_grad_guard();
        let (normed, n) = Normed::new(x, norm, eps)?;
        let turned = |w| block::rotary(&by_heads(&project(&n, w)?)?, &cos, &sin, false);
        let (q, k, v) = (turned(&layer.wq)?, turned(&layer.wk)?, by_heads(&project(&n, &layer.wv)?)?);
        drop(n);
        let given = attention::Inputs::new(&q, &k, &v, layer.scale(), true)?;
        let _place = shard.at(Place::Forward(LayerKind::Softmax));
        let attention::Forward { o, saved } = attention::forward(&shard, &given, before)?;
        let attended = Attended::of(shard.attention.as_ref(), &saved);
        let y = add_projection(x, &o.f_reshape([b * t, d])?, &layer.wo)?;
        (y, normed, o, saved, attended)
    };
    let (weights, unwritten) = (clones(&inputs[2..]), context.unwritten.clone());
    kernels::bridge::attach(&inputs, &[&y], move |mut grads: Vec<Option<Tensor>>| -> Grads {
        let Some(dy) = grads.swap_remove(0) else { return Ok((0..6).map(|_| None).collect()) };
        drop(grads);
        let [wq, wk, wv, wo] = &weights[..] else { return Ok(vec![]) };
        let dy_rows = rows(&dy)?;
        let d_wo = weight_grad(wo, &dy_rows, &o.f_reshape([b * t, d])?, &unwritten)?;
        let d_o = block::product(&dy_rows, wo)?.f_view(o.size().as_slice())?;
        drop(o);
        let place = shard.at(Place::Backward(LayerKind::Softmax));
        let back = shard.attention.backward(&shard, saved, &d_o).map_err(|e| e.into_kernels())?;
        drop(place);
        drop(d_o);
        let flat = |x: Tensor, w: &Tensor| rows_of(x, w.size()[0]);
        let dq = flat(block::rotary(&back.dq, &cos, &sin, true)?, wq)?;
        let dk = flat(block::rotary(&back.dk, &cos, &sin, true)?, wk)?;
        let dv = flat(back.dv, wv)?;
        let n = normed.again()?;
        let weight = |w, dy| weight_grad(w, dy, &n, &unwritten);
        let d_weights = [weight(wq, &dq)?, weight(wk, &dk)?, weight(wv, &dv)?, d_wo];
        drop(n);
        let d_rows = input_grad(&[(&dq, wq), (&dk, wk), (&dv, wv)])?;
        let [dx, d_norm] = normed.backward(d_rows, &dy)?;
        Ok([dx, d_norm].into_iter().chain(d_weights).collect())
    })?;
    Ok((y, attended))
}
