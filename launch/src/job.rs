//! Runs a command's body once on every rank: in this process under a launcher, else on threads.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use collectives::local::{self, Network};
use collectives::{Group, nccl, tcp};
use tch::Device;

use crate::identity::{Launcher, Peer};
use crate::{failure, gpu};

/// For all processes of a job to come.
const JOINING: Duration = Duration::from_secs(300);

/// Runs `body` on all ranks. `ranks` is what the user asked for: how many threads, or what the launcher's number must be.
/// Where a rank fails this does not return: the job ends with that rank's message.
pub fn on_ranks(launcher: &Launcher, ranks: Option<usize>, body: impl Fn(&Group) -> Result<()> + Sync) -> Result<()> {
    on_network(launcher, None, ranks, body)
}

/// [`on_ranks`], with an emulated network between ranks that are threads.
pub fn on_network(
    launcher: &Launcher,
    network: Option<&Network>,
    ranks: Option<usize>,
    body: impl Fn(&Group) -> Result<()> + Sync,
) -> Result<()> {
    if launcher.joins_processes()? {
        if let Some(network) = network {
            bail!(
                "--network: found {network} under a launcher, whose processes have a network of their own; leave \
                 --network out, or start without a launcher and with --ranks N for ranks as threads"
            );
        }
        return match launcher {
            Launcher::Tcp(peer) => under_tcp(launcher, peer, ranks, &body),
            _ => under_mpi(launcher, ranks, &body),
        };
    }
    let ranks = ranks.unwrap_or(1);
    local::run_on(network, ranks, |world: Group| -> Result<()> {
        failure::this_is(&world);
        launcher.share_cores(ranks);
        if let Err(error) = body(&world) {
            failure::end(&error);
        }
        Ok(())
    })?;
    Ok(())
}

#[cfg(feature = "mpi")]
fn under_mpi(launcher: &Launcher, ranks: Option<usize>, body: &(impl Fn(&Group) -> Result<()> + Sync)) -> Result<()> {
    let mpi = collectives::mpi::init()?;
    let world = mpi.world();
    failure::this_is(&world);
    let size = world.size();
    let on_node = match launcher {
        Launcher::Mpi { on_node, .. } => on_node.unwrap_or(size),
        _ => size,
    };
    launcher.share_cores(on_node);
    let done = counted(&world, ranks).and_then(|()| body(&world));
    // Not later: dropping `mpi` would wait for ranks that wait for this one.
    done.or_else(|error| failure::end(&error))
}

#[cfg(not(feature = "mpi"))]
fn under_mpi(_: &Launcher, _: Option<usize>, _: &(impl Fn(&Group) -> Result<()> + Sync)) -> Result<()> {
    bail!("this lasp was built without MPI")
}

fn under_tcp(
    launcher: &Launcher,
    peer: &Peer,
    ranks: Option<usize>,
    body: &(impl Fn(&Group) -> Result<()> + Sync),
) -> Result<()> {
    let Peer { rank, size, on_node, address, port, token, .. } = peer.clone();
    let on_failure = Arc::new(|error: collectives::Error| match error {
        // It has said why.
        collectives::Error::RankFailed { .. } => kernels::bridge::exit(1),
        error => failure::end(&error.into()),
    });
    let tcp = tcp::join(&tcp::Options { rank, size, address, port, token, timeout: JOINING, on_failure })?;
    let world = tcp.world();
    failure::this_is(&world);
    launcher.share_cores(on_node.unwrap_or(size));
    let done = counted(&world, ranks).and_then(|()| body(&world));
    // Not later: dropping `tcp` would tell the others that all is well.
    done.or_else(|error| failure::end(&error))
}

/// That the launcher has started as many processes as the user expects.
fn counted(world: &Group, ranks: Option<usize>) -> Result<()> {
    match ranks {
        Some(ranks) if ranks != world.size() => bail!(
            "--ranks: found {ranks}, expected {}, the number of processes that the launcher started; leave --ranks out",
            world.size()
        ),
        _ => Ok(()),
    }
}

/// Gives this rank a GPU: the ranks of a node take its GPUs in turn. Gives `world` with NCCL between them, and the device.
/// Collective over `world`; to be called before the first tensor is made.
///
/// A rank alone needs no NCCL; of several each should have a GPU of its own.
pub fn on_gpu(launcher: &Launcher, world: &Group) -> Result<(Group, Device)> {
    gpu::open_named_nccl()?;
    kernels::bridge::open_cuda().map_err(|error| anyhow!("{error}; see lasp doctor"))?;
    let gpus = gpu::count();
    if gpus == 0 {
        bail!("libtorch sees no GPU here; see lasp doctor");
    }
    let place = launcher.local().unwrap_or(world.rank());
    let gpu = place % gpus;
    let library = match nccl::Library::open(None) {
        Err(_) if world.size() == 1 => return Ok((world.clone(), Device::Cuda(gpu))),
        library => library?,
    };
    let version = library.version();
    if place >= gpus && version >= nccl::SHARES_GPUS && !nccl::may_share_gpus(version) {
        bail!(
            "rank {} is number {} of its node, which has {gpus} GPUs: start as many ranks as GPUs, or set \
             NCCL_MULTI_RANK_GPU_ENABLE=1 to let ranks share one",
            world.rank(),
            place + 1
        );
    }
    let on_failure = Arc::new(|error: collectives::Error| {
        // Who says it is said by `end`.
        let text = error.to_string();
        let text =
            text.strip_prefix("rank ").and_then(|text| Some(text.split_once(": ")?.1.to_owned())).unwrap_or(text);
        failure::end(&anyhow!(text))
    });
    Ok((nccl::open(world, gpu, library, nccl::Options::new(on_failure))?, Device::Cuda(gpu)))
}
