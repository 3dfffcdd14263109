//! Ranks talking to each other: groups of ranks, a two-axis mesh of them, and collectives that run while a rank computes.
//!
//! A rank issues all its communication from one thread, in program order. Each call on a [`Group`] enqueues a job for the
//! rank's progress thread and returns a [`Pending`] at once; `wait` gives the result. The same operations run on two back
//! ends: [`local`], ranks as threads of one process, and `mpi` (cargo feature `mpi`), ranks as processes. Both move bytes
//! only; what an operation means, and in which order numbers are added, is written once (`program`), so the back ends
//! agree bit for bit.
//!
//! This crate knows no model, reads no environment variable, and starts no processes.
//!
//! Reading order: [`Group`], `op` (what ranks must agree on), `program` (an operation as steps), `progress` (the thread
//! that runs them), then a back end.

#![deny(unsafe_code)]

pub mod bench;
mod error;
mod flight;
mod group;
pub mod local;
mod mesh;
#[cfg(feature = "mpi")]
#[allow(unsafe_code)]
pub mod mpi;
mod op;
mod pending;
mod program;
mod progress;
mod trace;

pub use error::{Error, Result};
pub use group::Group;
pub use mesh::Mesh;
pub use op::Reduce;
pub use pending::Pending;
pub use tch::{Kind, Tensor};
pub use trace::{CommSpan, ComputeSpan, Recorder, SpanGuard, Totals};
