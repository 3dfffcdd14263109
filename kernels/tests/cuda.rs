//! The kernels of `kernels/cuda/block.cu`: that they compile, and that each agrees with the plain tensor operations of
//! `kernels::block` in f64 on the same bf16 numbers, on a GPU or, with fewer rows, on the emulator.

mod emulator;

use emulator::{device, few};
use kernels::block;
use kernels::cuda::ops::{self, AdamStep};
use kernels::cuda::{self, BLOCK};
use kernels::testing::{assert_close, rand, randn, relative_rms};
use tch::{Device, Kind, Tensor};

/// One rounding to bf16 is an error of at most 2^-9, 1.1e-3 in the mean square.
const ROUNDED: f64 = 2.5e-3;
const EPS: f64 = 1e-5;

#[test]
fn nvrtc_compiles_every_kernel() {
    if !cuda::has_compiler() {
        println!("not tested: no NVRTC");
        return;
    }
    for arch in ["sm_80", "sm_90a"] {
        for defines in [&[][..], &["VECS=2"], &["VECS=8"], &["LANES=1"], &["LANES=32"]] {
            let defines: Vec<String> = defines.iter().map(|d| (*d).to_owned()).collect();
            let cubin = cuda::compile(&BLOCK, arch, &defines).unwrap();
            assert_eq!(&cubin[..4], b"\x7fELF", "{arch} {defines:?}");
        }
    }
}

#[test]
fn an_error_of_the_compiler_shows_the_line() {
    if !cuda::has_compiler() {
        println!("not tested: no NVRTC");
        return;
    }
    let program = cuda::Program { name: "broken", source: "__global__ void f() { undefined; }\n", headers: &[] };
    let error = cuda::compile(&program, "sm_90a", &[]).unwrap_err().to_string();
    assert!(error.contains("broken.cu(1)") && error.contains("undefined"), "{error}");
}

/// Normal bf16 numbers on the device, and the same in f64 on the CPU.
fn pair(device: Device, seed: u64, shape: &[i64]) -> (Tensor, Tensor) {
    let x = randn(seed, shape).to_kind(Kind::BFloat16);
    (x.to_device(device), x.to_kind(Kind::Double))
}

/// A weight that does not begin at a multiple of 16 bytes, as among the flat parameters.
fn weight(device: Device, seed: u64, width: i64) -> (Tensor, Tensor) {
    let (x, x64) = pair(device, seed, &[width + 4]);
    (x.narrow(0, 4, width), x64.narrow(0, 4, width))
}

#[test]
fn scaled_sums() {
    let Some(device) = device(80) else { return };
    let shape = [if few(device) { 5 } else { 700 }, 1032];
    let (x, scale) = (randn(2, &shape), Tensor::from(0.37f32));
    let (on_x, on_scale) = (x.to_kind(Kind::Float).to_device(device), scale.to_device(device));
    for (kind, bound) in [(Kind::BFloat16, ROUNDED), (Kind::Float, 1e-6)] {
        let before = randn(1, &shape).to_kind(kind);
        let mut sum = before.to_device(device).copy();
        ops::add_scaled(&sum, &on_x, &on_scale).unwrap();
        let expected = before.to_kind(Kind::Double) + &x * 0.37;
        assert_close(&format!("{kind:?}"), &sum, &expected, bound);
        let expected = sum.to_device(Device::Cpu).to_kind(Kind::Double) + &x * 0.37;
        block::add_scaled(&mut sum, &on_x, &on_scale).unwrap();
        assert_close(&format!("{kind:?}"), &sum, &expected, bound);
    }
}

/// Into places that begin anywhere, with the same bits again.
#[test]
fn sums_of_rows() {
    let Some(device) = device(80) else { return };
    for (rows, d) in rows(device, [(1, 8), (37, 1000), (528, 2048), (1056, 128), (0, 40)]) {
        let x = randn(1, &[rows, d]);
        let on_x = x.to_kind(Kind::Float).to_device(device);
        for (kind, bound) in [(Kind::BFloat16, ROUNDED), (Kind::Float, 1e-5)] {
            let before = randn(2, &[d + 6]).to_kind(kind);
            let sums = || {
                let all = before.to_device(device).copy();
                block::add_rows(&mut all.narrow(0, 3, d), &on_x).unwrap();
                all
            };
            let (all, again) = (sums(), sums());
            let expected = before.to_kind(Kind::Double);
            let _ = expected.narrow(0, 3, d).g_add_(&over_rows(&x));
            assert_close(&format!("{rows} x {d}, {kind:?}"), &all, &expected, bound);
            assert!(same_bits(&all, &again), "{rows} x {d}, {kind:?}: the same bits again");
        }
    }
}

