//! `lasp calibrate`: measures this machine, or ranks on an emulated network, and writes it as a machine for `lasp simulate`.
//! The measuring is `benches::calibrate`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use benches::calibrate::{Calibration, KINDS, Setting, calibrate, kernels};
use benches::simulate::Machine;
use benches::simulate::host::{Host, Kernel};
use collectives::Group;
use collectives::local::Network;
use tch::Device;

use crate::argument::at_least_one;
use crate::gpu::Place;
use crate::identity::{Launcher, cores};
use crate::{doctor, gpu, job, output};

/// Measure kernels and collectives here, and write them as a machine of the cost model
#[derive(clap::Args)]
pub struct Args {
    /// Number of ranks, as threads; under mpirun, if given, its number of processes [default: 2, on a GPU 1]
    #[arg(long, value_name = "N", value_parser = at_least_one::<usize>)]
    ranks: Option<usize>,
    /// What to measure; cuda: a GPU in bf16 and, with several ranks, NCCL between GPUs; the rest of the machine is a preset's
    #[arg(long, value_enum, default_value_t = Place::Cpu)]
    device: Place,
    /// Emulate this network between ranks that are threads: ranks on a node, latency/bandwidth within and between nodes,
    /// as in node=4,intra=2us/100GB/s,inter=20us/10GB/s
    #[arg(long, value_name = "NETWORK")]
    network: Option<Network>,
    /// Measure kernels once and at few sizes: some seconds, for a first look
    #[arg(long)]
    quick: bool,
    /// Measure only these kernels of ranks that share cores, and put them into --out, an earlier calibration, of which all else stays
    #[arg(long, value_name = "KIND", value_parser = KINDS, conflicts_with_all = ["device", "network"])]
    only: Option<String>,
    /// The file to write, TOML; it is replaced, or with --only changed
    #[arg(long, value_name = "FILE", default_value = "machine.toml")]
    out: PathBuf,
}

pub fn run(args: Args, launcher: &Launcher) -> Result<()> {
    let cuda = args.device == Place::Cuda;
    if let (true, Some(network)) = (cuda, &args.network) {
        bail!("{}", gpu::no_network(network));
    }
    if cuda {
        gpu::in_processes(launcher, args.ranks.as_slice(), "calibrate")?;
    }
    let ranks = match launcher.joins_processes()? {
        true => args.ranks,
        false => Some(args.ranks.unwrap_or(if cuda { 1 } else { 2 })),
    };
    job::on_network(launcher, args.network.as_ref(), ranks, |world| {
        if let Some(kind) = &args.only {
            return put(&args, kind, world);
        }
        if world.rank() == 0 {
            output::check_file("--out", &args.out)?;
        }
        let (world, device) = match args.device {
            Place::Cpu => (world.clone(), Device::Cpu),
            Place::Cuda => job::on_gpu(launcher, world).context("--device cuda")?,
        };
        let name = args.out.file_stem().map_or_else(|| "here".to_owned(), |name| name.to_string_lossy().into_owned());
        let on_node = launcher.on_node().unwrap_or(world.size());
        let setting = Setting {
            name,
            device,
            node: args.network.map_or(on_node, |network| network.node),
            gpus: if cuda { gpu::count() } else { 0 },
            memory: doctor::memory("MemTotal"),
            network: args.network.map(|network| network.to_string()),
            quick: args.quick,
        };
        let found = calibrate(&world, &setting)?;
        if world.rank() == 0 { write(&args, &world, device, &found) } else { Ok(()) }
    })
}

/// Measures kernels of one kind, and puts them in the place of those in the file; new ones come behind.
fn put(args: &Args, kind: &str, world: &Group) -> Result<()> {
    // Read first: measuring takes minutes.
    let earlier = if world.rank() == 0 { Some(Earlier::read(&args.out)?) } else { None };
    let found = kernels(world, kind, args.quick)?;
    earlier.map_or(Ok(()), |earlier| earlier.with(found, &args.out))
}

/// What `lasp calibrate` wrote before.
struct Earlier {
    /// The lines at its beginning that say what was measured.
    comments: String,
    machine: Machine,
    host: Host,
}

impl Earlier {
    fn read(file: &Path) -> Result<Self> {
        let path = file.display();
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {path} (--out with --only)"))?;
        let mut machine = Machine::from_toml(&text, &path.to_string())?;
        let host = machine.host.take().with_context(|| {
            format!("{path} has no [host]; expected a machine that lasp calibrate wrote (--out with --only)")
        })?;
        let comments = text.lines().take_while(|line| line.starts_with('#')).map(|line| format!("{line}\n")).collect();
        Ok(Self { comments, machine, host })
    }

    /// Writes it anew with these kernels.
    fn with(self, found: Vec<Kernel>, file: &Path) -> Result<()> {
        let path = file.display();
        let names: String =
            found.iter().map(|kernel| format!("  {}, {} threads\n", kernel.name, kernel.threads)).collect();
        let Self { comments, machine, mut host } = self;
        for new in found {
            match host.kernels.iter_mut().find(|old| (&old.name, old.threads) == (&new.name, new.threads)) {
                Some(old) => *old = new,
                None => host.kernels.push(new),
            }
        }
        let machine = Machine { host: Some(host), ..machine };
        fs::write(file, format!("{comments}\n{}", machine.to_toml()?))
            .with_context(|| format!("cannot write {path} (--out)"))?;
        output::print(&format!("{names}{path}\n"))
    }
}

fn write(args: &Args, world: &Group, device: Device, found: &Calibration) -> Result<()> {
    let network = args.network.map_or_else(String::new, |network| format!(", emulated network {network}"));
    let about = format!(
        "ranks: {}, back end {}, libtorch threads of each: {}, cores: {}{network}; {}",
        world.size(),
        world.backend_on(device),
        tch::get_num_threads(),
        cores(),
        if device.is_cuda() { "bf16" } else { "f32" }
    );
    let comments = std::iter::once(&about).chain(&found.measured).map(|line| format!("# {line}\n"));
    let text = comments.collect::<String>() + "\n" + &found.machine.to_toml()?;
    fs::write(&args.out, text).with_context(|| format!("cannot write {} (--out)", args.out.display()))?;
    let lines: String = found.measured.iter().map(|line| format!("  {line}\n")).collect();
    output::print(&format!("{about}\n{lines}{}\n", args.out.display()))
}
