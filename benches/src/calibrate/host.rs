//! What the simulation of ranks on shared cores needs (`simulate::host`): each part of each kernel at several sizes, on all ranks
//! at once and by one rank with all cores, and how long a thread takes to wake.

use std::hint;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use collectives::{Group, Reduce};
use kernels::linear::chunkwise::Chunkwise;
use kernels::linear::left_product;
use kernels::linear::{BackwardSegment, Decay, ForwardSegment, Inputs, StateMixer};
use kernels::softmax::{self, Tile};
use runtime::config::DecayKind;
use runtime::model::{Model, constant_decay};
use tch::{Device, Kind, Tensor};

use crate::exchange::gather;
use crate::simulate::Pass;
use crate::simulate::host::{
    ADD, COPY, DENSE_WIDTHS, Host, JOIN, Kernel, dense_kernel, dense_model, left_product_kind, linear_kernel,
    pairs_kernel,
};

use super::{CHUNK, DIM, F32, HEADS};

const KV_HEADS: i64 = 2;
/// Tokens of a segment, of a tile's queries and keys, and numbers of a copy.
const SEGMENTS: &[i64] = &[256, 1024, 4096];
/// One of them, at which a rank is also measured while the others wait.
const ALONE: i64 = 1024;
const CAUSAL_TILES: &[i64] = &[128, 512, 2048];
const FULL_TILES: &[i64] = &[128, 512, 1536];
const DENSE: &[i64] = &[256, 2048];
const COPIES: &[i64] = &[1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 22];
const RUNS: usize = 5;
const WAKES: usize = 200;
/// For how long threads compete for cores, and how long a thread must stand still to have lost its own.
const SLICES: Duration = Duration::from_millis(500);
const GAP: Duration = Duration::from_micros(200);
/// Numbers that fill any cache.
const COLD: i64 = 12 << 20;

/// Names of parts and their seconds.
type Times = Vec<(String, f64)>;

/// What can be measured by itself.
pub const KINDS: [&str; 5] = ["copies", "dense", "linear", "softmax", "left_product"];

/// The kernels of one of [`KINDS`]. Collective over `world`; the same on every rank.
pub fn kernels(world: &Group, kind: &str, quick: bool) -> Result<Vec<Kernel>> {
    let [shared, _, alone] = measure(world, quick, |job| job.kind == kind, vec![])?;
    Ok([shared, alone].concat())
}

/// The kernels on all ranks at once with their share of the cores; `also` on rank 0 with as much while the others wait; and the
/// kernels on it with all cores, if those are more.
fn measure(world: &Group, quick: bool, wanted: impl Fn(&Job) -> bool, also: Vec<Job>) -> Result<[Vec<Kernel>; 3]> {
    let _guard = tch::no_grad_guard();
    let cores = thread::available_parallelism().map_or(1, Into::into);
    let cold = Tensor::f_ones([COLD], F32)?;
    let among = tch::get_num_threads();
    // No more ranks at once than there are cores.
    let busy = world.rank() < cores;
    let group = world.split("kernels", usize::from(busy), world.rank())?;
    let (mut jobs, rounds) = if quick { (jobs(2), 1) } else { (jobs(usize::MAX), RUNS) };
    jobs.retain(wanted);
    let with_all = if cores as i32 > among { jobs.clone() } else { vec![] };
    let settings = [(among, false, jobs), (among, true, also), (cores as i32, true, with_all)];
    let mut ranks =
        settings.map(|(threads, alone, jobs)| Ranks { world, group: &group, busy, alone, threads, cold: &cold, jobs });
    // Again and again, so that a disturbance of some seconds does not spoil all runs of a kernel.
    for run in 0..rounds + 1 {
        for ranks in &mut ranks {
            tch::set_num_threads(ranks.threads);
            let done = ranks.run(run > 0);
            tch::set_num_threads(among);
            done?;
        }
    }
    Ok([ranks[0].kernels()?, ranks[1].kernels()?, ranks[2].kernels()?])
}

