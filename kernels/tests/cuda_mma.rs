//! The mma kernels of linear attention against the f64 recurrence, with every decay, in every kind: bf16 and f16 by
//! FlashAttention's rule, at most twice the error that a naive implementation in the same kind makes; f32 to 1e-5. Every
//! length, cut and head size that takes another path through them, on a GPU or, the shorter ones, on the emulator.

mod common;
mod emulator;

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Case, SCALE, as_decay, chained, milliseconds, naive, naive_is_the_recurrence, on, poison, twice};
use emulator::{few, slow};
use kernels::cuda;
use kernels::cuda::mma::{Form, Fused, LINEAR_MMA, Variant, supports};
use kernels::linear::chunkwise::Chunkwise;
use kernels::linear::{Grads, Inputs, Piece, StateMixer};
use kernels::testing::{assert_close, randn, relative_rms, rms};
use tch::{Device, Kind, Tensor};

/// `strong`: most tokens forget nearly all. `mixed`: some groups of 16 tokens decay by more than the products of their halves
/// may, others do not.
/// `short`: in the inputs' kind. `few`: strong in a few channels only.
const DECAYS: [&str; 11] = [
    "none",
    "head",
    "token",
    "channel",
    "channel short",
    "token strong",
    "token mixed",
    "channel strong",
    "channel mixed",
    "channel mixed short",
    "channel few",
];
/// Compute capabilities, the first number of each, and the shared memory of a block of threads, which decides how many tiles are in
/// flight.
const DEVICES: [(&str, i32, i64); 3] = [("sm_80", 8, 163 << 10), ("sm_86", 8, 99 << 10), ("sm_90a", 9, 227 << 10)];

/// Every variant that a call launches. `major`: of the compute capability.
fn variants(kind: Kind, decay: Form, major: i32, dk: i64, dv: i64) -> Vec<Variant> {
    let o = Variant { dk, dv, ..Variant::forward(kind, decay, major) };
    let dq = Variant { outer: true, dots: decay != Form::None, ..o };
    vec![o, Variant { late: true, ..o }, dq, Variant { reverse: true, ..o }, Variant { reverse: true, ..dq }]
}

#[test]
fn nvrtc_compiles_every_variant() {
    if !cuda::has_compiler() {
        println!("not tested: no NVRTC");
        return;
    }
    let mut all: Vec<(Variant, &str, i64)> = Vec::new();
    for kind in [Kind::BFloat16, Kind::Half, Kind::Float] {
        for decay in [Form::None, Form::Scalar, Form::Channel] {
            for (place, (arch, major, shared)) in DEVICES.into_iter().enumerate() {
                for (i, variant) in variants(kind, decay, major, 128, 128).into_iter().enumerate() {
                    // All for one of the devices, and those that differ for all.
                    if kind == Kind::BFloat16 || (i + decay as usize) % DEVICES.len() == place {
                        all.push((variant, arch, shared));
                    }
                }
            }
        }
    }
    for (arch, major, shared) in [DEVICES[0], DEVICES[2]] {
        for (dk, dv) in [(64, 128), (128, 64)] {
            let half = |variant| (Variant { half_decay: true, ..variant }, arch, shared);
            all.extend(variants(Kind::BFloat16, Form::Channel, major, dk, dv).into_iter().map(half));
        }
    }
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some((variant, arch, shared)) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let cubin = cuda::compile(&LINEAR_MMA, arch, &variant.defines(*shared)).unwrap();
                    assert_eq!(&cubin[..4], b"\x7fELF", "{variant:?}");
                }
            });
        }
    });
}

/// A device that the kernels are for.
fn device() -> Option<Device> {
    let device = common::device(80, supports)?;
    if let Some(capability) = std::env::var_os(emulator::CAPABILITY) {
        assert_eq!(capability.to_str().unwrap(), format!("{}0", cuda::gpu(device).unwrap().major));
    }
    Some(device)
}

