//! The operator of linear attention with its scan, in the order of `runtime::sequence::linear`.

use runtime::sequence::Piece;
use runtime::sequence::scan::{DecayForm, Reach, Route};

use super::engine::Id;
use super::ranks::Ranks;
use super::{Host, Pass, Sizes, linear_kernel};
use crate::simulate::Result;
use crate::simulate::method::Linear;
use crate::simulate::packing::{enters, leaves};

pub(super) fn run(
    host: &Host,
    ranks: &mut Ranks,
    sizes: &Sizes,
    scan: Linear,
    pass: Pass,
    reach: &Reach,
) -> Result<()> {
    // Kernels grow with heads, and with the products of a chunk and of a state.
    let products = |heads: f64, dim: f64, chunk: f64| heads * dim * (dim + chunk);
    let measured = products(host.heads as f64, host.head_dim as f64, host.chunk as f64);
    let scale = products(sizes.heads, sizes.dim, sizes.chunk) / measured;
    let (state, kernel) = (sizes.size.state() as f64, |name: &str| linear_kernel(sizes.decay, pass, name));
    // Every piece of a document is a segment of its own.
    let part = |name: &str, rank: usize, of: &dyn Fn(&Piece) -> bool| -> Result<f64> {
        let seconds = |piece: &Piece| host.by_tokens(&kernel(name), sizes.ranks, piece.tokens() as f64);
        let pieces = sizes.packing.pieces(rank).iter().filter(|piece| of(piece));
        Ok(scale * pieces.map(seconds).sum::<Result<f64>>()?)
    };
    let all = |_: &Piece| true;
    let flows = sizes.packing.chain(pass).flows() && scan != Linear::None;
    // What nobody waits for, the intra-rank work sums up.
    let first = |piece: &Piece| leaves(piece, pass);
    for rank in 0..sizes.ranks {
        let summarized = part("open", rank, &all)? + part("summarize", rank, &first)?;
        ranks.compute(rank, summarized + sizes.slots * host.copy(state)?);
    }
    let mut scanning = Scanning { host, sizes, pass, state, reach, ranks };
    let arrived = if flows && sizes.ranks > 1 { scanning.scan(scan)? } else { vec![None; sizes.ranks] };
    let one = host.add(state)?;
    for (rank, arrived) in arrived.into_iter().enumerate() {
        ranks.compute(rank, part("summarize", rank, &|piece: &Piece| !first(piece))? + part("run", rank, &all)?);
        if let Some(arrived) = arrived {
            ranks.wait(rank, arrived);
        }
        let folded = match scan {
            Linear::Lasp2 { .. } | Linear::Truncated { .. } if flows => {
                one * sizes.packing.folded(rank, pass, reach).saturating_sub(1) as f64
            }
            _ => 0.0,
        };
        let added = if flows { part("add", rank, &|piece: &Piece| enters(piece, pass))? } else { 0.0 };
        // Results of pieces are put together.
        let pieces = sizes.packing.pieces(rank).len();
        let tensors = if pass == Pass::Forward { 1.0 } else { 3.0 };
        let joined = if pieces > 1 { tensors * host.copy(sizes.bytes(sizes.tokens, sizes.heads))? } else { 0.0 };
        ranks.compute(rank, folded + added + part("finish", rank, &all)? + joined);
    }
    Ok(())
}

struct Scanning<'a, 'b> {
    host: &'a Host,
    sizes: &'a Sizes<'a>,
    pass: Pass,
    /// Bytes.
    state: f64,
    reach: &'a Reach,
    ranks: &'a mut Ranks<'b>,
}

impl Scanning<'_, '_> {
    /// When each rank has what enters it, if it waits for anything.
    fn scan(&mut self, scan: Linear) -> Result<Vec<Option<Id>>> {
        match scan {
            Linear::Lasp1 => self.relay(1),
            Linear::AllScan { blocks } => self.relay(blocks),
            Linear::Hierarchical { node } => self.hierarchical(node.min(self.sizes.ranks)),
            Linear::Lasp2 { splits } => self.gather(splits),
            Linear::Truncated { splits } if self.sizes.size.decay == DecayForm::None => self.gather(splits),
            Linear::Truncated { .. } => self.truncated(),
            _ => Ok(vec![None; self.sizes.ranks]),
        }
    }

    /// Bytes of one segment's log-decays, where they travel.
    fn decays(&self) -> f64 {
        if self.pass == Pass::Forward { self.sizes.size.decays() as f64 } else { 0.0 }
    }

    fn gather(&mut self, splits: usize) -> Result<Vec<Option<Id>>> {
        let (all, issued) = ((0..self.sizes.ranks).collect::<Vec<_>>(), self.ranks.all_now());
        let part = self.sizes.slots * (self.state + self.decays()) / splits as f64;
        let mut arrived = issued.clone();
        for _ in 0..splits {
            arrived = self.ranks.all_gather(&all, part, &issued)?;
        }
        Ok(arrived.into_iter().map(Some).collect())
    }