/// Both layouts of both factors, with and without a summand, into bf16 and f32: to rounding, with the same bits again, and the
/// summand untouched unless it is the output.
#[test]
fn large_products() {
    let Some(device) = device(80).filter(|device| device.is_cuda()) else {
        println!("not tested: no CUDA device");
        return;
    };
    let (m, n, k) = (2304, 1032, 4096);
    let by = |seed, rows, columns, columnwise: bool| {
        let (x, x64) = pair(device, seed, &if columnwise { [columns, rows] } else { [rows, columns] });
        if columnwise { (x.transpose(0, 1), x64.transpose(0, 1)) } else { (x, x64) }
    };
    for (a_by, b_by) in [(false, false), (false, true), (true, false), (true, true)] {
        let ((a, a64), (b, b64)) = (by(1, m, k, a_by), by(2, k, n, b_by));
        let ((c, c64), product) = (by(3, m, n, false), a64.matmul(&b64));
        for kind in [Kind::BFloat16, Kind::Float] {
            let bound = if kind == Kind::Float { 1e-5 } else { ROUNDED };
            let (c, out) = (c.to_kind(kind).copy(), Tensor::full([m, n], f64::NAN, (kind, device)));
            let compute = |plus: Option<&Tensor>| {
                let out = out.copy();
                assert!(cuda::matmul::product(&out, &a, &b, plus).unwrap());
                out
            };
            let what = format!("{a_by} {b_by} {kind:?}");
            let out = compute(None);
            assert_close(&what, &out, &product, bound);
            assert!(out.equal(&compute(None)), "{what}: other bits");
            let before = c.copy();
            let sum = compute(Some(&c));
            assert_close(&what, &sum, &(&product + &c64), bound);
            assert!(c.equal(&before), "{what}: the summand has changed");
            // cuBLASLt rounds the product to bf16 before it adds it in place.
            let in_place = |c: &Tensor| assert!(cuda::matmul::product(c, &a, &b, Some(c)).unwrap());
            in_place(&c);
            assert_close(&what, &c, &(&product + &c64), bound);
            in_place(&before);
            assert!(before.equal(&c), "{what}: other bits in place");
        }
    }
    let small = pair(device, 1, &[8, 8]).0;
    assert!(!cuda::matmul::product(&small.copy(), &small, &small, None).unwrap(), "left to libtorch");
}

/// Cases of `(rows, columns)`; on the emulator of few rows.
fn rows<const N: usize>(device: Device, cases: [(i64, i64); N]) -> [(i64, i64); N] {
    cases.map(|(rows, columns)| (if few(device) { rows.min(40) } else { rows }, columns))
}

/// A number of numbers that ends within 8, after several turns of a strided kernel or, on the emulator, one.
fn numbers(device: Device) -> i64 {
    if few(device) { 10_003 } else { 100_003 }
}

fn same_bits(a: &Tensor, b: &Tensor) -> bool {
    a.to_device(Device::Cpu).equal(&b.to_device(Device::Cpu))
}

fn over_rows(x: &Tensor) -> Tensor {
    x.sum_dim_intlist(0, false, None)
}

#[test]
fn norms() {
    let Some(device) = device(90) else { return };
    for (rows, d) in rows(device, [(1, 8), (37, 1000), (1027, 2048), (65, 2056), (300, 8192)]) {
        let ((x, x64), (w, w64)) = (pair(device, 1, &[rows, d]), weight(device, 2, d));
        let ((dy, dy64), (residual, residual64)) = (pair(device, 3, &[rows, d]), pair(device, 4, &[rows, d]));
        let name = |tensor| format!("{rows} x {d}: {tensor}");
        let (y, rstd) = block::rms_norm(&x, &w, EPS).unwrap();
        let (y64, rstd64) = block::rms_norm(&x64, &w64, EPS).unwrap();
        assert_close(&name("y"), &y, &y64, ROUNDED);
        assert_close(&name("rstd"), &rstd, &rstd64, 1e-5);
        for with in [true, false] {
            let grads = |x, w, rstd, dy: &Tensor, r| block::rms_norm_backward(x, w, rstd, dy.copy(), r).unwrap();
            let (dx, dw) = grads(&x, &w, &rstd, &dy, with.then_some(&residual));
            let (dx64, dw64) = grads(&x64, &w64, &rstd64, &dy64, with.then_some(&residual64));
            assert_close(&name("dx"), &dx, &dx64, ROUNDED);
            assert_close(&name("dweight"), &over_rows(&dw), &over_rows(&dw64), 1e-5);
            let again = grads(&x, &w, &rstd, &dy, with.then_some(&residual));
            assert!(same_bits(&dx, &again.0) && same_bits(&dw, &again.1), "{}", name("the same bits again"));
        }
    }
}

