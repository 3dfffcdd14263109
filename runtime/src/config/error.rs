//! What can be wrong with a configuration. Every message names the key, what was found and what was expected.

use std::path::PathBuf;

use super::Origin;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{name} is not valid TOML: {message}")]
    Syntax { name: String, message: String },
    #[error("override `{found}`: expected key=value, such as train.steps=100")]
    Override { found: String },
    #[error("unknown key {key} {origin}{}", suggestion.as_ref().map(|s| format!("; did you mean {s}?")).unwrap_or_default())]
    UnknownKey { key: String, origin: Origin, suggestion: Option<String> },
    #[error("{key} {origin}: found {found}, expected {expected}")]
    Value { key: String, origin: Origin, found: String, expected: String },
    #[error(
        "{ranks} ranks cannot be arranged as parallel.sp x parallel.dp = {sp} x {dp}: expected a product of {ranks}, \
         or 0 for the one that shall follow from the other"
    )]
    Mesh { ranks: usize, sp: usize, dp: usize },
    #[error(
        "train.batch = {batch} sequences a step cannot be shared by dp = {dp} groups of sp = {sp} ranks ({ranks} ranks) \
         in passes of train.micro_batch = {micro_batch}: expected a multiple of {}; \
         change train.batch, train.micro_batch or parallel.dp", dp * micro_batch
    )]
    Batch { batch: usize, micro_batch: usize, ranks: usize, sp: usize, dp: usize },
    /// The method of softmax layers does not fit the number of ranks.
    #[error("{0}")]
    Softmax(String),
    #[error("cannot write the configuration as TOML: {0}")]
    Write(#[from] toml::ser::Error),
}
