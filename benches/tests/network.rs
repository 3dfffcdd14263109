//! What an emulated network shows of the methods: a chain of states falls behind a gather as ranks grow, a scan over nodes
//! overtakes both, and a gather that takes as long as the intra-rank work hides behind it.

use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use benches::overlap::Overlap;
use collectives::Reduce;
use collectives::local::{self, Network};
use kernels::linear::{Summary, Transition};
use runtime::config::LayoutKind;
use runtime::sequence::scan::Known;
use runtime::sequence::{Layout, Plan, method};
use tch::{Device, Kind, Tensor};

/// One at a time, or they would disturb each other.
static CORES: Mutex<()> = Mutex::new(());

/// A state of 2 KiB takes as long to pass as to arrive: 3 ms each.
const NETWORK: &str = "node=1,intra=3ms/682KB/s,inter=3ms/682KB/s";
/// Intra-rank work, slept through, so that eight ranks need no eight cores.
const WORK: Duration = Duration::from_millis(3);

/// Seconds from the first rank's start to the last one's end of one scan over states beside some intra-rank work; the least of
/// some, as what else has the cores only adds.
fn scan(name: &str, ranks: usize) -> f64 {
    let network: Network = NETWORK.parse().unwrap();
    let times = local::run_on(Some(&network), ranks, |world| -> Result<Vec<f64>> {
        let scan = method::scan(name, &world)?;
        let chain = Plan::new(Layout::new(LayoutKind::Contiguous, ranks as i64, ranks)?, None, world.rank())?.chain;
        let summary = || Summary {
            transition: Transition::Identity,
            state: Tensor::ones([1, 2, 16, 16], (Kind::Float, Device::Cpu)),
        };
        let mut times = Vec::new();
        for _ in 0..9 {
            world.barrier()?.wait()?;
            let start = world.recorder().now();
            let known = Known::All(chain.links.iter().map(|_| Transition::Identity).collect());
            let scanned = scan.forward(&world, &chain, vec![summary()], known)?;
            thread::sleep(WORK);
            scanned.wait()??;
            let ends = Tensor::from_slice(&[world.recorder().now() as i64, -(start as i64)]);
            let ends = world.all_reduce(&ends, Reduce::Max)?.wait()?;
            times.push(ends.sum(Kind::Int64).int64_value(&[]) as f64 / 1e9);
        }
        Ok(times)
    });
    times.unwrap().swap_remove(0).into_iter().fold(f64::INFINITY, f64::min)
}

/// On W ranks a chain takes W - 1 hops of 6 ms; the gather log2 W times 3 ms and W - 1 states of 3 ms; the scan over nodes,
/// here of one rank each, log2 W hops of 6 ms. On two ranks all are one hop.
#[test]
fn a_chain_falls_behind_a_gather_as_ranks_grow_and_a_scan_over_nodes_overtakes_both() {
    let _alone = CORES.lock();
    let over_gather = |ranks| {
        let [gather, chain, nodes] = ["lasp2", "lasp1", "hierarchical:node=1"].map(|name| scan(name, ranks));
        println!("{ranks} ranks: LASP-1 {:.2}, hierarchical {:.2} times LASP-2", chain / gather, nodes / gather);
        (chain / gather, nodes / gather)
    };
    // 1 and 1, 18 / 15 and 12 / 15, 42 / 30 and 18 / 30 where nothing else has the cores.
    let (few, middle, many) = (over_gather(2), over_gather(4), over_gather(8));
    assert!((0.8..1.2).contains(&few.0) && (0.8..1.2).contains(&few.1), "2 ranks: {few:?}");
    assert!(many.0 > 1.2 && many.0 > few.0 && middle.0 > few.0, "LASP-1 over LASP-2: {few:?} {middle:?} {many:?}");
    assert!(many.1 < 0.8 && many.1 < middle.1 && many.1 < few.1, "hierarchical: {few:?} {middle:?} {many:?}");
}

/// Of some attempts one must show it: what takes the cores meanwhile is not LASP-2's fault.
#[test]
fn a_gather_as_long_as_the_intra_rank_work_hides_behind_it() {
    let _alone = CORES.lock();
    let overlap = Overlap::new(8192, 7).unwrap();
    let mut best = f64::INFINITY;
    for _ in 0..8 {
        let turn = overlap.turn().unwrap();
        println!("{turn:?}: {:.3}", turn.ratio());
        best = best.min(turn.ratio());
        if best <= 1.1 {
            return;
        }
    }
    panic!("LASP-2's step takes {best:.2} times that without communication, expected at most 1.1");
}
