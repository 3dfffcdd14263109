//! Linear attention on one GPU, forward and backward: milliseconds by CUDA events, the L2 cache overwritten before each, over
//! the time in which memory could move what must be moved (forward: q, k, v in, o out; with backward eleven such tensors; decays
//! twice, and a learned one's gradient). A JSON line for each decay and length. `--documents` packs the tokens: documents of
//! unequal lengths in one call, between which no state passes. `benches/gpu-kernels.sh` puts it beside flash-linear-attention.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use benches::Timing;
use clap::Parser;
use kernels::cuda::Stopwatch;
use kernels::linear::oracle::Whole;
use kernels::linear::{Grads, Inputs, Piece, StateMixer, mixer};
use kernels::testing::relative_rms;
use serde_json::json;
use tch::{Device, Kind, Tensor};

#[derive(Parser)]
struct Options {
    #[arg(long, value_delimiter = ',', default_value = "16384,131072", value_parser = clap::value_parser!(i64).range(1..))]
    tokens: Vec<i64>,
    #[arg(long, value_delimiter = ',', default_value = "none,head,token", value_parser = ["none", "head", "token", "channel"])]
    decays: Vec<String>,
    /// The tokens are those of so many documents, 64 each and the rest in the proportions 1, 6, 2, 12, 3, 1, 6, ..
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(i64).range(1..))]
    documents: i64,
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(i64).range(1..))]
    heads: i64,
    /// K = V.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(i64).range(1..))]
    dim: i64,
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// After the L2 cache was overwritten, read something else into it: then no run has to write back what it finds there.
    #[arg(long)]
    clean: bool,
}

const DEVICE: Device = Device::Cuda(0);
/// Bytes, more than any L2 cache has.
const CACHE: i64 = 256 << 20;
/// So often the cache is overwritten before each run: the GPU is at it for 2 ms, in which the host launches all of the run, so that no
/// time of the host is in a figure. As in `peers/linear_attention.py`.
const OVERWRITTEN: usize = 32;

/// Tokens that every document has, and the proportions of the rest; `peers/linear_attention.py` has the same.
const AT_LEAST: i64 = 64;
const PROPORTIONS: [i64; 5] = [1, 6, 2, 12, 3];

/// Where documents begin and end, `[N + 1]`.
fn cu_seqlens(tokens: i64, documents: i64) -> Vec<i64> {
    let shares = PROPORTIONS.iter().cycle().scan(0, |sum, share| {
        *sum += share;
        Some(*sum)
    });
    let shares: Vec<i64> = std::iter::once(0).chain(shares).take(documents as usize + 1).collect();
    let (all, rest) = (shares[documents as usize], tokens - AT_LEAST * documents);
    shares.iter().zip(0..).map(|(share, n)| AT_LEAST * n + rest * share / all).collect()
}

/// q, k, v in bf16 on the GPU.
fn inputs(o: &Options, tokens: i64, decay: &str) -> Result<Inputs> {
    let shape = [1, tokens, o.heads, o.dim];
    let x = || Tensor::randn(shape, (Kind::Float, DEVICE)).to_kind(Kind::BFloat16);
    let g = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, DEVICE)).log_sigmoid() / 16.0;
    let log_decay = match decay {
        "none" => None,
        "head" => Some(g(&shape[2..3])),
        "token" => Some(g(&shape[..3])),
        _ => Some(g(&shape)),
    };
    let mut x = Inputs::new(&x(), &x(), &x(), log_decay.as_ref())?;
    // A constant per head is no parameter.
    x.decay_grad = matches!(decay, "token" | "channel");
    Ok(x)
}

fn scale(o: &Options) -> f64 {
    1.0 / (o.dim as f64).sqrt()
}

/// Packed documents, given to the traits as a layer of the model on one rank does: no state enters or leaves.
struct Work {
    mixer: Arc<dyn StateMixer>,
    x: Inputs,
    d_o: Tensor,
    cu_seqlens: Vec<i64>,
    pieces: Vec<Piece>,
    entries: Vec<Option<Tensor>>,
}

impl Work {
    fn new(o: &Options, tokens: i64, documents: i64, decay: &str) -> Result<Self> {
        let x = inputs(o, tokens, decay)?;
        let cu_seqlens = cu_seqlens(tokens, documents);
        let piece = |ends: &[i64]| Piece { tokens: ends[1] - ends[0], enters: false, leaves: false };
        Ok(Self {
            mixer: mixer(64, scale(o))?,
            d_o: x.v.f_randn_like()?,
            x,
            pieces: cu_seqlens.windows(2).map(piece).collect(),
            entries: (0..documents).map(|_| None).collect(),
            cu_seqlens,
        })
    }

    /// o, and what backward is to have of forward.
    fn forward(&self) -> Result<(Tensor, Option<Vec<Tensor>>)> {
        let mut forward = self.mixer.forward_pieces(&self.x, &self.pieces, &self.entries)?;
        forward.run()?;
        let saved = forward.take_saved()?;
        Ok((forward.finish()?, saved))
    }

    fn backward(&self, saved: Option<Vec<Tensor>>) -> Result<Grads> {
        let mut backward = self.mixer.backward_pieces(&self.x, &self.pieces, &self.entries, &self.d_o, saved)?;
        backward.run_grad()?;
        Ok(backward.finish()?)
    }

