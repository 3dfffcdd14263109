//! `lasp compare`: methods of sequence parallelism on the same work, as tables, `results.jsonl` and `report.html`. The
//! comparing is `benches::compare`; here are the command line, the ranks, and the files.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use benches::compare::report::{self, Conditions};
use benches::compare::table::{self, LEGEND, Table};
use benches::compare::{Comparison, Method, Mixer, Mode, Options, Row};
use benches::simulate::sweep;
use clap::ValueEnum;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use collectives::Group;
use collectives::local::Network;
use runtime::config::{self, Config, DataConfig, DecayKind, DeviceKind, LayoutKind};
use runtime::metrics::format_duration;
use serde_json::{Value, json};
use tch::Device;

use crate::argument::at_least_one;
use crate::gpu::{Found, Place};
use crate::identity::{Launcher, cores};
use crate::{auto, doctor, gpu, job, output};

/// Time methods of sequence parallelism against each other: tables, results.jsonl, report.html
#[derive(clap::Args)]
#[command(after_help = LEGEND)]
pub struct Args {
    /// A configuration whose sizes are taken where no option gives them [default: 8 heads of 64, 2 layers]
    config: Option<PathBuf>,
    /// Only these, each with settings and a layout if wanted, as in lasp2:splits=4,"ring zigzag"; auto: as the cost model finds
    /// quickest for the length [default: all of the mixer]
    #[arg(long, value_name = "METHOD,..")]
    methods: Option<String>,
    /// Lengths of the sequence over all ranks; K and M are 1024 and 1024^2
    #[arg(long, value_name = "TOKENS,..", value_delimiter = ',', default_value = "4K,8K,16K", value_parser = tokens)]
    seq_lens: Vec<i64>,
    /// Numbers of ranks, as threads; under mpirun, if given, its number of processes [default: 2, on a GPU 1]
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = at_least_one::<usize>)]
    ranks: Vec<usize>,
    /// Whose methods
    #[arg(long, default_value = "linear", value_parser = one_of(&[Mixer::Linear, Mixer::Softmax], Mixer::name))]
    mixer: Mixer,
    /// What is timed: the attention operator, one layer of the model, or training steps of the model; each with backward
    #[arg(long, default_value = "operator", value_parser = one_of(&[Mode::Operator, Mode::Layer, Mode::Train], Mode::name))]
    mode: Mode,
    /// Decay of linear layers
    #[arg(long, value_enum)]
    decay: Option<Decay>,
    /// Heads; query heads of softmax layers
    #[arg(long, value_name = "H", value_parser = at_least_one::<i64>)]
    heads: Option<i64>,
    /// Key and value heads of softmax layers
    #[arg(long, value_name = "H", value_parser = at_least_one::<i64>)]
    kv_heads: Option<i64>,
    /// Width of a head, K = V
    #[arg(long, value_name = "K", value_parser = at_least_one::<i64>)]
    dim: Option<i64>,
    /// Chunk length of linear attention
    #[arg(long, value_name = "C", value_parser = at_least_one::<i64>)]
    chunk: Option<i64>,
    /// Element type [default: CONFIG's; without one f32, on GPUs bf16]
    #[arg(long, value_parser = ["f32", "bf16", "f64"])]
    dtype: Option<String>,
    /// Layout of methods that name none
    #[arg(long, value_enum)]
    layout: Option<Layout>,
    /// Change another setting of the configuration; may be repeated
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// Where to compute; cuda: each rank a process with a GPU, messages by NCCL [default: cuda if CONFIG's train.device is, else
    /// cpu]
    #[arg(long, value_enum)]
    device: Option<Place>,
    /// Emulate this network between ranks that are threads: ranks on a node, latency/bandwidth within and between nodes,
    /// as in node=4,intra=2us/100GB/s,inter=20us/10GB/s
    #[arg(long, value_name = "NETWORK")]
    network: Option<Network>,
    /// Timed rounds of each method
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = at_least_one::<usize>)]
    rounds: usize,
    /// Folder for results.jsonl and report.html, which are replaced [default: compare-MIXER]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// A length that takes longer is announced, and parity that took longer is told.
const WORTH_SAYING: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, ValueEnum)]
enum Decay {
    None,
    /// A constant per head, as Lightning attention
    Head,
    Token,
    Channel,
}

#[derive(Clone, Copy, ValueEnum)]
enum Layout {
    Contiguous,
    Zigzag,
}

