//! Runs a command's body once on every rank: in this process under an MPI launcher, else on threads.

use anyhow::{Result, bail};
use collectives::Group;
use collectives::local::{self, Network};

use crate::failure;
use crate::identity::Launcher;

/// Runs `body` on all ranks. `ranks` is what the user asked for: how many threads, or what mpirun's number must be.
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
                "--network: found {network} under an MPI launcher, whose processes have a network of their own; leave \
                 --network out, or start without mpirun and with --ranks N for ranks as threads"
            );
        }
        return under_mpi(launcher, ranks, &body);
    }
    let ranks = ranks.unwrap_or(1);
    if ranks == 0 {
        bail!("--ranks: found 0, expected at least 1");
    }
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
    let done = match ranks {
        Some(ranks) if ranks != size => Err(anyhow::anyhow!(
            "--ranks: found {ranks}, expected {size}, the number of processes that the MPI launcher started; \
             leave --ranks out"
        )),
        _ => body(&world),
    };
    // Not later: dropping `mpi` would wait for ranks that wait for this one.
    done.or_else(|error| failure::end(&error))
}

#[cfg(not(feature = "mpi"))]
fn under_mpi(_: &Launcher, _: Option<usize>, _: &(impl Fn(&Group) -> Result<()> + Sync)) -> Result<()> {
    bail!("this lasp was built without MPI")
}
