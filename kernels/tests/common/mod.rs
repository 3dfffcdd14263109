//! What the tests of linear attention's CUDA kernels share: inputs, the segments of several ranks in a row, and the naive version
//! that decides how large an error may be.

// Each test uses its part.
#![allow(dead_code)]

use kernels::linear::oracle::Whole;
use kernels::linear::{Decay, Grads, Inputs, Piece, StateMixer};
use kernels::testing::{assert_close, assert_close_at, rand, randn};
use tch::{Device, Kind, Tensor};

use crate::emulator::{self, slow};

pub const SCALE: f64 = 0.7;

#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub b: i64,
    pub t: i64,
    pub h: i64,
    pub dk: i64,
    pub dv: i64,
}

impl Case {
    pub fn state(&self, seed: u64, device: Device) -> Tensor {
        randn(seed, &[self.b, self.h, self.dk, self.dv]).to_kind(Kind::Float).to_device(device)
    }
}

/// A device with kernels for bf16, as `supports` says; `arch`: the compute capability to emulate without one.
pub fn device(arch: u32, supports: fn(&Inputs) -> bool) -> Option<Device> {
    let device = emulator::device(arch)?;
    let x = Tensor::zeros([1, 1, 1, 8], (Kind::BFloat16, device));
    let there = supports(&Inputs::new(&x, &x, &x, None).unwrap());
    if !there {
        println!("not tested: the GPU is not of a compute capability that the kernels are for");
    }
    there.then_some(device)
}

