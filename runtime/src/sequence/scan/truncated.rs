//! LASP-2 without what has decayed away: a rank receives the states of earlier segments only as far back as the decay
//! between them and it leaves anything that the numbers can hold, 2^-24 in f32 and 2^-53 in f64, in any head or channel.
//! States of like size assumed, what is left out would have been rounded away. The point of strong decays: Lightning's
//! (MiniMax-01, arXiv 2501.08313, section 3.2) and gates that forget leave each rank a few neighbours to hear of.
//!
//! States then go from rank to rank instead of by an AllGather, so all ranks must agree on who sends to whom. Constant
//! decays follow from the plan. Those that depend on the data are gathered first; that small message is waited for before
//! the intra-rank work, and what it says serves backward too. Without decay nothing dies, and this is LASP-2.

use std::collections::BTreeSet;

use collectives::Group;
use kernels::linear::Transition;
use tch::{Kind, Tensor};

use super::fold::{States, fold};
use super::message::{Row, connect_near, gather, gather_messages, when_they_come};
use super::{
    Chain, DecayForm, Entries, Lasp2, Messages, Result, Scan, Scanned, StateSize, Traffic, Transitions, both_ways,
    missing,
};

/// How far from a rank others are to whom the way is made ready: decays through which states reach farther leave little out.
const REACH: usize = 8;

#[derive(Clone, Copy, Debug, Default)]
pub struct Truncated {
    /// What runs without decay.
    pub undecayed: Lasp2,
}

impl Scan for Truncated {
    fn connect(&self, group: &Group) -> Result<()> {
        connect_near(group, REACH)
    }

    fn prefix(
        &self,
        group: &Group,
        chain: &Chain,
        mine: Vec<Tensor>,
        mut transitions: Transitions,
    ) -> Result<Scanned<(Entries, Transitions)>> {
        if matches!(transitions[chain.held[0]], Some(Transition::Identity)) {
            return self.undecayed.prefix(group, chain, mine, transitions);
        }
        if transitions.iter().any(Option::is_none) {
            learn(group, chain, &mut transitions)?;
        }
        let reach = Reach::over(&transitions, mine[0].kind())?;
        let firsts: Vec<Option<usize>> = chain.held.iter().map(|&s| reach.back(chain, s)).collect();

        let mut states: States = chain.links.iter().map(|_| None).collect();
        for (&segment, state) in chain.held.iter().zip(&mine) {
            states[segment] = Some(state.shallow_clone());
        }
        let mut sent = Vec::new();
        for &segment in chain.held.iter().collect::<BTreeSet<_>>() {
            for to in reach.heard_by(chain, segment).into_iter().filter(|&to| to != group.rank()) {
                let state = states[segment].as_ref().ok_or_else(|| missing("state", segment))?;
                sent.push(group.send(state, to)?);
            }
        }
        let (mut coming, mut awaited) = (Vec::new(), Vec::new());
        for segment in needed(chain, &chain.held, &firsts) {
            let from = chain.owners[segment].0;
            if from != group.rank() {
                coming.push(group.recv_on(mine[0].device(), &mine[0].size(), mine[0].kind(), from)?);
                awaited.push(segment);
            }
        }
        let chain = chain.clone();
        Ok(when_they_come(coming, sent, move |coming| {
            for (segment, state) in awaited.into_iter().zip(coming) {
                states[segment] = Some(state?);
            }
            let entry = |(&segment, first): (&usize, &Option<usize>)| match first {
                Some(first) => fold(&chain, *first..segment, None, &states, &transitions),
                None => Ok(None),
            };
            let entries = chain.held.iter().zip(&firsts).map(entry).collect::<Result<Entries>>()?;
            Ok((entries, transitions))
        }))
    }

    /// The log-decays of all segments and, were nothing to die, the states of all from which state flows here.
    fn messages(&self, chain: &Chain, rank: usize, size: &StateSize, again: bool) -> Messages {
        self.messages_within(&Reach::full(), chain, rank, size, again)
    }

    fn sends_less(&self, size: &StateSize) -> bool {
        size.decay != DecayForm::None
    }
}

impl Truncated {
    /// [`Scan::traffic`], exactly, where it is known how far states reach, as [`Reach::both_ways`] says it.
    pub fn traffic_within(&self, reaches: &[Reach; 2], chain: &Chain, rank: usize, size: &StateSize) -> Traffic {
        both_ways(chain, |chain, again| self.messages_within(&reaches[usize::from(again)], chain, rank, size, again))
    }

