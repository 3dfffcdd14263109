//! The two axes along which a job's ranks are laid out: `dp` (replicas that see different sequences) and `sp` (shards of
//! one sequence; Megatron-Core and torchtitan call it context parallelism, `cp`).

use crate::{Error, Group, Result};

/// The world and this rank's group on each axis. Rank = dp_index * sp + sp_index: neighbours in a sequence are neighbours
/// in the world, and so share a node as far as possible.
#[derive(Clone, Debug)]
pub struct Mesh {
    pub world: Group,
    /// The ranks that hold the same shard of their sequences.
    pub dp: Group,
    /// The ranks that share this rank's sequence.
    pub sp: Group,
}

impl Mesh {
    /// Collective over `world`. Fails unless `dp * sp` is the size of the world.
    pub fn new(world: Group, dp: usize, sp: usize) -> Result<Mesh> {
        let (dp_index, sp_index) = coordinates(world.rank(), world.size(), dp, sp)?;
        let sp_group = world.split("sp", dp_index, sp_index)?;
        let dp_group = world.split("dp", sp_index, dp_index)?;
        Ok(Mesh { world, dp: dp_group, sp: sp_group })
    }
}

/// A rank's index on each axis, `(dp_index, sp_index)`.
fn coordinates(rank: usize, world: usize, dp: usize, sp: usize) -> Result<(usize, usize)> {
    if dp.checked_mul(sp) != Some(world) {
        return Err(Error::Mesh { dp, sp, world });
    }
    Ok((rank / sp, rank % sp))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_error_names_every_number_and_the_knobs() {
        assert_eq!(
            coordinates(0, 4, 2, 3).unwrap_err().to_string(),
            "a mesh of dp = 2 (parallel.dp) by sp = 3 (parallel.sp) needs 6 ranks, found 4; \
             choose parallel.dp and parallel.sp so that their product is 4"
        );
        assert!(coordinates(0, 4, 0, 4).is_err());
        assert!(coordinates(0, 4, usize::MAX, 2).is_err());
    }

    proptest! {
        #[test]
        fn coordinates_and_rank_are_inverse(dp in 1usize..20, sp in 1usize..20, pick in 0usize..400) {
            let rank = pick % (dp * sp);
            let (d, s) = coordinates(rank, dp * sp, dp, sp).unwrap();
            prop_assert!(d < dp && s < sp);
            prop_assert_eq!(d * sp + s, rank);
        }
    }
}
