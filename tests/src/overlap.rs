//! Communication hides behind compute: the recorded AllGather of a linear layer lies inside the intra-rank span, in forward
//! and in backward.

use std::sync::Arc;

use anyhow::{Result, anyhow, ensure};
use collectives::Group;
use kernels::linear::Inputs;
use kernels::linear::chunkwise::Chunkwise;
use runtime::config::LayoutKind;
use runtime::sequence::scan::{Entries, Scan, Scanned, StateSize, Transitions};
use runtime::sequence::{Chain, Layout, LinearMethod, Messages, Plan, Shard, linear, method};
use tch::{Cuda, Device, Kind, Tensor};

const ROUNDS: usize = 5;

/// Runs a layer a few times and reads the flight recorder. Of the rounds, one may be spoilt by a busy machine; where ranks share
/// a GPU, which then serves them in turn, all but one.
///
/// A rank alone takes the place of the first of two, and its gather goes to itself.
pub fn check(group: &Group) -> Result<()> {
    let (device, recorder) = (group.device(), group.recorder());
    let ranks = group.size().max(2);
    let (tokens, heads) = if device.is_cuda() { (1 << 17, 16) } else { (8192, 8) };
    let layout = Layout::new(LayoutKind::Contiguous, tokens * ranks as i64, ranks)?;
    let linear = match group.size() {
        1 => LinearMethod::Scan(Arc::new(Alone)),
        _ => method::linear("lasp2", group)?,
    };
    let (plan, attention) = (Plan::new(layout, None, group.rank())?, method::attention("lasp2h")?);
    let shard = Shard { group: group.clone(), plan, linear, attention };
    let random = || Tensor::randn([1, tokens, heads, 64], (Kind::Float, device));
    let mixer = Chunkwise::new(64, 1.0)?;
    // The first operation on a GPU makes the communicator.
    let unseen = usize::from(device.is_cuda());
    let mut hidden = [0, 0];
    for round in 0..unseen + ROUNDS {
        let (q, k, v, d_o) = (random(), random(), random(), random());
        // GPUs begin together as hosts do.
        if let Device::Cuda(gpu) = device {
            Cuda::synchronize(gpu as i64);
        }
        recorder.settle();
        group.barrier()?.wait()?;
        recorder.clear();
        let forward = linear::forward(&shard, &mixer, Inputs::new(&q, &k, &v, None)?, None)?;
        group.barrier()?.wait()?;
        linear::backward(&shard, &mixer, forward.saved, &d_o)?;
        recorder.settle();

        let gathers: Vec<_> = recorder.comm_spans().into_iter().filter(|span| span.op == "all_gather").collect();
        ensure!(gathers.len() == 2, "expected one AllGather forward and one backward, found {}", gathers.len());
        let spans = recorder.compute_spans();
        for (i, (gather, name)) in gathers.iter().zip(["intra_rank", "intra_rank_grad"]).enumerate() {
            let intra = spans.iter().find(|span| span.name == name).ok_or_else(|| anyhow!("no span {name}"))?;
            let inside = intra.started_ns <= gather.started_ns && gather.ended_ns <= intra.ended_ns;
            hidden[i] += usize::from(inside && round >= unseen);
            if device.is_cuda() && group.rank() == 0 {
                let us = |from: u64, to: u64| (to as f64 - from as f64) / 1e3;
                println!(
                    "round {round}, {name} of {:.0} us: AllGather from {:.0} to {:.0} us, exposed for {:.0} us",
                    us(intra.started_ns, intra.ended_ns),
                    us(intra.started_ns, gather.started_ns),
                    us(intra.started_ns, gather.ended_ns),
                    gather.exposed_ns as f64 / 1e3
                );
            }
        }
    }
    let shared = device.is_cuda() && group.size() as i64 > Cuda::device_count();
    let wanted = if shared { 1 } else { ROUNDS - 1 };
    let [forward, backward] = hidden;
    ensure!(
        forward >= wanted && backward >= wanted,
        "rank {} of {}, {}: the AllGather lay inside the intra-rank span in {forward} forward and {backward} backward \
         of {ROUNDS} rounds, expected {wanted}",
        group.rank(),
        group.size(),
        group.backend_on(device),
    );
    Ok(())
}

/// LASP-2's gather on one rank that stands for the first of two; what it gets of the other is its own.
struct Alone;

impl Scan for Alone {
    fn prefix(
        &self,
        group: &Group,
        _: &Chain,
        mine: Vec<Tensor>,
        transitions: Transitions,
    ) -> runtime::sequence::Result<Scanned<(Entries, Transitions)>> {
        let gathered = group.all_gather(&mine[0])?;
        Ok(gathered.map(|states| Ok(Ok((vec![Some(states.f_select(0, 0)?)], transitions)))))
    }

    fn messages(&self, _: &Chain, _: usize, _: &StateSize, _: bool) -> Messages {
        Messages::default()
    }
}
