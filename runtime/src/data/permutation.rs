//! A pseudo-random order of `0..n` that needs no memory: position i is looked up, not remembered. A Feistel network
//! permutes the smallest even power of two that covers n; what lands outside is sent round again (cycle walking).

const ROUNDS: usize = 6;

/// A permutation of `0..n` that is a function of (n, seed, epoch) alone.
#[derive(Debug, Clone)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    pub fn new(n: u64, seed: u64, epoch: u64) -> Self {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        let mut key = mix(seed ^ mix(epoch));
        let keys = std::array::from_fn(|_| {
            key = mix(key);
            key
        });
        Permutation { n, half_bits: bits.div_ceil(2).max(1), keys }
    }

    /// What stands at position `i`, which must be below n.
    pub fn at(&self, i: u64) -> u64 {
        assert!(i < self.n, "position {i} of a permutation of {}", self.n);
        let mut x = self.round_trip(i);
        while x >= self.n {
            x = self.round_trip(x);
        }
        x
    }

    fn round_trip(&self, x: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

/// The output function of SplitMix64: every bit of the result depends on every bit of `x`.
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_value_once(n in 1u64..3000, seed in any::<u64>(), epoch in any::<u64>()) {
            let order = Permutation::new(n, seed, epoch);
            let mut seen: Vec<u64> = (0..n).map(|i| order.at(i)).collect();
            seen.sort_unstable();
            prop_assert!(seen.into_iter().eq(0..n));
        }

        #[test]
        fn huge_domains_stay_inside(n in 1u64.., at in any::<u64>(), seed in any::<u64>()) {
            prop_assert!(Permutation::new(n, seed, 0).at(at % n) < n);
        }
    }

    #[test]
    fn seeds_and_epochs_give_other_orders() {
        let order = |seed, epoch| {
            let order = Permutation::new(100, seed, epoch);
            (0..100).map(|i| order.at(i)).collect::<Vec<_>>()
        };
        assert_eq!(order(1, 2), order(1, 2));
        assert_ne!(order(1, 2), order(1, 3));
        assert_ne!(order(1, 2), order(2, 2));
        assert_ne!(order(1, 2), order(2, 1));
    }

    #[test]
    fn small_orders_are_all_reached() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..500 {
            let order = Permutation::new(3, seed, 0);
            seen.insert([order.at(0), order.at(1), order.at(2)]);
        }
        assert_eq!(seen.len(), 6);
    }
}
