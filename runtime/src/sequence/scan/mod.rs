//! How the summaries of all segments become the states at their entries: one method a file. A method knows no mixer: it
//! moves states and applies transitions, whose product is associative (algorithms.md, section 1).
//!
//! A method is one function, the exclusive prefix over a chain of segments. Forward calls it with end states; backward
//! calls it with the gradients and the chain reversed, since a diagonal transition is its own transpose.

mod all_scan;
mod fold;
mod hierarchical;
mod lasp1;
mod lasp2;
mod message;
mod relay;
mod route;
mod size;
mod truncated;

use collectives::{Group, Pending};
use kernels::linear::{Summary, Transition};
use tch::{Kind, Tensor};

pub use all_scan::AllScan;
pub use hierarchical::Hierarchical;
pub use lasp1::Lasp1;
pub use lasp2::Lasp2;
pub use route::Route;
pub use size::{DecayForm, StateSize};
pub use truncated::{Reach, Truncated};

use super::{Chain, Error, Messages, Result, Traffic};

/// What is known of the transitions of other ranks' segments without a message.
pub enum Known {
    /// All of them, in sequence order: no decay, or a constant per head.
    All(Vec<Transition>),
    /// Nothing: they depend on the data.
    Nothing,
}

/// The segments' transitions in sequence order, as far as this rank knows them: always those of its own.
pub type Transitions = Vec<Option<Transition>>;

/// The states that enter this rank's segments, by their place on it; `None` where none enters.
pub type Entries = Vec<Option<Tensor>>;

/// What a scan will have found: the wait can fail, and so can the fold after it.
pub type Scanned<T> = Pending<Result<T>>;

/// A way of scanning over the segments of a sequence.
pub trait Scan: Send + Sync {
    /// Makes ready what it sends by ([`Group::connect`]): collectives, if nothing else. Collective, before anything is under way.
    fn connect(&self, group: &Group) -> Result<()> {
        Ok(group.connect(&[], &[])?)
    }

    /// `mine`: the end states of this rank's segments, `[B, H, K, V]`, by their place on it; zero where nothing leaves.
    /// `transitions`: all, or this rank's own; on every rank the same of the two. Starts the communication and returns;
    /// pending are the entry states, the exclusive prefix `P_{g+1} = A_g P_g + S_g` along each document, and the
    /// transitions, with those that the method had to learn.
    fn prefix(
        &self,
        group: &Group,
        chain: &Chain,
        mine: Vec<Tensor>,
        transitions: Transitions,
    ) -> Result<Scanned<(Entries, Transitions)>>;

    /// What `rank` sends and receives in one scan over `chain`, through which state flows. `again`: what the scan of
    /// forward has brought to all ranks need not be brought again.
    fn messages(&self, chain: &Chain, rank: usize, size: &StateSize, again: bool) -> Messages;

    /// Whether [`Scan::messages`] is the most that it can be, and not what it is.
    fn sends_less(&self, _size: &StateSize) -> bool {
        false
    }

    /// What `rank` sends and receives for one layer.
    fn traffic(&self, chain: &Chain, rank: usize, size: &StateSize) -> Traffic {
        let at_most = self.sends_less(size);
        Traffic { at_most, ..both_ways(chain, |chain, again| self.messages(chain, rank, size, again)) }
    }

    /// `mine`: one summary for each segment of this rank. Pending are the entry states, and what backward wants again.
    fn forward(
        &self,
        group: &Group,
        chain: &Chain,
        mine: Vec<Summary>,
        known: Known,
    ) -> Result<Scanned<(Entries, Transitions)>> {
        let mut states = Vec::with_capacity(mine.len());
        let mut transitions: Transitions = match known {
            Known::All(all) => all.into_iter().map(Some).collect(),
            Known::Nothing => chain.links.iter().map(|_| None).collect(),
        };
        for (&segment, Summary { state, transition }) in chain.held.iter().zip(mine) {
            if transitions[segment].is_none() {
                transitions[segment] = Some(in_kind(transition, state.kind())?);
            }
            states.push(state);
        }
        self.prefix(group, chain, states, transitions)
    }

    /// `mine`: the gradients that this rank's segments send to the states at their entries. Pending are the exit gradients:
    /// the exclusive suffix `R_g = A_{g+1} R_{g+1} + G_{g+1}`.
    fn backward(
        &self,
        group: &Group,
        chain: &Chain,
        mine: Vec<Tensor>,
        mut transitions: Transitions,
    ) -> Result<Scanned<Entries>> {
        transitions.reverse();
        let scanned = self.prefix(group, &chain.reversed(), mine, transitions)?;
        Ok(scanned.map(|result| Ok(result.map(|(exits, _)| exits))))
    }
}

/// The scans of forward and backward, each given its chain and whether it is the second.
fn both_ways(chain: &Chain, messages: impl Fn(&Chain, bool) -> Messages) -> Traffic {
    if !chain.flows() {
        return Traffic::default();
    }
    Traffic::exactly(messages(chain, false), messages(&chain.reversed(), true))
}

/// [`Hierarchical`]'s [`Scan::traffic`], for which no ranks are needed.
pub(super) fn hierarchical_traffic(node_size: usize, chain: &Chain, rank: usize, size: &StateSize) -> Traffic {
    both_ways(chain, |chain, again| hierarchical::messages(node_size, chain, rank, size, again))
}

/// What a flight reads of this rank's states and of the transitions that are known.
fn tensors(states: &[Tensor], transitions: &Transitions) -> Vec<Tensor> {
    let decays = transitions.iter().flatten().filter_map(|transition| match transition {
        Transition::Identity => None,
        Transition::Scalar(sum) | Transition::Channel(sum) => Some(sum),
    });
    states.iter().chain(decays).map(Tensor::shallow_clone).collect()
}

/// A transition in the kind of the states, in which it also travels.
fn in_kind(transition: Transition, kind: Kind) -> Result<Transition> {
    Ok(match transition {
        Transition::Identity => Transition::Identity,
        Transition::Scalar(sum) => Transition::Scalar(sum.f_to_kind(kind)?),
        Transition::Channel(sum) => Transition::Channel(sum.f_to_kind(kind)?),
    })
}

/// A segment's state or transition that the plan promised and no message brought.
fn missing(what: &str, segment: usize) -> Error {
    Error::Unsupported(format!(
        "the {what} of segment {segment} did not come to this rank; expected the same cu_seqlens and the same \
         parallel.linear_method on every rank"
    ))
}