/// Values that have names.
fn one_of<T: Copy + Send + Sync + 'static>(
    all: &'static [T],
    name: fn(T) -> &'static str,
) -> impl TypedValueParser<Value = T> {
    let names = PossibleValuesParser::new(all.iter().map(|value| PossibleValue::new(name(*value))));
    names.try_map(move |found| all.iter().copied().find(|value| name(*value) == found).ok_or("not a known name"))
}

fn tokens(text: &str) -> Result<i64, String> {
    sweep::number(text)
        .and_then(|tokens| i64::try_from(tokens).ok())
        .ok_or_else(|| "expected a number of tokens above 0, as in 300, 16K or 1M".into())
}

pub fn run(args: Args, launcher: &Launcher) -> Result<()> {
    let options = options(&args)?;
    let alone = if options.device.is_cuda() { 1 } else { 2 };
    if options.device.is_cuda() {
        gpu::in_processes(launcher, &args.ranks, "compare")?;
    }
    let counts: Vec<Option<usize>> = match (launcher.joins_processes()?, args.ranks.as_slice()) {
        (true, []) => vec![None],
        (true, [ranks]) => vec![Some(*ranks)],
        (true, ranks) => bail!(
            "--ranks: found {ranks:?} under a launcher, expected its number of processes or nothing; start without \
             one for several numbers of ranks as threads"
        ),
        (false, []) => vec![Some(alone)],
        (false, ranks) => ranks.iter().copied().map(Some).collect(),
    };
    let folder = args.out.clone().unwrap_or_else(|| PathBuf::from(format!("compare-{}", options.mixer.name())));
    let results =
        Mutex::new(Results { folder, file: None, rows: vec![], threads: vec![], backend: "", carrier: "", gpu: None });
    for ranks in counts {
        job::on_network(launcher, args.network.as_ref(), ranks, |world| {
            compare(&args, &options, launcher, world, &results)
        })?;
    }
    // Processes other than rank 0 have none.
    match results.into_inner() {
        Ok(results) if !results.rows.is_empty() => results.finish(&args, &options),
        _ => Ok(()),
    }
}

/// The configuration, with the options laid over it, and what is to be timed.
fn options(args: &Args) -> Result<Options> {
    if args.mixer == Mixer::Softmax && matches!(args.decay, Some(Decay::Head | Decay::Token | Decay::Channel)) {
        bail!("--decay: softmax attention has none; leave --decay out, or compare linear attention: --mixer linear");
    }
    let load = |set: &[String]| match &args.config {
        Some(path) => Config::load(path, set),
        None => {
            let pattern = args.mixer.letter();
            let text = format!(
                "[model]\nheads = 8\nkv_heads = 2\ndim = 512\nlayers = 2\npattern = \"{pattern}\"\n[data]\nkind = \"random\"\n"
            );
            Config::from_toml_str(&text, "the defaults of lasp compare", set)
        }
    };
    let base = load(&args.set)?;
    let place = args.device.unwrap_or(match base.train.device {
        DeviceKind::Cuda => Place::Cuda,
        DeviceKind::Auto | DeviceKind::Cpu => Place::Cpu,
    });
    let device = match (place, args.network) {
        (Place::Cpu, _) => Device::Cpu,
        (Place::Cuda, Some(network)) => bail!("{}", gpu::no_network(&network)),
        // Which one is the rank's business.
        (Place::Cuda, None) => Device::Cuda(0),
    };
    let base = base.model;
    let heads = args.heads.unwrap_or(base.heads);
    let mut set = args.set.clone();
    if args.config.is_none() && device.is_cuda() {
        // What our kernels are for; --set and --dtype have the last word.
        set.insert(0, "train.dtype=bf16".to_owned());
    }
    let mut give = |key: &str, value: String| set.push(format!("{key}={value}"));
    if args.heads.is_some() || args.dim.is_some() {
        give("model.heads", heads.to_string());
        give("model.dim", heads.saturating_mul(args.dim.unwrap_or(base.head_dim())).to_string());
    }
    match args.kv_heads {
        Some(kv_heads) => give("model.kv_heads", kv_heads.to_string()),
        None if heads % base.kv_heads != 0 => give("model.kv_heads", heads.to_string()),
        None => {}
    }
    if let Some(chunk) = args.chunk {
        give("model.chunk", chunk.to_string());
    }
    if let Some(dtype) = &args.dtype {
        give("train.dtype", dtype.clone());
    }
    let constant = matches!(base.decay, DecayKind::Lightning | DecayKind::Retention);
    match args.decay {
        Some(Decay::Head) if constant => {}
        Some(Decay::Head) => give("model.decay", "lightning".to_owned()),
        Some(Decay::None) => give("model.decay", "none".to_owned()),
        Some(Decay::Token) => give("model.decay", "token".to_owned()),
        Some(Decay::Channel) => give("model.decay", "channel".to_owned()),
        None => {}
    }
    let config = load(&set).map_err(|error| in_options(error, args))?;
    let layout = match args.layout {
        Some(Layout::Contiguous) => LayoutKind::Contiguous,
        Some(Layout::Zigzag) => LayoutKind::Zigzag,
        None => config.parallel.layout,
    };
    let methods = match &args.methods {
        Some(text) => Method::list(text, args.mixer, layout)?,
        None => Method::all(args.mixer, layout, args.network.map(|network| network.node)),
    };
    Ok(Options { mixer: args.mixer, mode: args.mode, methods, rounds: args.rounds, device, config })
}

