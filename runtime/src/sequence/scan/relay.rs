//! A chain over the segments, on which LASP-1 and All-Scan run: each rank receives the state that enters a segment, adds
//! the segment's own and sends it on, in blocks of the key dimension. On the zigzag layout the chain goes up the ranks and
//! down again.
//!
//! Every rank knows from the plan where a state crosses; where a document ends, nothing is sent. All receives are posted
//! at once. What does not depend on them is sent at once, the rest block by block as they come, while the rank computes.

use std::ops::Range;

use collectives::{Group, Pending};
use tch::Tensor;

use super::fold::{in_sequence_order, past};
use super::message::{cut, narrow, slice};
use super::{Chain, Entries, Messages, Result, Scanned, StateSize, Transitions, missing, tensors};

/// The exclusive prefix by a chain in at most `blocks` blocks: see [`super::Scan::prefix`].
pub(super) fn relay(
    group: &Group,
    chain: &Chain,
    mine: Vec<Tensor>,
    transitions: Transitions,
    blocks: usize,
) -> Result<Scanned<(Entries, Transitions)>> {
    let me = group.rank();
    let elsewhere = |segment: Option<usize>| segment.map(|s| chain.owners[s].0).filter(|&owner| owner != me);
    let blocks = cut(mine[0].size()[2], blocks as i64);
    let step = |slot: usize| {
        let segment = chain.held[slot];
        let (from, to) = (elsewhere(chain.before(segment)), elsewhere(chain.after(segment)));
        Step { slot, segment, state: mine[slot].shallow_clone(), from, to }
    };
    let steps = in_sequence_order(chain).into_iter().map(step).collect();
    let reads = tensors(&mine, &transitions);
    let relay = Relay { group: group.clone(), chain: chain.clone(), blocks, steps, transitions };
    Ok(group.in_flight(reads, move || Ok(relay.run()))?)
}

/// What a rank sends and receives: a state for each crossing between one of its segments and another rank's.
pub(super) fn messages(chain: &Chain, rank: usize, size: &StateSize, blocks: usize) -> Messages {
    let blocks = cut(size.key as i64, blocks as i64).len() as u64;
    let mine = |segment: usize| chain.owners[segment].0 == rank;
    let crossings = |next: fn(&Chain, usize) -> Option<usize>| {
        let crosses = |&segment: &usize| mine(segment) && next(chain, segment).is_some_and(|other| !mine(other));
        (0..chain.owners.len()).filter(crosses).count() as u64
    };
    let (sent, received) = (crossings(Chain::after), crossings(Chain::before));
    let mut messages = Messages::default();
    messages.count("send", blocks * sent, sent * size.state(), 0);
    messages.count("recv", blocks * received, 0, received * size.state());
    messages
}

/// One segment of this rank.
struct Step {
    slot: usize,
    segment: usize,
    state: Tensor,
    /// The rank that sends what enters, if it is another one.
    from: Option<usize>,
    /// The rank that waits for what leaves.
    to: Option<usize>,
}

struct Relay {
    group: Group,
    chain: Chain,
    blocks: Vec<Range<i64>>,
    steps: Vec<Step>,
    transitions: Transitions,
}

/// Messages that have been issued.
struct UnderWay {
    /// Block by block, segment by segment.
    coming: Vec<Pending<Tensor>>,
    sent: Vec<Pending<()>>,
}

impl Relay {
    /// Posts every receive, and sends what depends on none.
    fn start(&self) -> Result<UnderWay> {
        let mut under_way = UnderWay { coming: vec![], sent: vec![] };
        for Step { segment, state, from, to, .. } in &self.steps {
            for block in &self.blocks {
                let own = narrow(state, block)?;
                if let Some(from) = from {
                    under_way.coming.push(self.group.recv_on(own.device(), &own.size(), own.kind(), *from)?);
                }
                if let Some(to) = to.filter(|_| !self.chain.links[*segment].through) {
                    under_way.sent.push(self.group.send(&own, to)?);
                }
            }
        }
        Ok(under_way)
    }

    fn run(self) -> Result<(Entries, Transitions)> {
        let UnderWay { coming, mut sent } = self.start()?;
        let mut coming = coming.into_iter();
        let mut entries: Entries = self.steps.iter().map(|_| None).collect();
        // What one segment of this rank hands to its next, with no other rank's between.
        let mut handed: Option<Tensor> = None;
        for Step { slot, segment, state, from, to } in &self.steps {
            let (link, transition) = (&self.chain.links[*segment], self.transitions[*segment].as_ref());
            let to = &to.filter(|_| link.through);
            let mut entry = handed.take().filter(|_| link.enters);
            if from.is_some() {
                let mut arrived = Vec::with_capacity(self.blocks.len());
                for block in &self.blocks {
                    let incoming = coming.next().ok_or_else(|| missing("state before it", *segment))?.wait()?;
                    if let Some(to) = to {
                        let slice = transition.map(|transition| slice(transition, block)).transpose()?;
                        let own = narrow(state, block)?;
                        let entering = Some(incoming.shallow_clone());
                        let leaving = past(*segment, link, entering, Some(&own), slice.as_ref())?;
                        sent.extend(leaving.map(|leaving| self.group.send(&leaving, *to)).transpose()?);
                    }
                    arrived.push(incoming);
                }
                entry = Some(if arrived.len() == 1 { arrived.swap_remove(0) } else { Tensor::f_cat(&arrived, 2)? });
            }
            let leaving = |entry: &Option<Tensor>| {
                let entering = entry.as_ref().map(Tensor::shallow_clone);
                past(*segment, link, entering, Some(state), transition)
            };
            match to {
                Some(to) if from.is_none() => {
                    let leaving = leaving(&entry)?.ok_or_else(|| missing("state", *segment))?;
                    for block in &self.blocks {
                        sent.push(self.group.send(&narrow(&leaving, block)?, *to)?);
                    }
                }
                Some(_) => {}
                None => handed = leaving(&entry)?,
            }
            entries[*slot] = entry;
        }
        sent.into_iter().try_for_each(Pending::wait)?;
        Ok((entries, self.transitions))
    }
}
