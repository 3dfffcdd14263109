//! The operator of linear attention with its scan, in the order of `runtime::sequence::linear`.

use runtime::config::LayoutKind;

use super::engine::Id;
use super::ranks::Ranks;
use super::{Host, Pass, Sizes, WIDTH, linear_kernel};
use crate::simulate::Result;
use crate::simulate::method::Linear;

pub(super) fn run(host: &Host, ranks: &mut Ranks, sizes: &Sizes, scan: Linear, pass: Pass) -> Result<()> {
    // Kernels grow with heads, and with the products of a chunk and of a state.
    let products = |heads: f64, dim: f64, chunk: f64| heads * dim * (dim + chunk);
    let measured = products(host.heads as f64, host.head_dim as f64, host.chunk as f64);
    let scale = products(sizes.heads, sizes.dim, sizes.chunk) / measured;
    let slots = sizes.slots() as f64;
    let part = |name: &str| -> Result<f64> {
        let seconds = host.by_tokens(&linear_kernel(sizes.decay, pass, name), sizes.ranks, sizes.tokens / slots)?;
        Ok(slots * scale * seconds)
    };
    let (open, summarize, intra, add, finish) =
        (part("open")?, part("summarize")?, part("run")?, part("add")?, part("finish")?);
    // Results of two segments are put together.
    let tensors = if pass == Pass::Forward { 1.0 } else { 3.0 };
    let join = if slots > 1.0 { tensors * host.copy(sizes.bytes(sizes.tokens, sizes.heads))? } else { 0.0 };
    let state = sizes.heads * sizes.dim * sizes.dim * WIDTH;

    ranks.compute_all(open + summarize + slots * host.copy(state)?);
    if sizes.ranks == 1 || scan == Linear::None {
        ranks.compute_all(intra + finish + join);
        return Ok(());
    }
    let mut scanning = Scanning { host, sizes, pass, state, ranks };
    let arrived = match scan {
        Linear::Lasp1 => scanning.chain(1)?,
        Linear::AllScan { blocks } => scanning.chain(blocks)?,
        Linear::Hierarchical { node } => scanning.hierarchical(node.min(sizes.ranks))?,
        Linear::Lasp2 { splits } => scanning.gather(splits)?,
        _ => scanning.gather(1)?,
    };
    let one = host.add(state)?;
    let fold = |segments: usize| one * segments.saturating_sub(1) as f64;
    let path = sizes.path(pass);
    for rank in 0..sizes.ranks {
        ranks.compute(rank, intra);
        if let Some(arrived) = arrived[rank] {
            ranks.wait(rank, arrived);
        }
        let mine = || path.iter().enumerate().filter(|(_, of)| **of == rank).map(|(at, _)| at);
        let folded = if matches!(scan, Linear::Lasp2 { .. }) { fold(mine().max().unwrap_or(0)) } else { 0.0 };
        let entered = mine().filter(|at| *at > 0).count() as f64;
        ranks.compute(rank, folded + entered / slots * add + finish + join);
    }
    Ok(())
}

struct Scanning<'a, 'b> {
    host: &'a Host,
    sizes: &'a Sizes,
    pass: Pass,
    /// Bytes.
    state: f64,
    ranks: &'a mut Ranks<'b>,
}

impl Scanning<'_, '_> {
    fn gather(&mut self, splits: usize) -> Result<Vec<Option<Id>>> {
        let (all, issued) = ((0..self.sizes.ranks).collect::<Vec<_>>(), self.ranks.all_now());
        let part = self.sizes.slots() as f64 * self.state / splits as f64;
        let mut arrived = issued.clone();
        for _ in 0..splits {
            arrived = self.ranks.all_gather(&all, part, &issued)?;
        }
        Ok(arrived.into_iter().map(Some).collect())
    }

    /// From segment to segment: `runtime::sequence::scan::relay`.
    fn chain(&mut self, blocks: usize) -> Result<Vec<Option<Id>>> {
        let path = self.sizes.path(self.pass);
        let block = self.state / blocks as f64;
        let add = self.host.add(block)?;
        let mut flown: Vec<Option<Id>> = vec![None; self.sizes.ranks];
        // When each block of what leaves the segment before has been sent, by whom.
        let mut leaving: Vec<Id> = vec![self.ranks.now(path[0]); blocks];
        for (at, pair) in path.windows(2).enumerate() {
            let (from, to) = (pair[0], pair[1]);
            let last = at + 2 == path.len();
            let mut next = Vec::with_capacity(blocks);
            for &issued in &leaving {
                let arrived = if from == to { issued } else { self.ranks.send(from, to, block, issued)? };
                let after: Vec<Id> = [arrived, self.ranks.now(to)].into_iter().chain(flown[to]).collect();
                let work = if last { 0.0 } else { add };
                let passed = self.ranks.fly(to, work, &after);
                flown[to] = Some(passed);
                next.push(passed);
            }
            leaving = next;
        }
        Ok(flown)
    }

    /// A gather in each node, slices across nodes, a gather of slices: `runtime::sequence::scan::hierarchical`.
    fn hierarchical(&mut self, node: usize) -> Result<Vec<Option<Id>>> {
        let w = self.sizes.ranks;
        let nodes: Vec<Vec<usize>> =
            (0..w).step_by(node).map(|first| (first..(first + node).min(w)).collect()).collect();
        let slots = self.sizes.slots() as f64;
        let mut there: Vec<Id> = self.ranks.all_now();
        for of in &nodes {
            let issued: Vec<Id> = of.iter().map(|&rank| self.ranks.now(rank)).collect();
            let ends = self.ranks.all_gather(of, slots * self.state, &issued)?;
            for (&rank, end) in of.iter().zip(ends) {
                there[rank] = self.ranks.fly(rank, self.host.add(self.state)? * of.len() as f64, &[end]);
            }
        }
        if nodes.len() == 1 {
            return Ok(there.into_iter().map(Some).collect());
        }
        let mut runs: Vec<usize> = (0..nodes.len()).collect();
        if self.sizes.layout == LayoutKind::Zigzag {
            runs.extend((0..nodes.len() - 1).rev());
        }
        if self.pass == Pass::Backward {
            runs.reverse();
        }
        let slice = self.state / node as f64;
        let carrier = |run: usize, part: usize| nodes[runs[run]][part % nodes[runs[run]].len()];
        let mut sums: Vec<Vec<Id>> =
            (0..runs.len()).map(|run| (0..node).map(|part| there[carrier(run, part)]).collect()).collect();
        let mut distance = 1;
        while distance < runs.len() {
            let before = sums.clone();
            for to in distance..runs.len() {
                for part in 0..node {
                    let (sender, receiver) = (carrier(to - distance, part), carrier(to, part));
                    let sent = before[to - distance][part];
                    let arrived =
                        if sender == receiver { sent } else { self.ranks.send(sender, receiver, slice, sent)? };
                    let after = [arrived, before[to][part], there[receiver]];
                    sums[to][part] = self.ranks.fly(receiver, 2.0 * self.host.add(slice)?, &after);
                    there[receiver] = sums[to][part];
                }
            }
            distance *= 2;
        }
        for (number, of) in nodes.iter().enumerate() {
            // Nothing enters the first run.
            let entered = runs.iter().skip(1).filter(|run| **run == number).count() as f64;
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
