//! One rank's part of the operator: forward and, given do, backward, under the method chosen.

use anyhow::Result;
use collectives::{Group, Reduce};
use kernels::linear;
use kernels::linear::chunkwise::Chunkwise;
use runtime::sequence::left_product::LeftProduct;
use runtime::sequence::{Layout, LinearMethod, Plan, Shard, attention, linear as causal, linear_full as full, method};
use tch::Tensor;

use super::inputs::{Inputs, accumulation};
use super::{Mixer, Task};

/// A result as this rank has it.
pub enum Part {
    /// `[B, T, ..]`: of this rank's tokens.
    Tokens(Tensor),
    /// The same on every rank.
    Whole(Tensor),
}

type Results = Vec<(&'static str, Part)>;

pub fn run(task: &Task, world: &Group, layout: Layout, x: Inputs) -> Result<Results> {
    let plan = Plan::new(layout, x.cu_seqlens.as_deref(), world.rank())?;
    let (linear, attention) = match task.mixer {
        Mixer::Linear => (task.method.as_str(), method::ATTENTIONS[0]),
        Mixer::Softmax => (method::SCANS[0], task.method.as_str()),
    };
    let (linear, attention) = (method::linear(linear, world)?, method::softmax(attention, world)?);
    let shard = Shard { group: world.clone(), plan, linear, attention };
    match (task.mixer, &shard.linear) {
        (Mixer::Softmax, _) => softmax(task, &shard, x),
        (Mixer::Linear, _) if !task.causal => linear_full(task, &shard, x),
        (Mixer::Linear, LinearMethod::Scan(_)) => linear_causal(task, &shard, x),
        (Mixer::Linear, LinearMethod::LeftProduct(method)) => left_product(task, &shard, method.as_ref(), x),
    }
}

fn softmax(task: &Task, shard: &Shard, x: Inputs) -> Result<Results> {
    let scale = task.scale.unwrap_or((x.sizes.key as f64).powf(-0.5));
    let inputs = attention::Inputs::new(&x.q, &x.k, &x.v, scale, task.causal)?;
    let forward = shard.attention.forward(shard, &inputs)?;
    let mut results = vec![("o", Part::Tokens(forward.o))];
    if let Some(d_o) = &x.d_o {
        let grads = shard.attention.backward(shard, forward.saved, d_o)?;
        results.extend([
            ("dq", Part::Tokens(grads.dq)),
            ("dk", Part::Tokens(grads.dk)),
            ("dv", Part::Tokens(grads.dv)),
        ]);
    }
    Ok(results)
}

fn linear_causal(task: &Task, shard: &Shard, x: Inputs) -> Result<Results> {
    let mixer = Chunkwise::new(task.chunk, task.scale.unwrap_or(1.0))?;
    let inputs = linear::Inputs::new(&x.q, &x.k, &x.v, x.log_decay.as_ref())?;
    let forward = causal::forward(shard, &mixer, inputs, Some(causal::States { initial: x.initial_state.as_ref() }))?;
    let final_state = join_states(task, shard, &x, forward.final_states, x.initial_state.as_ref())?;
    let mut results = vec![("o", Part::Tokens(forward.o)), ("final_state", Part::Whole(final_state))];
    if let Some(d_o) = &x.d_o {
        let backward = causal::backward(shard, &mixer, forward.saved, d_o)?;
        let dinitial_state = join_states(task, shard, &x, backward.initial_state_grads, None)?;
        results.extend(gradients(shard, backward.grads)?);
        results.push(("dinitial_state", Part::Whole(dinitial_state)));
    }
    Ok(results)
}

fn left_product(task: &Task, shard: &Shard, method: &dyn LeftProduct, x: Inputs) -> Result<Results> {
    let inputs = linear::Inputs::new(&x.q, &x.k, &x.v, x.log_decay.as_ref())?;
    let forward = method.forward(shard, inputs, task.scale.unwrap_or(1.0))?;
    let mut results = vec![("o", Part::Tokens(forward.o))];
    if let Some(d_o) = &x.d_o {
        results.extend(gradients(shard, method.backward(shard, forward.saved, d_o)?)?);
    }
    Ok(results)
}

fn linear_full(task: &Task, shard: &Shard, x: Inputs) -> Result<Results> {
    let scale = task.scale.unwrap_or(1.0);
    let inputs = linear::Inputs::new(&x.q, &x.k, &x.v, None)?;
    let forward = full::forward(shard, &inputs, x.initial_state.as_ref(), scale)?;
    let mut results =
        vec![("o", Part::Tokens(forward.o)), ("final_state", Part::Whole(forward.states.shallow_clone()))];
    if let Some(d_o) = &x.d_o {
        let backward = full::backward(shard, &inputs, &forward.states, d_o, scale)?;
        results.extend(gradients(shard, backward.grads)?);
        results.push(("dinitial_state", Part::Whole(backward.state_grads)));
    }
    Ok(results)
}

fn gradients(shard: &Shard, grads: linear::Grads) -> Result<Results> {
    let mut results =
        vec![("dq", Part::Tokens(grads.dq)), ("dk", Part::Tokens(grads.dk)), ("dv", Part::Tokens(grads.dv))];
    results.extend(match grads.dlog_decay {
        // `[H]`: this rank's sum over its own tokens.
        Some(dg) if dg.dim() == 1 => {
            Some(("dlog_decay", Part::Whole(shard.group.all_reduce(&dg, Reduce::Sum)?.wait()?)))
        }
        dg => dg.map(|dg| ("dlog_decay", Part::Tokens(dg))),
    });
    Ok(results)
}

/// The states of all documents `[N, H, K, V]` (one document: `[B, H, K, V]`) on every rank, from those that each rank knows.
/// An empty document is on no rank: it keeps its row of `empty`, or zero.
fn join_states(
    task: &Task,
    shard: &Shard,
    x: &Inputs,
    known: Vec<(usize, Tensor)>,
    empty: Option<&Tensor>,
) -> Result<Tensor> {
    let plan = &shard.plan;
    let packed = x.cu_seqlens.is_some();
    let rows = if packed { plan.documents() as i64 } else { x.sizes.batch };
    let shape = [rows, x.sizes.heads, x.sizes.key, x.sizes.value];
    let kind = accumulation(task.kind);
    let states = Tensor::f_zeros(shape, (kind, x.q.device()))?;
    let put = |document: usize, state: &Tensor| -> Result<()> {
        let (start, count) = if packed { (document as i64, 1) } else { (0, rows) };
        Ok(states.f_narrow(0, start, count)?.f_copy_(state)?)
    };
    for (document, state) in &known {
        put(*document, state)?;
    }
    if let Some(empty) = empty.filter(|_| plan.rank == 0) {
        for document in (0..plan.documents()).filter(|&n| plan.document(n).is_empty()) {
            put(document, &empty.f_narrow(0, document as i64, 1)?)?;
        }
    }
    Ok(shard.group.all_reduce(&states, Reduce::Sum)?.wait()?)
}
