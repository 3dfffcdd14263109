//! The parity list with tensors on GPUs, over NCCL: this program starts itself again under mpirun on 1, 2 and 4 ranks.
//!
//! Several ranks need as many GPUs, or one GPU, NCCL 2.30 or later and NCCL_MULTI_RANK_GPU_ENABLE=1; LASP_NCCL names another
//! libnccl.so.2 than libtorch's own. LASP_PARITY_RANKS names other numbers of ranks ("1 2"). With LASP_PARITY_SECONDS each
//! number of ranks stops there with a part of the cases, of every sort alike, and says how many.

use std::env;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use collectives::nccl;
use lasp_tests::mpirun;
use tch::Cuda;

const RANKS: [usize; 3] = [1, 2, 4];

fn main() -> ExitCode {
    let ranks: Vec<usize> = match env::var("LASP_PARITY_RANKS") {
        Ok(named) => match named.split_whitespace().map(str::parse).collect() {
            Ok(ranks) => ranks,
            Err(error) => {
                eprintln!("LASP_PARITY_RANKS={named}: {error}");
                return ExitCode::FAILURE;
            }
        },
        Err(_) => RANKS.to_vec(),
    };
    mpirun::main(&ranks, missing, on_this_rank)
}

/// What this machine lacks for so many ranks.
fn missing(ranks: usize) -> Option<String> {
    nccl::missing(ranks, open_cuda().map_or(0, |()| Cuda::device_count() as usize))
}

/// libtorch's CUDA part, after another NCCL if one is named.
fn open_cuda() -> Result<()> {
    if let Some(path) = env::var_os("LASP_NCCL") {
        nccl::Library::open(Some(&PathBuf::from(path)))?;
    }
    Ok(kernels::bridge::open_cuda()?)
}

#[cfg(feature = "mpi")]
fn on_this_rank() -> Result<()> {
    use anyhow::{Context, ensure};
    use collectives::mpi;
    use std::sync::Arc;
    use std::time::Duration;

    mpirun::abort_on_panic();
    tch::set_num_threads(1);
    let mpi = mpi::init()?;
    let host = mpi.world();
    let on_gpu = || -> Result<()> {
        open_cuda()?;
        let place: usize = env::var("OMPI_COMM_WORLD_LOCAL_RANK")?.parse()?;
        let gpu = place % usize::try_from(Cuda::device_count())?;
        let mut options = nccl::Options::new(Arc::new(|error| {
            eprintln!("{error}");
            mpi::abort(1);
        }));
        options.timeout = Duration::from_secs(60);
        let world = nccl::open(&host, gpu, nccl::Library::open(None)?, options)?;
        let (failed, overlap) = parity::check(&world, &host)?;
        let (rank, size) = (world.rank(), world.size());
        overlap.with_context(|| format!("{failed} assertions failed on rank {rank} of {size}, and the overlap"))?;
        ensure!(failed == 0, "{failed} assertions failed on rank {rank} of {size}");
        Ok(())
    };
    // Not later: dropping `mpi` would wait for ranks that wait for this one.
    on_gpu().inspect_err(|error| {
        eprintln!("{error:#}");
        mpi::abort(1);
    })
}

#[cfg(not(feature = "mpi"))]
fn on_this_rank() -> Result<()> {
    anyhow::bail!("built without mpi")
}

#[cfg(feature = "mpi")]
mod parity {
    use std::env;
    use std::time::{Duration, Instant};

    use anyhow::{Context, Result, ensure};
    use collectives::{Group, Tensor};
    use lasp_tests::{
        Bf16SoftmaxCase, Scans, bf16_linear_cases, cuda_linear_cases, determinism, going_on_after_failures,
        left_product_cases, linear_cases, overlap, scans, softmax_cases,
    };

    type Case = Box<dyn Fn(&Group, &Scans) -> Result<()>>;

    /// Tokens of the softmax layers in bf16: cuDNN attends within a rank, and flash attention where zigzag leaves less.
    const BF16_TOKENS: i64 = 503;

    /// Every sort of case, each with its cases and their names.
    fn sorts(world: &Group) -> Result<Vec<Vec<(String, Case)>>> {
        let mut linear: Vec<(String, Case)> = Vec::new();
        for case in linear_cases() {
            linear.push((case.name.clone(), Box::new(move |group, scans| case.check(group, scans))));
        }
        let mut bf16: Vec<(String, Case)> = Vec::new();
        let fused = if world.device().is_cuda() { cuda_linear_cases() } else { Vec::new() };
        for case in bf16_linear_cases().into_iter().chain(fused) {
            bf16.push((case.name.clone(), Box::new(move |group, scans| case.check(group, scans))));
        }
        let case = Bf16SoftmaxCase::new(BF16_TOKENS)?;
        let mut softmax: Vec<(String, Case)> =
            vec![("softmax in bf16".into(), Box::new(move |group, _| case.check(group)))];
        for case in softmax_cases() {
            softmax.push((case.name.clone(), Box::new(move |group, _| case.check(group))));
        }
        let mut left: Vec<(String, Case)> = Vec::new();
        for case in left_product_cases() {
            left.push((case.name.clone(), Box::new(move |group, _| case.check(group))));
        }
        Ok(vec![linear, bf16, softmax, left])
    }

    /// Gives the number of assertions that failed on this rank, and what the overlap check says. `host`: the same ranks, for
    /// what is agreed on between cases.
    pub fn check(world: &Group, host: &Group) -> Result<(usize, Result<()>)> {
        let limit: Option<f64> =
            env::var("LASP_PARITY_SECONDS").ok().map(|s| s.parse()).transpose().context("LASP_PARITY_SECONDS")?;
        let (told, rank) = (env::var_os("LASP_TIMES").is_some(), world.rank());
        let scans = scans(world)?;
        // Multiples of the golden ratio, of which any number lie evenly: what comes first is like the whole.
        let place = |i: usize| (i as f64 * 0.618_033_988_749_895).fract();
        let mut cases: Vec<(f64, String, Case)> = Vec::new();
        for sort in sorts(world)? {
            cases.extend(sort.into_iter().enumerate().map(|(i, (name, case))| (place(i), name, case)));
        }
        cases.push((1.0, "repeated runs".into(), Box::new(|group, _| determinism::check(group))));
        cases.sort_by(|a, b| a.0.total_cmp(&b.0));

        let (started, total) = (Instant::now(), cases.len());
        let (mut done, mut failed) = (0, 0);
        for (_, name, case) in &cases {
            let here = Instant::now();
            let on = limit.is_none_or(|limit| started.elapsed() < Duration::from_secs_f64(limit));
            let on = host.broadcast(&Tensor::from_slice(&[i64::from(on)]), 0)?.wait()?;
            if on.int64_value(&[0]) == 0 {
                break;
            }
            let (outcome, failures) = going_on_after_failures(|| case(world, &scans));
            outcome.with_context(|| format!("{name}, rank {rank} of {}", world.size()))?;
            (done, failed) = (done + 1, failed + failures);
            if told && rank == 0 {
                println!("{:>6} ms  {failures} failed  {name}", here.elapsed().as_millis());
            }
        }
        ensure!(done > 0, "no case was tested in LASP_PARITY_SECONDS");
        let outcome = overlap::check(world);
        if rank == 0 {
            let seconds = started.elapsed().as_secs_f64();
            println!("{} ranks: {done} of {total} cases and the overlap in {seconds:.1} s", world.size());
        }
        world.recorder().settle();
        // The first to report a failure ends the job of all.
        host.barrier()?.wait()?;
        Ok((failed, outcome))
    }
}
