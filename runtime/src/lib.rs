//! The training runtime: everything between the collectives and kernels below and the command line above.
//! It reads no environment variables; what it must know is handed to it in a `Config`.

#![deny(unsafe_code)]

mod atomic;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod estimate;
pub mod generate;
mod mapped;
pub mod metrics;
pub mod model;
pub mod report;
pub mod sequence;
pub mod tensor_file;
pub mod train;
