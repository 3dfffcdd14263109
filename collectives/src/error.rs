//! What can go wrong between ranks. Each variant carries its operands, and its message says what was found, what was
//! expected and, where there is one, the setting to change.

use crate::nccl::{SHARES_GPUS, Version};
use std::sync::Arc;
use tch::Kind;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("{op} on group {group} cannot carry {kind:?} tensors; it takes Double, Float, BFloat16 and Int64")]
    UnsupportedKind { op: &'static str, group: Arc<str>, kind: Kind },

    #[error("{op} on group {group} takes at most {most} dimensions, found {shape:?}; flatten some")]
    TooManyDims { op: &'static str, group: Arc<str>, shape: Box<[i64]>, most: usize },

    /// The ranks of a group called the same operation differently. Found before anything was sent, on every rank.
    #[error("{op} #{number} on group {group}: {what} differ: {}", .brought.join(", "))]
    Mismatch {
        op: &'static str,
        /// How many collectives (for `recv`: messages from that peer) came before on this group.
        number: u64,
        group: Arc<str>,
        what: &'static str,
        /// What each rank brought, in rank order.
        brought: Vec<String>,
    },

    #[error("{op} on group {group}, rank {rank}: shape {shape:?} with rows {rows:?}: {problem}")]
    Rows { op: &'static str, group: Arc<str>, rank: usize, shape: Box<[i64]>, rows: Box<[i64]>, problem: String },

    #[error("broadcast on group {group}: root {root} is not one of its ranks, 0 to {}", .size - 1)]
    BadRoot { group: Arc<str>, root: usize, size: usize },

    #[error("{op} on group {group}: peer {peer} is not one of its ranks, 0 to {}", .size - 1)]
    BadPeer { op: &'static str, group: Arc<str>, peer: usize, size: usize },

    #[error(
        "a mesh of dp = {dp} (parallel.dp) by sp = {sp} (parallel.sp) needs {} ranks, found {world}; \
         choose parallel.dp and parallel.sp so that their product is {world}",
        .dp.saturating_mul(*.sp)
    )]
    Mesh { dp: usize, sp: usize, world: usize },

    #[error("{op} of {bytes} bytes on group {group}: ranks {ranks:?} got a wrong result, so there are no figures")]
    WrongResult { op: &'static str, bytes: u64, group: Arc<str>, ranks: Vec<usize> },

    /// `rank` counts in the world, whatever the group in which its failure was noticed.
    #[error("rank {rank} failed: {message}")]
    RankFailed { rank: usize, message: String },

    /// `rank` counts in the world.
    #[error("rank {rank} is gone: {message}")]
    RankLost { rank: usize, message: String },

    #[error("{op} on group {group}: this rank's progress thread has ended; communicate only while the job runs")]
    Stopped { op: &'static str, group: Arc<str> },

    #[error(
        "network `{text}`: {problem}; a network is the ranks on a node, and latency/bandwidth within a node and between \
         nodes, as in `node=4,intra=2us/100GB/s,inter=20us/10GB/s`"
    )]
    Network { text: String, problem: String },

    #[error("a local run needs at least 1 rank, found 0")]
    NoRanks,

    #[error("cannot start the thread of rank {rank}: {source}")]
    Spawn { rank: usize, source: std::io::Error },

    #[error("{call} failed with code {code}: {message}")]
    Mpi { call: &'static str, code: i32, message: String },

    #[error("rank {rank} of {size} did not get into the job of rank 0 at {at}: {problem}")]
    Join { rank: usize, size: usize, at: String, problem: String },

    #[error("another rank sent {found}; all ranks must run the same build")]
    Foreign { found: String },

    #[error(
        "NCCL: {problem}; it comes with PyTorch's wheel, or with `pip install nvidia-nccl-cu13`, the same on all ranks"
    )]
    NoNccl { problem: String },

    #[error(
        "ranks {ranks:?} share a GPU, for which NCCL {SHARES_GPUS} or later is needed, found {found}: start one rank a GPU, \
         or `pip install 'nvidia-nccl-cu13>=2.30'` and set NCCL_MULTI_RANK_GPU_ENABLE=1"
    )]
    SharedGpu { ranks: Vec<usize>, found: Version },

    #[error("{call} failed with code {code}: {message}")]
    Nccl { call: &'static str, code: i32, message: String },

    #[error("{call} failed with code {code}: {message}")]
    Cuda { call: &'static str, code: i32, message: String },

    /// `rank` counts in the world; `number` the operations of this sort on the group's GPUs.
    #[error("rank {rank}: {op} #{number} on group {group}, {bytes} bytes, on the GPU: {problem}")]
    OnGpu { rank: usize, op: &'static str, number: u64, group: Arc<str>, bytes: u64, problem: String },

    #[error(transparent)]
    Tch(#[from] tch::TchError),
}
