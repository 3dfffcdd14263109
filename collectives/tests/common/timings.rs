//! The benchmark runs on every back end, checks results, and keeps to its definitions.

use super::device;
use anyhow::Result;
use collectives::{Group, bench};
use std::time::Duration;

pub fn the_benchmark_runs(world: &Group) -> Result<()> {
    let budget = Duration::from_millis(50);
    let options = bench::Options {
        sizes: bench::sizes(100, 2000, 20),
        warmup: 1,
        iterations: 6,
        budget,
        device: device(),
        ..Default::default()
    };
    let rows = bench::run(world, &options)?;
    let w = world.size() as u64;
    assert_eq!(rows.len(), 2 * bench::COLLECTIVES.len());
    for (row, collective) in rows.iter().zip(bench::COLLECTIVES.iter().flat_map(|c| [c, c])) {
        assert_eq!(
            (row.collective, row.backend, row.ranks),
            (collective.name, world.backend_on(device()), world.size())
        );
        assert!([100, 2000].iter().any(|size| (*size - 4 * w..=*size).contains(&row.bytes)), "{row:?}");
        assert!((5..=6).contains(&row.iterations) && row.p10_us <= row.median_us && row.median_us <= row.p90_us);
        assert!((row.algbw - row.bytes as f64 / row.median_us / 1e3).abs() < 1e-9 * row.algbw, "{row:?}");
    }
    Ok(())
}
