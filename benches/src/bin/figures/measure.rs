//! The commands behind the figures, and a folder of what they gave.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

/// Where a command's results are.
enum Gives {
    /// On standard output: this file.
    Lines(&'static str),
    /// In a folder, whose path the command takes last.
    Folder(&'static str),
}

struct Measurement {
    name: &'static str,
    gives: Gives,
    /// A program beside this one, behind a launcher where needed.
    command: &'static [&'static str],
    says: &'static str,
}

/// Where a command begins with mpirun.
const RANKS: usize = 2;

/// In the order of the README's table.
const ALL: &[Measurement] = &[
    Measurement {
        name: "quickstart",
        gives: Gives::Folder("quickstart"),
        command: &["mpirun", "lasp", "train", "configs/quickstart.toml", "--run-dir"],
        says: "validation loss by tokens; needs corpus.bin, as `make train` prepares it",
    },
    Measurement {
        name: "chunkwise",
        gives: Gives::Lines("chunkwise.jsonl"),
        command: &["chunkwise", "--runs", "20"],
        says: "chunkwise linear attention over the time of the same operations in batched matrix products",
    },
    Measurement {
        name: "scaling",
        gives: Gives::Lines("scaling.jsonl"),
        command: &["training", "--what", "scaling", "--rounds", "2", "--tokens", "8192", "--set", "train.steps=7"],
        says: "tokens/s of training steps under mpirun, sp = 2 over sp = 1, one libtorch thread a rank",
    },
    Measurement {
        name: "flat",
        gives: Gives::Lines("flat.jsonl"),
        command: &["training", "--what", "flat", "--rounds", "2", "--set", "train.steps=5"],
        says: "tokens/s of training steps at sp = 1 as the sequence grows",
    },
    Measurement {
        name: "network",
        gives: Gives::Folder("network"),
        command: &[
            "lasp",
            "compare",
            "--methods",
            "lasp2,lasp1,hierarchical:node=1",
            "--heads",
            "4",
            "--dim",
            "128",
            "--decay",
            "head",
            "--ranks",
            "2,4,8",
            "--seq-lens",
            "1K",
            "--network",
            "node=1,intra=4ms/128MB/s,inter=4ms/128MB/s",
            "--rounds",
            "15",
            "--out",
        ],
        says: "scans on an emulated network as ranks grow",
    },
    Measurement {
        name: "overlap",
        gives: Gives::Lines("overlap.jsonl"),
        command: &["overlap"],
        says: "LASP-2's step where the AllGather takes as long as the intra-rank work, over the step without communication",
    },
    Measurement {
        name: "links",
        gives: Gives::Lines("links.jsonl"),
        command: &[
            "lasp",
            "bench",
            "collectives",
            "--json",
            "--ranks",
            "2",
            "--ops",
            "send_recv,all_gather",
            "--min",
            "1K",
            "--max",
            "1M",
            "--factor",
            "1024",
            "--network",
            "node=2,intra=50us/10GB/s,inter=50us/10GB/s",
        ],
        says: "what the emulated network adds to what it was told",
    },
];

/// Runs what is asked for, all if nothing is, and writes the folder's README.
pub fn all(run: &Path, only: &[String]) -> Result<()> {
    if let Some(unknown) = only.iter().find(|name| ALL.iter().all(|m| m.name != **name)) {
        let names: Vec<&str> = ALL.iter().map(|m| m.name).collect();
        bail!("--only: found {unknown:?}, expected some of {}", names.join(", "));
    }
    fs::create_dir_all(run).with_context(|| format!("cannot create {}", run.display()))?;
    for measurement in ALL.iter().filter(|m| only.is_empty() || only.iter().any(|name| name == m.name)) {
        eprintln!("{}: {}", measurement.name, measurement.says);
        let start = Instant::now();
        measurement.run(run).with_context(|| measurement.name.to_owned())?;
        eprintln!("{}: {:.0} s", measurement.name, start.elapsed().as_secs_f64());
    }
    fs::write(run.join("README.md"), readme(run)?).with_context(|| format!("cannot write to {}", run.display()))
}

impl Measurement {
    fn run(&self, run: &Path) -> Result<()> {
        let programs = std::env::current_exe()?;
        let program = |name: &str| -> Result<_> {
            let path = programs.with_file_name(name);
            ensure!(path.exists(), "{} is missing: cargo build --release --workspace", path.display());
            Ok(path)
        };
        let mut command = match self.command {
            ["mpirun", name, rest @ ..] => {
                let mut command = benches::mpirun(RANKS);
                command.arg(program(name)?).args(rest);
                command
            }
            [name, rest @ ..] => {
                let mut command = Command::new(program(name)?);
                command.args(rest);
                command
            }
            [] => bail!("no command"),
        };
        // Whole or not at all: what was there is replaced at the end.
        let (aside, place) = (run.join(format!("{}.part", self.file())), run.join(self.file()));
        let status = match self.gives {
            Gives::Lines(_) => command.stdout(Stdio::from(File::create(&aside)?)).status(),
            Gives::Folder(_) => {
                remove(&aside)?;
                command.arg(&aside).stdout(Stdio::null()).status()
            }
        };
        let status = status.with_context(|| format!("cannot start {}", self.shown()))?;
        ensure!(status.success(), "{} failed: {status}", self.shown());
        if let Gives::Folder(_) = self.gives {
            // Checkpoints are not figures.
            remove(&aside.join("checkpoints"))?;
            remove(&place)?;
        }
        fs::rename(&aside, &place).with_context(|| format!("cannot replace {}", place.display()))
    }

