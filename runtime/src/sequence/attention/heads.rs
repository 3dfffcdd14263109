//! Runs of query heads, and the KV heads that they use. The attention of one rank wants every KV head to serve equally many
//! query heads; a run that cuts through the groups of GQA (arXiv 2305.13245) repeats KV heads until that holds.

use std::ops::Range;

use tch::Tensor;

use super::Result;

pub(super) struct Heads {
    /// Query heads.
    pub range: Range<i64>,
    /// Query heads of one entry, the copy of a KV head that this run works with.
    group: i64,
    /// Query heads of one KV head of the layer.
    per_kv: i64,
}

impl Heads {
    /// The heads `range`, with as few entries as they need.
    pub fn new(range: Range<i64>, per_kv: i64) -> Self {
        let group = gcd(gcd(range.start, range.end), per_kv);
        Self { range, group, per_kv }
    }

    /// Heads `0 .. heads`, with entries that a cut into runs of `run` heads does not cut.
    pub fn in_runs(heads: i64, run: i64, per_kv: i64) -> Self {
        Self { range: 0..heads, group: gcd(run, per_kv), per_kv }
    }

    /// The share of one rank: as even as it gets.
    pub fn share(heads: i64, ranks: usize, rank: usize, per_kv: i64) -> Self {
        let start = |rank: usize| heads * rank as i64 / ranks as i64;
        Self::new(start(rank)..start(rank + 1), per_kv)
    }

    pub fn count(&self) -> i64 {
        self.range.end - self.range.start
    }

    /// Copies of KV heads that these query heads work with.
    pub fn entries(&self) -> i64 {
        self.count() / self.group
    }

    /// Whether some KV head has more than one entry in the whole layer.
    pub fn repeats(&self) -> bool {
        self.group < self.per_kv
    }

    /// x `[B, T, H, X]` -> these heads, a view.
    pub fn queries(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_narrow(2, self.range.start, self.count())?)
    }

    /// x `[B, T, Hkv, X]` -> `[B, T, entries, X]`.
    pub fn keys(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_index_select(2, &self.kv_heads(x)?)?)
    }

    /// Adds what the entries `[B, T, entries, X]` were found to need to the sums of their KV heads `[B, T, Hkv, X]`.
    pub fn add_keys(&self, sums: &Tensor, entries: &Tensor) -> Result<()> {
        let _ = sums.shallow_clone().f_index_add_(2, &self.kv_heads(sums)?, entries)?;
        Ok(())
    }

    /// The KV head of each entry.
    fn kv_heads(&self, like: &Tensor) -> Result<Tensor> {
        let heads: Vec<i64> = (0..self.entries()).map(|e| (self.range.start + e * self.group) / self.per_kv).collect();
        Ok(Tensor::f_from_slice(&heads)?.f_to_device(like.device())?)
    }
}

/// At least 1, also of two zeros.
fn gcd(a: i64, b: i64) -> i64 {
    if b == 0 { a.max(1) } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tch::{Device, Kind};

    proptest! {
        /// Every query head of every rank finds the KV head that the layer gives it.
        #[test]
        fn entries_are_the_kv_heads_of_their_queries(kv_heads in 1i64..7, per_kv in 1i64..7, ranks in 1usize..9) {
            let heads = kv_heads * per_kv;
            let numbers = Tensor::arange(kv_heads, (Kind::Int64, Device::Cpu)).view([1, 1, -1, 1]);
            let mut next = 0;
            let check = |run: &Heads| -> std::result::Result<(), TestCaseError> {
                let found: Vec<i64> = Vec::try_from(run.keys(&numbers).unwrap().flatten(0, -1)).unwrap();
                prop_assert_eq!(found.len() as i64 * run.group, run.count());
                for (i, head) in run.range.clone().enumerate() {
                    prop_assert_eq!(found[i / run.group as usize], head / per_kv);
                }
                Ok(())
            };
            for rank in 0..ranks {
                let run = Heads::share(heads, ranks, rank, per_kv);
                prop_assert_eq!(run.range.start, next);
                next = run.range.end;
                check(&run)?;
            }
            prop_assert_eq!(next, heads);
            if heads % ranks as i64 == 0 {
                let all = Heads::in_runs(heads, heads / ranks as i64, per_kv);
                prop_assert_eq!(all.entries() % ranks as i64, 0);
                check(&all)?;
            }
        }
    }
}