fn mixer() -> Fused<Chunkwise> {
    Fused::new(Chunkwise::new(64, SCALE).unwrap())
}

#[test]
fn the_naive_version_in_f64_is_the_recurrence() {
    // A few sums, which may come to little: held against the magnitudes of their terms.
    let scale = |x: &Inputs, d_o: &Tensor, initial: &Tensor, _: &Tensor| {
        let magnitudes = Inputs::new(&x.q.abs(), &x.k.abs(), &x.v.abs(), x.decay.tensor()).unwrap();
        let terms = naive(&magnitudes, &d_o.abs(), &initial.abs(), &initial.zeros_like(), Kind::Double);
        rms(&as_decay(x, &terms.grads.dlog_decay.unwrap()))
    };
    DECAYS.iter().for_each(|decay| naive_is_the_recurrence(decay, scale));
}

/// From one number of a kind to the next, relative.
fn rounding(kind: Kind) -> f64 {
    if kind == Kind::Half { 1.0 / 1024.0 } else { 1.0 / 256.0 }
}

/// One case in one kind with one decay; prints the errors over the naive ones. `modes`: whether entries come late, and whether
/// backward is given what forward has saved.
fn check_case(device: Device, kind: Kind, decay: &str, case: Case, cuts: &[i64], modes: &[(bool, bool)]) {
    let x = on(&common::inputs(kind, decay, case), device);
    let d_o = randn(5, &x.v.size()).to_kind(kind).to_device(device);
    let (initial, exit) = (case.state(6, device), case.state(7, device));
    let truth = naive(&x, &d_o, &initial, &exit, Kind::Double);
    let theirs = naive(&x, &d_o, &initial, &exit, kind);
    for &(late, saves) in modes {
        let order = if late { 1 } else { 2 + case.t as u32 };
        let run = || chained(&mixer(), &x, &d_o, cuts, &initial, &exit, late, saves);
        let [ours, again] = twice(device, order, run);
        let mut ratios = Vec::new();
        for (i, (what, ours)) in ours.named().into_iter().enumerate() {
            let [again, truth, theirs] = [&again, &truth, &theirs].map(|all| all.named()[i].1);
            let name = format!("{what}, {kind:?}, {decay}, {case:?}, late {late}, saves {saves}");
            let error = relative_rms(theirs, truth);
            ratios.push(format!("{what} {:.1e}/{error:.1e}", relative_rms(ours, truth)));
            // Under a strong decay the naive version is far off: by more than a few roundings nothing may be.
            let tolerance = if kind == Kind::Float { 1e-5 } else { (2.0 * error).min(3.0 * rounding(kind)) + 1e-6 };
            assert_close(&name, ours, truth, tolerance);
            assert!(ours.equal(again), "{name}: other bits the second time");
        }
        println!("{kind:?}, {decay}, {case:?}, {cuts:?}, late {late}, saves {saves}: {}", ratios.join(", "));
    }
}

/// All programs of some cases, on as many cores as there are: one by one they would take longer than the tests.
fn compile_ahead(device: Device, kind: Kind, cases: &[Case]) {
    let cuda::Gpu { shared, major, .. } = cuda::gpu(device).unwrap();
    let mut all = Vec::new();
    for case in cases {
        for decay in [Form::None, Form::Scalar, Form::Channel] {
            let of_kind = |half_decay| {
                variants(kind, decay, major, case.dk, case.dv).into_iter().map(move |v| Variant { half_decay, ..v })
            };
            let half = decay == Form::Channel && kind != Kind::Float;
            let of = of_kind(false).chain(of_kind(true).filter(|_| half));
            all.extend(of.map(|variant| variant.defines(i64::from(shared))));
        }
    }
    all.sort();
    all.dedup();
    cuda::compile_ahead(device, &LINEAR_MMA, &all).unwrap();
}

