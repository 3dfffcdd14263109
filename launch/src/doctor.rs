//! `lasp doctor`: what this machine has of what lasp can use, and what would mend what is missing. It looks and never fails.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use collectives::nccl::{Library, SHARES_GPUS};
use serde_json::{Value, json};

use crate::gpu;
use crate::identity::cores;
use crate::output::{self, bytes, table};

/// The libtorch that tch 0.24 is made for.
const LIBTORCH: &str = "2.11.0";

/// Say what this machine has of what lasp can use, and how to get what is missing
#[derive(clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One thing looked for.
struct Finding {
    name: &'static str,
    found: String,
    /// What follows, and the command that mends it; none if all is well.
    mend: Option<String>,
    detail: Value,
}

pub fn run(args: Args) -> Result<()> {
    // If it cannot be opened, `nccl` says so.
    let _ = gpu::open_named_nccl();
    let libtorch = libtorch();
    let driver = driver();
    let findings = [
        program(),
        machine(),
        about_libtorch(libtorch.as_deref()),
        mpi(),
        about_driver(driver.as_deref()),
        gpus(driver.is_some()),
        nvrtc(driver.is_some()),
        nccl(driver.is_some()),
    ];
    let text = match args.json {
        true => serde_json::to_string_pretty(&json(&findings))? + "\n",
        false => show(&findings),
    };
    output::print(&text)
}

fn json(findings: &[Finding]) -> Value {
    let of = |f: &Finding| {
        let value = json!({ "found": f.found, "missing": f.mend, "detail": f.detail });
        (f.name.to_lowercase().replace(' ', "_"), value)
    };
    Value::Object(findings.iter().map(of).collect())
}

fn show(findings: &[Finding]) -> String {
    let rows: Vec<_> = findings.iter().map(|f| vec![f.name.to_owned(), f.found.clone()]).collect();
    let mut text = table("ll", &rows);
    let missing: Vec<_> = findings.iter().filter_map(|f| Some((f.name, f.mend.as_ref()?))).collect();
    if missing.is_empty() {
        return text + "\nnothing is missing\n";
    }
    text += "\nmissing\n";
    let rows: Vec<_> = missing.into_iter().map(|(name, mend)| vec![name.to_owned(), mend.clone()]).collect();
    text + &table("ll", &rows)
}

fn program() -> Finding {
    let mpi = cfg!(feature = "mpi");
    let found = format!(
        "{} ({})",
        env!("CARGO_PKG_VERSION"),
        if mpi { "with MPI" } else { "without MPI: ranks as threads only" }
    );
    let mend = (!mpi).then(|| "ranks as processes need a build with MPI: cargo build --release -p lasp".to_owned());
    Finding { name: "lasp", found, mend, detail: json!({ "version": env!("CARGO_PKG_VERSION"), "mpi": mpi }) }
}

/// Bytes of a line of /proc/meminfo; 0 if there is none.
pub fn memory(key: &str) -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

fn machine() -> Finding {
    let (total, available) = (memory("MemTotal"), memory("MemAvailable"));
    let found = format!("{} cores, {} memory, {} of it available", cores(), bytes(total), bytes(available));
    let detail = json!({ "cores": cores(), "memory_bytes": total, "available_bytes": available });
    Finding { name: "machine", found, mend: None, detail }
}

/// Where a library that this process has loaded lies.
fn loaded(prefix: &str) -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let path = |line: &str| Some(Path::new(line.get(line.find('/')?..)?).to_owned());
    maps.lines().filter_map(path).find(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix)))
}

/// The folder with `lib/libtorch_cpu.so`.
fn libtorch() -> Option<PathBuf> {
    Some(loaded("libtorch_cpu.so")?.parent()?.parent()?.to_owned())
}

/// The version of the libtorch that this process has loaded, where it can be told.
pub fn libtorch_version() -> Option<String> {
    version_in(&libtorch()?)
}

fn version_in(folder: &Path) -> Option<String> {
    // A PyTorch wheel has version.py, a libtorch archive build-version.
    let quoted = fs::read_to_string(folder.join("version.py")).ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("__version__ = '"))?;
        Some(line.trim_end_matches('\'').to_owned())
    });
    quoted.or_else(|| Some(fs::read_to_string(folder.join("build-version")).ok()?.trim().to_owned()))
}

fn about_libtorch(folder: Option<&Path>) -> Finding {
    let version = folder.and_then(version_in);
    let at = folder.map_or_else(|| "unknown place".to_owned(), |folder| folder.display().to_string());
    let found = format!("{}, {at}", version.as_deref().unwrap_or("version unknown"));
    let mend = version
        .as_ref()
        .filter(|version| !version.starts_with(LIBTORCH))
        .map(|version| format!("found {version}, expected {LIBTORCH}: remove .venv and run `make build`"));
    Finding { name: "libtorch", found, mend, detail: json!({ "version": version, "path": folder }) }
}

/// A program on the PATH.
fn on_path(program: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join(program)).find(|path| path.is_file())
}

