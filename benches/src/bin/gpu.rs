//! Linear attention on one GPU, forward and backward: milliseconds by CUDA events, the L2 cache overwritten before each, over
//! the time in which memory could move what must be moved (forward: q, k, v in, o out; with backward eleven such tensors).
//! A JSON line for each decay and length. `benches/gpu-kernels.sh` puts it beside flash-linear-attention.

use anyhow::{Context, Result, ensure};
use benches::Timing;
use clap::Parser;
use kernels::cuda::Stopwatch;
use kernels::linear::oracle::Whole;
use kernels::linear::{Inputs, StateMixer, mixer};
use kernels::testing::relative_rms;
use serde_json::json;
use tch::{Device, Kind, Tensor};

#[derive(Parser)]
struct Options {
    #[arg(long, value_delimiter = ',', default_value = "16384,131072")]
    tokens: Vec<i64>,
    #[arg(long, value_delimiter = ',', default_value = "none,head,token")]
    decays: Vec<String>,
    #[arg(long, default_value_t = 16)]
    heads: i64,
    /// K = V.
    #[arg(long, default_value_t = 128)]
    dim: i64,
    #[arg(long, default_value_t = 30)]
    runs: usize,
}

const DEVICE: Device = Device::Cuda(0);
const CACHE: i64 = 256 << 20;

/// q, k, v in bf16 on the CPU.
fn inputs(o: &Options, tokens: i64, decay: &str) -> Result<Inputs> {
    let shape = [1, tokens, o.heads, o.dim];
    let x = || Tensor::randn(shape, (Kind::Float, DEVICE)).to_kind(Kind::BFloat16);
    let g = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, DEVICE)).log_sigmoid() / 16.0;
    let log_decay = match decay {
        "none" => None,
        "head" => Some(g(&shape[2..3])),
        "token" => Some(g(&shape[..3])),
        "channel" => Some(g(&shape)),
        other => anyhow::bail!("--decays: found {other:?}, expected none, head, token or channel"),
    };
    let mut x = Inputs::new(&x(), &x(), &x(), log_decay.as_ref())?;
    // A constant per head is no parameter.
    x.decay_grad = matches!(decay, "token" | "channel");
    Ok(x)
}

fn scale(o: &Options) -> f64 {
    1.0 / (o.dim as f64).sqrt()
}

/// Forward and backward through the traits, as a layer of the model does.
fn step(mixer: &dyn StateMixer, x: &Inputs, d_o: Option<&Tensor>) -> Result<Tensor> {
    let mut forward = mixer.forward(x, None)?;
    forward.run()?;
    let o = forward.finish()?;
    if let Some(d_o) = d_o {
        let mut backward = mixer.backward(x, None, d_o)?;
        backward.run_grad()?;
        backward.finish()?;
    }
    Ok(o)
}

/// No figure without parity: a short sequence against the f64 recurrence.
fn check(o: &Options, decay: &str) -> Result<()> {
    let x = inputs(o, 1000, decay)?;
    let (mixer, d_o) = (mixer(64, scale(o))?, x.v.randn_like());
    let on_cpu = |x: &Tensor| x.to_device(Device::Cpu).to_kind(Kind::Double);
    let decays = x.decay.tensor().map(on_cpu);
    let exact = Inputs::new(&on_cpu(&x.q), &on_cpu(&x.k), &on_cpu(&x.v), decays.as_ref())?;
    let whole = Whole { inputs: &exact, cu_seqlens: None, initial_state: None, causal: true, scale: scale(o) };
    let grads = mixer.backward(&x, None, &d_o)?.finish()?;
    let exact_grads = whole.backward(&on_cpu(&d_o))?;
    for (what, ours, exact) in [
        ("o", step(mixer.as_ref(), &x, None)?, whole.forward()?.o),
        ("dq", grads.dq, exact_grads.dq),
        ("dk", grads.dk, exact_grads.dk),
        ("dv", grads.dv, exact_grads.dv),
    ] {
        let error = relative_rms(&ours, &exact);
        ensure!(
            error <= 6e-3,
            "decay {decay}, {what}: relative RMS error {error:.1e} against the recurrence, no figures"
        );
    }
    Ok(())
}

/// What times every body, each run of it from an L2 cache full of something else.
struct Clock {
    watch: Stopwatch,
    cache: Tensor,
    runs: usize,
}

impl Clock {
    fn new(runs: usize) -> Result<Self> {
        Ok(Self { watch: Stopwatch::new(DEVICE)?, cache: Tensor::f_zeros([CACHE], (Kind::Uint8, DEVICE))?, runs })
    }

    fn time(&mut self, body: impl Fn() -> Result<()>) -> Result<Timing> {
        let mut times = Vec::with_capacity(self.runs);
        for run in 0..self.runs + 3 {
            let _ = self.cache.zero_();
            let ms = self.watch.time::<anyhow::Error>(&body)?;
            if run >= 3 {
                times.push(ms);
            }
        }
        Ok(Timing::of(times))
    }

    /// Bytes a second that a copy inside the GPU reads and writes.
    fn memory_rate(&mut self) -> Result<f64> {
        let from = Tensor::f_zeros([1 << 30], (Kind::Uint8, DEVICE))?;
        let to = from.f_zeros_like()?;
        let copy = self.time(|| Ok(to.shallow_clone().f_copy_(&from)?))?;
        Ok(2.0 * f64::from(1 << 30) / copy.median_ms * 1e3)
    }
}

fn main() -> Result<()> {
    let o = Options::parse();
    kernels::bridge::open_cuda().context("not measured: no CUDA device")?;
    ensure!(o.runs > 0 && tch::Cuda::is_available(), "not measured: no CUDA device");
    let _guard = tch::no_grad_guard();
    let mut clock = Clock::new(o.runs)?;
    let rate = clock.memory_rate()?;
    for decay in &o.decays {
        check(&o, decay)?;
        for &tokens in &o.tokens {
            let x = inputs(&o, tokens, decay)?;
            let (mixer, d_o) = (mixer(64, scale(&o))?, x.v.f_randn_like()?);
            let forward = clock.time(|| step(mixer.as_ref(), &x, None).map(drop))?;
            let both = clock.time(|| step(mixer.as_ref(), &x, Some(&d_o)).map(drop))?;
            let before = kernels::bridge::device_memory(0)?.now;
            kernels::bridge::reset_peak_memory(0)?;
            drop(step(mixer.as_ref(), &x, Some(&d_o))?);
            let extra = kernels::bridge::device_memory(0)?.peak.saturating_sub(before);
            let tensor = (tokens * o.heads * o.dim * 2) as f64;
            let share = |tensors: f64, ms: f64| tensors * tensor / rate * 1e3 / ms;
            let line = json!({
                "decay": decay, "tokens": tokens, "heads": o.heads, "dim": o.dim, "runs": o.runs,
                "forward_ms": forward.median_ms, "both_ms": both.median_ms,
                "forward": forward.json(), "both": both.json(),
                "forward_of_floor": share(4.0, forward.median_ms), "both_of_floor": share(11.0, both.median_ms),
                "extra_mib": extra as f64 / f64::from(1 << 20), "copy_tb_s": rate / 1e12,
                "gpu": kernels::cuda::name(DEVICE)?, "lasp": env!("CARGO_PKG_VERSION"),
            });
            println!("{line}");
        }
    }
    Ok(())
}