/// What is wrong with a setting that an option has given, in the option's words.
fn in_options(error: config::Error, args: &Args) -> anyhow::Error {
    let config::Error::Value { key, expected, .. } = &error else { return error.into() };
    let (option, found) = match key.as_str() {
        // The width of all heads is made a multiple of their number: only that of one can be wrong.
        "model.dim" | "model.heads" if args.dim.is_some() => ("--dim", args.dim),
        "model.dim" | "model.heads" => ("--heads", args.heads),
        "model.kv_heads" => ("--kv-heads", args.kv_heads),
        "model.chunk" => ("--chunk", args.chunk),
        // That the method takes the decay of the configuration has been seen.
        "parallel.linear_method" if args.decay.is_some() => return anyhow::Error::new(error).context("--decay"),
        _ => return error.into(),
    };
    match found {
        Some(found) => anyhow::anyhow!("{option}: found {found}, expected {expected}"),
        None => error.into(),
    }
}

/// One number of ranks: collective over `world`; rank 0 prints and writes.
fn compare(args: &Args, options: &Options, launcher: &Launcher, world: &Group, results: &Mutex<Results>) -> Result<()> {
    let mut options = options.clone();
    let mut world = world.clone();
    if options.device.is_cuda() {
        (world, options.device) = job::on_gpu(launcher, &world).context("--device cuda")?;
    }
    let (world, first) = (&world, world.rank() == 0);
    let lock = || results.lock().map_err(|_| anyhow::anyhow!("another rank failed"));
    // What the methods are compared in may be left open.
    let mut config = options.config.clone();
    (config.parallel.sp, config.parallel.dp) = (world.size(), 1);
    config.train.seq_len = args.seq_lens.iter().copied().max().unwrap_or(1) as usize;
    auto::agree(&mut config, world, options.device.is_cuda())?;
    options.config.parallel.linear_method = config.parallel.linear_method;
    options.config.parallel.softmax_method = config.parallel.softmax_method;
    // What is open among the methods is decided for each length.
    let of_lengths = args.seq_lens.iter().map(|&tokens| decided(args, &options, tokens, world));
    let of_lengths = of_lengths.collect::<Result<Vec<_>>>()?;
    let mut comparison: Option<Comparison> = None;
    if first {
        let found = Found::new(launcher, world, options.device)?;
        lock()?.begin(&options, world, found)?;
    }
    for (at, (&tokens, options)) in args.seq_lens.iter().zip(&of_lengths).enumerate() {
        let same = at > 0 && of_lengths[at - 1].methods == options.methods;
        let comparison = match comparison.take().filter(|_| same) {
            Some(ready) => comparison.insert(ready),
            None => {
                let began = Instant::now();
                let ready = comparison.insert(Comparison::new(world, options)?);
                if first && began.elapsed() > WORTH_SAYING {
                    let time = format_duration(began.elapsed().as_secs_f64());
                    tracing::info!("{} ranks: every method agrees with the f64 oracle, seen in {time}", world.size());
                }
                ready
            }
        };
        let announce = |time: Duration| {
            if first && time > WORTH_SAYING {
                let time = format_duration(time.as_secs_f64());
                tracing::info!("{} ranks, {tokens} tokens: {} rounds take about {time}", world.size(), options.rounds);
            }
        };
        let rows = comparison.at(tokens, &announce)?;
        if first {
            lock()?.add(args, options, rows)?;
        }
    }
    Ok(())
}

