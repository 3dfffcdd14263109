//! LASP-1 (arXiv 2404.02882), Algorithms 2 and 3: states go from rank to rank along the sequence, and in backward their
//! gradients against it. One state received a rank and W - 1 dependent steps.
//!
//! A fair version: the receive is posted before the intra-rank work and waited for after it, and the received state is
//! kept for backward, where the released code receives first and runs a second ring to compute it again.

use collectives::Group;
use tch::Tensor;

use super::relay::{received, relay};
use super::{Chain, Entries, Result, Scan, Scanned, StateSize, Transitions};

#[derive(Clone, Copy, Debug, Default)]
pub struct Lasp1;

impl Scan for Lasp1 {
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
    fn received(&self, chain: &Chain, rank: usize, size: &StateSize) -> u64 {
        received(chain, rank, size)
    }
}
