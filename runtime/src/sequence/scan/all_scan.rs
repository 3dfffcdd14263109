//! All-Scan of ZeCO (arXiv 2507.01004): LASP-1's chain with the state cut along its key dimension, so that a
//! rank sends a block on while the next one is on its way. One state received a rank; (W - 1) + (blocks - 1) dependent
//! steps, each a block long.

use collectives::Group;
use tch::Tensor;

use super::message::connect_near;
use super::relay::{messages, relay};
use super::{Chain, Entries, Messages, Result, Scan, Scanned, StateSize, Transitions};

#[derive(Clone, Copy, Debug)]
pub struct AllScan {
    /// At least 1; at most K are used.
    pub blocks: usize,
}

impl Default for AllScan {
    fn default() -> Self {
        Self { blocks: 4 }
    }
}

impl Scan for AllScan {
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
        relay(group, chain, mine, transitions, self.blocks)
    }

    /// As LASP-1, in more messages.
    fn messages(&self, chain: &Chain, rank: usize, size: &StateSize, _again: bool) -> Messages {
        messages(chain, rank, size, self.blocks)
    }
}