    /// The command line as one would type it.
    fn shown(&self) -> String {
        let ["mpirun", rest @ ..] = self.command else { return self.command.join(" ") };
        let mpirun = benches::mpirun(RANKS);
        let options = mpirun.get_args().map(|arg| arg.to_string_lossy().into_owned());
        let words: Vec<String> = options.chain(rest.iter().map(|word| (*word).to_owned())).collect();
        format!("mpirun {}", words.join(" "))
    }

    fn file(&self) -> &'static str {
        match self.gives {
            Gives::Lines(file) => file,
            Gives::Folder(folder) => folder,
        }
    }
}

/// A folder that may be there.
fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// What lies in the folder, and on what machine it was measured; then the folder's notes.md, of what came otherwise.
fn readme(run: &Path) -> Result<String> {
    let cpu = benches::processor();
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib: f64 = memory.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).unwrap_or(0.0);
    let cores = std::thread::available_parallelism()?;
    let mut text = format!(
        "# {cpu}, {cores} cores, {:.0} GiB\n\nWritten by `figures measure`; lasp {}, libtorch {}, release build. Compare ratios \
         within one file: machines are shared.\n\n| result | command | what it says |\n|---|---|---|\n",
        kib / f64::from(1 << 20),
        env!("CARGO_PKG_VERSION"),
        libtorch_version()?,
    );
    for measurement in ALL.iter().filter(|m| run.join(m.file()).exists()) {
        let folder = if matches!(measurement.gives, Gives::Folder(_)) {
            format!(" {}", measurement.file())
        } else {
            String::new()
        };
        text += &format!("| `{}` | `{}{folder}` | {} |\n", measurement.file(), measurement.shown(), measurement.says);
    }
    if let Ok(notes) = fs::read_to_string(run.join("notes.md")) {
        text += &format!("\n{notes}");
    }
    Ok(text)
}

/// As `lasp doctor` has it.
fn libtorch_version() -> Result<String> {
    let path = std::env::current_exe()?.with_file_name("lasp");
    let output = Command::new(path).args(["doctor", "--json"]).output().context("cannot start lasp doctor")?;
    ensure!(output.status.success(), "lasp doctor: {}", String::from_utf8_lossy(&output.stderr).trim());
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).context("lasp doctor --json")?;
    Ok(found["libtorch"]["detail"]["version"].as_str().unwrap_or("of unknown version").to_owned())
}