#[test]
fn head_norms_with_gates() {
    let Some(device) = device(90) else { return };
    for (rows, d) in rows(device, [(1, 8), (37, 64), (1003, 96), (5000, 128), (129, 192), (77, 256)]) {
        let ((o, o64), (w, w64)) = (pair(device, 1, &[rows, d]), weight(device, 2, d));
        let ((gate, gate64), (dy, dy64)) = (pair(device, 3, &[rows, d]), pair(device, 4, &[rows, d]));
        for with in [true, false] {
            let name = |tensor| format!("{rows} x {d}, gate {with}: {tensor}");
            let y = block::gated_norm(&o, &w, with.then_some(&gate), EPS).unwrap();
            let y64 = block::gated_norm(&o64, &w64, with.then_some(&gate64), EPS).unwrap();
            assert_close(&name("y"), &y, &y64, ROUNDED);
            let grads = |o: &Tensor, w, gate: &Tensor, dy: &Tensor| {
                block::gated_norm_backward(o.copy(), w, with.then(|| gate.copy()), dy.copy(), EPS).unwrap()
            };
            let (ours, truth) = (grads(&o, &w, &gate, &dy), grads(&o64, &w64, &gate64, &dy64));
            assert_close(&name("y again"), &ours.y, &y64, ROUNDED);
            assert_close(&name("do"), &ours.d_o, &truth.d_o, ROUNDED);
            assert_close(&name("dweight"), &over_rows(&ours.d_weight), &over_rows(&truth.d_weight), 1e-5);
            if let (Some(ours), Some(truth)) = (ours.d_gate, truth.d_gate) {
                assert_close(&name("dgate"), &ours, &truth, ROUNDED);
            }
        }
    }
}

#[test]
fn silu_and_swiglu() {
    let Some(device) = device(90) else { return };
    for (rows, d) in rows(device, [(1, 8), (37, 1000), (1024, 2048)]) {
        let [(gate, gate64), (up, up64), (d, d64)] = [1, 2, 3].map(|seed| pair(device, seed, &[rows, d]));
        assert_close("silu", &block::silu(&gate).unwrap(), &block::silu(&gate64).unwrap(), ROUNDED);
        let back = |x, dy: &Tensor| block::silu_backward(x, dy.copy()).unwrap();
        assert_close("silu dx", &back(&gate, &d), &back(&gate64, &d64), ROUNDED);
        let hidden64 = block::swiglu(&gate64, &up64).unwrap();
        assert_close("hidden", &block::swiglu(&gate, &up).unwrap(), &hidden64, ROUNDED);
        let back = |g: &Tensor, u: &Tensor, d: &Tensor| block::swiglu_backward(g.copy(), u.copy(), d.copy()).unwrap();
        let (ours, truth) = (back(&gate, &up, &d), back(&gate64, &up64, &d64));
        assert_close("hidden again", &ours.hidden, &hidden64, ROUNDED);
        assert_close("dgate", &ours.d_gate, &truth.d_gate, ROUNDED);
        assert_close("dup", &ours.d_up, &truth.d_up, ROUNDED);
    }
}

#[test]
fn rotary_angles() {
    let Some(device) = device(90) else { return };
    for (b, t, h, k) in [(1, 1, 1, 16), (2, 37, 3, 64), (1, 1000, 16, 128)] {
        let ((x, x64), (cos, cos64), (sin, sin64)) =
            (pair(device, 1, &[b, t, h, k]), pair(device, 2, &[t, 1, k / 2]), pair(device, 3, &[t, 1, k / 2]));
        for back in [false, true] {
            let truth = block::rotary(&x64, &cos64, &sin64, back).unwrap();
            assert_close("turned", &block::rotary(&x, &cos, &sin, back).unwrap(), &truth, ROUNDED);
        }
    }
}

