//! The fold that every scan ends in: `P_{g+1} = A_g P_g + S_g` over segments in sequence order, along each document
//! (LASP-2, arXiv 2502.07563, Algorithm 2, line 9, with decay).

use std::ops::Range;

use kernels::linear::Transition;
use tch::Tensor;

use super::{Chain, Entries, Result, missing};
use crate::sequence::Link;

/// States of segments, by their places in the sequence, as far as they have come.
pub(super) type States = Vec<Option<Tensor>>;

/// What is carried past one segment: nothing where its document ends, all of it where it lies inside one document.
pub(super) fn past(
    segment: usize,
    link: &Link,
    entering: Option<Tensor>,
    own: Option<&Tensor>,
    transition: Option<&Transition>,
) -> Result<Option<Tensor>> {
    if link.empty {
        return Ok(entering);
    }
    if !link.leaves {
        return Ok(None);
    }
    let own = own.ok_or_else(|| missing("state", segment))?;
    Ok(Some(match entering {
        Some(state) if link.through => {
            transition.ok_or_else(|| missing("transition", segment))?.apply(&state)?.f_add(own)?
        }
        _ => own.shallow_clone(),
    }))
}

/// What leaves the last of some segments when `entering` enters the first.
pub(super) fn fold(
    chain: &Chain,
    segments: Range<usize>,
    mut entering: Option<Tensor>,
    states: &[Option<Tensor>],
    transitions: &[Option<Transition>],
) -> Result<Option<Tensor>> {
    for s in segments {
        entering = past(s, &chain.links[s], entering, states[s].as_ref(), transitions[s].as_ref())?;
    }
    Ok(entering)
}

/// The state at the entry of each segment that this rank holds, when all states are here.
pub(super) fn prefixes(
    chain: &Chain,
    states: &[Option<Tensor>],
    transitions: &[Option<Transition>],
) -> Result<Entries> {
    let mut entries: Entries = chain.held.iter().map(|_| None).collect();
    let (mut at, mut running) = (0, None);
    for slot in in_sequence_order(chain) {
        let segment = chain.held[slot];
        running = fold(chain, at..segment, running, states, transitions)?;
        at = segment;
        if chain.links[segment].enters {
            entries[slot] = running.as_ref().map(Tensor::shallow_clone);
        }
    }
    Ok(entries)
}

/// The places of this rank's segments, the one that comes first in the sequence first.
pub(super) fn in_sequence_order(chain: &Chain) -> Vec<usize> {
    let mut slots: Vec<usize> = (0..chain.held.len()).collect();
    slots.sort_by_key(|&slot| chain.held[slot]);
    slots
}

/// The composition of two transitions, in either order, as they are diagonal.
pub(super) fn compose(a: &Transition, b: &Transition) -> Result<Transition> {
    Ok(match (a, b) {
        (Transition::Identity, other) | (other, Transition::Identity) => copy(other),
        (Transition::Channel(a), Transition::Channel(b)) => Transition::Channel(a.f_add(b)?),
        (Transition::Scalar(a), Transition::Scalar(b)) => Transition::Scalar(a.f_add(b)?),
        (Transition::Channel(channel), Transition::Scalar(scalar))
        | (Transition::Scalar(scalar), Transition::Channel(channel)) => {
            Transition::Channel(channel.f_add(&scalar.f_unsqueeze(-1)?)?)
        }
    })
}

pub(super) fn copy(transition: &Transition) -> Transition {
    match transition {
        Transition::Identity => Transition::Identity,
        Transition::Scalar(sum) => Transition::Scalar(sum.shallow_clone()),
        Transition::Channel(sum) => Transition::Channel(sum.shallow_clone()),
    }
}
