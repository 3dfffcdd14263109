//! LASP-1 (arXiv 2404.02882), Algorithms 2 and 3: states go from rank to rank along the sequence, and in backward their
//! gradients against it. One state received a rank and W - 1 dependent steps.
//!
//! A fair version: the state is received, added to and sent on while the rank does its intra-rank work, and it is kept for
//! backward, where the released code receives first and runs a second ring to compute it again.

use collectives::Group;
use tch::Tensor;

use super::message::connect_near;
use super::relay::{messages, relay};
use super::{Chain, Entries, Messages, Result, Scan, Scanned, StateSize, Transitions};

#[derive(Clone, Copy, Debug, Default)]
pub struct Lasp1;

impl Scan for Lasp1 {
    fn connect(&self, group: &Group) -> Result<()> {
        connect_near(group, 1)
    }

    fn prefix(
        &self,
        group: &Group,
        chain: &Chain,
        mine: Vec<Tensor>,
        transitions: Transitions,
    ) -> Result<Scanned<(Entries, Transitions)>> {
        relay(group, chain, mine, transitions, 1)
    }

    /// A state, but for the rank where the sequence begins; on the zigzag layout two, but for the ranks where the chain
    /// begins and turns.
    fn messages(&self, chain: &Chain, rank: usize, size: &StateSize, _again: bool) -> Messages {
        messages(chain, rank, size, 1)
    }
}