#[test]
fn losses() {
    let Some(device) = device(90) else { return };
    for (rows, vocab) in rows(device, [(1, 8), (33, 256), (65, 1000), (17, 128_256)]) {
        let (logits, logits64) = pair(device, 1, &[rows, vocab]);
        let (logits, logits64) = (logits * 4.0, logits64 * 4.0);
        let labels = (rand(2, &[rows]) * vocab as f64).to_kind(Kind::Int64);
        let _ = labels.narrow(0, 0, rows / 3).fill_(-100);
        let truth = block::cross_entropy(logits64, &labels, -100, true).unwrap();
        let labels = labels.to_device(device);
        let (only, none) = block::cross_entropy(logits.copy(), &labels, -100, false).unwrap();
        let (loss, grad) = block::cross_entropy(logits, &labels, -100, true).unwrap();
        assert!(none.is_none() && same_bits(&only, &loss));
        assert_close(&format!("{rows} x {vocab}: loss"), &loss, &truth.0, 1e-5);
        assert_close(&format!("{rows} x {vocab}: dlogits"), &grad.unwrap(), &truth.1.unwrap(), ROUNDED);
    }
}

#[test]
fn products_add_to_f32() {
    let Some(device) = device(90) else { return };
    let ((a, a64), (b, b64)) = (pair(device, 1, &[300, 520]), pair(device, 2, &[520, 130]));
    let mut sum = Tensor::ones([300, 130], (Kind::Float, device));
    for _ in 0..2 {
        block::add_product(&mut sum, &a, &b).unwrap();
    }
    assert_close("sum", &sum, &(a64.matmul(&b64) * 2.0 + 1.0), 1e-5);
}

#[test]
fn masters_come_apart_and_together() {
    let Some(device) = device(90) else { return };
    let n = numbers(device);
    let master = (randn(1, &[n]) * 0.02).to_kind(Kind::Float).to_device(device);
    let (high, low) = (Tensor::zeros([n], (Kind::BFloat16, device)), Tensor::zeros([n], (Kind::Int16, device)));
    ops::split_master(&master, &high, &low).unwrap();
    assert!(same_bits(&ops::join_master(&high, &low).unwrap(), &master), "every bit of the master is kept");
    // Ties apart, the upper half is the rounded master.
    assert!(relative_rms(&high, &master.to_kind(Kind::BFloat16)) < 1e-4);
}

/// Three steps of AdamW, with clipping and with a scaled gradient, against its formulas in f64.
#[test]
fn adamw() {
    let Some(device) = device(90) else { return };
    let (n, decayed, clip) = (numbers(device), 6001, 0.5);
    for kind in [Kind::BFloat16, Kind::Float] {
        let start = randn(1, &[n]).to_kind(Kind::BFloat16);
        let high = start.to_device(device);
        let low = Tensor::zeros([n], (Kind::Int16, device));
        let [mean, square] = [(); 2].map(|()| Tensor::zeros([n], (Kind::Float, device)));
        let mut p = start.to_kind(Kind::Double);
        let [mut m, mut v] = [(); 2].map(|()| Tensor::zeros([n], (Kind::Double, Device::Cpu)));
        for step in 1..=3u64 {
            let a = AdamStep { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step, decayed };
            let grad = randn(1 + step, &[n]).to_kind(kind);
            let scale = 0.25;
            let on_gpu = grad.to_device(device);
            let clipping = ops::clipping(&on_gpu, scale, clip).unwrap();
            ops::adamw(&high, &low, [&mean, &square], &on_gpu, &clipping, a).unwrap();

            let g = grad.to_kind(Kind::Double) * scale;
            let norm = g.norm();
            assert_close("norm", &clipping.get(0), &norm, 1e-6);
            let g = &g * (clip / norm.double_value(&[])).min(1.0);
            m = &m * a.beta1 + &g * (1.0 - a.beta1);
            v = &v * a.beta2 + g.square() * (1.0 - a.beta2);
            let _ = p.narrow(0, 0, decayed).g_mul_scalar_(1.0 - a.lr * a.weight_decay);
            let corrected = |x: &Tensor, beta: f64| x / (1.0 - beta.powi(step as i32));
            p -= corrected(&m, a.beta1) / (corrected(&v, a.beta2).sqrt() + a.eps) * a.lr;
        }
        assert_close("mean", &mean, &m, 1e-6);
        assert_close("square", &square, &v, 1e-6);
        assert_close("master", &ops::join_master(&high, &low).unwrap(), &p, 1e-6);
        assert_close("parameters", &high, &p, ROUNDED);
    }
}
