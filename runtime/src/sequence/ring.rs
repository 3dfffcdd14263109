//! Blocks of all ranks' tokens that go round a ring, one hop a step: Ring Attention (arXiv 2310.01889). In step s rank t has
//! the block of rank t - s; while it works on it, that block is on its way to rank t + 1 and the next one on its way here.
//! What a block is, and what is done with it, is left to the methods.

use collectives::{Group, Pending};
use tch::{Device, Kind, Tensor};

use super::{Result, Shard};

/// This rank's place on the ring.
struct Ring<'a> {
    shard: &'a Shard,
    /// Tokens of each rank.
    rows: Vec<i64>,
    /// Sizes of a block after its first dimension, and where it lives.
    rest: Vec<i64>,
    device: Device,
}

impl<'a> Ring<'a> {
    fn new(shard: &'a Shard, mine: &Tensor) -> Self {
        let rest = mine.size().split_off(1);
        Self { shard, rows: shard.plan.layout.tokens_per_rank(), rest, device: mine.device() }
    }

    fn size(&self) -> usize {
        self.rows.len()
    }

    /// The rank `hops` back on the ring.
    fn back(&self, hops: usize) -> usize {
        (self.shard.group.rank() + self.size() - hops) % self.size()
    }

    fn send(&self, x: &Tensor) -> Result<Pending<()>> {
        Ok(self.shard.group.send(x, (self.shard.group.rank() + 1) % self.size())?)
    }

    /// Starts receiving, from the rank before, something of the size of `owner`'s block.
    fn receive(&self, owner: usize, kind: Kind) -> Result<Pending<Tensor>> {
        let shape = [&[self.rows[owner]], self.rest.as_slice()].concat();
        Ok(self.shard.group.recv_on(self.device, &shape, kind, self.back(1))?)
    }
}

/// For what goes round on the ranks of `group`.
pub(super) fn connect(group: &Group) -> Result<()> {
    let (rank, size) = (group.rank(), group.size());
    Ok(group.connect(&[(rank + 1) % size], &[(rank + size - 1) % size])?)
}

/// Keys and values, or their gradients, as one block: `[B, T, heads, K]` and `[B, T, heads, V]` to `[T, B, heads, K + V]`.
pub(super) fn block(k: &Tensor, v: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_cat(&[k, v], -1)?.f_transpose(0, 1)?.f_contiguous()?)
}

/// The inverse of [`block`], as views.
pub(super) fn unblock(block: &Tensor, dk: i64) -> Result<(Tensor, Tensor)> {
    let block = block.f_transpose(0, 1)?;
    Ok((block.f_narrow(-1, 0, dk)?, block.f_narrow(-1, dk, block.size()[3] - dk)?))
}

/// Sends `mine` `[T, ..]` round. `visit` gets every rank's block in turn with its owner's number, this rank's own first.
pub(super) fn go_round(
    shard: &Shard,
    mine: &Tensor,
    mut visit: impl FnMut(usize, &Tensor) -> Result<()>,
) -> Result<()> {
    let ring = Ring::new(shard, mine);
    let mut block = mine.shallow_clone();
    for step in 0..ring.size() {
        let last = step + 1 == ring.size();
        let passing =
            if last { None } else { Some((ring.send(&block)?, ring.receive(ring.back(step + 1), block.kind())?)) };
        visit(ring.back(step), &block)?;
        if let Some((sent, next)) = passing {
            block = next.wait()?;
            sent.wait()?;
        }
    }
    Ok(())
}

/// As [`go_round`], but `visit` also gives what this rank adds to the sums of the block, of the block's shape in `kind`, or
/// nothing. Returns the sums of this rank's own block over all ranks.
///
/// The sums start with the first other rank that has the block, follow it one step behind, and need W - 1 hops to be home;
/// what the owner adds itself never travels.
pub(super) fn go_round_and_home(
    shard: &Shard,
    mine: &Tensor,
    kind: Kind,
    mut visit: impl FnMut(usize, &Tensor) -> Result<Option<Tensor>>,
) -> Result<Tensor> {
    let ring = Ring::new(shard, mine);
    let (mut block, mut own, mut leaving) = (mine.shallow_clone(), None, Vec::new());
    for step in 0..ring.size() {
        let (owner, last) = (ring.back(step), step + 1 == ring.size());
        // The rank before added its share in its last step, and sent it before it passed on another block.
        let earlier = if step >= 2 { Some(ring.receive(owner, kind)?) } else { None };
        let passing =
            if last { None } else { Some((ring.send(&block)?, ring.receive(ring.back(step + 1), block.kind())?)) };
        let share = visit(owner, &block)?;
        if step == 0 {
            own = share;
        } else {
            let sums = add(earlier.map(Pending::wait).transpose()?, share)?;
            let zeros = || Tensor::f_zeros(block.size(), (kind, ring.device));
            leaving.push(ring.send(&sums.map_or_else(zeros, Ok)?)?);
        }
        if let Some((sent, next)) = passing {
            block = next.wait()?;
            sent.wait()?;
        }
    }
    let home = if ring.size() > 1 { Some(ring.receive(ring.back(0), kind)?.wait()?) } else { None };
    for sent in leaving {
        sent.wait()?;
    }
    match add(home, own)? {
        Some(sums) => Ok(sums),
        None => Ok(Tensor::f_zeros(mine.size(), (kind, ring.device))?),
    }
}

fn add(a: Option<Tensor>, b: Option<Tensor>) -> Result<Option<Tensor>> {
    Ok(match (a, b) {
        (Some(mut a), Some(b)) => Some(a.f_add_(&b)?),
        (a, b) => a.or(b),
    })
}
