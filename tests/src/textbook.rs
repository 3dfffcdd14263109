//! Attention as a textbook has it, in the kind of its inputs: what FlashAttention's rule compares with.

use anyhow::Result;
use kernels::linear::oracle::Whole;
use kernels::linear::{Decay, Inputs};
use tch::{Kind, Tensor};

use crate::{Results, leaf};

/// `((q k^T) * D) v` with `D_ij = e^{b_i - b_j}`, document by document, every product rounded to the kind of the inputs and
/// gradients by libtorch's autograd; b and D alone are computed in f32. Causal only.
pub fn linear(whole: &Whole, d_o: &Tensor) -> Result<Results> {
    let (x, kind) = (whole.inputs, whole.inputs.q.kind());
    let ((b, tokens, h, dk), dv) = (x.q.size4()?, x.v.size()[3]);
    let (q, k, v, log_decay) = (leaf(&x.q), leaf(&x.k), leaf(&x.v), x.decay.tensor().map(leaf));
    let rows = whole.cu_seqlens.map_or(b, |cu| cu.len() as i64 - 1);
    let zero = || Tensor::zeros([rows, h, dk, dv], (kind, x.q.device()));
    let initial = leaf(&whole.initial_state.map_or_else(zero, Tensor::shallow_clone));
    let logs = log_decays(x, log_decay.as_ref());
    let whole_sequence = [0, tokens];
    let cu_seqlens = whole.cu_seqlens.unwrap_or(&whole_sequence);
    let (mut os, mut states) = (Vec::new(), Vec::new());
    for (n, ends) in cu_seqlens.windows(2).enumerate() {
        let length = ends[1] - ends[0];
        let part = |x: &Tensor| x.narrow(1, ends[0], length).transpose(1, 2); // [B, H, T, ..]
        let factor = |sums: Tensor| sums.exp().to_kind(kind);
        let (q, k, v, g) = (part(&q), part(&k), part(&v), part(&logs));
        let sums = g.cumsum(2, Kind::Float);
        let total = g.sum_dim_intlist(2, true, Kind::Float);
        let weights = factor((sums.unsqueeze(3) - sums.unsqueeze(2)).clamp_max(0.0)); // [B, H, T, T, K]
        let scores = match &x.decay {
            Decay::Channel(_) => (q.unsqueeze(3) * weights * k.unsqueeze(2)).sum_dim_intlist(-1, false, kind),
            _ => q.matmul(&k.transpose(2, 3)) * weights.select(-1, 0),
        };
        let entry = match whole.cu_seqlens {
            Some(_) => initial.narrow(0, n as i64, 1),
            None => initial.shallow_clone(),
        };
        let o = scores.tril(0).matmul(&v) + (q * factor(sums.shallow_clone())).matmul(&entry);
        let end = (k * factor((&total - &sums).clamp_max(0.0))).transpose(2, 3).matmul(&v);
        states.push(end + entry * factor(total.transpose(2, 3)));
        os.push((o * whole.scale).transpose(1, 2));
    }
    let o = Tensor::cat(&os, 1);
    kernels::bridge::backward(&o, d_o)?;
    let mut results = Results::from([
        ("o", o.detach()),
        ("final_state", Tensor::cat(&states, 0).detach()),
        ("dq", q.grad()),
        ("dk", k.grad()),
        ("dv", v.grad()),
        ("dinitial_state", initial.grad()),
    ]);
    results.extend(log_decay.map(|g| ("dlog_decay", g.grad())));
    Ok(results)
}

/// `[o, dq, dk, dv]` of causal attention in the kind of the inputs, by libtorch's autograd.
pub fn softmax([q, k, v, d_o]: [&Tensor; 4], scale: f64) -> [Tensor; 4] {
    let [q, k, v] = [q, k, v].map(|x| x.copy().set_requires_grad(true));
    let group = q.size()[2] / k.size()[2];
    let heads = |x: &Tensor, group: i64| x.repeat_interleave_self_int(group, 2, None).transpose(1, 2);
    let ahead = Tensor::ones([q.size()[1], k.size()[1]], (Kind::Bool, q.device())).triu(1);
    let scores =
        (heads(&q, 1).matmul(&heads(&k, group).transpose(2, 3)) * scale).masked_fill(&ahead, f64::NEG_INFINITY);
    let o = scores.softmax(-1, None).matmul(&heads(&v, group)).transpose(1, 2);
    let grads = Tensor::run_backward(&[(&o * d_o).sum(o.kind())], &[&q, &k, &v], false, false);
    let [dq, dk, dv] = <[Tensor; 3]>::try_from(grads).expect("three gradients");
    [o.detach(), dq, dk, dv]
}

/// Log-decays `[B, T, H, K]` in f32, whatever the form of the decay.
fn log_decays(x: &Inputs, log_decay: Option<&Tensor>) -> Tensor {
    let size = x.q.size();
    let all = match (&x.decay, log_decay) {
        (Decay::Head(_), Some(g)) => g.view([1, 1, -1, 1]),
        (Decay::Token(_), Some(g)) => g.unsqueeze(-1),
        (Decay::Channel(_), Some(g)) => g.shallow_clone(),
        _ => Tensor::zeros([1, 1, 1, 1], (Kind::Float, x.q.device())),
    };
    all.to_kind(Kind::Float).expand(size, false)
}
