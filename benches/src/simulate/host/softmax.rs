//! The operators in which keys meet queries of other ranks: the methods of softmax layers, and the two left products. What is
//! copied on the way is counted as `runtime::sequence::{attention, left_product}` copy it.

use kernels::softmax::Tile;
use runtime::sequence::attention::{self, Lasp2h};

use super::ranks::Ranks;
use super::{Host, Pass, Sizes, left_product_kind, pairs_kernel};
use crate::simulate::Result;
use crate::simulate::method::Softmax;

pub(super) fn run(
    host: &Host,
    ranks: &mut Ranks,
    sizes: &Sizes,
    method: Softmax,
    pass: Pass,
    left_product: bool,
) -> Result<()> {
    // A left product has as many KV heads as heads.
    let kv_heads = if left_product { sizes.heads } else { sizes.kv_heads };
    let attend = Attend { host, ranks, sizes, pass, left_product, kv_heads };
    match method {
        Softmax::Lasp2h { stages } => attend.lasp2h(stages),
        Softmax::Ring => attend.ring(),
        Softmax::Ulysses => attend.ulysses(),
        Softmax::MegatronSp => attend.megatron_sp(),
    }
}

struct Attend<'a, 'b> {
    host: &'a Host,
    ranks: &'a mut Ranks<'b>,
    sizes: &'a Sizes<'a>,
    pass: Pass,
    left_product: bool,
    kv_heads: f64,
}

impl Attend<'_, '_> {
    /// A tile of all heads: so many queries see so many keys, the last of them as many as there are queries causally.
    fn tile(&self, queries: f64, keys: f64, causal: bool) -> Result<f64> {
        let kind = if self.left_product { left_product_kind(self.sizes.decay) } else { "softmax" };
        let scale = self.sizes.heads * self.sizes.dim / (self.host.heads * self.host.head_dim) as f64;
        let name = |causal: bool| pairs_kernel(kind, causal, self.pass);
        let square = |causal: bool, side: f64| Ok(scale * self.host.tile(&name, causal, self.sizes.ranks, side)?);
        if !causal {
            return square(false, (queries * keys).sqrt());
        }
        let before = square(false, (queries * (keys - queries)).max(0.0).sqrt())?;
        let merging = before > 0.0 && self.pass == Pass::Forward && !self.left_product;
        Ok(square(true, queries)? + before + if merging { self.merge(queries)? } else { 0.0 })
    }

    fn tiles(&self, tiles: &[Tile]) -> Result<f64> {
        let length = |range: &std::ops::Range<i64>| (range.end - range.start) as f64;
        tiles.iter().map(|tile| self.tile(length(&tile.q), length(&tile.k), tile.causal)).sum()
    }

    /// All heads and the whole sequence, document by document.
    fn whole(&self) -> Result<f64> {
        self.tiles(&attention::documents(&self.sizes.packing.plan(0), true))
    }

    /// Two partial results of so many queries: each scaled, one added, and put into its place.
    fn merge(&self, queries: f64) -> Result<f64> {
        Ok(4.0 * self.host.copy(self.rows(queries))?)
    }

    /// Bytes of all heads.
    fn rows(&self, tokens: f64) -> f64 {
        self.sizes.bytes(tokens, self.sizes.heads)
    }

    /// Bytes of keys and values.
    fn keys(&self, tokens: f64) -> f64 {
        self.sizes.bytes(tokens, 2.0 * self.kv_heads)
    }

    /// What `rank`'s queries see of the keys of the whole sequence, all heads.
    fn prefix(&self, rank: usize) -> Result<f64> {
        self.tiles(&attention::tiles(&self.sizes.packing.plan(rank), true))
    }

    fn zigzag_copy(&self, bytes: f64) -> Result<f64> {
        if self.sizes.slots > 1.0 { self.host.copy(bytes) } else { Ok(0.0) }
    }