    /// Log-decays that depend on the data are waited for; then each state goes to each rank to which it matters:
    /// `runtime::sequence::scan::truncated`.
    fn truncated(&mut self) -> Result<Vec<Option<Id>>> {
        let (all, decays) = ((0..self.sizes.ranks).collect::<Vec<_>>(), self.sizes.slots * self.decays());
        if decays > 0.0 {
            let issued = self.ranks.all_now();
            for (rank, known) in self.ranks.all_gather(&all, decays, &issued)?.into_iter().enumerate() {
                self.ranks.wait(rank, known);
            }
        }
        let chain = self.sizes.packing.chain(self.pass);
        let mut arrived: Vec<Vec<Id>> = vec![vec![]; self.sizes.ranks];
        for (segment, &(from, _)) in chain.owners.iter().enumerate() {
            for to in self.reach.heard_by(chain, segment).into_iter().filter(|&to| to != from) {
                let issued = self.ranks.now(from);
                arrived[to].push(self.ranks.send(from, to, self.state, issued)?);
            }
        }
        let last = |of: Vec<Id>| if of.is_empty() { None } else { Some(self.ranks.engine.time(0.0, &of)) };
        Ok(arrived.into_iter().map(last).collect())
    }

    /// From segment to segment: `runtime::sequence::scan::relay`.
    fn relay(&mut self, blocks: usize) -> Result<Vec<Option<Id>>> {
        let chain = self.sizes.packing.chain(self.pass);
        let block = self.state / blocks as f64;
        let add = self.host.add(block)?;
        let mut flown: Vec<Option<Id>> = vec![None; self.sizes.ranks];
        // When each block of what leaves a segment can be sent.
        let mut leaving: Vec<Vec<Id>> = Vec::with_capacity(chain.owners.len());
        for (segment, &(to, _)) in chain.owners.iter().enumerate() {
            let mut next = vec![self.ranks.now(to); blocks];
            if let Some(before) = chain.before(segment) {
                let (from, through) = (chain.owners[before].0, chain.links[segment].through);
                for (&issued, next) in leaving[before].iter().zip(&mut next) {
                    let arrived = if from == to { issued } else { self.ranks.send(from, to, block, issued)? };
                    let after: Vec<Id> = [arrived, self.ranks.now(to)].into_iter().chain(flown[to]).collect();
                    let passed = self.ranks.fly(to, if through { add } else { 0.0 }, &after);
                    flown[to] = Some(passed);
                    if through {
                        *next = passed;
                    }
                }
            }
            leaving.push(next);
        }
        Ok(flown)
    }

    /// A gather in each node, slices across nodes, a gather of slices: `runtime::sequence::scan::hierarchical`, by its route.
    fn hierarchical(&mut self, node: usize) -> Result<Vec<Option<Id>>> {
        let (w, size) = (self.sizes.ranks, self.sizes.size);
        let route = Route::new(self.sizes.packing.chain(self.pass), node, size.key as i64);
        let nodes: Vec<Vec<usize>> = (0..w.div_ceil(node)).map(|number| route.members(number).collect()).collect();
        let mut there: Vec<Id> = self.ranks.all_now();
        for of in &nodes {
            let issued: Vec<Id> = of.iter().map(|&rank| self.ranks.now(rank)).collect();
            let ends = self.ranks.all_gather(of, self.sizes.slots * (self.state + self.decays()), &issued)?;
            for (&rank, end) in of.iter().zip(ends) {
                there[rank] = self.ranks.fly(rank, self.host.add(self.state)? * of.len() as f64, &[end]);
            }
        }
        if nodes.len() == 1 {
            return Ok(there.into_iter().map(Some).collect());
        }
        let slices = route.slices.len();
        let carrier = |run: usize, slice: usize| route.scans(route.runs[run].node, slice);
        let mut sums: Vec<Vec<Id>> =
            (0..route.runs.len()).map(|run| (0..slices).map(|slice| there[carrier(run, slice)]).collect()).collect();
        for distance in route.steps() {
            let before = sums.clone();
            for to in (distance..route.runs.len()).filter(|&to| route.takes(to, distance)) {
                for slice in 0..slices {
                    let from = to - distance;
                    let (sender, receiver) = (carrier(from, slice), carrier(to, slice));
                    let (sent, bytes) = (before[from][slice], route.bytes(from, distance, slice, &size) as f64);
                    let arrived =
                        if sender == receiver { sent } else { self.ranks.send(sender, receiver, bytes, sent)? };
                    let after = [arrived, before[to][slice], there[receiver]];
                    sums[to][slice] = self.ranks.fly(receiver, 2.0 * self.host.add(bytes)?, &after);
                    there[receiver] = sums[to][slice];
                }
            }
        }
        for (number, of) in nodes.iter().enumerate() {
            let entered = route.runs_of(number).into_iter().filter(|&run| route.enters(run)).count() as f64;
            if entered > 0.0 {
                let issued: Vec<Id> = of.iter().map(|&rank| there[rank]).collect();
                let ends = self.ranks.all_gather(of, entered * self.state / of.len() as f64, &issued)?;
                for (&rank, end) in of.iter().zip(ends) {
                    there[rank] = self.ranks.fly(rank, self.host.copy(entered * self.state)?, &[end]);
                }
            }
        }
        Ok(there.into_iter().map(Some).collect())
    }
}