/// Inputs on the CPU.
pub fn inputs(kind: Kind, decay: &str, case: Case) -> Inputs {
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

pub fn on(x: &Inputs, device: Device) -> Inputs {
    let g = x.decay.tensor().map(|g| g.to_device(device));
    Inputs::new(&x.q.to_device(device), &x.k.to_device(device), &x.v.to_device(device), g.as_ref()).unwrap()
}

/// Fills what the allocator will hand out next with NaN: an output that no kernel writes then shows.
pub fn poison(device: Device) {
    let sizes = (4..if slow(device) { 17 } else { 23 }).flat_map(|power| [1, 3].map(|odd| odd << power));
    let full = |size: i64| (0..8).map(move |_| Tensor::full([size], f64::NAN, (Kind::Float, device)));
    drop(sizes.flat_map(full).collect::<Vec<_>>());
}

/// `run` twice, on the emulator then with threads in another order: the same bits tell that none reads what another has yet to
/// write.
pub fn twice<T>(device: Device, order: u32, run: impl Fn() -> T) -> [T; 2] {
    let first = run();
    [first, if slow(device) { emulator::in_order(order, run) } else { run() }]
}

pub struct All {
    pub o: Tensor,
    pub end: Tensor,
    pub grads: Grads,
    pub d_initial: Tensor,
}

impl All {
    fn to(&self, device: Device) -> Self {
        let to = |x: &Tensor| x.to_device(device);
        let Self { o, end, grads: Grads { dq, dk, dv, dlog_decay }, d_initial } = self;
        let grads = Grads { dq: to(dq), dk: to(dk), dv: to(dv), dlog_decay: dlog_decay.as_ref().map(to) };
        Self { o: to(o), end: to(end), grads, d_initial: to(d_initial) }
    }

    pub fn named(&self) -> Vec<(&'static str, &Tensor)> {
        let Self { o, end, grads: Grads { dq, dk, dv, dlog_decay }, d_initial } = self;
        let mut all = vec![("o", o), ("end", end), ("dq", dq), ("dk", dk), ("dv", dv), ("dinitial", d_initial)];
        all.extend(dlog_decay.as_ref().map(|dg| ("dlog_decay", dg)));
        all
    }
}

/// Of tokens one after another.
pub fn joined(grads: &[Grads]) -> Grads {
    let cat = |f: fn(&Grads) -> &Tensor| Tensor::cat(&grads.iter().map(f).collect::<Vec<_>>(), 1);
    let decay = grads[0].dlog_decay.is_some();
    Grads {
        dq: cat(|g| &g.dq),
        dk: cat(|g| &g.dk),
        dv: cat(|g| &g.dv),
        dlog_decay: decay.then(|| cat(|g| g.dlog_decay.as_ref().unwrap())),
    }
}

/// Segments one after another, as ranks would chain them. `late`: each segment learns of its entry only after it has run.
/// `saves`: backward gets the states that forward has saved.
#[allow(clippy::too_many_arguments)]
pub fn chained(
    mixer: &dyn StateMixer,
    x: &Inputs,
    d_o: &Tensor,
    cuts: &[i64],
    initial: &Tensor,
    exit: &Tensor,
    late: bool,
    saves: bool,
) -> All {
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
    assert!(grads.iter().all(|grads: &Grads| grads.dlog_decay.is_some() == x.decay.tensor().is_some()));
    All { o: Tensor::cat(&o, 1), end: state, grads: joined(&grads), d_initial: exit }
}

/// The whole `[T, T]` matrix of scores, in `kind`, differentiated by libtorch; `exit` enters as the gradient of the state at the
/// end. A decay per channel stands in it as `[T, T, K]`. On the CPU where compute-sanitizer looks on, which then
/// sees few kernels but ours.
pub fn naive(x: &Inputs, d_o: &Tensor, initial: &Tensor, exit: &Tensor, kind: Kind) -> All {
    let device = x.q.device();
    if emulator::sanitized() && device != Device::Cpu {
        let [d_o, initial, exit] = [d_o, initial, exit].map(|x| x.to_device(Device::Cpu));
        return naive(&on(x, Device::Cpu), &d_o, &initial, &exit, kind).to(device);
    }
    let leaf = |x: &Tensor| x.detach().to_kind(kind).set_requires_grad(true);
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

/// dlog_decay of [`naive`] in the shape of the decay.
pub fn as_decay(x: &Inputs, dg: &Tensor) -> Tensor {
    let head = matches!(x.decay, Decay::Head(_));
    if head { dg.sum_dim_intlist([0, 1].as_slice(), false, None) } else { dg.shallow_clone() }
}

/// Checks [`naive`] in f64 against the oracle. `scale`: what errors of dlog_decay are relative to, from the inputs, do, the
/// initial state and dq.
pub fn naive_is_the_recurrence(decay: &str, scale: impl Fn(&Inputs, &Tensor, &Tensor, &Tensor) -> f64) {
    let case = Case { b: 2, t: 40, h: 2, dk: 8, dv: 16 };
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
    if let (Some(dg), Some(truth)) = (&ours.grads.dlog_decay, &grads.dlog_decay) {
        let scale = scale(&x, &d_o, &initial, &grads.dq);
        assert_close_at(&format!("dlog_decay, {decay}"), &as_decay(&x, dg), truth, scale, 1e-10);
    }
}

/// Slices of one projection, and tensors that kernels cannot read where they lie.
pub fn layouts(mixer: &dyn StateMixer, t: i64, device: Device) {
    let run = |q: &Tensor, k: &Tensor, v: &Tensor| {
        mixer.forward(&Inputs::new(q, k, v, None).unwrap(), None).unwrap().finish().unwrap()
    };
    let big = randn(1, &[2, t, 3, 3 * 64 + 1]).to_kind(Kind::BFloat16).to_device(device);
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
    // Contiguous, but not at a multiple of 16 bytes.
    let shifted = |x: &Tensor| {
        Tensor::cat(&[&x.flatten(0, -1).narrow(0, 0, 1), &x.flatten(0, -1)], 0)
            .narrow(0, 1, x.numel() as i64)
            .view(x.size().as_slice())
    };
    let (q, k, v) = (sliced(0).contiguous(), sliced(64).contiguous(), sliced(128).contiguous());
    assert!(run(&shifted(&q), &shifted(&k), &shifted(&v)).equal(&plain), "an odd address");
    let entry = randn(2, &[2, 3, 64, 64]).to_kind(Kind::Float).to_device(device);
    let entered = |entry: &Tensor| {
        let mut segment = mixer.forward(&Inputs::new(&q, &k, &v, None).unwrap(), Some(entry)).unwrap();
        (segment.summarize(0).unwrap().state, segment.finish().unwrap())
    };
    let ((end, o), (shifted_end, shifted_o)) = (entered(&entry), entered(&shifted(&entry)));
    assert!(shifted_end.equal(&end) && shifted_o.equal(&o), "a state at an odd address");
}

/// Milliseconds that `f` takes on a GPU, on average of `repeats`.
pub fn milliseconds(repeats: u32, f: &dyn Fn()) -> f64 {
    (0..3).for_each(|_| f());
    tch::Cuda::synchronize(0);
    let start = std::time::Instant::now();
    (0..repeats).for_each(|_| f());
    tch::Cuda::synchronize(0);
    start.elapsed().as_secs_f64() * 1e3 / f64::from(repeats)
}
