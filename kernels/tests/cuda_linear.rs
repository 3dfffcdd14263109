//! The Hopper kernels of linear attention against the f64 recurrence, by FlashAttention's rule: at most twice the error that a
//! naive implementation in bf16 makes. Every length, cut and head size that takes another path through them, on a GPU or, the
//! shorter ones, on the emulator.

mod emulator;

use emulator::slow;
use kernels::cuda;
use kernels::cuda::linear::{Fused, LINEAR, Variant, supports};
use kernels::linear::chunkwise::Chunkwise;
use kernels::linear::oracle::Whole;
use kernels::linear::{Grads, Inputs, Piece, StateMixer};
use kernels::testing::{assert_close, assert_close_at, rand, randn, relative_rms, rms};
use tch::{Device, Kind, Tensor};

const SCALE: f64 = 0.7;
const DECAYS: [&str; 5] = ["none", "head", "token", "head strong", "token strong"];

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
    ] {
        let cubin = cuda::compile(&LINEAR, "sm_90a", &variant.defines()).unwrap();
        assert_eq!(&cubin[..4], b"\x7fELF", "{variant:?}");
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    b: i64,
    t: i64,
    h: i64,
    dk: i64,
    dv: i64,
}

/// A device that the kernels are for.
fn hopper() -> Option<Device> {
    let device = emulator::device(90)?;
    let x = Tensor::zeros([1, 1, 1, 8], (Kind::BFloat16, device));
    let there = supports(&Inputs::new(&x, &x, &x, None).unwrap());
    if !there {
        println!("not tested: the GPU is not of compute capability 9.0");
    }
    there.then_some(device)
}

/// Inputs on the CPU.
fn inputs(decay: &str, case: Case) -> Inputs {
    let Case { b, t, h, dk, dv } = case;
    let randn = |seed, sizes: &[i64]| randn(seed, sizes).to_kind(Kind::BFloat16);
    let strength = if decay.ends_with("strong") { 80.0 } else { 0.1 };
    let shape = match decay.split(' ').next() {
        Some("head") => vec![h],
        Some("token") => vec![b, t, h],
        _ => vec![],
    };
    let g = (!shape.is_empty()).then(|| (rand(4, &shape) * -strength).to_kind(Kind::BFloat16).to_kind(Kind::Float));
    let (q, k, v) = (randn(1, &[b, t, h, dk]), randn(2, &[b, t, h, dk]), randn(3, &[b, t, h, dv]));
    Inputs::new(&q, &k, &v, g.as_ref()).unwrap()
}

fn on(x: &Inputs, device: Device) -> Inputs {
    let g = x.decay.tensor().map(|g| g.to_device(device));
    Inputs::new(&x.q.to_device(device), &x.k.to_device(device), &x.v.to_device(device), g.as_ref()).unwrap()
}