/// Which cases with which decays: on a GPU all, on the emulator, where each program takes seconds to compile, those `chosen`.
fn check_all(kind: Kind, chosen: &[(&[&str], Case, &[i64])]) {
    let Some(device) = device() else { return };
    if few(device) {
        for (i, (decays, case, cuts)) in chosen.iter().enumerate() {
            for (j, decay) in decays.iter().enumerate() {
                check_case(device, kind, decay, *case, cuts, &[((i + j) % 2 == 0, (i + j) % 4 < 2)]);
            }
        }
        return;
    }
    let cases: [(Case, &[i64]); 8] = [
        (Case { b: 2, t: 67, h: 3, dk: 16, dv: 8 }, &[0, 67]),
        (Case { b: 1, t: 1, h: 16, dk: 128, dv: 128 }, &[0, 1]),
        (Case { b: 1, t: 200, h: 1, dk: 128, dv: 128 }, &[0, 1, 64, 130, 200]),
        (Case { b: 1, t: 130, h: 1, dk: 136, dv: 256 }, &[0, 70, 130]),
        (Case { b: 1, t: 90, h: 2, dk: 96, dv: 64 }, &[0, 90]),
        (Case { b: 1, t: 321, h: 2, dk: 64, dv: 128 }, &[0, 321]),
        (Case { b: 1, t: 1000, h: 2, dk: 128, dv: 128 }, &[0, 1000]),
        (Case { b: 2, t: 700, h: 5, dk: 64, dv: 64 }, &[0, 333, 700]),
    ];
    compile_ahead(device, kind, &cases.map(|(case, _)| case));
    for (case, cuts) in cases {
        for decay in DECAYS {
            check_case(device, kind, decay, case, cuts, &[(false, false), (true, false), (false, true), (true, true)]);
        }
    }
}

const NARROW: Case = Case { b: 2, t: 67, h: 1, dk: 40, dv: 16 };
/// For which eight warps share the scores.
const WIDE: Case = Case { b: 1, t: 70, h: 1, dk: 128, dv: 128 };
const WIDE_DECAYS: [&str; 2] = ["channel", "token"];

#[test]
fn as_good_as_naive_bf16() {
    let few: [(&[&str], Case, &[i64]); 5] = [
        (&DECAYS, NARROW, &[0, 30, 67]),
        (&["channel", "channel mixed", "none"], Case { b: 1, t: 100, h: 1, dk: 128, dv: 128 }, &[0, 1, 64, 100]),
        (&["channel", "none"], Case { b: 1, t: 1, h: 2, dk: 128, dv: 128 }, &[0, 1]),
        (&["channel", "channel mixed"], Case { b: 1, t: 70, h: 1, dk: 136, dv: 192 }, &[0, 70]),
        (&["token", "token mixed"], Case { b: 1, t: 150, h: 1, dk: 96, dv: 128 }, &[0, 150]),
    ];
    check_all(Kind::BFloat16, &few);
}

/// What Hopper does otherwise in bf16, where the emulator, which is one device in a process, has taken another's place.
#[test]
fn on_hopper() {
    if std::env::var_os(emulator::CAPABILITY).is_some() || !device().is_some_and(slow) {
        return;
    }
    let tests = ["as_good_as_naive_bf16", "documents_in_one_call", "layouts", "long_segments"];
    let mut program = Command::new(std::env::current_exe().unwrap());
    let end = program.args(tests).arg("--exact").env(emulator::CAPABILITY, "90").output().unwrap();
    let said = String::from_utf8_lossy(&end.stdout);
    assert!(end.status.success(), "{said}");
    assert!(said.contains("ok. 4 passed"), "{said}");
}

#[test]
fn as_good_as_naive_f16() {
    let decays = ["channel", "channel strong", "channel mixed short", "token", "none"];
    check_all(Kind::Half, &[(&decays, NARROW, &[0, 30, 67]), (&WIDE_DECAYS, WIDE, &[0, 70])]);
}