/// Collective over `world`; the same on every rank.
pub fn host(world: &Group, quick: bool, measured: &mut Vec<String>) -> Result<Host> {
    let cores = thread::available_parallelism().map_or(1, Into::into);
    let of = |ranks: &Ranks, size| segment(ranks, size, DecayKind::None);
    let one = Job { kind: "linear", size: ALONE, of, runs: vec![] };
    let [mut kernels, by_itself, with_all] = measure(world, quick, |_| true, vec![one])?;
    let name = linear_kernel(DecayKind::None, Pass::Backward, "run");
    let us = |kernels: &[Kernel]| -> Result<f64> {
        let kernel = kernels.iter().find(|kernel| kernel.name == name).context("no kernel")?;
        kernel.at.iter().position(|at| *at == ALONE as f64).map(|i| kernel.us[i]).context("no such size")
    };
    let alone = (us(&kernels)? / us(&by_itself)?).max(1.0);
    kernels.extend(with_all);
    let [wake, wake_busy, slice] = waits(world, cores)?;
    measured.push(format!(
        "a core among idle ones: {alone:.2} times as fast as among busy ones; a thread wakes after {wake:.0} us, among \
         busy ones after {wake_busy:.0}; with others waiting it keeps its core for {slice:.0} us"
    ));
    Ok(Host {
        cores,
        alone,
        slice_us: slice,
        wake_us: wake,
        wake_busy_us: wake_busy,
        network: None,
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: DIM,
        chunk: CHUNK,
        kernels,
    })
}

/// Who measures: all ranks at once, or rank 0 while the others wait.
struct Ranks<'a> {
    world: &'a Group,
    /// Those that measure at once, of which this rank may be one.
    group: &'a Group,
    busy: bool,
    alone: bool,
    threads: i32,
    cold: &'a Tensor,
    jobs: Vec<Job>,
}

/// A kernel at a size, and what its parts took on this rank.
#[derive(Clone)]
struct Job {
    kind: &'static str,
    size: i64,
    of: fn(&Ranks, i64) -> Result<Times>,
    runs: Vec<Times>,
}

impl Ranks<'_> {
    /// Before each run, once its inputs are made: out of the caches, as those of a model's layer are, and all ranks at once.
    fn ready(&self) -> Result<Laps> {
        let _ = self.cold.f_sum(Kind::Float)?;
        if !self.alone {
            self.group.barrier()?.wait()?;
        }
        Ok(Laps(Instant::now()))
    }

    /// All jobs once.
    fn run(&mut self, counts: bool) -> Result<()> {
        let mut jobs = std::mem::take(&mut self.jobs);
        if self.world.rank() == 0 || (self.busy && !self.alone) {
            for job in &mut jobs {
                let times = (job.of)(self, job.size)?;
                if counts {
                    job.runs.push(times);
                }
            }
        }
        self.jobs = jobs;
        Ok(self.world.barrier()?.wait()?)
    }

    /// The median of each part, the mean of the ranks that measured.
    fn kernels(&self) -> Result<Vec<Kernel>> {
        let mut kernels: Vec<Kernel> = Vec::new();
        for job in &self.jobs {
            let names: Vec<String> = job.runs.first().into_iter().flatten().map(|(name, _)| name.clone()).collect();
            // Rank 0 measures every job.
            for (part, name) in gather(self.world, &names)?.swap_remove(0).into_iter().enumerate() {
                let mut seconds: Vec<f64> = job.runs.iter().map(|times| times[part].1).collect();
                seconds.sort_by(f64::total_cmp);
                let mine = seconds.get(seconds.len() / 2).copied().unwrap_or(0.0);
                let sum = self.world.all_reduce(&Tensor::f_from_slice(&[mine])?, Reduce::Sum)?.wait()?;
                let count =
                    self.world.all_reduce(&Tensor::f_from_slice(&[f64::from(!job.runs.is_empty())])?, Reduce::Sum)?;
                let ranks = count.wait()?.double_value(&[0]).max(1.0);
                let us = (1e6 * sum.double_value(&[0]) / ranks).max(1e-3);
                match kernels.iter_mut().find(|kernel| kernel.name == name) {
                    Some(kernel) => {
                        kernel.at.push(job.size as f64);
                        kernel.us.push(us);
                    }
                    None => {
                        let threads = self.threads as usize;
                        kernels.push(Kernel { name, threads, at: vec![job.size as f64], us: vec![us] });
                    }
                }
            }
        }
        Ok(kernels)
    }
}

