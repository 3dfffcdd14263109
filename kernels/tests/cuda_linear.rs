//! The Hopper kernels of linear attention against the f64 recurrence, by FlashAttention's rule: at most twice the error that a
//! naive implementation in bf16 makes. Every length, cut and head size that takes another path through them, on a GPU or, the
//! shorter ones, on the emulator.

mod common;
mod emulator;

use common::{Case, SCALE, chained, milliseconds, naive, naive_is_the_recurrence, on, poison, twice};
use emulator::{few, in_order, slow};
use kernels::cuda;
use kernels::cuda::linear::{Fused, LINEAR, Variant, looks_back, supports};
use kernels::linear::chunkwise::Chunkwise;
use kernels::linear::{Inputs, Piece, StateMixer};
use kernels::testing::{assert_close, randn, relative_rms, rms};
use tch::{Device, Kind, Tensor};

#[test]
fn nvrtc_compiles_every_variant() {
    if !cuda::has_compiler() {
        println!("not tested: no NVRTC");
        return;
    }
    let of = |dk, dv| Variant { dk, dv, ..Variant::default() };
    let backwards = Variant { reverse: true, dual: true, ..of(128, 128) };
    for variant in [
        of(128, 128),
        backwards,
        Variant { decay: true, dots: true, ..of(64, 128) },
        Variant { decay: true, dots: true, ..backwards },
        Variant { decay: true, late: true, ..of(128, 64) },
        Variant { looks_back: true, ..of(128, 128) },
        Variant { decay: true, dots: true, looks_back: true, ..backwards },
    ] {
        let cubin = cuda::compile(&LINEAR, "sm_90a", &variant.defines()).unwrap();
        assert_eq!(&cubin[..4], b"\x7fELF", "{variant:?}");
    }
}

/// A device that the kernels are for.
fn hopper() -> Option<Device> {
    common::device(90, supports)
}

fn mixer() -> Fused<Chunkwise> {
    Fused::new(Chunkwise::new(64, SCALE).unwrap())
}

#[test]
fn the_naive_version_in_f64_is_the_recurrence() {
    for decay in ["none", "head", "token", "head strong", "token strong"] {
        // Sums of q dq and k dk, which may come to little.
        naive_is_the_recurrence(decay, |x, _, _, dq| {
            rms(&(x.q.to_kind(Kind::Double) * dq).sum_dim_intlist([-1].as_slice(), false, None))
        });
    }
}

/// Every result, twice: on the emulator in another order of threads and blocks, with other times of asynchronous instructions.
fn as_good_as_naive_bf16(decay: &str) {
    let Some(device) = hopper() else { return };
    let cases = [
        // Blocks of threads that go from several chunks of one head to the next head.
        (Case { b: 2, t: 131, h: 5, dk: 16, dv: 8 }, vec![0, 131]),
        (Case { b: 1, t: 1, h: 16, dk: 128, dv: 128 }, vec![0, 1]),
        (Case { b: 1, t: 1000, h: 2, dk: 128, dv: 128 }, vec![0, 1000]),
        // Long enough for the warpgroups of a block to drift apart.
        (Case { b: 1, t: 3001, h: 24, dk: 128, dv: 128 }, vec![0, 3001]),
        (Case { b: 2, t: 200, h: 5, dk: 128, dv: 128 }, vec![0, 1, 64, 130, 200]),
        (Case { b: 2, t: 300, h: 1, dk: 128, dv: 128 }, vec![0, 1, 64, 300]),
        (Case { b: 1, t: 700, h: 2, dk: 96, dv: 64 }, vec![0, 333, 700]),
        (Case { b: 1, t: 321, h: 2, dk: 64, dv: 128 }, vec![0, 321]),
        (Case { b: 1, t: 130, h: 2, dk: 192, dv: 256 }, vec![0, 70, 130]),
    ];
    let small = |case: &Case| case.b * case.t * case.h < if slow(device) { 1500 } else { 700 };
    for (i, (case, cuts)) in cases.iter().filter(|(case, _)| !few(device) || small(case)).enumerate() {
        for (late, saves) in [(false, false), (true, false), (false, true), (true, true)] {
            if few(device) && (late == saves) == (i % 2 == 0) {
                continue;
            }
            let x = on(&common::inputs(Kind::BFloat16, decay, *case), device);
            let d_o = randn(5, &x.v.size()).to_kind(Kind::BFloat16).to_device(device);
            let (initial, exit) = (case.state(6, device), case.state(7, device));
            let run = || chained(&mixer(), &x, &d_o, cuts, &initial, &exit, late, saves);
            let [ours, again] = twice(device, if late { 1 } else { 2 + i as u32 }, run);
            let truth = naive(&x, &d_o, &initial, &exit, Kind::Double);
            let theirs = naive(&x, &d_o, &initial, &exit, Kind::BFloat16);
            for (i, (what, ours)) in ours.named().into_iter().enumerate() {
                let [again, truth, theirs] = [&again, &truth, &theirs].map(|all| all.named()[i].1);
                let name = format!("{what}, {decay}, {case:?}, late {late}, saves {saves}");
                assert_close(&name, ours, truth, 2.0 * relative_rms(theirs, truth) + 1e-6);
                assert!(ours.equal(again), "{name}: other bits the second time");
            }
        }
    }
}

