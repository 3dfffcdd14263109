//! Communication hides behind compute: the recorded AllGather of a linear layer lies inside the intra-rank span, in forward
//! and in backward.

use std::sync::Arc;

use anyhow::{Result, ensure};
use collectives::Group;
use kernels::linear::Inputs;
use kernels::linear::chunkwise::Chunkwise;
use runtime::config::LayoutKind;
use runtime::sequence::{Layout, Plan, Shard, linear, method};
use tch::{Device, Kind, Tensor};

const ROUNDS: usize = 5;

/// Runs a layer a few times and reads the flight recorder. Of the rounds, one may be spoilt by a busy machine.
pub fn check(group: &Group) -> Result<()> {
    let tokens = 8192 * group.size() as i64;
    let plan = Plan::new(Layout::new(LayoutKind::Contiguous, tokens, group.size())?, None, group.rank())?;
    let (linear, attention) = (method::linear("lasp2", group)?, method::attention("lasp2h")?);
    let shard = Shard { group: group.clone(), plan, linear, attention };
    let random = || Tensor::randn([1, 8192, 8, 64], (Kind::Float, Device::Cpu));
    let mixer = Arc::new(Chunkwise::new(64, 1.0)?);
    let mut hidden = [0, 0];
    for _ in 0..ROUNDS {
        let (q, k, v, d_o) = (random(), random(), random(), random());
        group.barrier()?.wait()?;
        group.recorder().clear();
        let forward = linear::forward(&shard, mixer.as_ref(), Inputs::new(&q, &k, &v, None)?, None)?;
        group.barrier()?.wait()?;
        linear::backward(&shard, mixer.as_ref(), forward.saved, &d_o)?;

        let gathers: Vec<_> =
            group.recorder().comm_spans().into_iter().filter(|span| span.op == "all_gather").collect();
        ensure!(gathers.len() == 2, "expected one AllGather forward and one backward, found {}", gathers.len());
        for (i, (gather, name)) in gathers.iter().zip(["intra_rank", "intra_rank_grad"]).enumerate() {
            let spans = group.recorder().compute_spans();
            let Some(intra) = spans.iter().find(|span| span.name == name) else { anyhow::bail!("no span {name}") };
            let inside = intra.started_ns <= gather.started_ns && gather.ended_ns <= intra.ended_ns;
            hidden[i] += usize::from(inside);
        }
    }
    let [forward, backward] = hidden;
    ensure!(
        forward + 1 >= ROUNDS && backward + 1 >= ROUNDS,
        "rank {} of {}, {}: the AllGather lay inside the intra-rank span in {forward} forward and {backward} backward \
         of {ROUNDS} rounds",
        group.rank(),
        group.size(),
        group.backend(),
    );
    Ok(())
}