/// At so many sizes of each kernel.
fn jobs(most: usize) -> Vec<Job> {
    let mut jobs = Vec::new();
    let mut add = |kind: &'static str, sizes: &[i64], of: fn(&Ranks, i64) -> Result<Times>| {
        jobs.extend(sizes.iter().take(most).map(|&size| Job { kind, size, of, runs: vec![] }));
    };
    add("copies", COPIES, copies);
    add("dense", DENSE, |ranks, tokens| dense(ranks, tokens, DENSE_WIDTHS[0]));
    add("dense", DENSE, |ranks, tokens| dense(ranks, tokens, DENSE_WIDTHS[1]));
    add("linear", SEGMENTS, |ranks, tokens| segment(ranks, tokens, DecayKind::None));
    add("linear", SEGMENTS, |ranks, tokens| segment(ranks, tokens, DecayKind::Lightning));
    add("linear", SEGMENTS, |ranks, tokens| segment(ranks, tokens, DecayKind::Token));
    add("linear", SEGMENTS, |ranks, tokens| segment(ranks, tokens, DecayKind::Channel));
    add("softmax", CAUSAL_TILES, |ranks, tokens| softmax_tile(ranks, tokens, true));
    add("left_product", CAUSAL_TILES, |ranks, tokens| left_product_tile(ranks, tokens, true, DecayKind::None));
    add("left_product", CAUSAL_TILES, |ranks, tokens| left_product_tile(ranks, tokens, true, DecayKind::Lightning));
    add("softmax", FULL_TILES, |ranks, tokens| softmax_tile(ranks, tokens, false));
    add("left_product", FULL_TILES, |ranks, tokens| left_product_tile(ranks, tokens, false, DecayKind::None));
    add("left_product", FULL_TILES, |ranks, tokens| left_product_tile(ranks, tokens, false, DecayKind::Lightning));
    jobs
}

/// Seconds since the last lap.
struct Laps(Instant);

impl Laps {
    fn lap(&mut self) -> f64 {
        let before = std::mem::replace(&mut self.0, Instant::now());
        (self.0 - before).as_secs_f64()
    }
}

fn copies(ranks: &Ranks, numbers: i64) -> Result<Times> {
    let x = Tensor::f_ones([numbers], F32)?;
    let mut sum = Tensor::f_zeros([numbers], F32)?;
    let halves = Tensor::f_ones([1, numbers / (2 * KV_HEADS * DIM), KV_HEADS, DIM], F32)?;
    let mut laps = ranks.ready()?;
    let mut copy = Tensor::f_empty([numbers], F32)?;
    copy.f_copy_(&x)?;
    let copied = laps.lap();
    let _ = sum.f_add_(&x)?;
    let added = laps.lap();
    let _ = Tensor::f_cat(&[&halves, &halves], -1)?;
    Ok(vec![(COPY.to_owned(), copied), (ADD.to_owned(), added), (JOIN.to_owned(), laps.lap())])
}

fn random(tokens: i64, heads: i64) -> Result<Tensor> {
    Ok(Tensor::f_randn([1, tokens, heads, DIM], F32)?)
}

fn log_decay(tokens: i64, decay: DecayKind) -> Result<Option<Tensor>> {
    let shape: &[i64] = match decay {
        DecayKind::None => return Ok(None),
        DecayKind::Lightning | DecayKind::Retention => &[HEADS],
        DecayKind::Token => &[1, tokens, HEADS],
        DecayKind::Channel => &[1, tokens, HEADS, DIM],
    };
    Ok(Some(Tensor::f_rand(shape, F32)?.f_mul_scalar(-0.1)?))
}

