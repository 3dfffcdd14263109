//! How much memory a step takes on the CPU: what the kernel saw resident at most (VmHWM), reset before the step. It is that
//! of a process, so ranks that are threads have an equal share of it.

use std::fs;

use anyhow::Result;
use collectives::Group;
use serde::{Deserialize, Serialize};

use super::exchange::gather;

/// Bytes of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// Resident at most while the step ran.
    pub peak: u64,
    /// Of that, what was not resident before the step.
    pub added: u64,
}

/// Runs `step` on every rank and sees how much memory it takes: of processes the one that takes most. `None` where the
/// kernel does not tell. Collective.
pub(super) fn of_step(world: &Group, step: impl FnOnce() -> Result<()>) -> Result<Option<Memory>> {
    let threads = world.backend() == "local";
    let watches = !threads || world.rank() == 0;
    world.barrier()?.wait()?;
    let before = if watches { reset() } else { None };
    world.barrier()?.wait()?;
    step()?;
    world.barrier()?.wait()?;
    let found = before.and_then(|before| Some((before, status("VmHWM")?)));
    let shared_by = if threads { world.size() as u64 } else { 1 };
    let mine =
        found.map(|(before, peak)| Memory { peak: peak / shared_by, added: peak.saturating_sub(before) / shared_by });
    let all = gather(world, &mine)?;
    Ok(all.into_iter().flatten().max_by_key(|memory| memory.peak))
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
    use tch::{Device, Kind, Tensor};

    #[test]
    fn a_tensor_is_seen_and_shared() {
        let take = |group: Group| {
            of_step(&group, || {
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
}
