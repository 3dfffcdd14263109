//! One rank's tensor mathematics. Nothing here communicates.
//!
//! * [`linear`]: linear attention with a diagonal decay, as segments that can be summed up and run apart.
//! * [`softmax`]: softmax attention of a query range against a key range, with log-sum-exp.
//! * [`block`]: norms, gates and the loss, each a pair of forward and backward; [`cuda`]: the kernels behind them on a GPU.
//! * [`bridge`]: what tch lacks of libtorch, above all an autograd node whose backward is Rust.

#![deny(unsafe_code)]

pub mod block;
#[allow(unsafe_code)]
pub mod bridge;
#[allow(unsafe_code)]
pub mod cuda;
mod error;
pub mod linear;
pub mod softmax;
pub mod testing;

pub use error::{Error, Result};
