//! Files that appear whole or not at all: written aside in the same folder, synced, renamed.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Why `replace` failed: in what was to be written, or in writing it.
#[derive(Debug)]
pub(crate) enum Failure<E> {
    Source(E),
    Target(io::Error),
}

impl<E> Failure<E> {
    /// The error, where `name` says to which file an error of writing belongs.
    pub fn named(self, name: impl FnOnce(io::Error) -> E) -> E {
        match self {
            Failure::Source(error) => error,
            Failure::Target(error) => name(error),
        }
    }
}

impl<E> From<io::Error> for Failure<E> {
    fn from(error: io::Error) -> Self {
        Failure::Target(error)
    }
}

/// Writes `path` through `write`; on any error the file that was there before is untouched.
pub(crate) fn replace<E>(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<(), Failure<E>>,
) -> Result<(), Failure<E>> {
    let aside = aside(path);
    let result = (|| {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(&aside)?);
        write(&mut file)?;
        file.flush()?;
        file.get_ref().sync_all()?;
        Ok(commit(&aside, path)?)
    })();
    if result.is_err() {
        // The error being returned matters more than a file left aside.
        let _ = fs::remove_file(&aside);
    }
    result
}

/// As `replace`, for content at hand.
pub(crate) fn replace_bytes(path: &Path, content: &[u8]) -> io::Result<()> {
    let written = replace(path, |file| Ok(file.write_all(content)?));
    written.map_err(|failure| failure.named(|error| error))
}

/// Where a file or folder is written before it takes its name: `NAME.tmp`, in the same folder.
pub(crate) fn aside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    path.with_file_name(name)
}

/// Renames, then makes the new name durable.
pub(crate) fn commit(aside: &Path, path: &Path) -> io::Result<()> {
    fs::rename(aside, path)?;
    sync_folder(parent(path))
}

pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// The folder that `path` is in.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}
