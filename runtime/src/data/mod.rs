//! Training data. Text becomes a corpus file of byte tokens once (`prepare`); training maps it (`Corpus`), holds out its
//! end (`Split`), and takes sequences from it by number (`Source`). Which rank gets which tokens is decided elsewhere.

mod corpus;
mod error;
mod permutation;
mod prepare;
mod sequence;
mod source;

pub use corpus::{Corpus, SEPARATOR, Split};
pub use error::{Error, Result};
pub use permutation::Permutation;
pub(crate) use permutation::mix;
pub use prepare::{PrepareOptions, Summary, prepare};
pub use sequence::{IGNORE_INDEX, Sequence};
pub use source::{RandomSource, Sampler, Source};
