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
use super::message::{Row, gather, gather_messages, when_they_come};
use super::{Chain, DecayForm, Entries, Lasp2, Messages, Result, Scan, Scanned, StateSize, Transitions, missing};

#[derive(Clone, Copy, Debug, Default)]
pub struct Truncated {
    /// What runs without decay.
    pub undecayed: Lasp2,
}

impl Scan for Truncated {
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
        let decays = Decays::new(&transitions, mine[0].kind())?;
        let alive = |from, to| decays.alive(from, to);
        let firsts: Vec<Option<usize>> = chain.held.iter().map(|&s| reaches_back(chain, s, alive)).collect();

        let mut states: States = chain.links.iter().map(|_| None).collect();
        for (&segment, state) in chain.held.iter().zip(&mine) {
            states[segment] = Some(state.shallow_clone());
        }
        let mut sent = Vec::new();
        for &segment in chain.held.iter().collect::<BTreeSet<_>>() {
            for to in heard_by(chain, segment, alive).into_iter().filter(|&to| to != group.rank()) {
                let state = states[segment].as_ref().ok_or_else(|| missing("state", segment))?;
                sent.push(group.send(state, to)?);
            }
        }
        let (mut coming, mut awaited) = (Vec::new(), Vec::new());
        for segment in needed(chain, &firsts) {
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
        if size.decay == DecayForm::None {
            return self.undecayed.messages(chain, rank, size, again);
        }
        let mut messages = Messages::default();
        if size.decays() > 0 && !again {
            messages = gather_messages("sp", chain.ranks(), chain.slots(), size.decays(), size, 1);
        }
        let always = |_, _| true;
        let held: Vec<usize> = (0..chain.owners.len()).filter(|&s| chain.owners[s].0 == rank).collect();
        let firsts: Vec<_> = held.iter().map(|&segment| reaches_back(chain, segment, always)).collect();
        let heard = held.iter().flat_map(|&segment| heard_by(chain, segment, always));
        let sent = heard.filter(|&to| to != rank).count() as u64;
        let needed = needed(&Chain { held: held.clone(), ..chain.clone() }, &firsts);
        let received = needed.into_iter().filter(|&segment| chain.owners[segment].0 != rank).count() as u64;
        messages.count("send", sent, sent * size.state(), 0);
        messages.count("recv", received, 0, received * size.state());
        messages
    }

    fn sends_less(&self, size: &StateSize) -> bool {
        size.decay != DecayForm::None
    }
}

/// The segments whose states the held ones need: from the given first ones on, those with tokens.
fn needed(chain: &Chain, firsts: &[Option<usize>]) -> BTreeSet<usize> {
    let ranges = chain.held.iter().zip(firsts).filter_map(|(&segment, first)| Some(first.as_ref().copied()?..segment));
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

/// Cumulative log-decays over the segments, in f64 and by the same additions on every rank: sender and receiver find the
/// same number for the same pair, or one would wait for ever.
struct Decays {
    /// `[segments, n]`, n numbers of a transition.
    sums: Vec<f64>,
    n: usize,
    limit: f64,
}

impl Decays {
    fn new(transitions: &[Option<Transition>], kind: Kind) -> Result<Self> {
        let bits = if kind == Kind::Double { 53.0 } else { 24.0 };
        let mut rows = Vec::with_capacity(transitions.len());
        for (segment, transition) in transitions.iter().enumerate() {
            match transition {
                Some(Transition::Scalar(sum) | Transition::Channel(sum)) => rows.push(sum.f_flatten(0, -1)?),
                _ => return Err(missing("transition", segment)),
            }
        }
        // What is not a number forgets nothing; the least is far below any limit, and still finite when summed.
        let logs = Tensor::f_stack(&rows, 0)?.f_to_kind(Kind::Double)?.f_nan_to_num(0.0, 0.0, -1e6)?;
        let sums = logs.f_clamp(-1e6, 0.0)?.f_cumsum(0, Kind::Double)?;
        let n = sums.size()[1] as usize;
        let sums = Vec::try_from(sums.f_flatten(0, -1)?)?;
        Ok(Self { sums, n, limit: -bits * std::f64::consts::LN_2 })
    }

    /// Whether what leaves `from` still matters at the entry of `to`, in some head or channel.
    fn alive(&self, from: usize, to: usize) -> bool {
        let row = |segment: usize| &self.sums[segment * self.n..(segment + 1) * self.n];
        row(from).iter().zip(row(to - 1)).any(|(before, here)| here - before >= self.limit)
    }
}

/// The first segment whose state matters at the entry of `segment`; `alive(from, to)` tells.
fn reaches_back(chain: &Chain, segment: usize, alive: impl Fn(usize, usize) -> bool) -> Option<usize> {
    let mut first = chain.before(segment)?;
    while chain.links[first].through {
        match chain.before(first).filter(|&before| alive(before, segment)) {
            Some(before) => first = before,
            None => break,
        }
    }
    Some(first)
}

/// The ranks at whose segments the state of `segment` matters.
fn heard_by(chain: &Chain, segment: usize, alive: impl Fn(usize, usize) -> bool) -> BTreeSet<usize> {
    let mut ranks = BTreeSet::new();
    let mut at = chain.after(segment);
    while let Some(to) = at.filter(|&to| alive(segment, to)) {
        ranks.insert(chain.owners[to].0);
        at = chain.after(to).filter(|_| chain.links[to].through);
    }
    ranks
}