fn mpi() -> Finding {
    let mpirun = on_path("mpirun");
    let version = mpirun.as_ref().and_then(|path| {
        let out = Command::new(path).arg("--version").output().ok()?;
        Some(String::from_utf8_lossy(&out.stdout).lines().next()?.trim().to_owned())
    });
    let library = loaded("libmpi.so");
    let found = match (&mpirun, &version) {
        (Some(path), Some(version)) => format!("{version}, {}", path.display()),
        (Some(path), None) => format!("{}, which does not tell its version", path.display()),
        (None, _) => "no mpirun on the PATH".to_owned(),
    };
    let mend = mpirun.is_none().then(|| {
        "ranks are threads of one process only; for mpirun: apt-get install openmpi-bin libopenmpi-dev".to_owned()
    });
    Finding { name: "MPI", found, mend, detail: json!({ "mpirun": mpirun, "version": version, "library": library }) }
}

/// The version of the NVIDIA driver, or where its library is.
pub fn driver() -> Option<String> {
    if let Ok(text) = fs::read_to_string("/proc/driver/nvidia/version") {
        let digits = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
        return Some(text.split_whitespace().find(digits).unwrap_or("version unknown").to_owned());
    }
    let folders = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/lib/wsl/lib"];
    let library = loader_path().into_iter().chain(folders.map(PathBuf::from)).map(|f| f.join("libcuda.so.1"));
    library.into_iter().find(|path| path.exists()).map(|path| path.display().to_string())
}

fn loader_path() -> Vec<PathBuf> {
    env::var_os("LD_LIBRARY_PATH").map(|paths| env::split_paths(&paths).collect()).unwrap_or_default()
}

fn about_driver(driver: Option<&str>) -> Finding {
    let found = driver.map_or_else(|| "no NVIDIA driver".to_owned(), |driver| format!("NVIDIA driver {driver}"));
    let mend = driver
        .is_none()
        .then(|| "everything runs on the CPU; with an NVIDIA GPU: apt-get install nvidia-open".to_owned());
    Finding { name: "CUDA driver", found, mend, detail: json!({ "driver": driver }) }
}

/// What libtorch sees, once its CUDA part is open.
fn gpus(has_driver: bool) -> Finding {
    let opened = kernels::bridge::open_cuda().map_err(|error| error.to_string());
    let count = if opened.is_ok() { tch::Cuda::device_count().max(0) } else { 0 };
    let mut models: Vec<String> =
        fs::read_dir("/proc/driver/nvidia/gpus").into_iter().flatten().flatten().filter_map(model).collect();
    models.sort();
    let (found, mend) = match &opened {
        Ok(()) if count > 0 => {
            let named = if models.is_empty() { String::new() } else { format!(": {}", models.join(", ")) };
            (format!("{count}{named}"), None)
        }
        Ok(()) if has_driver => {
            ("none seen by libtorch".to_owned(), Some("is CUDA_VISIBLE_DEVICES empty? see nvidia-smi".to_owned()))
        }
        Ok(()) => ("none".to_owned(), None),
        Err(error) if has_driver => (
            format!("{} in the machine, none usable", models.len()),
            Some(format!(
                "libtorch's CUDA part does not open ({error}): remove .venv and run `make build` on this machine"
            )),
        ),
        Err(_) => ("none".to_owned(), None),
    };
    let detail = json!({ "count": count, "models": models, "error": opened.err() });
    Finding { name: "GPUs", found, mend, detail }
}

fn model(gpu: fs::DirEntry) -> Option<String> {
    let information = fs::read_to_string(gpu.path().join("information")).ok()?;
    Some(information.lines().find_map(|line| line.strip_prefix("Model:"))?.trim().to_owned())
}

fn nvrtc(has_driver: bool) -> Finding {
    let version = kernels::cuda::compiler().map(|(major, minor)| format!("{major}.{minor}"));
    let found = version.as_ref().map_or_else(|_| "none".to_owned(), |version| format!("NVRTC {version}"));
    let mend = version.as_ref().err().filter(|_| has_driver).map(|error| {
        format!("GPU kernels cannot be compiled ({error}): .venv/bin/python -m pip install nvidia-cuda-nvrtc")
    });
    Finding { name: "NVRTC", found, mend, detail: json!({ "version": version.ok() }) }
}

/// The one that libtorch's CUDA part has brought, or that would be opened.
fn nccl(has_driver: bool) -> Finding {
    const PIP: &str = ".venv/bin/python -m pip install 'nvidia-nccl-cu13>=2.30'";
    let library = Library::open(None);
    let (found, mend, version, path) = match &library {
        Ok(library) => {
            let mend = (library.version() < SHARES_GPUS && has_driver).then(|| {
                format!(
                    "several ranks on one GPU need NCCL {SHARES_GPUS} or later and NCCL_MULTI_RANK_GPU_ENABLE=1: {PIP}, \
                     or name another libnccl.so.2 in LASP_NCCL; one rank a GPU works as it is"
                )
            });
            let path = library.path();
            (
                format!("{}, {}", library.version(), path.display()),
                mend,
                Some(library.version().to_string()),
                Some(path),
            )
        }
        Err(error) => {
            let mend = has_driver.then(|| format!("several ranks with GPUs need it ({error}): {PIP}"));
            ("none".to_owned(), mend, None, None)
        }
    };
    Finding { name: "NCCL", found, mend, detail: json!({ "version": version, "path": path }) }
}