/// The options with methods chosen, for one length, where that was left to the cost model. Collective.
fn decided(args: &Args, options: &Options, tokens: i64, world: &Group) -> Result<Options> {
    let mut options = options.clone();
    let kind = options.mixer.layer();
    for method in options.methods.iter_mut().filter(|method| method.is_open()) {
        let mut config = options.config.clone();
        (config.train.seq_len, config.parallel.layout) = (tokens as usize, method.layout);
        let gpu = options.device.is_cuda();
        let operator = auto::Operator { kind, backward: true, gpu, network: args.network, option: "--methods" };
        method.name = operator.agree(Some(&config), None, world)?;
    }
    Ok(options)
}

/// What rank 0 has so far.
struct Results {
    folder: PathBuf,
    file: Option<File>,
    rows: Vec<Row>,
    /// libtorch threads of a rank, by number of ranks.
    threads: Vec<(usize, i32)>,
    /// What started the ranks, and what carries their tensors.
    backend: &'static str,
    carrier: &'static str,
    gpu: Option<Found>,
}

impl Results {
    fn begin(&mut self, options: &Options, world: &Group, gpu: Option<Found>) -> Result<()> {
        if self.file.is_none() {
            let create = || -> std::io::Result<File> {
                fs::create_dir_all(&self.folder)?;
                File::create(self.folder.join("results.jsonl"))
            };
            self.file = Some(create().with_context(|| format!("cannot write to {} (--out)", self.folder.display()))?);
            output::print(&format!("{}\n", options.about()))?;
        }
        (self.backend, self.carrier, self.gpu) = (world.backend(), world.backend_on(options.device), gpu);
        self.threads.push((world.size(), tch::get_num_threads()));
        Ok(())
    }

    fn add(&mut self, args: &Args, options: &Options, rows: Vec<Row>) -> Result<()> {
        let conditions = self.conditions(args, options);
        if let Some(file) = &mut self.file {
            for row in &rows {
                writeln!(file, "{}", row.json(&conditions)?)?;
            }
            file.flush()?;
        }
        let show = |table: Table| match table.cells.len() {
            0 | 1 => String::new(),
            _ => output::table(&table.aligns, &table.marked()),
        };
        let mut text = format!(
            "\n{}, {}\n",
            table::heading(&rows),
            self.about_ranks(args, &self.threads[self.threads.len().saturating_sub(1)..])
        );
        text += &show(table::times(&rows));
        text += "\n";
        text += &show(table::memory_and_messages(&rows));
        for reason in table::skipped(&rows) {
            text += &format!("  {reason}\n");
        }
        output::print(&text)?;
        self.rows.extend(rows);
        Ok(())
    }

    fn finish(self, args: &Args, options: &Options) -> Result<()> {
        let conditions = Conditions {
            about: options.about(),
            ranks: self.about_ranks(args, &self.threads),
            machine: self.machine(),
            versions: self.versions(),
            rounds: options.rounds,
            device: options.device,
            command: std::iter::once("lasp".to_owned())
                .chain(std::env::args().skip(1).map(|argument| shown(&argument)))
                .collect::<Vec<_>>()
                .join(" "),
        };
        let path = self.folder.join("report.html");
        fs::write(&path, report::html(&self.rows, &conditions))
            .with_context(|| format!("cannot write {}", path.display()))?;
        output::print(&format!("\n{}, {}\n", path.display(), self.folder.join("results.jsonl").display()))
    }

    /// Ranks as threads or processes, what each may use, and the network between them; of `these` numbers of ranks, each with the
    /// libtorch threads of a rank.
    fn about_ranks(&self, args: &Args, these: &[(usize, i32)]) -> String {
        let kind = match self.backend {
            "mpi" => "processes under MPI",
            "tcp" => "processes over TCP",
            _ => "threads",
        };
        if let Some(gpu) = &self.gpu {
            let by = if self.carrier == "nccl" { ", messages by NCCL" } else { "" };
            return match (self.backend, gpu.ranks) {
                ("local", _) => "one process with a GPU".to_owned(),
                (_, 1) => format!("ranks as {kind}, a GPU each{by}"),
                (_, n) => {
                    format!("ranks as {kind}, {n} on one GPU, so that times say nothing of GPUs of their own{by}")
                }
            };
        }
        let network = args.network.map_or_else(String::new, |network| format!(", emulated network {network}"));
        let of = |n: i32| format!("{n} libtorch thread{}", if n == 1 { "" } else { "s" });
        let threads = match these {
            [(1, n)] if self.backend == "local" => return format!("{}{network}", of(*n)),
            [(_, n), rest @ ..] if rest.iter().all(|(_, other)| other == n) => format!("{} each", of(*n)),
            several => {
                let each = several.iter().map(|(ranks, n)| format!("{n} with {}", table::ranks(*ranks)));
                format!("libtorch threads of each: {}", each.collect::<Vec<_>>().join(", "))
            }
        };
        format!("ranks as {kind}, {threads}{network}")
    }