    /// Bytes that go through memory at least, forward and with backward: inputs are read once in each, outputs written once.
    fn moved(&self) -> (f64, f64) {
        let bytes = |x: &Tensor| x.numel() as f64 * x.kind().elt_size_in_bytes() as f64;
        let tensor = bytes(&self.x.v);
        let decay = self.x.decay.tensor().map_or(0.0, bytes);
        let gradient = if self.x.decay_grad { decay } else { 0.0 };
        (4.0 * tensor + decay, 11.0 * tensor + 2.0 * decay + gradient)
    }

    fn both(&self) -> Result<()> {
        let (_o, saved) = self.forward()?;
        self.backward(saved).map(drop)
    }
}

/// No figure without parity: a short sequence, of a few documents if there are several, against the f64 recurrence.
fn check(o: &Options, decay: &str) -> Result<()> {
    let work = Work::new(o, 1000, o.documents.min(8), decay)?;
    let on_cpu = |x: &Tensor| x.to_device(Device::Cpu).to_kind(Kind::Double);
    let x = &work.x;
    let decays = x.decay.tensor().map(on_cpu);
    let exact = Inputs::new(&on_cpu(&x.q), &on_cpu(&x.k), &on_cpu(&x.v), decays.as_ref())?;
    let cu_seqlens = Some(work.cu_seqlens.as_slice());
    let whole = Whole { inputs: &exact, cu_seqlens, initial_state: None, causal: true, scale: scale(o) };
    let (o, saved) = work.forward()?;
    let (grads, exact_grads) = (work.backward(saved)?, whole.backward(&on_cpu(&work.d_o))?);
    for (what, ours, exact) in [
        ("o", o, whole.forward()?.o),
        ("dq", grads.dq, exact_grads.dq),
        ("dk", grads.dk, exact_grads.dk),
        ("dv", grads.dv, exact_grads.dv),
    ] {
        let error = relative_rms(&ours, &exact);
        ensure!(
            error <= 6e-3,
            "decay {decay}, {} documents, {what}: relative RMS error {error:.1e} against the recurrence, no figures",
            work.pieces.len()
        );
    }
    Ok(())
}

/// What times every body, each run of it from an L2 cache full of something else.
struct Clock {
    watch: Stopwatch,
    cache: Tensor,
    runs: u32,
    clean: bool,
}

impl Clock {
    fn new(o: &Options) -> Result<Self> {
        let cache = Tensor::f_zeros([CACHE / 4], (Kind::Float, DEVICE))?;
        Ok(Self { watch: Stopwatch::new(DEVICE)?, cache, runs: o.runs, clean: o.clean })
    }

    fn time(&mut self, body: impl Fn() -> Result<()>) -> Result<Timing> {
        let mut times = Vec::with_capacity(self.runs as usize);
        for run in 0..self.runs + 3 {
            for _ in 0..OVERWRITTEN {
                let _ = self.cache.zero_();
            }
            if self.clean {
                let _sum = self.cache.f_sum(Kind::Float)?;
            }
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
    let room = (o.tokens.iter().min().unwrap_or(&0) / AT_LEAST).max(1);
    ensure!(
        o.documents <= room,
        "--documents {}: expected 1 to {room}, of {AT_LEAST} tokens and more each (--tokens)",
        o.documents
    );
    kernels::bridge::open_cuda().context("not measured: no CUDA device")?;
    ensure!(tch::Cuda::is_available(), "not measured: no CUDA device");
    let _guard = tch::no_grad_guard();
    let mut clock = Clock::new(&o)?;
    let rate = clock.memory_rate()?;
    for decay in &o.decays {
        check(&o, decay)?;
        for &tokens in &o.tokens {
            let work = Work::new(&o, tokens, o.documents, decay)?;
            let forward = clock.time(|| work.forward().map(drop))?;
            let both = clock.time(|| work.both())?;
            let before = kernels::bridge::device_memory(0)?.now;
            kernels::bridge::reset_peak_memory(0)?;
            work.both()?;
            let extra = kernels::bridge::device_memory(0)?.peak.saturating_sub(before);
            let (forward_bytes, both_bytes) = work.moved();
            let share = |bytes: f64, ms: f64| bytes / rate * 1e3 / ms;
            let line = json!({
                "decay": decay, "tokens": tokens, "documents": o.documents, "heads": o.heads, "dim": o.dim, "runs": o.runs,
                "clean": o.clean,
                "forward_ms": forward.median_ms, "both_ms": both.median_ms,
                "forward": forward.json(), "both": both.json(),
                "forward_of_floor": share(forward_bytes, forward.median_ms), "both_of_floor": share(both_bytes, both.median_ms),
                "extra_mib": extra as f64 / f64::from(1 << 20), "copy_tb_s": rate / 1e12,
                "gpu": kernels::cuda::name(DEVICE)?, "lasp": env!("CARGO_PKG_VERSION"),
            });
            println!("{line}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_fill_the_tokens_unevenly() {
        assert_eq!(cu_seqlens(16384, 4), [0, 832, 5504, 7104, 16384]);
        assert_eq!((cu_seqlens(5, 1), cu_seqlens(192, 3)), (vec![0, 5], vec![0, 64, 128, 192]));
        for documents in [2, 7, 16, 250] {
            let ends = cu_seqlens(16384, documents);
            assert_eq!((ends.len() as i64, ends[0], ends[ends.len() - 1]), (documents + 1, 0, 16384));
            assert!(ends.windows(2).all(|ends| ends[1] - ends[0] >= AT_LEAST), "{ends:?}");
        }
    }
}