    fn messages_within(&self, reach: &Reach, chain: &Chain, rank: usize, size: &StateSize, again: bool) -> Messages {
        if size.decay == DecayForm::None {
            return self.undecayed.messages(chain, rank, size, again);
        }
        let mut messages = Messages::default();
        if size.decays() > 0 && !again {
            messages = gather_messages("sp", chain.ranks(), chain.slots(), size.decays(), size, 1);
        }
        let held: Vec<usize> = (0..chain.owners.len()).filter(|&s| chain.owners[s].0 == rank).collect();
        let firsts: Vec<_> = held.iter().map(|&segment| reach.back(chain, segment)).collect();
        let heard = held.iter().flat_map(|&segment| reach.heard_by(chain, segment));
        let sent = heard.filter(|&to| to != rank).count() as u64;
        let needed = needed(chain, &held, &firsts);
        let received = needed.into_iter().filter(|&segment| chain.owners[segment].0 != rank).count() as u64;
        messages.count("send", sent, sent * size.state(), 0);
        messages.count("recv", received, 0, received * size.state());
        messages
    }
}

/// The segments whose states the held ones need: from the given first ones on, those with tokens.
fn needed(chain: &Chain, held: &[usize], firsts: &[Option<usize>]) -> BTreeSet<usize> {
    let ranges = held.iter().zip(firsts).filter_map(|(&segment, first)| Some(first.as_ref().copied()?..segment));
    ranges.flatten().filter(|&segment| !chain.links[segment].empty).collect()
}

/// Gathers the transitions that are not known yet.
fn learn(group: &Group, chain: &Chain, transitions: &mut Transitions) -> Result<()> {
    let own = |segment: usize| transitions[segment].as_ref();
    let device = match own(chain.held[0]) {
        Some(Transition::Scalar(sum) | Transition::Channel(sum)) => (sum.kind(), sum.device()),
        _ => return Ok(()),
    };
    let nothing = Tensor::f_zeros([0], device)?;
    let row = Row::new(&nothing, own(chain.held[0]));
    let rows = chain.held.iter().map(|&segment| row.pack(&nothing, own(segment))).collect::<Result<Vec<_>>>()?;
    let gathered = gather(group, &rows, 1)?.wait()?;
    for (&(rank, slot), transition) in chain.owners.iter().zip(transitions) {
        if transition.is_none() {
            *transition = row.transition(&gathered.f_select(0, rank as i64)?.f_select(0, slot as i64)?)?;
        }
    }
    Ok(())
}

/// Between which segments states matter: as far as the decay between them leaves anything.
///
/// Cumulative log-decays over the segments, in f64 and by the same additions on every rank: sender and receiver find the
/// same number for the same pair, or one would wait for ever.
#[derive(Clone, Debug, PartialEq)]
pub struct Reach {
    /// `[segments, n]`, n numbers of a transition; none if nothing decays.
    sums: Vec<f64>,
    n: usize,
    limit: f64,
}

impl Reach {
    /// As far as state flows.
    pub fn full() -> Self {
        Self { sums: vec![], n: 0, limit: 0.0 }
    }

    /// Under constant log-decays `[H]`, of states whose numbers have `width` bytes: that of the head which decays least.
    pub fn constant(log_decay: &[f64], chain: &Chain, width: u64) -> Self {
        let least = log_decay.iter().copied().map(known_log).fold(LEAST, f64::max);
        let mut sum = 0.0;
        let sums = chain.links.iter().map(|link| {
            sum += known_log(least * link.tail as f64);
            sum
        });
        Self { sums: sums.collect(), n: 1, limit: limit(width) }
    }

    /// [`Reach::constant`] of forward, which meets the segments as `chain` has them, and of backward.
    pub fn both_ways(log_decay: &[f64], chain: &Chain, width: u64) -> [Self; 2] {
        [Self::constant(log_decay, chain, width), Self::constant(log_decay, &chain.reversed(), width)]
    }

    fn over(transitions: &[Option<Transition>], kind: Kind) -> Result<Self> {
        let mut rows = Vec::with_capacity(transitions.len());
        for (segment, transition) in transitions.iter().enumerate() {
            match transition {
                Some(Transition::Scalar(sum) | Transition::Channel(sum)) => rows.push(sum.f_flatten(0, -1)?),
                _ => return Err(missing("transition", segment)),
            }
        }
        let logs = Tensor::f_stack(&rows, 0)?.f_to_kind(Kind::Double)?.f_nan_to_num(0.0, 0.0, LEAST)?;
        let sums = logs.f_clamp(LEAST, 0.0)?.f_cumsum(0, Kind::Double)?;
        let n = sums.size()[1] as usize;
        let sums = Vec::try_from(sums.f_flatten(0, -1)?)?;
        Ok(Self { sums, n, limit: limit(kind.elt_size_in_bytes() as u64) })
    }

