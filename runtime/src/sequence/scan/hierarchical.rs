//! A scan for a fast network inside nodes and a slow one between them: AllGather of the summaries inside the node, a
//! logarithmic scan (Hillis and Steele, 1986) across nodes in which each rank of a node carries one slice of the node's
//! state, AllGather of the slices inside the node. Received per rank about (w - 1) + (w - 1) / w states inside the node
//! and log2(nodes) / w from outside; 2 + log2(nodes) dependent steps, which travel while the rank computes.
//!
//! Nodes are runs of `node_size` neighbouring ranks; the last one may be smaller, its ranks then scan more than one slice.
//! On the zigzag layout the segments of a node are two runs, one on the way up and one on the way down (the last node's
//! meet and are one); the scan goes over the runs of all nodes in sequence order, so that it needs no second pass.

use std::ops::Range;

use collectives::{Group, Pending};
use kernels::linear::Transition;
use tch::Tensor;

use super::fold::{States, compose, copy, fold};
use super::message::{Row, gather, narrow, slice};
use super::route::{Route, partners};
use super::{Chain, Entries, Messages, Result, Scan, Scanned, StateSize, Transitions, missing, tensors};

pub struct Hierarchical {
    node: Group,
    node_size: usize,
}

impl Hierarchical {
    /// Collective over `group`, on which alone the scan may then run.
    pub fn new(group: &Group, node_size: usize) -> Result<Self> {
        let node_size = node_size.clamp(1, group.size());
        Ok(Self { node: group.split("node", group.rank() / node_size, group.rank())?, node_size })
    }
}

impl Scan for Hierarchical {
    fn connect(&self, group: &Group) -> Result<()> {
        self.node.connect(&[], &[])?;
        let partners: Vec<_> = partners(group.rank(), self.node_size, group.size()).into_iter().collect();
        Ok(group.connect(&partners, &partners)?)
    }

    fn prefix(
        &self,
        group: &Group,
        chain: &Chain,
        mine: Vec<Tensor>,
        transitions: Transitions,
    ) -> Result<Scanned<(Entries, Transitions)>> {
        let route = Route::new(chain, self.node_size, mine[0].size()[2]);
        let own = chain.held.first().and_then(|&segment| transitions[segment].as_ref());
        let unknown = |of_node: &dyn Fn(usize) -> bool| {
            let mut all = chain.owners.iter().zip(&transitions);
            own.filter(|_| all.any(|(&(rank, _), known)| known.is_none() && of_node(route.node_of(rank))))
        };
        let node = route.node_of(group.rank());
        let row = Row::new(&mine[0], unknown(&|of| of == node));
        let travelling = unknown(&|_| true).map(copy);
        let rows = chain.held.iter().zip(&mine).map(|(&segment, state)| row.pack(state, transitions[segment].as_ref()));
        let rows = rows.collect::<Result<Vec<_>>>()?;
        let mut reads = tensors(&mine, &transitions);
        reads.extend(rows.iter().map(Tensor::shallow_clone));
        let nodes = Nodes {
            group: group.clone(),
            node: self.node.clone(),
            route,
            like: mine[0].shallow_clone(),
            travelling,
            states: chain.links.iter().map(|_| None).collect(),
            transitions,
        };
        Ok(group.in_flight(reads, move || Ok(nodes.run(&rows, &row)))?)
    }

    fn messages(&self, chain: &Chain, rank: usize, size: &StateSize, again: bool) -> Messages {
        messages(self.node_size, chain, rank, size, again)
    }
}

/// [`Scan::messages`] for ranks that need not exist.
pub(super) fn messages(node_size: usize, chain: &Chain, rank: usize, size: &StateSize, again: bool) -> Messages {
    Route::new(chain, node_size.clamp(1, chain.ranks().max(1)), size.key as i64).messages(rank, size, again)
}

/// What some consecutive runs sum up to: one slice of it.
struct Sum {
    state: Option<Tensor>,
    /// None where a document ends inside.
    transition: Option<Transition>,
}

impl Sum {
    fn copy(&self) -> Sum {
        let state = self.state.as_ref().map(Tensor::shallow_clone);
        Sum { state, transition: self.transition.as_ref().map(copy) }
    }

    /// With the runs before these.
    fn after(self, earlier: &Sum) -> Result<Sum> {
        let Some(transition) = self.transition else { return Ok(self) };
        let carried = earlier.state.as_ref().map(|state| transition.apply(state)).transpose()?;
        let state = match (carried, self.state) {
            (Some(carried), Some(own)) => Some(carried.f_add(&own)?),
            (carried, own) => carried.or(own),
        };
        let transition = earlier.transition.as_ref().map(|earlier| compose(&transition, earlier)).transpose()?;
        Ok(Sum { state, transition })
    }
}