    fn conditions(&self, args: &Args, options: &Options) -> Value {
        let (model, threads) = (&options.config.model, self.threads.last().map(|(_, threads)| *threads));
        // Training is on random tokens, and where files lie on this machine is nobody's business.
        let mut config = options.config.clone();
        config.data.path = DataConfig::default().path;
        config.parallel.machine = shown(&config.parallel.machine);
        let mut conditions = json!({
            "device": if self.gpu.is_some() { "cuda" } else { "cpu" },
            "backend": self.carrier,
            "threads_per_rank": threads,
            "network": args.network.map(|network| network.to_string()),
            "rounds": options.rounds,
            "options": {
                "heads": model.heads, "kv_heads": model.kv_heads, "dim": model.head_dim(), "chunk": model.chunk,
                "decay": model.decay, "dtype": options.config.train.dtype, "layers": model.layers,
                "pattern": model.pattern, "batch": options.config.train.batch,
            },
            // What layers and training steps depend on besides.
            "config": (options.mode != Mode::Operator).then_some(&config),
            "machine": { "cpu": benches::processor(), "cores": cores(), "memory_bytes": doctor::memory("MemTotal") },
            "versions": { "lasp": env!("CARGO_PKG_VERSION"), "libtorch": libtorch() },
        });
        if let Some(gpu) = &self.gpu {
            conditions["ranks_per_gpu"] = gpu.ranks.into();
            let (machine, versions) = (json!({ "gpu": gpu.name, "gpus": gpu.gpus }), json!(gpu.versions()));
            for (key, more) in [("machine", machine), ("versions", versions)] {
                if let (Some(all), Value::Object(more)) = (conditions[key].as_object_mut(), more) {
                    all.extend(more);
                }
            }
        }
        conditions
    }

    fn machine(&self) -> String {
        let gpu = self.gpu.as_ref().map(|gpu| {
            let of = if gpu.gpus > 1 { format!(", one of {} of its machine", gpu.gpus) } else { String::new() };
            format!("{}{of}; ", gpu.name)
        });
        format!("{}{}, {} cores", gpu.unwrap_or_default(), benches::processor(), cores())
    }

    fn versions(&self) -> String {
        let gpu = self.gpu.iter().flat_map(Found::versions);
        let gpu: String = gpu.map(|(name, version)| format!(", {name} {version}")).collect();
        format!("lasp {}, libtorch {}{gpu}", env!("CARGO_PKG_VERSION"), libtorch())
    }
}

/// An argument as a report shows it: of an absolute path the last name, as where files lie on this machine is nobody's business.
fn shown(argument: &str) -> String {
    let (option, value) = match argument.rsplit_once('=') {
        Some((option, value)) => (format!("{option}="), value),
        None => (String::new(), argument),
    };
    let path = Path::new(value.trim_matches('"'));
    let value = match path.file_name().filter(|_| path.is_absolute()) {
        Some(name) => name.to_string_lossy().into_owned(),
        None => value.to_owned(),
    };
    let quote = if value.contains(char::is_whitespace) { "'" } else { "" };
    format!("{option}{quote}{value}{quote}")
}

fn libtorch() -> String {
    doctor::libtorch_version().unwrap_or_else(|| "of unknown version".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_names_no_folder_of_the_machine() {
        let arguments =
            ["--out", "/home/me/run 1", "configs/a.toml", "--set=data.path=/data/b.bin", "--methods=ring zigzag"];
        let found = arguments.map(shown);
        assert_eq!(found, ["--out", "'run 1'", "configs/a.toml", "--set=data.path=b.bin", "--methods='ring zigzag'"]);
    }

    #[test]
    fn lengths_have_binary_units() {
        assert_eq!(["1", "300", "4K", "2m"].map(tokens), [1, 300, 4096, 2 << 20].map(Ok));
        assert!(["", "K", "0", "-4K", "1.5K", "1G", "99999999999999999999M"].iter().all(|text| tokens(text).is_err()));
    }
}
