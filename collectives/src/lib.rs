//! Ranks talking to each other: groups of ranks, a two-axis mesh of them, and collectives that run while a rank computes.
//!
//! A rank issues all its communication from one thread, in program order. Each call on a [`Group`] enqueues a job for the
//! rank's progress thread and returns a [`Pending`] at once; `wait` gives the result. The same operations run on three back
//! ends: [`local`], ranks as threads of one process, and `mpi` (cargo feature `mpi`) and [`tcp`], ranks as processes. They
//! move bytes only; what an operation means, and in which order numbers are added, is written once (`program`), so they
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
#[allow(unsafe_code)]
pub mod nccl;
mod op;
mod pending;
mod program;
mod progress;
pub mod tcp;
mod trace;

pub use error::{Error, Result};
pub use group::Group;
pub use mesh::Mesh;
pub use op::Reduce;
pub use pending::Pending;
pub use tch::{Kind, Tensor};
pub use trace::{CommSpan, ComputeSpan, PlaceGuard, Recorder, SpanGuard, Totals};