/// The scan of one rank, from the gather of its node's summaries on.
struct Nodes {
    group: Group,
    node: Group,
    route: Route,
    /// Any state: shape, kind and device.
    like: Tensor,
    /// The form of the transitions that travel, if they do.
    travelling: Option<Transition>,
    states: States,
    transitions: Transitions,
}

impl Nodes {
    fn run(mut self, rows: &[Tensor], row: &Row) -> Result<(Entries, Transitions)> {
        let gathered = gather(&self.node, rows, 1)?.wait()?;
        let node = self.route.node_of(self.group.rank());
        let members = self.route.members(node);
        for (segment, &(rank, slot)) in self.route.chain.owners.iter().enumerate() {
            if !members.contains(&rank) {
                continue;
            }
            let message = gathered.f_select(0, (rank - members.start) as i64)?.f_select(0, slot as i64)?;
            self.states[segment] = Some(row.state(&message)?);
            if self.transitions[segment].is_none() {
                self.transitions[segment] = row.transition(&message)?;
            }
        }
        let runs = self.route.runs_of(node);
        let entering = self.entering(&runs)?;
        let chain = &self.route.chain;
        let mut entries: Entries = chain.held.iter().map(|_| None).collect();
        for (entry, &segment) in entries.iter_mut().zip(&chain.held).filter(|(_, s)| chain.links[**s].enters) {
            for (&run, state) in runs.iter().zip(&entering) {
                let segments = &self.route.runs[run].segments;
                if segments.contains(&segment) {
                    let state = state.as_ref().map(Tensor::shallow_clone);
                    *entry = fold(chain, segments.start..segment, state, &self.states, &self.transitions)?;
                }
            }
        }
        Ok((entries, self.transitions))
    }

    /// The states that enter this node's runs from others: the slices of all its ranks, put together.
    fn entering(&self, runs: &[usize]) -> Result<Vec<Option<Tensor>>> {
        let entered: Vec<usize> = runs.iter().copied().filter(|&run| self.route.enters(run)).collect();
        let slices = self.route.slices_of(self.group.rank());
        let scanned = self.across(runs, &slices)?;
        if entered.is_empty() {
            return Ok(runs.iter().map(|_| None).collect());
        }
        let (b, h, _, dv) = self.like.size4()?;
        let count = entered.len() as i64;
        let mut mine = vec![self.like.f_new_zeros([0, count, b, h, dv], (self.like.kind(), self.like.device()))?];
        for at in 0..slices.len() {
            let mut states = Vec::with_capacity(entered.len());
            for (i, &run) in runs.iter().enumerate().filter(|(_, run)| self.route.enters(**run)) {
                states.push(scanned[i * slices.len() + at].as_ref().ok_or_else(|| self.missing(run))?);
            }
            mine.push(Tensor::f_stack(&states, 0)?.f_permute([3, 0, 1, 2, 4])?); // [rows, R, B, H, V]
        }
        let rows = |rank: usize| -> i64 {
            let rows = |slice: usize| self.route.slices[slice].end - self.route.slices[slice].start;
            self.route.slices_of(rank).into_iter().map(rows).sum()
        };
        let members = self.route.members(self.route.node_of(self.group.rank()));
        let rows: Vec<i64> = members.map(rows).collect();
        let mine = Tensor::f_cat(&mine, 0)?;
        let slices = if rows.len() == 1 { mine } else { self.node.all_gather_v(&mine, &rows)?.wait()? };
        let states = slices.f_permute([1, 2, 3, 0, 4])?;
        let state = |run: &usize| entered.iter().position(|e| e == run).map(|at| states.f_select(0, at as i64));
        Ok(runs.iter().map(|run| state(run).transpose()).collect::<std::result::Result<Vec<_>, _>>()?)
    }

