//! Unmasked (bidirectional) linear attention over a sharded sequence: LASP-2 (arXiv 2502.07563), Algorithms 1 and 3.
//! Every token reads the sum over its whole document, so one AllReduce of a state per document that crosses ranks does
//! it; documents that lie on one rank are computed while it is in flight.

use collectives::Reduce;
use kernels::linear::{Decay, Grads, Inputs, accumulation_kind, full};
use tch::Tensor;

use super::{Error, Plan, Result, Shard};

/// o `[B, T, H, V]`, each document's state, and what backward needs.
pub struct Forward {
    pub o: Tensor,
    /// `[B, H, K, V]`, or `[N, H, K, V]` for N packed documents; the same on every rank.
    pub states: Tensor,
}

pub struct Backward {
    pub grads: Grads,
    /// Of `states`, and so of the initial states; the same on every rank.
    pub state_grads: Tensor,
}

/// `initial_state` as in [`super::linear::States`]; it is added to the document's sum.
pub fn forward(shard: &Shard, x: &Inputs, initial_state: Option<&Tensor>, scale: f64) -> Result<Forward> {
    let _guard = tch::no_grad_guard();
    if !matches!(x.decay, Decay::None) {
        return Err(Error::Unsupported(
            "log_decay with mask full: a decay is causal by nature; use mask causal, or leave log_decay out".to_owned(),
        ));
    }
    let mut states = sums(shard, x, |part, _| Ok(full::summarize(part)?))?;
    if let Some(initial) = initial_state {
        states = states.f_add(&initial.f_to_kind(states.kind())?)?;
    }
    let o = x.v.f_zeros_like()?;
    for (part, (start, length), state) in parts(&shard.plan, x, &states)? {
        o.f_narrow(1, start, length)?.f_copy_(&full::run(&part, &state, scale)?)?;
    }
    Ok(Forward { o, states })
}

/// do: `[B, T, H, V]`.
pub fn backward(shard: &Shard, x: &Inputs, states: &Tensor, d_o: &Tensor, scale: f64) -> Result<Backward> {
    let _guard = tch::no_grad_guard();
    let state_grads = sums(shard, x, |part, (start, length)| {
        Ok(full::summarize_grad(part, &d_o.f_narrow(1, start, length)?, scale)?)
    })?;
    let (dq, dk, dv) = (x.q.f_zeros_like()?, x.k.f_zeros_like()?, x.v.f_zeros_like()?);
    let with_grads = parts(&shard.plan, x, &state_grads)?;
    for ((part, (start, length), state), (_, _, grad)) in parts(&shard.plan, x, states)?.into_iter().zip(with_grads) {
        let grads = full::run_grad(&part, &d_o.f_narrow(1, start, length)?, &state, &grad, scale)?;
        for (whole, part) in [(&dq, grads.dq), (&dk, grads.dk), (&dv, grads.dv)] {
            whole.f_narrow(1, start, length)?.f_copy_(&part)?;
        }
    }
    Ok(Backward { grads: Grads { dq, dk, dv, dlog_decay: None }, state_grads })
}

/// A piece's inputs, its first token and their number, and its document's row of `states`.
type Part = (Inputs, (i64, i64), Tensor);

/// The pieces of this rank.
fn parts(plan: &Plan, x: &Inputs, states: &Tensor) -> Result<Vec<Part>> {
    plan.pieces
        .iter()
        .map(|piece| {
            let range = (piece.local.start, piece.tokens());
            let state = if plan.documents() > 1 {
                states.f_narrow(0, piece.document as i64, 1)?
            } else {
                states.shallow_clone()
            };
            Ok((x.narrow(range.0, range.1)?, range, state))
        })
        .collect()
}

/// Sums `of` over each document: `[B, H, K, V]`, or `[N, H, K, V]` when packed, accumulation kind, on every rank.
fn sums(shard: &Shard, x: &Inputs, of: impl Fn(&Inputs, (i64, i64)) -> Result<Tensor>) -> Result<Tensor> {
    let plan = &shard.plan;
    let ((b, _, h, dk), dv) = (x.q.size4()?, x.v.size()[3]);
    let rows = if plan.documents() > 1 { plan.documents() as i64 } else { b };
    let sums = Tensor::f_zeros([rows, h, dk, dv], (accumulation_kind(x.q.kind()), x.q.device()))?;
    for piece in &plan.pieces {
        let range = (piece.local.start, piece.tokens());
        let part = of(&x.narrow(range.0, range.1)?, range)?;
        let mut row =
            if plan.documents() > 1 { sums.f_narrow(0, piece.document as i64, 1)? } else { sums.shallow_clone() };
        let _ = row.f_add_(&part)?;
    }
    if shard.group.size() == 1 {
        return Ok(sums);
    }
    Ok(shard.group.all_reduce(&sums, Reduce::Sum)?.wait()?)
}