/// The parts of a segment's forward and backward, as `runtime::sequence::linear` calls them.
fn segment(ranks: &Ranks, tokens: i64, decay: DecayKind) -> Result<Times> {
    let [q, k, v, d_o] = [0; 4].map(|_| random(tokens, HEADS));
    let (q, k, v, d_o) = (q?, k?, v?, d_o?);
    let state = Tensor::f_zeros([1, HEADS, DIM, DIM], F32)?;
    let log_decay = log_decay(tokens, decay)?;
    let mut x = Inputs::new(&q, &k, &v, log_decay.as_ref())?;
    x.decay_grad = matches!(decay, DecayKind::Token | DecayKind::Channel);
    let mixer = Chunkwise::new(CHUNK, 0.125)?;
    let mut times = Vec::new();
    let mut laps = ranks.ready()?;
    let mut took = |pass: Pass, part: &str, laps: &mut Laps| times.push((linear_kernel(decay, pass, part), laps.lap()));

    let mut forward: Box<dyn ForwardSegment> = mixer.forward(&x, None)?;
    took(Pass::Forward, "open", &mut laps);
    let _ = forward.summarize(0)?;
    took(Pass::Forward, "summarize", &mut laps);
    forward.run()?;
    took(Pass::Forward, "run", &mut laps);
    forward.add_entry(0, &state)?;
    took(Pass::Forward, "add", &mut laps);
    let _ = forward.finish()?;
    took(Pass::Forward, "finish", &mut laps);

    let mut backward: Box<dyn BackwardSegment> = mixer.backward(&x, Some(&state), &d_o)?;
    took(Pass::Backward, "open", &mut laps);
    let _ = backward.summarize_grad(0)?;
    took(Pass::Backward, "summarize", &mut laps);
    backward.run_grad()?;
    took(Pass::Backward, "run", &mut laps);
    backward.add_exit(0, &state)?;
    took(Pass::Backward, "add", &mut laps);
    let _ = backward.finish()?;
    took(Pass::Backward, "finish", &mut laps);
    Ok(times)
}

/// A layer of linear attention as `runtime::model` has it, with an operator in it that does nothing.
fn dense(ranks: &Ranks, tokens: i64, width: i64) -> Result<Times> {
    let config = dense_model(width, DIM)?.model;
    let model = Model::new(&config, Kind::Float, 0, Device::Cpu)?;
    model.params.share_grads(&model.params.flat.f_zeros_like()?)?;
    let weight = |name: &str| model.params.get(&format!("layers.0.{name}"));
    let norms = [weight("attn_norm")?, weight("attn.o_norm")?, weight("mlp_norm")?];
    let qkvg = [weight("attn.wq")?, weight("attn.wk")?, weight("attn.wv")?, weight("attn.wg")?];
    let (out, mlp) = (weight("attn.wo")?, [weight("mlp.w_gate")?, weight("mlp.w_up")?, weight("mlp.w_down")?]);
    let rows = || Tensor::f_randn([1, tokens, width], F32);
    let (x, d_y, attended) = (rows()?.f_set_requires_grad(true)?, rows()?, rows()?);
    let norm = |x: &Tensor, weight: &Tensor| x.f_rms_norm(weight.size(), Some(weight), config.norm_eps);
    let product = |x: &Tensor, weight: &Tensor| x.f_linear(weight, None::<&Tensor>);
    let heads = [1, tokens, config.heads, DIM];
    let mut laps = ranks.ready()?;
    let y = tch::with_grad(|| -> Result<Tensor> {
        let normed = norm(&x, &norms[0])?;
        let (q, k) = (product(&normed, &qkvg[0])?.f_silu()?, product(&normed, &qkvg[1])?.f_silu()?);
        let (v, o) = (product(&normed, &qkvg[2])?, attended.f_view(heads)?);
        kernels::bridge::attach(&[&q, &k, &v], &[&o], move |mut grads: Vec<Option<Tensor>>| {
            let grad = grads.swap_remove(0).map(|grad| grad.f_view([1, tokens, width])).transpose()?;
            Ok([0; 3].map(|_| grad.as_ref().map(Tensor::shallow_clone)).into())
        })?;
        let gated = norm(&o, &norms[1])?.f_view_as(&x)?.f_mul(&product(&normed, &qkvg[3])?.f_silu()?)?;
        let x = x.f_add(&product(&gated, &out)?)?;
        let normed = norm(&x, &norms[2])?;
        let hidden = product(&normed, &mlp[0])?.f_silu()?.f_mul(&product(&normed, &mlp[1])?)?;
        Ok(x.f_add(&product(&hidden, &mlp[2])?)?)
    })?;
    let forward = laps.lap();
    kernels::bridge::backward(&y, &d_y)?;
    let name = |pass| dense_kernel(width, pass);
    Ok(vec![(name(Pass::Forward), forward), (name(Pass::Backward), laps.lap())])
}

