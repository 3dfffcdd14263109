//! GPUs for the commands that compute: which one is this rank's, what it is, and where compiled kernels are kept.

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use collectives::local::Network;
use collectives::{Group, nccl};
use runtime::config::DeviceKind;
use tch::{Cuda, Device};

use crate::identity::Launcher;
use crate::{doctor, job};

/// What `--device` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Place {
    Cpu,
    Cuda,
}

/// Keeps compiled kernels in LASP_KERNELS, or else where the user's caches are; to be called once.
pub fn keep_kernels() {
    let folder = |name: &str| env::var_os(name).map(PathBuf::from);
    let caches = || folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")));
    let named = folder("LASP_KERNELS").or_else(|| Some(caches()?.join("lasp/kernels")));
    kernels::cuda::keep_in(named.filter(|path| !path.as_os_str().is_empty()));
}

/// Opens the NCCL that LASP_NCCL names, if it does; before libtorch's CUDA part, which would bring its own.
pub fn open_named_nccl() -> Result<()> {
    if let Some(path) = env::var_os("LASP_NCCL") {
        nccl::Library::open(Some(Path::new(&path)))?;
    }
    Ok(())
}

/// Where this rank computes, and the group through which it then meets the others. Collective; to be called before the
/// first tensor is made.
///
/// "auto" is the CPU where a node has more ranks than GPUs.
pub fn place(kind: DeviceKind, launcher: &Launcher, world: &Group) -> Result<(Group, Device)> {
    let wanted = match kind {
        DeviceKind::Cpu => false,
        DeviceKind::Cuda => true,
        DeviceKind::Auto => launcher.on_node().unwrap_or(world.size()) <= kernels::cuda::devices(),
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

/// GPUs that libtorch sees; to be asked once it is open to them.
pub fn count() -> usize {
    usize::try_from(Cuda::device_count()).unwrap_or(0)
}

/// Why a network cannot be emulated between ranks with GPUs.
pub fn no_network(network: &Network) -> String {
    format!(
        "--network: found {network} with --device cuda, expected only one of them: networks are emulated between ranks that are \
         threads on the CPU"
    )
}

/// That ranks are processes, or only one: each has a GPU, and NCCL is between processes.
pub fn in_processes(launcher: &Launcher, ranks: &[usize], command: &str) -> Result<()> {
    match ranks.iter().max() {
        Some(&most) if most > 1 && !launcher.joins_processes()? => bail!(
            "--device cuda: found {most} ranks as threads (--ranks), expected a process each: start it with \
             mpirun -n {most} lasp {command} .., srun -n {most} lasp {command} .., or \
             torchrun --nproc-per-node {most} --no-python lasp {command} ..; one rank needs no launcher"
        ),
        _ => Ok(()),
    }
}

/// What was measured on, as results tell it.
#[derive(Clone, Debug)]
pub struct Found {
    /// This rank's GPU.
    pub name: String,
    /// On this node.
    pub gpus: usize,
    /// Ranks that take turns on this one.
    pub ranks: usize,
    driver: Option<String>,
    nccl: Option<String>,
    nvrtc: Option<String>,
}

impl Found {
    /// `None` on the CPU.
    pub fn new(launcher: &Launcher, world: &Group, device: Device) -> Result<Option<Found>> {
        if device == Device::Cpu {
            return Ok(None);
        }
        let gpus = count().max(1);
        Ok(Some(Found {
            name: kernels::cuda::name(device)?,
            gpus,
            ranks: launcher.on_node().unwrap_or(world.size()).div_ceil(gpus).max(1),
            driver: doctor::driver(),
            nccl: nccl::Library::open(None).ok().map(|library| library.version().to_string()),
            nvrtc: kernels::cuda::compiler().ok().map(|(major, minor)| format!("{major}.{minor}")),
        }))
    }

    /// By name, of what is known.
    pub fn versions(&self) -> BTreeMap<&'static str, &str> {
        let all = [("driver", &self.driver), ("nccl", &self.nccl), ("nvrtc", &self.nvrtc)];
        all.into_iter().filter_map(|(name, version)| Some((name, version.as_deref()?))).collect()
    }
}
