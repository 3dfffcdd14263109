//! What an emulated network shows of the methods: a chain of states falls behind a gather as ranks grow, and a gather that
//! takes as long as the intra-rank work hides behind it. Margins are wide, as other programs may have the cores.

use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use benches::compare::{Comparison, Measured, Method, Mixer, Mode, Options, Row};
use collectives::Reduce;
use collectives::local::{self, Network};
use kernels::linear::{Summary, Transition};
use runtime::config::{Config, LayoutKind};
use runtime::sequence::scan::Known;
use runtime::sequence::{Layout, Plan, method};
use tch::{Device, Kind, Tensor};

/// One at a time, or they would disturb each other.
static CORES: Mutex<()> = Mutex::new(());

fn options(methods: &str, sizes: &str, rounds: usize) -> Options {
    let methods = Method::list(methods, Mixer::Linear, LayoutKind::Contiguous).unwrap();
    let config = Config::from_toml_str(&format!("[model]\nkv_heads = 1\n{sizes}"), "sizes", &[]).unwrap();
    Options { mixer: Mixer::Linear, mode: Mode::Operator, methods, rounds, config }
}

/// Rows of rank 0.
fn compare(options: &Options, ranks: usize, tokens: i64, network: Option<&str>) -> Vec<Measured> {
    let network: Option<Network> = network.map(|text| text.parse().unwrap());
    let rows = local::run_on(network.as_ref(), ranks, |world| -> Result<Vec<Row>> {
        tch::set_num_threads(1);
        Comparison::new(&world, options)?.at(tokens, &|_| {})
    });
    rows.unwrap().swap_remove(0).into_iter().map(|row| row.measured.unwrap()).collect()
}

fn latency(ms: f64) -> String {
    let link = format!("{:.0}us/100GB/s", 1e3 * ms);
    format!("node=1,intra={link},inter={link}")
}

/// Seconds of the slowest rank for one scan over states that `work` of intra-rank work follows; the median of some.
fn scan(name: &str, ranks: usize, hop: Duration, work: Duration) -> f64 {
    let network: Network = latency(1e3 * hop.as_secs_f64()).parse().unwrap();
    let times = local::run_on(Some(&network), ranks, |world| -> Result<Vec<f64>> {
        let scan = method::scan(name, &world)?;
        let chain = Plan::new(Layout::new(LayoutKind::Contiguous, ranks as i64, ranks)?, None, world.rank())?.chain;
        let summary = || Summary {
            transition: Transition::Identity,
            state: Tensor::ones([1, 2, 16, 16], (Kind::Float, Device::Cpu)),
        };
        let mut times = Vec::new();
        for _ in 0..7 {
            world.barrier()?.wait()?;
            let start = Instant::now();
            let known = Known::All(chain.links.iter().map(|_| Transition::Identity).collect());
            let scanned = scan.forward(&world, &chain, vec![summary()], known)?;
            thread::sleep(work);
            scanned.wait()??;
            let all = world.all_reduce(&Tensor::from_slice(&[start.elapsed().as_secs_f64()]), Reduce::Max)?.wait()?;
            times.push(all.double_value(&[0]));
        }
        Ok(times)
    });
    let mut times = times.unwrap().swap_remove(0);
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// The gather of LASP-2 travels, on a ring as many hops as LASP-1's chain, while ranks compute; the chain's ranks pass states
/// on only when they have computed. Intra-rank work is slept through, so that eight ranks need no eight cores.
#[test]
fn a_chain_falls_behind_a_gather_as_ranks_grow() {
    let _alone = CORES.lock();
    let (hop, work) = (Duration::from_millis(3), Duration::from_millis(21));
    let [few, middle, many] = [2, 4, 8].map(|ranks| scan("lasp1", ranks, hop, work) / scan("lasp2", ranks, hop, work));
    println!("LASP-1 over LASP-2: {few:.2} on 2 ranks, {middle:.2} on 4, {many:.2} on 8");
    // 1, 27 / 21 and 39 / 21 where nothing else has the cores.
    assert!(few < 1.2 && middle > 1.1 && many > 1.4 && few < middle && middle < many, "{few:.2} {middle:.2} {many:.2}");
}

/// Of three attempts one must show it: what takes the cores meanwhile is not LASP-2's fault.
#[test]
fn a_gather_as_long_as_the_intra_rank_work_hides_behind_it() {
    let _alone = CORES.lock();
    let options = options("lasp2", "heads = 4\ndim = 256\nchunk = 64", 9);
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let free = &compare(&options, 2, 8192, None)[0];
        let lanes = free.lanes.as_ref().unwrap();
        let intra = |phase: usize, name: &str| {
            let spans = lanes.ranks.iter().map(|rank| {
                let of = rank[phase].computing.iter().filter(|span| span.name == name);
                of.map(|span| span.end_ns - span.start_ns).sum::<u64>()
            });
            spans.min().unwrap() as f64 / 1e6
        };
        // The shorter of the two passes: its gather must not be longer.
        let gather = intra(0, "intra_rank").min(intra(1, "intra_rank_grad"));
        assert!(gather > 0.0, "no intra-rank spans");
        let slowed = &compare(&options, 2, 8192, Some(&latency(gather)))[0];
        let ratio = slowed.step.median_ms / free.step.median_ms;
        println!(
            "a gather of {gather:.1} ms in each pass: a step of {:.1} ms, {:.1} ms without: {ratio:.3}; {:.0} % of the \
             communication hidden",
            slowed.step.median_ms,
            free.step.median_ms,
            100.0 * slowed.hidden.unwrap_or(0.0)
        );
        best = best.min(ratio);
        if best <= 1.1 {
            break;
        }
    }
    assert!(best <= 1.25, "LASP-2's step takes {best:.2} times that without communication, expected at most 1.25");
}