    fn lasp2h(self, stages: usize) -> Result<()> {
        let (w, t, whole) = (self.sizes.ranks, self.sizes.tokens, self.sizes.whole);
        let all: Vec<usize> = (0..w).collect();
        let stages = Lasp2h { stages }.stages(self.kv_heads as i64).len();
        let share = 1.0 / stages as f64;
        let (mine, gathered) = (share * self.keys(t), share * self.keys(whole));
        let backward = self.pass == Pass::Backward;
        self.ranks.compute_all(self.host.join(mine)?);
        let mut coming = self.ranks.all_now();
        if w > 1 {
            coming = self.ranks.all_gather(&all, mine, &coming)?;
        }
        let mut sums = Vec::new();
        for stage in 0..stages {
            let more = stage + 1 < stages;
            for (rank, &coming) in coming.iter().enumerate() {
                self.ranks.wait(rank, coming);
                let next = if more { self.host.join(mine)? } else { 0.0 };
                self.ranks.compute(rank, self.zigzag_copy(gathered)? + next);
            }
            if more {
                coming = self.ranks.all_now();
                if w > 1 {
                    coming = self.ranks.all_gather(&all, mine, &coming)?;
                }
            }
            for rank in 0..w {
                let seconds = share * self.prefix(rank)?;
                self.ranks.compute(rank, seconds);
                if backward {
                    let joined = self.host.join(gathered)? + self.zigzag_copy(gathered)?;
                    self.ranks.compute(rank, joined);
                }
            }
            if backward && w > 1 {
                let issued = self.ranks.all_now();
                sums.push(self.ranks.reduce_scatter(mine, &issued)?);
            }
        }
        for sum in sums {
            for (rank, sum) in sum.into_iter().enumerate() {
                self.ranks.wait(rank, sum);
            }
        }
        let joined = self.rows(t) + if backward { self.keys(t) } else { 0.0 };
        self.ranks.compute_all(self.host.copy(joined)?);
        Ok(())
    }

    /// What `rank`'s queries do with the block of `owner`.
    fn block(&self, rank: usize, owner: usize) -> Result<Option<f64>> {
        let t = self.sizes.tokens;
        let tiles = attention::ring_tiles(&self.sizes.packing.plan(rank), owner, true);
        if tiles.is_empty() {
            return Ok(None);
        }
        let mine = self.tiles(&tiles)?;
        let rows = self.rows(t);
        let first = owner == rank;
        let more = match (self.pass, self.left_product) {
            (Pass::Forward, false) if first => 0.0,
            (Pass::Forward, false) => self.merge(t)?,
            (Pass::Forward, true) => self.host.add(rows)?,
            (Pass::Backward, _) => self.host.add(rows)? + self.host.join(self.keys(t))?,
        };
        Ok(Some(mine + more))
    }

    fn ring(self) -> Result<()> {
        let (w, t) = (self.sizes.ranks, self.sizes.tokens);
        let backward = self.pass == Pass::Backward;
        let bytes = self.keys(t);
        // Keys and values as one block; zeros for the sum of dq, or of o.
        let zeros = if backward || self.left_product { 0.5 * self.host.copy(self.rows(t))? } else { 0.0 };
        self.ranks.compute_all(self.host.join(bytes)? + zeros);
        let mut sums: Vec<Option<_>> = vec![None; w];
        for step in 0..w {
            let issued = self.ranks.all_now();
            let mut passing = vec![None; w];
            if step + 1 < w {
                for (rank, passing) in passing.iter_mut().enumerate() {
                    let from = (rank + w - 1) % w;
                    *passing = Some(self.ranks.send(from, rank, bytes, issued[from])?);
                }
            }
            for rank in 0..w {
                let seconds = self.block(rank, (rank + w - step) % w)?.unwrap_or(0.0);
                self.ranks.compute(rank, seconds);
            }
            let mut leaving = vec![None; w];
            if backward && step > 0 {
                for (rank, earlier) in sums.iter().enumerate() {
                    if let Some(earlier) = *earlier {
                        self.ranks.wait(rank, earlier);
                        self.ranks.compute(rank, self.host.add(bytes)?);
                    }
                    let to = (rank + 1) % w;
                    let issued = self.ranks.now(rank);
                    leaving[to] = Some(self.ranks.send(rank, to, bytes, issued)?);
                }
            }
            sums = leaving;
            for (rank, arrived) in passing.into_iter().enumerate() {
                if let Some(arrived) = arrived {
                    self.ranks.wait(rank, arrived);
                }
            }
        }
        for (rank, home) in sums.into_iter().enumerate() {
            if let Some(home) = home {
                self.ranks.wait(rank, home);
                self.ranks.compute(rank, self.host.add(bytes)?);
            }
        }
        let last = if backward { self.host.copy(bytes)? } else { 0.0 };
        self.ranks.compute_all(last);
        Ok(())
    }

