//! How much memory a step takes, reset before it. On the CPU what the kernel saw resident at most (VmHWM): that of a process,
//! so ranks that are threads have an equal share of it. On a GPU what libtorch's allocator had given out at most.

use std::fs;

use anyhow::Result;
use collectives::Group;
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::exchange::gather;
use crate::settle;

/// Bytes of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// In use at most while the step ran.
    pub peak: u64,
    /// Of that, what was not in use before the step.
    pub added: u64,
}

/// Runs `step` on every rank and sees how much memory it takes: of processes the one that takes most. `None` where the
/// kernel does not tell. Collective.
pub(super) fn of_step(world: &Group, device: Device, step: impl FnOnce() -> Result<()>) -> Result<Option<Memory>> {
    let mine = match device {
        Device::Cuda(gpu) => Some(on_gpu(world, gpu, step)?),
        _ => resident(world, step)?,
    };
    Ok(gather(world, &mine)?.into_iter().flatten().max_by_key(|memory| memory.peak))
}

fn on_gpu(world: &Group, gpu: usize, step: impl FnOnce() -> Result<()>) -> Result<Memory> {
    let through = || {
        settle(Device::Cuda(gpu));
        // Messages hold their tensors until they are known to have ended.
        world.recorder().settle();
    };
    through();
    kernels::bridge::reset_peak_memory(gpu)?;
    let before = kernels::bridge::device_memory(gpu)?.now;
    step()?;
    through();
    let peak = kernels::bridge::device_memory(gpu)?.peak;
    Ok(Memory { peak, added: peak.saturating_sub(before) })
}

fn resident(world: &Group, step: impl FnOnce() -> Result<()>) -> Result<Option<Memory>> {
    let threads = world.backend() == "local";
    let watches = !threads || world.rank() == 0;
    world.barrier()?.wait()?;
    let before = if watches { reset() } else { None };
    world.barrier()?.wait()?;
    step()?;
    world.barrier()?.wait()?;
    let found = before.and_then(|before| Some((before, status("VmHWM")?)));
    let shared_by = if threads { world.size() as u64 } else { 1 };
    Ok(found.map(|(before, peak)| Memory { peak: peak / shared_by, added: peak.saturating_sub(before) / shared_by }))
}

/// Makes the high-water mark what is resident now, and returns that.
fn reset() -> Option<u64> {
    kernels::bridge::release_freed_memory();
    fs::write("/proc/self/clear_refs", "5").ok()?;
    status("VmRSS")
}

/// Bytes of a line of /proc/self/status.
fn status(key: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use collectives::local;
    use tch::{Kind, Tensor};

    #[test]
    fn a_tensor_is_seen_and_shared() {
        let take = |group: Group| {
            of_step(&group, Device::Cpu, || {
                // 32 MiB each, and gone before the step has ended.
                let _ = Tensor::f_ones([8 << 20], (Kind::Float, Device::Cpu))?;
                Ok(())
            })
        };
        for memory in local::run(2, take).unwrap() {
            let Some(memory) = memory else { return println!("not tested: no /proc/self/clear_refs") };
            // Both at once, or one after the other; other tests of this process run meanwhile.
            assert!(memory.added >= 15 << 20 && memory.peak >= memory.added, "{memory:?}");
        }
    }

    #[test]
    fn a_tensor_on_a_gpu_is_seen() {
        let Some(gpu) = kernels::testing::cuda() else { return };
        let kept = Tensor::zeros([1 << 20], (Kind::Float, gpu));
        let take = |group: Group| {
            of_step(&group, gpu, || {
                drop(Tensor::f_ones([8 << 20], (Kind::Float, gpu))?);
                Ok(())
            })
        };
        let found = local::run(1, take).unwrap()[0].unwrap();
        assert!(found.added >= 32 << 20 && found.peak >= found.added + (4 << 20), "{found:?}");
        drop(kept);
    }
}
