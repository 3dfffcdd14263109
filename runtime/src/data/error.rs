//! What can be wrong with a corpus, its sources, or a request for more tokens than it has.

use std::path::PathBuf;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the pattern {pattern:?} is no glob: {message}")]
    Glob { pattern: String, message: String },
    #[error(
        "no documents for {}: looked in {inputs} for files named {glob}, found {matched} ({empty} empty, \
         {binary} binary, {unreadable} unreadable)", out.display()
    )]
    NoDocuments { out: PathBuf, inputs: String, glob: String, matched: u64, empty: u64, binary: u64, unreadable: u64 },
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} changed while it was read; prepare the corpus again when nothing writes to it", path.display())]
    Changed { path: PathBuf },
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: std::io::Error },
    #[error("{} is not a corpus: {found}; expected a file written by `lasp data prepare` (data.path)", path.display())]
    Foreign { path: PathBuf, found: String },
    #[error("{} is damaged: {found}; write it again with `lasp data prepare`", path.display())]
    Damaged { path: PathBuf, found: String },
    #[error(
        "train.seq_len = {seq_len} needs {} tokens, but the {split} split of {} has {tokens}: lower train.seq_len, \
         prepare a larger corpus (data.path), or change data.validation_fraction", seq_len + 1, path.display()
    )]
    TooShort { path: PathBuf, split: &'static str, seq_len: usize, tokens: u64 },
    #[error("window {window} of the {split} split: it has {windows} windows of train.seq_len = {seq_len}")]
    Window { split: &'static str, window: u64, windows: u64, seq_len: usize },
}