    /// The exclusive scan over the runs of all nodes, of this rank's slices: for each of the node's runs and each slice.
    fn across(&self, runs: &[usize], slices: &[usize]) -> Result<Vec<Option<Tensor>>> {
        let (route, me) = (&self.route, self.group.rank());
        let mine: Vec<(usize, usize)> = runs.iter().flat_map(|&run| slices.iter().map(move |&s| (run, s))).collect();
        let mut sums =
            mine.iter().map(|&(run, slice)| self.sum(run, &route.slices[slice])).collect::<Result<Vec<_>>>()?;
        let mut before: Vec<Sum> =
            mine.iter().map(|_| Sum { state: None, transition: Some(Transition::Identity) }).collect();
        let mut sent = Vec::new();
        for d in route.steps() {
            for (&(run, slice), sum) in mine.iter().zip(&sums).filter(|((run, _), _)| run + d < route.runs.len()) {
                let to = route.scans(route.runs[run + d].node, slice);
                if to != me && route.takes(run + d, d) {
                    sent.push(self.send(run, d, slice, sum, to)?);
                }
            }
            let mut coming = Vec::with_capacity(mine.len());
            for &(run, slice) in mine.iter().filter(|(run, _)| route.takes(*run, d)) {
                let from = route.scans(route.runs[run - d].node, slice);
                let own = mine.iter().zip(&sums).find(|(at, _)| **at == (run - d, slice));
                coming.push(match own {
                    Some((_, sum)) => Pending::ready(Ok(sum.copy())),
                    None => self.receive(run - d, d, slice, from)?,
                });
            }
            let mut coming = coming.into_iter();
            let mut next = Vec::with_capacity(mine.len());
            for ((&(run, _), sum), before) in mine.iter().zip(sums).zip(&mut before) {
                let earlier = if route.takes(run, d) { coming.next() } else { None };
                next.push(match earlier {
                    Some(earlier) => {
                        let earlier = earlier.wait()??;
                        *before = before.copy().after(&earlier)?;
                        sum.after(&earlier)?
                    }
                    None => sum,
                });
            }
            sums = next;
        }
        sent.into_iter().try_for_each(Pending::wait)?;
        Ok(before.into_iter().map(|sum| sum.state).collect())
    }

    /// One slice of what a run of this node sums up to.
    fn sum(&self, run: usize, rows: &Range<i64>) -> Result<Sum> {
        let segments = self.route.runs[run].segments.clone();
        let mut states: States = self.states.iter().map(|_| None).collect();
        let mut transitions: Transitions = self.states.iter().map(|_| None).collect();
        for segment in segments.clone() {
            states[segment] = self.states[segment].as_ref().map(|state| narrow(state, rows)).transpose()?;
            transitions[segment] = self.transitions[segment].as_ref().map(|t| slice(t, rows)).transpose()?;
        }
        let state = fold(&self.route.chain, segments, None, &states, &transitions)?;
        Ok(Sum { state, transition: self.product(run..run + 1, rows)? })
    }

    /// The transition of some runs whose segments' transitions are known; none where a document ends in them.
    fn product(&self, runs: Range<usize>, rows: &Range<i64>) -> Result<Option<Transition>> {
        if !self.route.passes(runs.clone()) {
            return Ok(None);
        }
        let mut product = Transition::Identity;
        for segment in self.route.segments(runs).filter(|&s| !self.route.chain.links[s].empty) {
            let transition = self.transitions[segment].as_ref().ok_or_else(|| missing("transition", segment))?;
            product = compose(&product, &slice(transition, rows)?)?;
        }
        Ok(Some(product))
    }

    /// The layout of the message in which the sum that run `run` has before step `d` travels.
    fn row(&self, run: usize, d: usize, rows: &Range<i64>) -> Result<Row> {
        let carries = self.route.passes(self.route.summed(run, d));
        let travelling = self.travelling.as_ref().filter(|_| carries).map(|t| slice(t, rows)).transpose()?;
        Ok(Row::new(&narrow(&self.like, rows)?, travelling.as_ref()))
    }

    fn send(&self, run: usize, d: usize, slice: usize, sum: &Sum, to: usize) -> Result<Pending<()>> {
        let state = sum.state.as_ref().ok_or_else(|| self.missing(run))?;
        let message = self.row(run, d, &self.route.slices[slice])?.pack(state, sum.transition.as_ref())?;
        Ok(self.group.send(&message, to)?)
    }

    /// Pending: the sum that run `run` has before step `d`.
    fn receive(&self, run: usize, d: usize, slice: usize, from: usize) -> Result<Scanned<Sum>> {
        let rows = &self.route.slices[slice];
        let row = self.row(run, d, rows)?;
        let shape = [row.numel()];
        let known = match self.travelling {
            Some(_) => None,
            None => self.product(self.route.summed(run, d), rows)?,
        };
        let unpack = move |message: Tensor| -> Result<Sum> {
            let transition = known.map_or_else(|| row.transition(&message), |known| Ok(Some(known)))?;
            Ok(Sum { state: Some(row.state(&message)?), transition })
        };
        let (device, kind) = (self.like.device(), self.like.kind());
        Ok(self.group.recv_on(device, &shape, kind, from)?.map(move |message| Ok(unpack(message))))
    }

    fn missing(&self, run: usize) -> super::Error {
        missing("state", self.route.runs[run].segments.start)
    }
}
