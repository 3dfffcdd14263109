//! A method's results are a function of its inputs, to the bit: not of which rank was late, nor of the back end.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use collectives::{Group, local};
use kernels::linear::Inputs;
use kernels::linear::chunkwise::Chunkwise;
use runtime::config::LayoutKind;
use runtime::sequence::{LinearMethod, Shard, attention, linear, method};
use tch::{Device, Kind, Tensor};

use crate::{LAYOUTS, Scans, Sizes, plan, randn, scans, share};

const SCALE: f64 = 0.3;
const RUNS: usize = 3;

/// One method on one layout: o and the gradients of this rank.
struct Found {
    name: String,
    tensors: Vec<Tensor>,
}

/// Runs every method on every rank of `group` again and again, each time another rank coming late, and on the CPU once on as
/// many threads. An error where a bit differs.
pub fn check(group: &Group) -> Result<()> {
    let scans = scans(group)?;
    let first = all(group, &scans, 0)?;
    for run in 1..RUNS {
        same(&first, &all(group, &scans, run)?, group, "another run")?;
    }
    if group.device() == Device::Cpu && group.backend() != "local" {
        let threads = local::run(group.size(), |group| all(&group, &crate::scans(&group)?, 0))?;
        same(&first, &threads[group.rank()], group, "ranks as threads")?;
    }
    Ok(())
}

fn same(ours: &[Found], theirs: &[Found], group: &Group, what: &str) -> Result<()> {
    ensure!(ours.len() == theirs.len(), "{} results, {} of {what}", ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(theirs) {
        let equal = ours.tensors.len() == theirs.tensors.len()
            && ours.tensors.iter().zip(&theirs.tensors).all(|(ours, theirs)| ours.equal(theirs));
        let (name, rank, size, backend) = (&ours.name, group.rank(), group.size(), group.backend_on(group.device()));
        ensure!(equal, "{name}, rank {rank} of {size}, {backend}: other bits than {what}");
    }
    Ok(())
}

fn all(group: &Group, scans: &Scans, run: usize) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    for (i, layout) in LAYOUTS.into_iter().enumerate() {
        let mut add =
            |name: &str, tensors: Vec<Tensor>| found.push(Found { name: format!("{name}, {layout:?}"), tensors });
        for (name, scan) in scans {
            for decay in ["none", "head", "token", "channel"] {
                late(group, run + i);
                let method = LinearMethod::Scan(scan.clone());
                add(&format!("{name}, decay {decay}"), linear_results(group, layout, method, decay)?);
            }
        }
        for name in method::LEFT_PRODUCTS {
            late(group, run + i);
            add(name, linear_results(group, layout, method::linear(name, group)?, "head")?);
        }
        for name in method::ATTENTIONS.iter().filter(|name| **name != "ulysses" || HEADS % group.size() as i64 == 0) {
            late(group, run + i);
            add(name, softmax_results(group, layout, name)?);
        }
    }
    Ok(found)
}

/// One rank comes late.
fn late(group: &Group, run: usize) {
    if run % group.size() == group.rank() {
        std::thread::sleep(Duration::from_micros(300));
    }
}

const HEADS: i64 = 4;

fn sizes() -> Sizes {
    let documents = vec![3, 40, 1, 0, 23];
    Sizes { b: 1, tokens: documents.iter().sum(), h: HEADS, kv_heads: 2, dk: 12, dv: 7, documents: Some(documents) }
}

fn shard(group: &Group, layout: LayoutKind, linear: LinearMethod, attention: &str) -> Result<Arc<Shard>> {
    let (plan, attention) = (plan(group, &sizes(), layout)?, method::softmax(attention, group)?);
    Ok(Arc::new(Shard { group: group.clone(), plan, linear, attention }))
}

/// This rank's tokens of a tensor.
fn mine(shard: &Shard, seed: u64, rest: &[i64]) -> Result<Tensor> {
    let whole = randn(seed, &[&[1, shard.plan.layout.tokens()], rest].concat()).to_kind(Kind::Float);
    share(&shard.group, &shard.plan, &whole)
}

fn linear_results(group: &Group, layout: LayoutKind, method: LinearMethod, decay: &str) -> Result<Vec<Tensor>> {
    let shard = shard(group, layout, method, "lasp2h")?;
    let Sizes { h, dk, dv, .. } = sizes();
    let log_decay = match decay {
        "head" => Some(randn(5, &[h]).to_kind(Kind::Float).to_device(group.device())),
        "token" => Some(mine(&shard, 5, &[h])?),
        "channel" => Some(mine(&shard, 5, &[h, dk])?),
        _ => None,
    };
    let log_decay = log_decay.map(|g| g.abs() * -0.05);
    let [q, k] = [mine(&shard, 1, &[h, dk])?, mine(&shard, 2, &[h, dk])?];
    let [v, d_o] = [mine(&shard, 3, &[h, dv])?, mine(&shard, 4, &[h, dv])?];
    let x = Inputs::new(&q, &k, &v, log_decay.as_ref())?;
    let (o, grads) = match &shard.linear {
        LinearMethod::Scan(_) => {
            let mixer = Chunkwise::new(16, SCALE)?;
            let forward = linear::forward(&shard, &mixer, x, None)?;
            (forward.o, linear::backward(&shard, &mixer, forward.saved, &d_o)?.grads)
        }
        LinearMethod::LeftProduct(method) => {
            let forward = method.forward(&shard, x, SCALE)?;
            (forward.o, method.backward(&shard, forward.saved, &d_o)?)
        }
    };
    Ok([o, grads.dq, grads.dk, grads.dv].into_iter().chain(grads.dlog_decay).collect())
}

fn softmax_results(group: &Group, layout: LayoutKind, name: &str) -> Result<Vec<Tensor>> {
    let shard = shard(group, layout, method::linear("lasp2", group)?, name)?;
    let Sizes { h, kv_heads, dk, dv, .. } = sizes();
    let (q, k) = (mine(&shard, 1, &[h, dk])?, mine(&shard, 2, &[kv_heads, dk])?);
    let (v, d_o) = (mine(&shard, 3, &[kv_heads, dv])?, mine(&shard, 4, &[h, dv])?);
    let forward = shard.attention.forward(&shard, &attention::Inputs::new(&q, &k, &v, SCALE, true)?)?;
    let grads = shard.attention.backward(&shard, forward.saved, &d_o)?;
    Ok(vec![forward.o, grads.dq, grads.dk, grads.dv])
}