/// Fills what the allocator will hand out next with NaN: an output that no kernel writes then shows. The emulator sees to it
/// by itself.
fn poison(device: Device) {
    if slow(device) {
        return;
    }
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

/// Segments one after another, as ranks would chain them. `late`: each segment learns of its entry only after it has run.
/// `saves`: backward gets the states that forward has saved.
fn chained(x: &Inputs, d_o: &Tensor, cuts: &[i64], initial: &Tensor, exit: &Tensor, late: bool, saves: bool) -> All {
    let mixer = Fused::new(Chunkwise::new(64, SCALE).unwrap());
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

/// The whole `[T, T]` matrix of scores, in the kind of the inputs, differentiated by libtorch; `exit` enters as the gradient
/// of the state at the end.
fn naive(x: &Inputs, d_o: &Tensor, initial: &Tensor, exit: &Tensor, kind: Kind) -> All {
    let leaf = |x: &Tensor| x.to_kind(kind).set_requires_grad(true);
    let (b, t, h, _) = x.q.size4().unwrap();
    let (q, k, v, m) = (leaf(&x.q), leaf(&x.k), leaf(&x.v), leaf(initial));
    let g = x.decay.tensor().map_or(Tensor::zeros([b, t, h], (kind, x.q.device())), |g| {
        if g.dim() == 1 { g.expand([b, t, h], false).contiguous() } else { g.shallow_clone() }
    });
    let g = leaf(&g);
    let heads = |x: &Tensor| x.transpose(1, 2);
    let sums = heads(&g).cumsum(-1, kind); // [B, H, T]
    let decay = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).tril(0).exp().tril(0);
    let intra = (heads(&q).matmul(&heads(&k).transpose(-1, -2)) * decay).matmul(&heads(&v));
    let o = heads(&((intra + (heads(&q) * sums.exp().unsqueeze(-1)).matmul(&m)) * SCALE));
    let total = sums.narrow(2, t - 1, 1);
    let left = (heads(&k) * (&total - &sums).exp().unsqueeze(-1)).transpose(-1, -2).matmul(&heads(&v));
    let end = &m * total.exp().unsqueeze(-1) + left;
    ((&o * d_o.to_kind(kind)).sum(kind) + (&end * exit.to_kind(kind)).sum(kind)).backward();
    let grads = Grads { dq: q.grad(), dk: k.grad(), dv: v.grad(), dlog_decay: x.decay.tensor().map(|_| g.grad()) };
    All { o: o.detach(), end: end.detach(), grads, d_initial: m.grad() }
}

#[test]
fn the_naive_version_in_f64_is_the_recurrence() {
    let case = Case { b: 2, t: 40, h: 2, dk: 8, dv: 16 };
    for decay in DECAYS {
        let x = inputs(decay, case);
        let (d_o, initial) =
            (randn(5, &x.v.size()).to_kind(Kind::BFloat16), randn(6, &[2, 2, 8, 16]).to_kind(Kind::Float));
        let whole = Whole { inputs: &x, cu_seqlens: None, initial_state: Some(&initial), causal: true, scale: SCALE };
        let (out, grads) = (whole.forward().unwrap(), whole.backward(&d_o).unwrap());
        let ours = naive(&x, &d_o, &initial, &initial.zeros_like(), Kind::Double);
        assert_close(&format!("o, {decay}"), &ours.o, &out.o, 1e-10);
        assert_close(&format!("end, {decay}"), &ours.end, &out.final_state, 1e-10);
        assert_close(&format!("dq, {decay}"), &ours.grads.dq, &grads.dq, 1e-10);
        assert_close(&format!("dinitial, {decay}"), &ours.d_initial, &grads.dinitial_state, 1e-10);
        if let (Some(dg), Some(truth)) = (ours.grads.dlog_decay, grads.dlog_decay) {
            let dg = if truth.dim() == 1 { dg.sum_dim_intlist([0, 1].as_slice(), false, None) } else { dg };
            // Sums of q dq and k dk, which may come to little.
            let scale = rms(&(x.q.to_kind(Kind::Double) * &grads.dq).sum_dim_intlist([-1].as_slice(), false, None));
            assert_close_at(&format!("dlog_decay, {decay}"), &dg, &truth, scale, 1e-10);
        }
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
    let small = |case: &Case| case.b * case.t * case.h < 1500;
    for (i, (case, cuts)) in cases.iter().filter(|(case, _)| !slow(device) || small(case)).enumerate() {
        for (late, saves) in [(false, false), (true, false), (false, true), (true, true)] {
            if slow(device) && (late == saves) == (i % 2 == 0) {
                continue;
            }
            let x = on(&inputs(decay, *case), device);
            let d_o = randn(5, &x.v.size()).to_kind(Kind::BFloat16).to_device(device);
            let state = |seed| randn(seed, &[case.b, case.h, case.dk, case.dv]).to_kind(Kind::Float).to_device(device);
            let (initial, exit) = (state(6), state(7));
            let run = || chained(&x, &d_o, cuts, &initial, &exit, late, saves);
            let (ours, again) = if slow(device) {
                let first = run();
                (first, emulator::in_order(if late { 1 } else { 2 + i as u32 }, run))
            } else {
                (run(), run())
            };
            let truth = naive(&x, &d_o, &initial, &exit, Kind::Double);
            let theirs = naive(&x, &d_o, &initial, &exit, Kind::BFloat16);
            let check = |what: &str, f: &dyn Fn(&All) -> Tensor| {
                let name = format!("{what}, {decay}, {case:?}, late {late}, saves {saves}");
                let tolerance = 2.0 * relative_rms(&f(&theirs), &f(&truth)) + 1e-6;
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

/// Slices of one projection, and tensors that TMA cannot take where they lie.
#[test]
fn layouts() {
    let Some(device) = hopper() else { return };
    let mixer = Fused::new(Chunkwise::new(64, SCALE).unwrap());
    let run = |q: &Tensor, k: &Tensor, v: &Tensor| {
        mixer.forward(&Inputs::new(q, k, v, None).unwrap(), None).unwrap().finish().unwrap()
    };
    let big = randn(1, &[2, 100, 3, 3 * 64 + 1]).to_kind(Kind::BFloat16).to_device(device);
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
        let forward = || {
            let mut segment = mixer.forward(&inputs, None).unwrap();
            segment.run().unwrap();
            segment.finish().unwrap()
        };
        let backward = || {
            let mut segment = mixer.backward(&inputs, None, &d_o).unwrap();
            segment.run_grad().unwrap();
            segment.finish().unwrap()
        };
        let time = |f: &dyn Fn()| {
            for _ in 0..3 {
                f();
            }
            tch::Cuda::synchronize(0);
            let start = std::time::Instant::now();
            for _ in 0..50 {
                f();
            }
            tch::Cuda::synchronize(0);
            start.elapsed().as_secs_f64() * 20.0
        };
        let (f, fb) = (time(&|| drop(forward())), time(&|| drop((forward(), backward()))));
        println!("T {t}: forward {f:.3} ms, with backward {fb:.3} ms");
    }
}