#[test]
fn as_good_as_naive_bf16_without_decay() {
    as_good_as_naive_bf16("none");
}

#[test]
fn as_good_as_naive_bf16_with_a_decay_per_head() {
    as_good_as_naive_bf16("head");
    as_good_as_naive_bf16("head strong");
}

#[test]
fn as_good_as_naive_bf16_with_a_decay_per_token() {
    as_good_as_naive_bf16("token");
    as_good_as_naive_bf16("token strong");
}

/// What is asked of a call: before its passes run, so that they come apart; afterwards; or nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Asked {
    Before,
    After,
    Never,
}

/// A call without states from outside: those saved, but for zeros; o, the gradients; and the state at the first document's end.
fn alone(x: &Inputs, d_o: &Tensor, documents: &[i64], asked: Asked) -> (Vec<Tensor>, Option<Tensor>) {
    let piece = |&tokens: &i64| Piece { tokens, enters: asked == Asked::Before, leaves: asked != Asked::Never };
    let (pieces, nothing): (Vec<_>, Vec<_>) = documents.iter().map(|tokens| (piece(tokens), None)).unzip();
    assert!(looks_back(x, &pieces).unwrap());
    poison(x.q.device());
    let mut segment = mixer().forward_pieces(x, &pieces, &nothing).unwrap();
    let mut end = (asked == Asked::Before).then(|| segment.summarize(0).unwrap().state);
    segment.run().unwrap();
    let saved = segment.take_saved().unwrap().unwrap();
    if asked == Asked::After {
        end = Some(segment.summarize(0).unwrap().state);
    }
    // Chains that have states only because these were asked for begin with zero.
    let rows = |saved: &Tensor| saved.abs().amax([1, 2].as_slice(), false).nonzero().squeeze_dim(-1);
    let mut all: Vec<_> = saved.iter().map(|saved| saved.index_select(0, &rows(saved))).collect();
    all.push(segment.finish().unwrap());
    let mut segment = mixer().backward_pieces(x, &pieces, &nothing, d_o, Some(saved)).unwrap();
    if asked == Asked::Before {
        segment.summarize_grad(0).unwrap();
    }
    let grads = segment.finish().unwrap();
    all.extend([grads.dq, grads.dk, grads.dv]);
    all.extend(grads.dlog_decay);
    (all, end)
}

