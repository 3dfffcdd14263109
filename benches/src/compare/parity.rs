//! No figure without parity: every method's output and gradients on every rank, on a short sequence of odd length, whole and
//! as packed documents, against the f64 oracle over the whole sequence.

use anyhow::{Context, Result, bail};
use collectives::{Group, Reduce};
use kernels::linear::Inputs;
use kernels::linear::oracle::Whole;
use kernels::softmax::{Tile, oracle};
use kernels::testing::{relative_rms, rms};
use runtime::sequence::{Layout, Plan};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::inputs::Tokens;
use super::method::Entrant;
use super::operator::{Operator, scale};
use super::{Mixer, Options};
use crate::exchange::gather;

/// The sequence.
struct Short {
    /// Boundaries of documents that cross ranks, are of one token, and are empty.
    documents: [i64; 6],
    /// K = V at most.
    widest: i64,
}

impl Short {
    fn on(device: Device) -> Short {
        match device {
            // Each width of a head has kernels of its own there, and a segment is to be several of their chunks.
            Device::Cuda(_) => Short { documents: [0, 137, 138, 138, 390, 517], widest: i64::MAX },
            // Wider heads add time and nothing else.
            _ => Short { documents: [0, 37, 38, 38, 78, 101], widest: 32 },
        }
    }

    fn tokens(&self) -> i64 {
        self.documents[5]
    }
}

/// What one rank found.
#[derive(Debug, Serialize, Deserialize)]
struct Found {
    method: String,
    documents: usize,
    tensor: String,
    /// Relative RMS.
    error: f64,
    tolerance: f64,
}

/// An error that names method, tensor and rank where one is off; the same on every rank. Collective.
pub(super) fn check(options: &Options, group: &Group, entrants: &[Entrant]) -> Result<()> {
    check_on(&Short::on(options.device), options, group, entrants)
}

fn check_on(short: &Short, options: &Options, group: &Group, entrants: &[Entrant]) -> Result<()> {
    let mut found = Vec::new();
    for cu_seqlens in [&[0, short.tokens()][..], &short.documents] {
        let truth = Truth::new(options, short, cu_seqlens)?;
        for entrant in entrants.iter().filter(|entrant| entrant.refused.is_none()) {
            let (method, documents) = (entrant.method.label(), cu_seqlens.len() - 1);
            tracing::debug!("rank {}: {method} against the f64 oracle, documents: {documents}", group.rank());
            let compared = compare(options, group, entrant, &truth);
            found.extend(compared.with_context(|| format!("{} against the f64 oracle", entrant.method.label()))?);
        }
    }
    for (rank, found) in gather(group, &found)?.into_iter().enumerate() {
        // A NaN is within no tolerance.
        if let Some(off) = found.iter().find(|f| f.error > f.tolerance || f.error.is_nan()) {
            bail!(
                "{}: {} on rank {rank} of {} differs from the f64 oracle: relative RMS error {:.2e}, expected at most {:.0e} \
                 ({} tokens, {} documents); so there are no figures",
                off.method,
                off.tensor,
                group.size(),
                off.error,
                off.tolerance,
                short.tokens(),
                off.documents
            );
        }
    }
    Ok(())
}

