//! What can go wrong in one rank's mathematics. Every variant carries what was found and what was expected.

use tch::Kind;

use crate::softmax::Tile;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{tensor}: found shape {found:?}, expected {expected}")]
    Shape { tensor: &'static str, found: Vec<i64>, expected: String },
    #[error("{tensor}: found {found:?}, expected {expected}")]
    Kind { tensor: &'static str, found: Kind, expected: String },
    #[error("tile {index}: found {tile:?}, expected {expected}")]
    Tile { index: usize, tile: Tile, expected: String },
    #[error("{0}")]
    Unsupported(String),
    #[error("CUDA: {0}")]
    Cuda(String),
    #[error("libtorch: {0}")]
    Libtorch(String),
    #[error(transparent)]
    Tch(#[from] tch::TchError),
}
