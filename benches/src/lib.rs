//! Timing as every benchmark here does it: warm-up, at least 20 runs, median with the tenth and ninetieth percentiles;
//! [`compare`], which times methods against each other; [`simulate`], the cost model, for machines that are not here; and
//! [`calibrate`], which makes such a machine of measurements; [`overlap`], whether a gather hides; [`exchange`], what ranks tell each
//! other beside tensors.

pub mod calibrate;
pub mod compare;
pub mod exchange;
pub mod overlap;
pub mod simulate;

use std::process::Command;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tch::{Cuda, Device};

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    pub median_ms: f64,
    pub p10_ms: f64,
    pub p90_ms: f64,
}

impl Timing {
    pub fn of(mut ms: Vec<f64>) -> Self {
        ms.sort_by(f64::total_cmp);
        let at = |share: f64| ms[((ms.len() - 1) as f64 * share).round() as usize];
        Self { median_ms: at(0.5), p10_ms: at(0.1), p90_ms: at(0.9) }
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({"median_ms": self.median_ms, "p10_ms": self.p10_ms, "p90_ms": self.p90_ms})
    }
}

/// `mpirun` for so many ranks, behind which a program and its arguments go: with more ranks than cores, as root too, and one
/// thread a rank.
pub fn mpirun(ranks: usize) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "--bind-to", "none", "-n", &ranks.to_string()]).envs([
        ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
        ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        ("OMP_NUM_THREADS", "1"),
    ]);
    command
}

/// The processor's name, or its architecture.
pub fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// Waits until the device is through with what it has been given.
pub(crate) fn settle(device: Device) {
    if let Device::Cuda(gpu) = device {
        Cuda::synchronize(gpu as i64);
    }
}

/// Times several bodies in turn, `runs` times each, so that a noisy machine favours none of them.
pub fn interleaved(runs: usize, bodies: &mut [&mut dyn FnMut() -> anyhow::Result<()>]) -> anyhow::Result<Vec<Timing>> {
    for body in bodies.iter_mut() {
        (body)()?;
        (body)()?;
    }
    let mut times = vec![Vec::with_capacity(runs); bodies.len()];
    for _ in 0..runs {
        for (body, times) in bodies.iter_mut().zip(&mut times) {
            let start = Instant::now();
            (body)()?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(times.into_iter().map(Timing::of).collect())
}