    /// Whether what leaves `from` still matters at the entry of `to`, in some head or channel.
    fn alive(&self, from: usize, to: usize) -> bool {
        let row = |segment: usize| &self.sums[segment * self.n..(segment + 1) * self.n];
        self.n == 0 || row(from).iter().zip(row(to - 1)).any(|(before, here)| here - before >= self.limit)
    }

    /// The first segment whose state matters at the entry of `segment`.
    pub fn back(&self, chain: &Chain, segment: usize) -> Option<usize> {
        let mut first = chain.before(segment)?;
        while chain.links[first].through {
            match chain.before(first).filter(|&before| self.alive(before, segment)) {
                Some(before) => first = before,
                None => break,
            }
        }
        Some(first)
    }

    /// The ranks at whose segments the state of `segment` matters, in ascending order.
    pub fn heard_by(&self, chain: &Chain, segment: usize) -> Vec<usize> {
        let mut ranks = Vec::new();
        let mut at = chain.after(segment);
        while let Some(to) = at.filter(|&to| self.alive(segment, to)) {
            ranks.push(chain.owners[to].0);
            at = chain.after(to).filter(|_| chain.links[to].through);
        }
        // A rank may hold two of them.
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    }
}

/// The least log-decay that counts: far below any limit, and still finite when summed.
const LEAST: f64 = -1e6;

/// What is not a number forgets nothing.
fn known_log(log: f64) -> f64 {
    if log.is_nan() { 0.0 } else { log.clamp(LEAST, 0.0) }
}

/// The log of what numbers of so many bytes can hold beside 1.
fn limit(width: u64) -> f64 {
    let bits = if width == 8 { 53.0 } else { 24.0 };
    -bits * std::f64::consts::LN_2
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LayoutKind;
    use crate::sequence::{Layout, Plan};

    fn chain(layout: LayoutKind, tokens: i64, ranks: usize, cu_seqlens: Option<&[i64]>) -> Chain {
        Plan::new(Layout::new(layout, tokens, ranks).unwrap(), cu_seqlens, 0).unwrap().chain
    }

    /// What a scan finds from its transitions and what is known of constants beforehand are the same reach.
    #[test]
    fn constants_reach_as_far_as_their_transitions_say() {
        let logs = [-0.003f32, -0.02, -0.3];
        let constants = logs.map(f64::from);
        for layout in [LayoutKind::Contiguous, LayoutKind::Zigzag] {
            for cu_seqlens in [None, Some(&[0, 100, 4000, 4000, 32000][..])] {
                let chain = chain(layout, 32000, 8, cu_seqlens);
                let of = |tail: i64| Tensor::from_slice(&logs).unsqueeze(0) * tail;
                let transitions: Transitions =
                    chain.links.iter().map(|link| Some(Transition::Scalar(of(link.tail)))).collect();
                let (found, known) =
                    (Reach::over(&transitions, Kind::Float).unwrap(), Reach::constant(&constants, &chain, 4));
                for segment in 0..chain.links.len() {
                    assert_eq!(found.back(&chain, segment), known.back(&chain, segment));
                    assert_eq!(found.heard_by(&chain, segment), known.heard_by(&chain, segment));
                }
            }
        }
    }

    #[test]
    fn messages_are_those_within_reach() {
        let size = StateSize { heads: 2, key: 4, value: 4, width: 4, decay: DecayForm::Head };
        let scan = Truncated::default();
        let chain = chain(LayoutKind::Contiguous, 8 * 1000, 8, None);
        let counts = |log: f64, rank: usize| {
            let reaches = Reach::both_ways(&[10.0 * log, log], &chain, size.width);
            let traffic = scan.traffic_within(&reaches, &chain, rank, &size);
            assert!(!traffic.at_most);
            [traffic.forward, traffic.backward].map(|moved| {
                ["send", "recv"].map(|op| moved.iter().find(|((_, of), _)| *of == op).map_or(0, |(_, n)| n.messages))
            })
        };
        // ln 2^-24 = -16.6: after 1000 tokens all is gone, after 2000 there is something left, after 3000 nothing.
        assert_eq!(counts(-0.02, 4), [[1, 1], [1, 1]]);
        assert_eq!(counts(-0.008, 4), [[3, 3], [3, 3]]);
        assert_eq!(counts(-0.008, 0), [[3, 0], [0, 3]]);
        // Nothing dies: as many as without knowing.
        for rank in 0..8 {
            let full = scan.traffic(&chain, rank, &size);
            let known = scan.traffic_within(&Reach::both_ways(&[-1e-6], &chain, size.width), &chain, rank, &size);
            assert_eq!((full.forward, full.backward), (known.forward, known.backward));
            assert!(full.at_most);
        }
    }
}
