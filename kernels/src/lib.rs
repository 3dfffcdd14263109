//! One rank's tensor mathematics. Nothing here communicates.
//!
//! * [`linear`]: linear attention with a diagonal decay, as segments that can be summed up and run apart.
//! * [`softmax`]: softmax attention of a query range against a key range, with log-sum-exp.
//! * [`bridge`]: what tch lacks of libtorch, above all an autograd node whose backward is Rust.

#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub mod bridge;
mod error;
pub mod linear;
pub mod softmax;
pub mod testing;

pub use error::{Error, Result};
