//! GPUs for the commands that train and generate: which one is this rank's, and where compiled kernels are kept.

use std::env;
use std::path::PathBuf;

use anyhow::Result;
use collectives::Group;
use runtime::config::DeviceKind;
use tch::Device;

use crate::identity::Launcher;
use crate::job;

/// Keeps compiled kernels in LASP_KERNELS, or else where the user's caches are; to be called once.
pub fn keep_kernels() {
    let folder = |name: &str| env::var_os(name).map(PathBuf::from);
    let caches = || folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")));
    let named = folder("LASP_KERNELS").or_else(|| Some(caches()?.join("lasp/kernels")));
    kernels::cuda::keep_in(named.filter(|path| !path.as_os_str().is_empty()));
}

/// Where this rank computes, and the group through which it then meets the others. Collective; to be called before the
/// first tensor is made.
///
/// "auto" is the CPU where a node has more ranks than GPUs.
pub fn place(kind: DeviceKind, launcher: &Launcher, world: &Group) -> Result<(Group, Device)> {
    let wanted = match kind {
        DeviceKind::Cpu => false,
        DeviceKind::Cuda => true,
        DeviceKind::Auto => {
            let on_node = match launcher {
                Launcher::Mpi { on_node, .. } => *on_node,
                Launcher::Tcp(peer) => peer.on_node,
                Launcher::None => None,
            };
            on_node.unwrap_or(world.size()) <= kernels::cuda::devices()
        }
    };
    if wanted { job::on_gpu(launcher, world) } else { Ok((world.clone(), Device::Cpu)) }
}

/// The device of a command that runs in one process.
pub fn alone(kind: DeviceKind) -> Result<Device> {
    let wanted = match kind {
        DeviceKind::Cpu => false,
        DeviceKind::Cuda => true,
        DeviceKind::Auto => kernels::cuda::devices() > 0,
    };
    if wanted {
        kernels::bridge::open_cuda().map_err(|error| anyhow::anyhow!("{error}; see lasp doctor"))?;
        return Ok(Device::Cuda(0));
    }
    Ok(Device::Cpu)
}