#[test]
fn f32_to_1e_5() {
    let decays = ["channel", "channel strong", "channel mixed", "token", "none"];
    check_all(Kind::Float, &[(&decays, NARROW, &[0, 30, 67]), (&WIDE_DECAYS, WIDE, &[0, 70])]);
}

/// What a call with several documents gives, as `o, dq, dk, dv, dlog_decay`, then the states that leave and the gradients of
/// those that enter. `late`: entries come after the rest has run.
fn packed(
    mixer: &dyn StateMixer,
    x: &Inputs,
    pieces: &[Piece],
    entries: &[Option<Tensor>],
    exits: &[Option<Tensor>],
    d_o: &Tensor,
    late: bool,
) -> Vec<Tensor> {
    let given =
        |now: bool| entries.iter().map(|e| e.as_ref().filter(|_| now).map(Tensor::shallow_clone)).collect::<Vec<_>>();
    poison(x.q.device());
    let mut segment = mixer.forward_pieces(x, pieces, &given(!late)).unwrap();
    let mut states = Vec::new();
    for (i, piece) in pieces.iter().enumerate().filter(|(_, piece)| piece.leaves) {
        let summary = segment.summarize(i).unwrap();
        let entry = entries[i].as_ref().filter(|_| late && piece.enters);
        states.push(entry.map_or_else(|| summary.state.shallow_clone(), |entry| summary.after(entry).unwrap()));
    }
    segment.run().unwrap();
    for (i, entry) in given(late).iter().enumerate() {
        if let Some(entry) = entry {
            segment.add_entry(i, entry).unwrap();
        }
    }
    let saved = segment.take_saved().unwrap();
    let o = segment.finish().unwrap();
    poison(x.q.device());
    let mut segment = mixer.backward_pieces(x, pieces, &given(true), d_o, saved.filter(|_| late)).unwrap();
    for (i, _) in pieces.iter().enumerate().filter(|(_, piece)| piece.enters) {
        states.push(segment.summarize_grad(i).unwrap().state);
    }
    segment.run_grad().unwrap();
    for (i, exit) in exits.iter().enumerate() {
        if let Some(exit) = exit {
            segment.add_exit(i, exit).unwrap();
        }
    }
    let Grads { dq, dk, dv, dlog_decay } = segment.finish().unwrap();
    [o, dq, dk, dv, dlog_decay.unwrap()].into_iter().chain(states).collect()
}

#[test]
fn documents_in_one_call() {
    let Some(device) = device() else { return };
    let pieces = [(1, true, false), (40, false, true), (130, true, true), (7, false, false), (64, false, true)]
        .map(|(tokens, enters, leaves)| Piece { tokens, enters, leaves });
    let case = Case { b: 1, t: pieces.iter().map(|piece| piece.tokens).sum(), h: 2, dk: 40, dv: 16 };
    let states = |seed: u64, is: &dyn Fn(&Piece) -> bool| -> Vec<_> {
        (pieces.iter().zip(seed..)).map(|(piece, seed)| is(piece).then(|| case.state(seed, device))).collect()
    };
    let (entries, exits) = (states(10, &|piece| piece.enters), states(20, &|piece| piece.leaves));
    for decay in ["channel", "channel mixed", "token"] {
        let x = on(&common::inputs(Kind::BFloat16, decay, case), device);
        let d_o = randn(5, &x.v.size()).to_kind(Kind::BFloat16).to_device(device);
        let double = |x: &Tensor| x.to_kind(Kind::Double);
        let exact =
            Inputs::new(&double(&x.q), &double(&x.k), &double(&x.v), x.decay.tensor().map(double).as_ref()).unwrap();
        let all = |x: &[Option<Tensor>]| x.iter().map(|x| x.as_ref().map(double)).collect::<Vec<_>>();
        let truth = Chunkwise::new(64, SCALE).unwrap();
        let truth = packed(&truth, &exact, &pieces, &all(&entries), &all(&exits), &double(&d_o), false);
        for late in [false, true] {
            let ours = packed(&mixer(), &x, &pieces, &entries, &exits, &d_o, late);
            for (i, (ours, truth)) in ours.iter().zip(&truth).enumerate() {
                assert_close(&format!("{i}, {decay}, late {late}"), ours, truth, 3.0 * rounding(Kind::BFloat16));
            }
        }
    }
}

