//! Checkpoints: `RUN/checkpoints/step-00000100/` with `model.safetensors`, `optimizer.safetensors` and `state.json`.
//! A checkpoint is written as `step-00000100.tmp` and renamed when every byte is on the disk, so that whatever is
//! interrupted, the folders without a suffix are whole. What is in the tensors is the trainer's business.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};
use xxhash_rust::xxh3::xxh3_64;

use crate::{atomic, mapped, tensor_file};

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is damaged or no state of a checkpoint: {message}", path.display())]
    State { path: PathBuf, message: String },
    #[error("{} is of version {found}, expected {VERSION}: continue with the program that wrote it", path.display())]
    Version { path: PathBuf, found: u32 },
    #[error(
        "{} is damaged: its checksum is {found}, expected {expected}; continue from an earlier checkpoint",
        path.display()
    )]
    Damaged { path: PathBuf, found: String, expected: String },
    #[error(transparent)]
    Tensors(#[from] tensor_file::Error),
}

/// The version of `state.json` that this program writes and reads.
pub const VERSION: u32 = 1;

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

/// Where training stands, beside its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Version of the format.
    pub version: u32,
    /// Optimizer steps done.
    pub step: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Sequences seen, which is the number of the next one.
    pub sequences: u64,
    /// Lowest validation loss so far, in nats a token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_val: Option<f64>,
    /// The resolved configuration of the run.
    pub config_toml: String,
}

impl Default for TrainState {
    fn default() -> Self {
        TrainState { version: VERSION, step: 0, tokens: 0, sequences: 0, best_val: None, config_toml: String::new() }
    }
}

/// `state.json`: the state, and the xxh3 of each tensor file.
#[derive(Serialize, Deserialize)]
struct StateFile {
    #[serde(flatten)]
    state: TrainState,
    xxh3: BTreeMap<String, String>,
}

/// A checkpoint in memory.
#[derive(Debug)]
pub struct Loaded {
    pub state: TrainState,
    pub model: BTreeMap<String, Tensor>,
    pub optimizer: BTreeMap<String, Tensor>,
}

/// Writes a checkpoint of `run_dir` and returns its folder; then removes all but the `keep` newest, never this one.
pub fn save(
    run_dir: &Path,
    state: &TrainState,
    model: &[(String, Tensor)],
    optimizer: &[(String, Tensor)],
    keep: usize,
) -> Result<PathBuf> {
    let folder = run_dir.join("checkpoints");
    fs::create_dir_all(&folder).map_err(failure("create", &folder))?;
    tidy(&folder)?;

    let path = folder.join(format!("step-{:08}", state.step));
    let aside = atomic::aside(&path);
    fs::create_dir(&aside).map_err(failure("create", &aside))?;
    let mut xxh3 = BTreeMap::new();
    for (name, tensors) in [(MODEL, model), (OPTIMIZER, optimizer)] {
        let file = aside.join(name);
        tensor_file::write(&file, tensors, &[])?;
        xxh3.insert(name.to_owned(), checksum(&file)?);
    }
    let state = StateFile { state: state.clone(), xxh3 };
    let file = aside.join(STATE);
    let text = serde_json::to_string_pretty(&state)
        .map_err(|error| Error::State { path: file.clone(), message: error.to_string() })?;
    atomic::replace_bytes(&file, text.as_bytes()).map_err(failure("write", &file))?;
    atomic::sync_folder(&aside).map_err(failure("sync", &aside))?;

    let old = path.with_extension("old");
    if path.exists() {
        fs::rename(&path, &old).map_err(failure("rename", &path))?;
    }
    atomic::commit(&aside, &path).map_err(failure("rename", &aside))?;
    tidy(&folder)?;
    let complete = complete(&folder)?;
    let surplus = complete.len().saturating_sub(keep);
    for (_, other) in complete.into_iter().take(surplus).filter(|(_, other)| *other != path) {
        remove(&other)?;
    }
    Ok(path)
}

/// The newest whole checkpoint of `run_dir`, if there is any.
pub fn latest(run_dir: &Path) -> Result<Option<PathBuf>> {
    Ok(complete(&run_dir.join("checkpoints"))?.pop().map(|(_, path)| path))
}

/// Reads the checkpoint in the folder `path` onto `device`, and checks that it is whole and undamaged.
pub fn load(path: &Path, device: Device) -> Result<Loaded> {
    let file = path.join(STATE);
    let text = fs::read_to_string(&file).map_err(failure("read", &file))?;
    let damaged = |error: serde_json::Error| Error::State { path: file.clone(), message: error.to_string() };
    // The version first: another one may have other fields.
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let found = serde_json::from_str::<Version>(&text).map_err(damaged)?.version;
    if found != VERSION {
        return Err(Error::Version { path: file, found });
    }
    let StateFile { state, xxh3 } = serde_json::from_str(&text).map_err(damaged)?;
    for (name, expected) in xxh3 {
        let file = path.join(name);
        let found = checksum(&file)?;
        if found != expected {
            return Err(Error::Damaged { path: file, found, expected });
        }
    }
    Ok(Loaded {
        state,
        model: tensor_file::read(&path.join(MODEL), device)?,
        optimizer: tensor_file::read(&path.join(OPTIMIZER), device)?,
    })
}

/// The whole checkpoints in `folder` by rising step. One being replaced (`.old`) counts while its successor is not there.
fn complete(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = BTreeMap::new();
    for path in entries(folder)? {
        let replaced = path.extension().is_some_and(|extension| extension == "old");
        let whole = if replaced { path.with_extension("") } else { path.clone() };
        if path.join(STATE).is_file()
            && let Some(step) = step_of(&whole)
            && !(replaced && whole.exists())
        {
            found.insert(step, path);
        }
    }
    Ok(found.into_iter().collect())
}

/// Clears up after interrupted saves: removes what was half written, and puts back what was about to be replaced.
fn tidy(folder: &Path) -> Result<()> {
    let with = |extension: &str| -> Result<Vec<PathBuf>> {
        let mut paths = entries(folder)?;
        paths.retain(|path| {
            let ours = step_of(&path.with_extension("")).is_some();
            ours && path.extension().is_some_and(|found| found == extension)
        });
        Ok(paths)
    };
    for path in with("tmp")? {
        remove(&path)?;
    }
    for path in with("old")? {
        let whole = path.with_extension("");
        if whole.exists() {
            remove(&path)?;
        } else {
            fs::rename(&path, &whole).map_err(failure("rename", &path))?;
        }
    }
    Ok(())
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let list = match fs::read_dir(folder) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failure("read", folder)(error)),
    };
    let paths: io::Result<Vec<PathBuf>> = list.map(|entry| Ok(entry?.path())).collect();
    paths.map_err(failure("read", folder))
}

fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
}

/// Renamed before it is emptied, so that a folder with a checkpoint's name is never half removed.
fn remove(path: &Path) -> Result<()> {
    let aside = path.with_extension("tmp");
    if aside != path {
        fs::rename(path, &aside).map_err(failure("rename", path))?;
    }
    fs::remove_dir_all(&aside).map_err(failure("remove", &aside))
}

fn checksum(path: &Path) -> Result<String> {
    let map = mapped::map(path).map_err(failure("read", path))?;
    Ok(format!("{:016x}", xxh3_64(&map)))
}

fn failure(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}
