//! The mma kernels of linear attention against the f64 recurrence, with every decay, in every kind: bf16 and f16 by
//! FlashAttention's rule, at most twice the error that a naive implementation in the same kind makes; f32 to 1e-5. Every
//! length, cut and head size that takes another path through them, on a GPU or, the shorter ones, on the emulator.

mod emulator;

use std::sync::atomic::{AtomicUsize, Ordering};

use emulator::slow;
use kernels::cuda;
use kernels::cuda::mma::{Form, Fused, LINEAR_MMA, Variant, supports};
use kernels::linear::chunkwise::Chunkwise;
use kernels::linear::oracle::Whole;
use kernels::linear::{Grads, Inputs, Piece, StateMixer};
use kernels::testing::{assert_close, assert_close_at, rand, randn, relative_rms, rms};
use tch::{Device, Kind, Tensor};

const SCALE: f64 = 0.7;
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
/// Compute capabilities with the shared memory of a block of threads, which decides how many tiles are in flight.
const DEVICES: [(&str, i64); 3] = [("sm_80", 163 << 10), ("sm_86", 99 << 10), ("sm_90a", 227 << 10)];

/// Every variant that a call launches.
fn variants(kind: Kind, decay: Form, dk: i64, dv: i64) -> Vec<Variant> {
    let o = Variant { dk, dv, ..Variant::forward(kind, decay) };
    let dq = Variant { inner: false, outer: true, dots: decay != Form::None, ..o };
    let mut all = vec![o, Variant { late: true, ..o }, dq];
    if kind == Kind::Float {
        all.extend([Variant { reverse: true, ..o }, Variant { reverse: true, ..dq }]);
    } else {
        all.push(Variant { reverse: true, inner: true, ..dq });
    }
    all
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
            for variant in variants(kind, decay, 128, 128) {
                // All for one of the devices, and those of the longest programs for all.
                let few = &DEVICES[all.len() % 3..][..1];
                let devices = if decay == Form::Channel && kind == Kind::BFloat16 { &DEVICES[..] } else { few };
                all.extend(devices.iter().map(|(arch, shared)| (variant, *arch, *shared)));
            }
        }
    }
    for variant in variants(Kind::BFloat16, Form::Channel, 64, 128) {
        all.push((Variant { half_decay: true, ..variant }, "sm_80", 163 << 10));
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

#[derive(Clone, Copy, Debug)]
struct Case {
    b: i64,
    t: i64,
    h: i64,
    dk: i64,
    dv: i64,
}

impl Case {
    fn state(&self, seed: u64, device: Device) -> Tensor {
        randn(seed, &[self.b, self.h, self.dk, self.dv]).to_kind(Kind::Float).to_device(device)
    }
}

/// A device that the kernels are for; `arch`: the compute capability to emulate without one.
fn device(arch: u32) -> Option<Device> {
    let device = emulator::device(arch)?;
    let x = Tensor::zeros([1, 1, 1, 8], (Kind::BFloat16, device));
    let there = supports(&Inputs::new(&x, &x, &x, None).unwrap());
    if !there {
        println!("not tested: the GPU is older than compute capability 8.0");
    }
    there.then_some(device)
}

/// Inputs on the CPU.
fn inputs(kind: Kind, decay: &str, case: Case) -> Inputs {
    let Case { b, t, h, dk, dv } = case;
    let mut words = decay.split(' ');
    let form = words.next().unwrap_or_default();
    let (mut strength, mut given, mut few) = (0.1, Kind::Float, false);
    for word in words {
        match word {
            "strong" => strength = 80.0,
            "mixed" => strength = 10.0,
            "slow" => strength = 0.002,
            "short" => given = kind,
            "few" => few = true,
            other => panic!("{other}"),
        }
    }
    let shape = match form {
        "head" => vec![h],
        "token" => vec![b, t, h],
        "channel" => vec![b, t, h, dk],
        _ => vec![],
    };
    let g = (!shape.is_empty()).then(|| {
        let strengths = if few {
            Tensor::arange(dk, (Kind::Double, Device::Cpu)).remainder(40).eq(3) * 80.0 + strength
        } else {
            Tensor::from(strength)
        };
        (rand(4, &shape) * -strengths).to_kind(kind).to_kind(given)
    });
    let (q, k, v) = (randn(1, &[b, t, h, dk]), randn(2, &[b, t, h, dk]), randn(3, &[b, t, h, dv]));
    Inputs::new(&q.to_kind(kind), &k.to_kind(kind), &v.to_kind(kind), g.as_ref()).unwrap()
}

fn on(x: &Inputs, device: Device) -> Inputs {
    let g = x.decay.tensor().map(|g| g.to_device(device));
    Inputs::new(&x.q.to_device(device), &x.k.to_device(device), &x.v.to_device(device), g.as_ref()).unwrap()
}

/// Fills what the allocator will hand out next with NaN: an output that no kernel writes then shows.
fn poison(device: Device) {
    let junk: Vec<_> = (10..23)
        .flat_map(|power| (0..8).map(move |_| Tensor::full([1 << power], f64::NAN, (Kind::Float, device))))
        .collect();
    drop(junk);
}

struct All {
    o: Tensor,
    end: Tensor,
    grads: Grads,
    d_initial: Tensor,
}

fn mixer() -> Fused<Chunkwise> {
    Fused::new(Chunkwise::new(64, SCALE).unwrap())
}

/// Segments one after another, as ranks would chain them. `late`: each segment learns of its entry only after it has run.
/// `saves`: backward gets the states that forward has saved.
fn chained(x: &Inputs, d_o: &Tensor, cuts: &[i64], initial: &Tensor, exit: &Tensor, late: bool, saves: bool) -> All {
    let mixer = mixer();
    let pieces: Vec<_> = cuts.windows(2).map(|w| (w[0], w[1] - w[0])).collect();
    let (mut state, mut exit) = (initial.shallow_clone(), exit.shallow_clone());
    let (mut o, mut entries, mut saved, mut grads) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for &(start, length) in &pieces {
        poison(x.q.device());
        let given = (!late).then_some(&state);
        let mut segment = mixer.forward(&x.narrow(start, length).unwrap(), given).unwrap();
        let end = if late {
            let summary = segment.summarize(0).unwrap();
            segment.run().unwrap();
            segment.add_entry(0, &state).unwrap();
            saved.push(segment.take_saved().unwrap());
            summary.after(&state).unwrap()
        } else {
            segment.run().unwrap();
            saved.push(segment.take_saved().unwrap());
            segment.summarize(0).unwrap().state
        };
        entries.push(std::mem::replace(&mut state, end));
        o.push(segment.finish().unwrap());
    }
    assert!(saved.iter().all(Option::is_some));
    for ((&(start, length), entry), saved) in pieces.iter().zip(&entries).zip(saved).rev() {
        poison(x.q.device());
        let (part, d_o) = (x.narrow(start, length).unwrap(), d_o.narrow(1, start, length));
        let entry = Some(entry.shallow_clone());
        let saved = saved.filter(|_| saves);
        let mut segment = mixer.backward_pieces(&part, &[Piece::whole(&part)], &[entry], &d_o, saved).unwrap();
        if late {
            segment.run_grad().unwrap();
        }
        segment.add_exit(0, &exit).unwrap();
        exit = segment.summarize_grad(0).unwrap().after(&exit).unwrap();
        grads.insert(0, segment.finish().unwrap());
    }
    let cat = |f: &dyn Fn(&Grads) -> Tensor| Tensor::cat(&grads.iter().map(f).collect::<Vec<_>>(), 1);
    let dlog_decay = x.decay.tensor().map(|_| cat(&|g| g.dlog_decay.as_ref().unwrap().shallow_clone()));
    let grads = Grads {
        dq: cat(&|g| g.dq.shallow_clone()),
        dk: cat(&|g| g.dk.shallow_clone()),
        dv: cat(&|g| g.dv.shallow_clone()),
        dlog_decay,
    };
    All { o: Tensor::cat(&o, 1), end: state, grads, d_initial: exit }
}

/// The whole `[T, T]` matrix of scores, in `kind`, differentiated by libtorch; `exit` enters as the gradient of the state at the
/// end. A decay per channel stands in it as `[T, T, K]`.
fn naive(x: &Inputs, d_o: &Tensor, initial: &Tensor, exit: &Tensor, kind: Kind) -> All {
    let leaf = |x: &Tensor| x.to_kind(kind).set_requires_grad(true);
    let (b, t, h, dk) = x.q.size4().unwrap();
    let (q, k, v, m) = (leaf(&x.q), leaf(&x.k), leaf(&x.v), leaf(initial));
    let g = x.decay.tensor().map_or(Tensor::zeros([b, t, h], (kind, x.q.device())), |g| {
        if g.dim() == 1 { g.expand([b, t, h], false).contiguous() } else { g.shallow_clone() }
    });
    let g = leaf(&g);
    let channels = g.dim() == 4;
    let heads = |x: &Tensor| x.transpose(1, 2);
    let sums = if channels { heads(&g).cumsum(2, kind) } else { heads(&g).cumsum(-1, kind).unsqueeze(-1) }; // [B, H, T, K or 1]
    let later = Tensor::ones([t, t], (kind, x.q.device())).tril(0).unsqueeze(-1);
    let between = ((sums.unsqueeze(3) - sums.unsqueeze(2)) * &later).exp() * &later; // [B, H, T, T, K or 1]
    let scores = if channels {
        let keys = (between * heads(&k).unsqueeze(2)).view([b * h * t, t, dk]);
        keys.matmul(&heads(&q).reshape([b * h * t, dk, 1])).view([b, h, t, t])
    } else {
        heads(&q).matmul(&heads(&k).transpose(-1, -2)) * between.squeeze_dim(-1)
    };
    let o = heads(&((scores.matmul(&heads(&v)) + (heads(&q) * sums.exp()).matmul(&m)) * SCALE));
    let total = sums.narrow(2, t - 1, 1);
    let left = (heads(&k) * (&total - &sums).exp()).transpose(-1, -2).matmul(&heads(&v));
    let end = &m * total.exp().transpose(-1, -2) + left;
    ((&o * d_o.to_kind(kind)).sum(kind) + (&end * exit.to_kind(kind)).sum(kind)).backward();
    let grads = Grads { dq: q.grad(), dk: k.grad(), dv: v.grad(), dlog_decay: x.decay.tensor().map(|_| g.grad()) };
    All { o: o.detach(), end: end.detach(), grads, d_initial: m.grad() }
}

#[test]
fn the_naive_version_in_f64_is_the_recurrence() {
    let case = Case { b: 2, t: 40, h: 2, dk: 8, dv: 16 };
    for decay in DECAYS {
        let x = inputs(Kind::BFloat16, decay, case);
        let (d_o, initial) = (randn(5, &x.v.size()), case.state(6, Device::Cpu));
        let whole = Whole { inputs: &x, cu_seqlens: None, initial_state: Some(&initial), causal: true, scale: SCALE };
        let (out, grads) = (whole.forward().unwrap(), whole.backward(&d_o).unwrap());
        let ours = naive(&x, &d_o, &initial, &initial.zeros_like(), Kind::Double);
        assert_close(&format!("o, {decay}"), &ours.o, &out.o, 1e-10);
        assert_close(&format!("end, {decay}"), &ours.end, &out.final_state, 1e-10);
        assert_close(&format!("dq, {decay}"), &ours.grads.dq, &grads.dq, 1e-10);
        assert_close(&format!("dk, {decay}"), &ours.grads.dk, &grads.dk, 1e-10);
        assert_close(&format!("dv, {decay}"), &ours.grads.dv, &grads.dv, 1e-10);
        assert_close(&format!("dinitial, {decay}"), &ours.d_initial, &grads.dinitial_state, 1e-10);
        if let (Some(dg), Some(truth)) = (ours.grads.dlog_decay, grads.dlog_decay) {
            // A few sums, which may come to little: held against the magnitudes of their terms.
            let magnitudes = Inputs::new(&x.q.abs(), &x.k.abs(), &x.v.abs(), x.decay.tensor()).unwrap();
            let terms = naive(&magnitudes, &d_o.abs(), &initial.abs(), &initial.zeros_like(), Kind::Double);
            let of = |dg: &Tensor| {
                if truth.dim() == 1 { dg.sum_dim_intlist([0, 1].as_slice(), false, None) } else { dg.shallow_clone() }
            };
            let scale = rms(&of(&terms.grads.dlog_decay.unwrap()));
            assert_close_at(&format!("dlog_decay, {decay}"), &of(&dg), &truth, scale, 1e-10);
        }
    }
}

/// From one number of a kind to the next, relative.
fn rounding(kind: Kind) -> f64 {
    if kind == Kind::Half { 1.0 / 1024.0 } else { 1.0 / 256.0 }
}

/// One case in one kind with one decay; prints the errors over the naive ones.
fn check_case(device: Device, kind: Kind, decay: &str, case: Case, cuts: &[i64], late: bool, saves: bool) {
    let x = on(&inputs(kind, decay, case), device);
    let d_o = randn(5, &x.v.size()).to_kind(kind).to_device(device);
    let (initial, exit) = (case.state(6, device), case.state(7, device));
    let ours = chained(&x, &d_o, cuts, &initial, &exit, late, saves);
    // On the emulator with threads in another order: the same bits tell that none reads what another has yet to write.
    let order = if late { 1 } else { 2 + case.t as u32 };
    let again = emulator::in_order(order, || chained(&x, &d_o, cuts, &initial, &exit, late, saves));
    let truth = naive(&x, &d_o, &initial, &exit, Kind::Double);
    let theirs = naive(&x, &d_o, &initial, &exit, kind);
    let mut ratios = Vec::new();
    let mut check = |what: &str, f: &dyn Fn(&All) -> Tensor| {
        let name = format!("{what}, {kind:?}, {decay}, {case:?}, late {late}, saves {saves}");
        let error = relative_rms(&f(&theirs), &f(&truth));
        ratios.push(format!("{what} {:.1e}/{error:.1e}", relative_rms(&f(&ours), &f(&truth))));
        // Under a strong decay the naive version is far off: by more than a few roundings nothing may be.
        let tolerance = if kind == Kind::Float { 1e-5 } else { (2.0 * error).min(3.0 * rounding(kind)) + 1e-6 };
        assert_close(&name, &f(&ours), &f(&truth), tolerance);
        assert!(f(&ours).equal(&f(&again)), "{name}: other bits the second time");
    };
    check("o", &|x| x.o.shallow_clone());
    check("end", &|x| x.end.shallow_clone());
    check("dq", &|x| x.grads.dq.shallow_clone());
    check("dk", &|x| x.grads.dk.shallow_clone());
    check("dv", &|x| x.grads.dv.shallow_clone());
    check("dinitial", &|x| x.d_initial.shallow_clone());
    if x.decay.tensor().is_some() {
        check("dlog_decay", &|x| x.grads.dlog_decay.as_ref().unwrap().shallow_clone());
    }
    println!("{kind:?}, {decay}, {case:?}, {cuts:?}, late {late}, saves {saves}: {}", ratios.join(", "));
}

/// Which cases with which decays: on a GPU all, on the emulator, where each program takes seconds to compile, those named `few`.
fn check_all(arch: u32, kind: Kind, few: &[(&[&str], Case, &[i64])]) {
    let Some(device) = device(arch) else { return };
    if slow(device) {
        for (i, (decays, case, cuts)) in few.iter().enumerate() {
            for (j, decay) in decays.iter().enumerate() {
                check_case(device, kind, decay, *case, cuts, (i + j) % 2 == 0, (i + j) % 4 < 2);
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
    for (case, cuts) in cases {
        for decay in DECAYS {
            for (late, saves) in [(false, false), (true, false), (false, true), (true, true)] {
                check_case(device, kind, decay, case, cuts, late, saves);
            }
        }
    }
}

const NARROW: Case = Case { b: 2, t: 67, h: 1, dk: 40, dv: 16 };

#[test]
fn as_good_as_naive_bf16() {
    let few: [(&[&str], Case, &[i64]); 3] = [
        (&DECAYS, NARROW, &[0, 30, 67]),
        (&["channel", "channel mixed"], Case { b: 1, t: 100, h: 1, dk: 128, dv: 128 }, &[0, 1, 64, 100]),
        (&["channel", "none"], Case { b: 1, t: 1, h: 2, dk: 128, dv: 128 }, &[0, 1]),
    ];
    check_all(80, Kind::BFloat16, &few);
}

/// With more shared memory, and so more tiles in flight; heads of several launches.
#[test]
fn as_good_as_naive_bf16_on_hopper() {
    let few: [(&[&str], Case, &[i64]); 2] = [
        (&["channel", "channel mixed"], Case { b: 1, t: 70, h: 1, dk: 136, dv: 192 }, &[0, 70]),
        (&["token", "token mixed"], Case { b: 1, t: 150, h: 1, dk: 96, dv: 64 }, &[0, 150]),
    ];
    check_all(90, Kind::BFloat16, &few);
}

#[test]
fn as_good_as_naive_f16() {
    let decays = ["channel", "channel strong", "channel mixed short", "token", "none"];
    check_all(80, Kind::Half, &[(&decays, NARROW, &[0, 30, 67])]);
}

#[test]
fn f32_to_1e_5() {
    let decays = ["channel", "channel strong", "channel mixed", "token", "none"];
    check_all(80, Kind::Float, &[(&decays, NARROW, &[0, 30, 67])]);
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
    let Some(device) = device(80) else { return };
    let pieces = [(1, true, false), (40, false, true), (130, true, true), (7, false, false), (64, false, true)]
        .map(|(tokens, enters, leaves)| Piece { tokens, enters, leaves });
    let case = Case { b: 1, t: pieces.iter().map(|piece| piece.tokens).sum(), h: 2, dk: 40, dv: 16 };
    let states = |seed: u64, is: &dyn Fn(&Piece) -> bool| -> Vec<_> {
        (pieces.iter().zip(seed..)).map(|(piece, seed)| is(piece).then(|| case.state(seed, device))).collect()
    };
    let (entries, exits) = (states(10, &|piece| piece.enters), states(20, &|piece| piece.leaves));
    for decay in ["channel", "channel mixed", "token"] {
        let x = on(&inputs(Kind::BFloat16, decay, case), device);
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
/// made on the way is forgotten.
#[test]
fn long_segments() {
    let Some(device) = device(90) else { return };
    let case = if slow(device) {
        Case { b: 1, t: 400, h: 12, dk: 16, dv: 16 }
    } else {
        Case { b: 1, t: 4000, h: 264, dk: 64, dv: 64 }
    };
    for decay in ["channel slow", "token slow"] {
        let x = on(&inputs(Kind::BFloat16, decay, case), device);
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

/// Slices of one projection, and tensors that cannot be read 16 bytes at a time where they lie.
#[test]
fn layouts() {
    let Some(device) = device(80) else { return };
    let run = |q: &Tensor, k: &Tensor, v: &Tensor| {
        mixer().forward(&Inputs::new(q, k, v, None).unwrap(), None).unwrap().finish().unwrap()
    };
    let big = randn(1, &[2, 50, 3, 3 * 64 + 1]).to_kind(Kind::BFloat16).to_device(device);
    let sliced = |start| big.narrow(3, 0, 192).contiguous().narrow(3, start, 64);
    let (q, k, v) = (sliced(0), sliced(64), sliced(128));
    let plain = run(&q.contiguous(), &k.contiguous(), &v.contiguous());
    assert!(run(&q, &k, &v).equal(&plain), "slices of one projection");
    let heads_first = |x: &Tensor| x.transpose(1, 2).contiguous().transpose(1, 2);
    assert!(run(&heads_first(&q), &heads_first(&k), &heads_first(&v)).equal(&plain), "heads before tokens");
    let odd = |start: i64| {
        let x = big.narrow(3, 1, 192).narrow(3, start, 64);
        assert!(x.stride()[2] % 8 != 0);
        x
    };
    let (q, k, v) = (odd(0), odd(64), odd(128));
    assert!(run(&q, &k, &v).equal(&run(&q.contiguous(), &k.contiguous(), &v.contiguous())), "odd strides");
}

/// Milliseconds of forward, and of forward and backward, through the traits, for every kind and form of decay.
#[test]
#[ignore = "a measurement"]
fn time() {
    let Some(device) = device(80).filter(|device| !slow(*device)) else { return };
    let mixer = Fused::new(Chunkwise::new(64, 128f64.powf(-0.5)).unwrap());
    for kind in [Kind::BFloat16, Kind::Half, Kind::Float] {
        for decay in ["none", "token", "channel", "channel strong"] {
            let case = Case { b: 1, t: 16384, h: 16, dk: 128, dv: 128 };
            let x = on(&inputs(kind, decay, case), device);
            let d_o = randn(5, &x.v.size()).to_kind(kind).to_device(device);
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
            let time = |f: &dyn Fn()| {
                for _ in 0..3 {
                    f();
                }
                tch::Cuda::synchronize(0);
                let start = std::time::Instant::now();
                for _ in 0..20 {
                    f();
                }
                tch::Cuda::synchronize(0);
                start.elapsed().as_secs_f64() * 50.0
            };
            let (f, b) = (time(&|| drop(forward())), time(&|| drop(backward())));
            println!("{kind:?}, {decay}, T 16384, 16 heads of 128: forward {f:.3} ms, backward {b:.3} ms");
        }
    }
}