fn softmax_tile(ranks: &Ranks, tokens: i64, causal: bool) -> Result<Times> {
    let (q, k, v) = (random(tokens, HEADS)?, random(tokens, KV_HEADS)?, random(tokens, KV_HEADS)?);
    let d_o = random(tokens, HEADS)?;
    let tiles = [Tile { q: 0..tokens, k: 0..tokens, causal }];
    let mut laps = ranks.ready()?;
    let (o, lse) = softmax::forward(&q, &k, &v, &tiles, 0.125)?;
    let forward = laps.lap();
    let _ = softmax::backward(&q, &k, &v, &o, &lse, &d_o, &tiles, 0.125)?;
    let name = |pass| pairs_kernel("softmax", causal, pass);
    Ok(vec![(name(Pass::Forward), forward), (name(Pass::Backward), laps.lap())])
}

/// With Lightning's decays of a first layer, which underflow at distances as they do in a model.
fn left_product_tile(ranks: &Ranks, tokens: i64, causal: bool, decay: DecayKind) -> Result<Times> {
    let (q, k, v, d_o) =
        (random(tokens, HEADS)?, random(tokens, HEADS)?, random(tokens, HEADS)?, random(tokens, HEADS)?);
    let tiles = [left_product::Tile { q: 0..tokens, k: 0..tokens, ahead: if causal { 0 } else { tokens } }];
    let log_decay = constant_decay(decay, HEADS, 0, 2)?.map(|g| g.f_to_kind(Kind::Float)).transpose()?;
    let of_heads = log_decay.map_or(Decay::None, Decay::Head);
    let mut laps = ranks.ready()?;
    let _ = left_product::forward(&q, &k, &v, &of_heads, &tiles, 0.125)?;
    let forward = laps.lap();
    left_product::backward(&q, &k, &v, &of_heads, false, &d_o, &tiles, 0.125)?;
    let name = |pass| pairs_kernel(left_product_kind(decay), causal, pass);
    Ok(vec![(name(Pass::Forward), forward), (name(Pass::Backward), laps.lap())])
}

/// Microseconds until a waiting thread runs that another has handed something, with cores idle and with all of them busy; and for
/// which a thread keeps its core when others wait. Rank 0 measures.
fn waits(world: &Group, cores: usize) -> Result<[f64; 3]> {
    let mut us = [0.0; 3];
    if world.rank() == 0 {
        us[0] = 1e6 * hand_over()?;
        let done = AtomicBool::new(false);
        us[1] = thread::scope(|scope| {
            for _ in 0..cores {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        hint::spin_loop();
                    }
                });
            }
            let us = hand_over().map(|seconds| 1e6 * seconds);
            done.store(true, Ordering::Relaxed);
            us
        })?;
        us[2] = 1e6 * slice(cores);
    }
    let us =
        world.broadcast(&Tensor::f_from_slice(&us)?, 0)?.wait()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
    Ok([0, 1, 2].map(|i| us.double_value(&[i])))
}

/// Seconds that a thread runs without a break when two want each core: the median of what threads see.
fn slice(cores: usize) -> f64 {
    let watch = || {
        let (start, mut runs) = (Instant::now(), Vec::new());
        let (mut last, mut began) = (start, start);
        while last - start < SLICES {
            let now = Instant::now();
            if now - last > GAP {
                runs.push((last - began).as_secs_f64());
                began = now;
            }
            last = now;
        }
        runs
    };
    let mut runs: Vec<f64> = thread::scope(|scope| {
        let threads: Vec<_> = (0..2 * cores).map(|_| scope.spawn(watch)).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).flatten().collect()
    });
    runs.sort_by(f64::total_cmp);
    runs.get(runs.len() / 2).copied().unwrap_or(SLICES.as_secs_f64())
}

/// Seconds that a hand-over takes, the mean of many to and fro.
fn hand_over() -> Result<f64> {
    let (ball, bell) = (Mutex::new(0usize), Condvar::new());
    let play = |parity: usize| {
        let mut turn = ball.lock().unwrap_or_else(PoisonError::into_inner);
        while *turn < WAKES {
            if *turn % 2 == parity {
                *turn += 1;
                bell.notify_one();
            } else {
                turn = bell.wait(turn).unwrap_or_else(PoisonError::into_inner);
            }
        }
        bell.notify_one();
    };
    let start = Instant::now();
    thread::scope(|scope| {
        let other = scope.spawn(|| play(1));
        play(0);
        other.join().ok().context("a thread that measures wake-ups panicked")
    })?;
    Ok(start.elapsed().as_secs_f64() / WAKES as f64)
}
