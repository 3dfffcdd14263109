//! LASP-2 (arXiv 2502.07563), Algorithm 2: one AllGather of every segment's state, then each rank folds what it needs.
//! W - 1 states received (2 (W - 1) on the zigzag layout), one dependent step, in forward and in backward. The gather may
//! be cut into several messages, as in the paper's ablation: the same bytes in more pieces.

use collectives::{Group, Pending};
use tch::Tensor;

use super::fold::prefixes;
use super::message::{Row, gather, gather_messages};
use super::{Chain, Entries, Messages, Result, Scan, Scanned, StateSize, Transitions};

#[derive(Clone, Copy, Debug)]
pub struct Lasp2 {
    /// Messages that make up the gather, at least 1.
    pub splits: usize,
}

impl Default for Lasp2 {
    fn default() -> Self {
        Self { splits: 1 }
    }
}

impl Scan for Lasp2 {
    fn prefix(
        &self,
        group: &Group,
        chain: &Chain,
        mine: Vec<Tensor>,
        mut transitions: Transitions,
    ) -> Result<Scanned<(Entries, Transitions)>> {
        let own = chain.held.first().and_then(|&segment| transitions[segment].as_ref());
        let travelling = own.filter(|_| transitions.iter().any(Option::is_none));
        let row = Row::new(&mine[0], travelling);
        let rows = chain.held.iter().zip(&mine).map(|(&segment, state)| row.pack(state, transitions[segment].as_ref()));
        let gathered = gather(group, &rows.collect::<Result<Vec<_>>>()?, self.splits)?;
        // Where nothing enters, as on the first rank of a sequence, nothing is waited for: only the others need the gather.
        if travelling.is_none() && !chain.held.iter().any(|&segment| chain.links[segment].enters) {
            drop(gathered);
            return Ok(Pending::ready(Ok((chain.held.iter().map(|_| None).collect(), transitions))));
        }
        let chain = chain.clone();
        let fold = move |gathered: Tensor| -> Result<(Entries, Transitions)> {
            let mut states = Vec::with_capacity(chain.owners.len());
            for (&(rank, slot), transition) in chain.owners.iter().zip(&mut transitions) {
                let message = gathered.f_select(0, rank as i64)?.f_select(0, slot as i64)?;
                states.push(Some(row.state(&message)?));
                if transition.is_none() {
                    *transition = row.transition(&message)?;
                }
            }
            Ok((prefixes(&chain, &states, &transitions)?, transitions))
        };
        Ok(gathered.map(move |gathered| Ok(fold(gathered))))
    }

    /// Received are `(W - 1)` times the summaries of a rank.
    fn messages(&self, chain: &Chain, _rank: usize, size: &StateSize, again: bool) -> Messages {
        let row = size.state() + if again { 0 } else { size.decays() };
        gather_messages("sp", chain.ranks(), chain.slots(), row, size, self.splits)
    }
}