/// The whole sequence and what the oracle makes of it: o, dq, dk, dv and, with a decay, dlog_decay.
struct Truth {
    cu_seqlens: Vec<i64>,
    dim: i64,
    tensors: Vec<(&'static str, Tensor)>,
    tolerance: f64,
}

impl Truth {
    fn new(options: &Options, short: &Short, cu_seqlens: &[i64]) -> Result<Self> {
        let dim = options.config.model.head_dim().min(short.widest);
        let x = Tokens::new(std::slice::from_ref(&(0..short.tokens())), options, dim)?;
        let tensors = truth(options.mixer, &x, cu_seqlens)?;
        let tolerance = match x.q.kind() {
            Kind::Double => 1e-10,
            Kind::BFloat16 => 2.0 * naive_error(options.mixer, &x)?,
            _ => 1e-5,
        };
        Ok(Self { cu_seqlens: cu_seqlens.to_vec(), dim, tensors, tolerance })
    }
}

fn truth(mixer: Mixer, x: &Tokens, cu_seqlens: &[i64]) -> Result<Vec<(&'static str, Tensor)>> {
    let scale = scale(x.q.size()[3]);
    Ok(match mixer {
        Mixer::Linear => {
            let inputs = Inputs::new(&x.q, &x.k, &x.v, x.log_decay.as_ref())?;
            let cu_seqlens = Some(cu_seqlens);
            let whole = Whole { inputs: &inputs, cu_seqlens, initial_state: None, causal: true, scale };
            let (o, grads) = (whole.forward()?.o, whole.backward(&x.d_o)?);
            let all = [("o", o), ("dq", grads.dq), ("dk", grads.dk), ("dv", grads.dv)];
            all.into_iter().chain(grads.dlog_decay.map(|grad| ("dlog_decay", grad))).collect()
        }
        Mixer::Softmax => {
            let documents = cu_seqlens.windows(2).map(|w| w[0]..w[1]).filter(|document| !document.is_empty());
            let tiles: Vec<_> = documents.map(|d| Tile { q: d.clone(), k: d, causal: true }).collect();
            let (o, lse) = oracle::forward(&x.q, &x.k, &x.v, &tiles, scale)?;
            let (dq, dk, dv) = oracle::backward(&x.q, &x.k, &x.v, &o, &lse, &x.d_o, &tiles, scale)?;
            vec![("o", o), ("dq", dq), ("dk", dk), ("dv", dv)]
        }
    })
}

fn compare(options: &Options, group: &Group, entrant: &Entrant, truth: &Truth) -> Result<Vec<Found>> {
    let tokens = truth.cu_seqlens.last().copied().unwrap_or(0);
    let layout = Layout::new(entrant.method.layout, tokens, group.size())?;
    let plan = Plan::new(layout, Some(&truth.cu_seqlens), group.rank())?;
    let x = Tokens::of_rank(&plan, options, truth.dim)?;
    let mut operator = Operator::new(entrant.shard(group, plan.clone()), options, x, true)?;
    let o = operator.forward()?.shallow_clone();
    let grads = operator.backward()?;
    let mut ours = vec![o, grads.dq, grads.dk, grads.dv];
    if let Some(grad) = grads.dlog_decay {
        let constant = grad.dim() == 1;
        let grad = grad.f_to_kind(Kind::Double)?;
        ours.push(if constant { group.all_reduce(&grad, Reduce::Sum)?.wait()? } else { grad });
    }
    if ours.len() != truth.tensors.len() {
        bail!("{}: found {} results, expected {}", entrant.method.label(), ours.len(), truth.tensors.len());
    }
    let mut found = Vec::with_capacity(ours.len());
    for ((tensor, whole), ours) in truth.tensors.iter().zip(ours) {
        let reference =
            if whole.dim() == 1 { whole.shallow_clone() } else { plan.layout.shard(whole, 1, plan.rank)? };
        if ours.size() != reference.size() {
            bail!("{}: {tensor} has shape {:?}, expected {:?}", entrant.method.label(), ours.size(), reference.size());
        }
        // A share that is zero but for rounding is held against a hundredth of the whole.
        let size = rms(&reference).max(0.01 * rms(whole));
        let error = rms(&ours.f_to_kind(Kind::Double)?.f_sub(&reference)?) / if size > 0.0 { size } else { 1.0 };
        found.push(Found {
            method: entrant.method.label(),
            documents: truth.cu_seqlens.len() - 1,
            tensor: (*tensor).to_owned(),
            error,
            tolerance: truth.tolerance,
        });
    }
    Ok(found)
}

/// The largest error that textbook attention without a decay makes when each of its results is rounded to bf16.
fn naive_error(mixer: Mixer, x: &Tokens) -> Result<f64> {
    let (heads, kv_heads) = (x.q.size()[2], x.k.size()[2]);
    let leaf = |x: &Tensor| -> Result<Tensor> { Ok(x.f_detach()?.f_set_requires_grad(true)?) };
    let (q, k, v) = (leaf(&x.q)?, leaf(&x.k)?, leaf(&x.v)?);
    let per_query = |x: &Tensor| x.f_repeat_interleave_self_int(heads / kv_heads, 2, None)?.f_transpose(1, 2);
    let scores = q.f_transpose(1, 2)?.f_matmul(&per_query(&k)?.f_transpose(-1, -2)?)?;
    let scores = scores.f_mul_scalar(scale(q.size()[3]))?;
    let weights = match mixer {
        Mixer::Linear => scores.f_tril(0)?,
        Mixer::Softmax => {
            let hidden = scores.f_ones_like()?.f_triu(1)?.f_to_kind(Kind::Bool)?;
            scores.f_masked_fill(&hidden, f64::NEG_INFINITY)?.f_softmax(-1, None::<Kind>)?
        }
    };
    let o = weights.f_matmul(&per_query(&v)?)?.f_transpose(1, 2)?;
    kernels::bridge::backward(&o, &x.d_o)?;
    let ours = [o.f_detach()?, q.f_grad()?, k.f_grad()?, v.f_grad()?];
    let undecayed = Tokens {
        q: x.q.shallow_clone(),
        k: x.k.shallow_clone(),
        v: x.v.shallow_clone(),
        d_o: x.d_o.shallow_clone(),
        log_decay: None,
    };
    let truth = truth(mixer, &undecayed, &[0, x.q.size()[1]])?;
    let errors = ours.iter().zip(&truth).map(|(ours, (_, truth))| relative_rms(ours, truth));
    errors.reduce(f64::max).context("no tensors")
}

#[cfg(test)]
mod tests {
    use super::*;
    use collectives::local;
    use runtime::config::{Config, LayoutKind};

    use crate::compare::{Method, Mode};

    /// Wider heads and longer segments leave the tolerances as far away.
    #[test]
    fn the_sequence_for_gpus_agrees_on_cpus_too() {
        for (mixer, name, decay, dtype) in [
            (Mixer::Linear, "lasp2", "lightning", "bf16"),
            (Mixer::Linear, "lasp2", "token", "f32"),
            (Mixer::Linear, "lasp2", "token", "bf16"),
            (Mixer::Softmax, "lasp2h", "none", "bf16"),
        ] {
            let text = format!(
                "[model]\nheads = 2\nkv_heads = 1\ndim = 256\ndecay = \"{decay}\"\n[train]\ndtype = \"{dtype}\"\n"
            );
            let options = Options {
                mixer,
                mode: Mode::Operator,
                methods: Method::list(name, mixer, LayoutKind::Zigzag).unwrap(),
                rounds: 1,
                device: Device::Cpu,
                config: Config::from_toml_str(&text, "sizes", &[]).unwrap(),
            };
            let checked = local::run(2, |group| -> Result<()> {
                let entrants = [Entrant::new(&options.methods[0], &options, &group)?];
                check_on(&Short::on(Device::Cuda(0)), &options, &group, &entrants)
            });
            checked.unwrap_or_else(|error| panic!("{name}, decay {decay}, {dtype}: {error:#}"));
        }
    }
}
