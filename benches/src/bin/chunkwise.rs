//! Chunkwise linear attention on the CPU, forward and backward, beside the time that libtorch needs for the same
//! floating-point operations in batched matrix products of the same shapes: that is the ceiling.

use anyhow::{Result, ensure};
use benches::interleaved;
use clap::Parser;
use kernels::linear::chunkwise::Chunkwise;
use kernels::linear::oracle::Whole;
use kernels::linear::{Inputs, StateMixer};
use kernels::testing::relative_rms;
use serde_json::json;
use tch::{Device, Kind, Tensor};

#[derive(Parser)]
struct Options {
    #[arg(long, default_value_t = 16384)]
    tokens: i64,
    #[arg(long, default_value_t = 8)]
    heads: i64,
    /// K = V.
    #[arg(long, default_value_t = 64)]
    dim: i64,
    #[arg(long, default_value_t = 64)]
    chunk: i64,
    #[arg(long, default_value_t = 20)]
    runs: usize,
    /// libtorch threads.
    #[arg(long, default_value_t = 2)]
    threads: i32,
    #[arg(long, default_values_t = ["none", "head", "token", "channel"].map(String::from))]
    decays: Vec<String>,
}

fn inputs(o: &Options, tokens: i64, decay: &str) -> Result<Inputs> {
    let f32 = (Kind::Float, Device::Cpu);
    let x = || Tensor::randn([1, tokens, o.heads, o.dim], f32);
    let g = |shape: &[i64]| Tensor::rand(shape, f32) * -0.05;
    let log_decay = match decay {
        "head" => Some(g(&[o.heads])),
        "token" => Some(g(&[1, tokens, o.heads])),
        "channel" => Some(g(&[1, tokens, o.heads, o.dim])),
        _ => None,
    };
    Ok(Inputs::new(&x(), &x(), &x(), log_decay.as_ref())?)
}

/// No figure without parity: o and dq of a short sequence against the recurrence.
fn check(o: &Options, mixer: &Chunkwise, decay: &str) -> Result<()> {
    let x = inputs(o, 200, decay)?;
    let d_o = Tensor::randn_like(&x.v);
    let whole = Whole { inputs: &x, cu_seqlens: None, initial_state: None, causal: true, scale: 1.0 };
    let error = relative_rms(&mixer.forward(&x, None)?.finish()?, &whole.forward()?.o);
    let grads = mixer.backward(&x, None, &d_o)?.finish()?;
    let error = error.max(relative_rms(&grads.dk, &whole.backward(&d_o)?.dk));
    ensure!(error <= 1e-5, "decay {decay}: relative RMS error {error:.1e} against the recurrence, no figures");
    Ok(())
}

fn main() -> Result<()> {
    let o = Options::parse();
    kernels::bridge::keep_freed_memory();
    tch::set_num_threads(o.threads);
    let _guard = tch::no_grad_guard();
    let mixer = Chunkwise::new(o.chunk, 1.0)?;
    let (c, d, chunks) = (o.chunk, o.dim, o.tokens / o.chunk * o.heads);
    let random = |rows, columns| Tensor::randn([chunks, rows, columns], (Kind::Float, Device::Cpu));
    let (a, x, s) = (random(c, c), random(c, d), random(d, d));
    // Forward: scores, scores v, k^T v, q P. Backward: scores again, do v^T, dA k, dA^T q, A^T do, do P^T, v R^T, k R,
    // q^T do, k^T v again. Of these 14 products, 3 are [C,D][D,C], 4 [C,C][C,D], 3 [D,C][C,D], 4 [C,D][D,D].
    let mut ceiling = || -> Result<()> {
        let t = x.transpose(1, 2);
        for _ in 0..3 {
            let _ = x.f_bmm(&t)?;
        }
        for _ in 0..4 {
            let _ = a.f_bmm(&x)?;
        }
        for _ in 0..3 {
            let _ = t.f_bmm(&x)?;
        }
        for _ in 0..4 {
            let _ = x.f_bmm(&s)?;
        }
        Ok(())
    };
    let flops = 2.0 * chunks as f64 * (7.0 * (c * c * d) as f64 + 7.0 * (c * d * d) as f64);
    eprintln!(
        "T {} H {} K = V = {} chunk {} f32, {} libtorch threads, {} runs",
        o.tokens, o.heads, d, c, o.threads, o.runs
    );
    for decay in &o.decays {
        check(&o, &mixer, decay)?;
        let x = inputs(&o, o.tokens, decay)?;
        let d_o = Tensor::randn_like(&x.v);
        let mut forward = || -> Result<()> {
            let _ = mixer.forward(&x, None)?.finish()?;
            Ok(())
        };
        let mut backward = || -> Result<()> {
            mixer.backward(&x, None, &d_o)?.finish()?;
            Ok(())
        };
        let times = interleaved(o.runs, &mut [&mut ceiling, &mut forward, &mut backward])?;
        let ratio = (times[1].median_ms + times[2].median_ms) / times[0].median_ms;
        let line = json!({
            "decay": decay, "tokens": o.tokens, "heads": o.heads, "dim": d, "chunk": c, "threads": o.threads, "runs": o.runs,
            "matrix_products": times[0].json(), "forward": times[1].json(), "backward": times[2].json(),
            "gflops_ceiling": flops / times[0].median_ms / 1e6, "ratio": ratio,
        });
        println!("{line}");
    }
    Ok(())
}
