//! How the summaries of all segments become the states at their entries: one method a file. A method knows no mixer: it
//! moves states and applies transitions, whose product is associative (algorithms.md, section 1).

mod lasp2;

use collectives::{Group, Pending};
use kernels::linear::{Summary, Transition};
use tch::Tensor;

pub use lasp2::Lasp2;

use super::{Chain, Result};

/// What is known of the transitions of other ranks' segments without a message.
pub enum Known {
    /// All of them, in sequence order: no decay, or a constant per head.
    All(Vec<Transition>),
    /// Nothing: they depend on the data.
    Nothing,
}

/// What backward needs to know again: all transitions, in sequence order.
pub type Transitions = Vec<Transition>;

/// The states that enter this rank's segments, by their place on it; `None` where none enters.
pub type Entries = Vec<Option<Tensor>>;

/// What a scan will have found: the wait can fail, and so can the fold after it.
pub type Scanned<T> = Pending<Result<T>>;

/// A way of scanning over the segments of a sequence.
pub trait Scan: Send + Sync {
    /// `mine`: one summary for each segment of this rank, zero where nothing leaves it; states `[B, H, K, V]`. Starts the
    /// communication and returns; what is pending are the entry states: the exclusive prefix in sequence order.
    fn forward(
        &self,
        group: &Group,
        chain: &Chain,
        mine: Vec<Summary>,
        known: Known,
    ) -> Result<Scanned<(Entries, Transitions)>>;

    /// `mine`: the gradients that this rank's segments send to the states at their entries. Pending are the exit gradients:
    /// the exclusive suffix.
    fn backward(
        &self,
        group: &Group,
        chain: &Chain,
        mine: Vec<Tensor>,
        transitions: Transitions,
    ) -> Result<Scanned<Entries>>;
}