/// Passes that take states from the blocks before them against the same ones after `summarize` and `combine`: every bit, launch
/// after launch.
#[test]
fn looking_back_changes_no_bit() {
    let Some(device) = hopper() else { return };
    let of = |b, t, h, dk, dv| Case { b, t, h, dk, dv };
    let mut cases = vec![
        // One segment a block; several, of two heads; two documents and then three, of which some are cut; one block for several.
        (of(1, 1000, 2, 128, 128), vec![1000]),
        (of(1, 700, 5, 128, 128), vec![700]),
        (of(1, 900, 1, 64, 128), vec![300, 600]),
        (of(2, 500, 2, 96, 64), vec![65, 400, 35]),
        (of(1, 300, 5, 32, 128), vec![20, 30, 250]),
        (of(1, 200, 1, 192, 256), vec![200]),
    ];
    if !few(device) {
        // The fourth has two chunks a block, fewer than the stages of the ring.
        cases.extend([(16000, 16), (16000, 24), (16000, 9), (1100, 16)].map(|(t, h)| (of(1, t, h, 128, 128), vec![t])));
        cases.push((of(2, 9000, 8, 128, 64), vec![100, 8000, 900]));
    }
    for (case, documents) in cases {
        for decay in ["none", "token"] {
            let x = on(&common::inputs(Kind::BFloat16, decay, case), device);
            let d_o = randn(5, &x.v.size()).to_kind(Kind::BFloat16).to_device(device);
            let (apart, end) = alone(&x, &d_o, &documents, Asked::Before);
            for (again, asked) in [(0, Asked::Never), (1, Asked::After), (2, Asked::Never)] {
                let run = || alone(&x, &d_o, &documents, asked);
                let (together, its_end) = if slow(device) { in_order(again, run) } else { run() };
                let name = format!("{decay}, {case:?}, {documents:?}, launch {again}");
                assert_eq!(together.len(), apart.len(), "{name}");
                for (i, (together, apart)) in together.iter().zip(&apart).enumerate() {
                    assert!(together.equal(apart), "result {i}, {name}");
                }
                assert!(its_end.is_none_or(|its_end| its_end.equal(end.as_ref().unwrap())), "end, {name}");
            }

            // A state may come that nobody has announced.
            let piece = |&tokens: &i64| Piece { tokens, enters: true, leaves: false };
            let (pieces, nothing): (Vec<_>, Vec<_>) = documents.iter().map(|tokens| (piece(tokens), None)).unzip();
            poison(device);
            let mut segment = mixer().forward_pieces(&x, &pieces, &nothing).unwrap();
            segment.run().unwrap();
            segment.add_entry(0, &case.state(6, device).zeros_like()).unwrap();
            let o = segment.finish().unwrap();
            assert!(apart.iter().any(|apart| apart.size() == o.size() && apart.equal(&o)), "{decay}, {case:?}, late");
        }
    }
}

#[test]
fn layouts() {
    let Some(device) = hopper() else { return };
    common::layouts(&mixer(), 100, device);
}

/// Milliseconds of forward, and of forward and backward, through the traits; the figures of kernels/cuda in full are the
/// benchmarks' business.
#[test]
#[ignore = "a measurement"]
fn time() {
    let Some(device) = hopper() else { return };
    let mixer = Fused::new(Chunkwise::new(64, 128f64.powf(-0.5)).unwrap());
    for t in [4096, 16384, 32768, 131072] {
        let x = || Tensor::randn([1, t, 16, 128], (Kind::BFloat16, device));
        let inputs = Inputs::new(&x(), &x(), &x(), None).unwrap();
        let d_o = x();
        let whole = [Piece { tokens: t, enters: false, leaves: false }];
        let forward = || {
            let mut segment = mixer.forward_pieces(&inputs, &whole, &[None]).unwrap();
            segment.run().unwrap();
            segment.finish().unwrap()
        };
        let backward = || {
            let mut segment = mixer.backward(&inputs, None, &d_o).unwrap();
            segment.run_grad().unwrap();
            segment.finish().unwrap()
        };
        let (f, fb) = (milliseconds(50, &|| drop(forward())), milliseconds(50, &|| drop((forward(), backward()))));
        println!("T {t}: forward {f:.3} ms, with backward {fb:.3} ms");
    }
}