/// Segments of many chunks, over which dlog_decay is carried from the end to the start: with little decay nothing of an error
/// made on the way is forgotten. Some blocks of threads have several, one after another.
#[test]
fn long_segments() {
    let Some(device) = device() else { return };
    let case = if few(device) {
        Case { b: 1, t: 400, h: 5, dk: 16, dv: 16 }
    } else {
        Case { b: 1, t: 4000, h: 160, dk: 64, dv: 64 }
    };
    for decay in ["channel slow", "token slow"] {
        let x = on(&common::inputs(Kind::BFloat16, decay, case), device);
        let d_o = randn(5, &x.v.size()).to_kind(Kind::BFloat16).to_device(device);
        let (entry, exit) = ([Some(case.state(6, device))], [Some(case.state(7, device))]);
        let double = |x: &Tensor| x.to_kind(Kind::Double);
        let exact =
            Inputs::new(&double(&x.q), &double(&x.k), &double(&x.v), x.decay.tensor().map(double).as_ref()).unwrap();
        let (pieces, truth) = ([Piece::whole(&x)], Chunkwise::new(64, SCALE).unwrap());
        let truth = packed(&truth, &exact, &pieces, &entry, &exit, &double(&d_o), false);
        let ours = packed(&mixer(), &x, &pieces, &entry, &exit, &d_o, false);
        for (i, (ours, truth)) in ours.iter().zip(&truth).enumerate() {
            println!("{i}, {decay}: {:.1e}", relative_rms(ours, truth));
            assert_close(&format!("{i}, {decay}"), ours, truth, 3.0 * rounding(Kind::BFloat16));
        }
    }
}

#[test]
fn layouts() {
    let Some(device) = device() else { return };
    common::layouts(&mixer(), 50, device);
}

/// Milliseconds of forward, and of forward and backward, through the traits, for every kind and form of decay.
#[test]
#[ignore = "a measurement"]
fn time() {
    let Some(device) = device().filter(|device| !slow(*device)) else { return };
    let mixer = Fused::new(Chunkwise::new(64, 128f64.powf(-0.5)).unwrap());
    for kind in [Kind::BFloat16, Kind::Half, Kind::Float] {
        for decay in ["none", "token", "channel", "channel strong"] {
            let normal = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, device));
            let shape = [1, 16384, 16, 128];
            let strength = if decay.ends_with("strong") { 80.0 } else { 0.1 };
            let g = match decay.split(' ').next() {
                Some("token") => Some(normal(&shape[..3]).exp() * -strength),
                Some("channel") => Some(normal(&shape).exp() * -strength),
                _ => None,
            };
            let [q, k, v, d_o] = std::array::from_fn(|_| normal(&shape).to_kind(kind));
            let mut x = Inputs::new(&q, &k, &v, g.as_ref()).unwrap();
            x.decay_grad = g.is_some();
            let forward = || {
                let mut segment = mixer.forward(&x, None).unwrap();
                segment.run().unwrap();
                segment.finish().unwrap()
            };
            let backward = || {
                let mut segment = mixer.backward(&x, None, &d_o).unwrap();
                segment.run_grad().unwrap();
                segment.finish().unwrap()
            };
            let (f, b) = (milliseconds(20, &|| drop(forward())), milliseconds(20, &|| drop(backward())));
            println!("{kind:?}, {decay}, T 16384, 16 heads of 128: forward {f:.3} ms, backward {b:.3} ms");
        }
    }
}