    /// Heads for tokens, or back: `bytes` of a rank; copied into rows of ranks, together, and apart again.
    fn exchange(&mut self, bytes: f64) -> Result<()> {
        let w = self.sizes.ranks;
        let copy = self.host.copy(bytes)?;
        self.ranks.compute_all(2.0 * copy);
        if w > 1 {
            let issued = self.ranks.all_now();
            let ends = self.ranks.all_to_all(bytes / w as f64, &issued)?;
            for (rank, end) in ends.into_iter().enumerate() {
                self.ranks.wait(rank, end);
            }
        }
        self.ranks.compute_all(copy + self.zigzag_copy(bytes)?);
        Ok(())
    }

    fn ulysses(mut self) -> Result<()> {
        let (w, t) = (self.sizes.ranks as f64, self.sizes.tokens);
        let rows = self.rows(t);
        let keys = self.keys(t) * (w / self.kv_heads).max(1.0);
        match self.pass {
            Pass::Forward => self.exchange(rows + keys)?,
            Pass::Backward => self.exchange(rows)?,
        }
        let seconds = self.whole()? / w;
        self.ranks.compute_all(seconds);
        match self.pass {
            Pass::Forward => self.exchange(rows)?,
            Pass::Backward => {
                self.exchange(rows)?;
                self.exchange(keys)?;
                self.ranks.compute_all(2.0 * self.host.add(keys)?);
            }
        }
        Ok(())
    }

    fn gather(&mut self, bytes: f64) -> Result<()> {
        let all: Vec<usize> = (0..self.sizes.ranks).collect();
        self.ranks.compute_all(self.host.copy(bytes)?);
        if all.len() > 1 {
            let issued = self.ranks.all_now();
            let ends = self.ranks.all_gather(&all, bytes, &issued)?;
            for (rank, end) in ends.into_iter().enumerate() {
                self.ranks.wait(rank, end);
            }
        }
        self.ranks.compute_all(self.zigzag_copy(all.len() as f64 * bytes)?);
        Ok(())
    }

    /// Sums of all ranks, of which each keeps `bytes`; before that each has put its heads among zeros.
    fn scatter(&mut self, bytes: f64) -> Result<Vec<usize>> {
        let w = self.sizes.ranks as f64;
        let placed = 0.5 * self.host.copy(w * bytes)? + self.host.copy(bytes)?;
        self.ranks.compute_all(placed + self.zigzag_copy(w * bytes)?);
        let issued = self.ranks.all_now();
        if self.sizes.ranks > 1 { self.ranks.reduce_scatter(bytes, &issued) } else { Ok(issued) }
    }

    fn wait_all(&mut self, ends: Vec<usize>) {
        for (rank, end) in ends.into_iter().enumerate() {
            self.ranks.wait(rank, end);
        }
    }

    fn megatron_sp(mut self) -> Result<()> {
        let (t, w) = (self.sizes.tokens, self.sizes.ranks as f64);
        let (rows, keys) = (self.rows(t), self.keys(t));
        let share = |rank: f64| (rank * self.sizes.heads / w).floor();
        let shares: Vec<f64> = (0..self.sizes.ranks)
            .map(|rank| (share(rank as f64 + 1.0) - share(rank as f64)) / self.sizes.heads)
            .collect();
        let seconds = self.whole()?;
        match self.pass {
            Pass::Forward => {
                self.gather(rows + keys)?;
                for (rank, share) in shares.iter().enumerate() {
                    let of_mine = self.host.copy(share * w * (rows + keys))?;
                    self.ranks.compute(rank, of_mine + share * seconds);
                }
                let ends = self.scatter(rows)?;
                self.wait_all(ends);
            }
            Pass::Backward => {
                self.gather(rows)?;
                for (rank, share) in shares.iter().enumerate() {
                    let joined = self.host.copy(share * w * (rows + keys))?;
                    self.ranks.compute(rank, share * seconds + joined);
                }
                if self.left_product {
                    let ends = self.scatter(rows + keys)?;
                    self.wait_all(ends);
                } else {
                    let first = self.scatter(rows)?;
                    let second = self.scatter(keys)?;
                    self.wait_all(second);
                    self.wait_all(first);
                }
                self.ranks.compute_all(self.host.copy(rows + keys)?);
            }
        }
        Ok(())
    }
}
