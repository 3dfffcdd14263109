//! Chunkwise linear attention against the f64 recurrence: every decay, every gradient, lengths that divide by nothing,
//! and segments chained by hand as ranks will chain them.

use kernels::Result;
use kernels::linear::chunkwise::Chunkwise;
use kernels::linear::oracle::{OracleGrads, Outputs, Whole};
use kernels::linear::{Grads, Inputs, Piece, StateMixer};
use kernels::testing::{self, assert_close, assert_close_at, rand, relative_rms, rms};
use tch::{Device, Kind, Tensor};

const DECAYS: [&str; 7] = ["none", "head", "token", "channel", "token strong", "channel strong", "head strong"];

struct Case {
    b: i64,
    t: i64,
    h: i64,
    dk: i64,
    dv: i64,
}

fn randn(seed: u64, shape: &[i64], kind: Kind) -> Tensor {
    testing::randn(seed, shape).to_kind(kind)
}

fn log_decay(name: &str, case: &Case, seed: u64, kind: Kind) -> Option<Tensor> {
    let &Case { b, t, h, dk, .. } = case;
    // Strong: e^B underflows within a few tokens.
    let strength = if name.ends_with("strong") { 80.0 } else { 0.1 };
    let shape = match name.split(' ').next()? {
        "head" => vec![h],
        "token" => vec![b, t, h],
        "channel" => vec![b, t, h, dk],
        _ => return None,
    };
    Some((rand(seed, &shape) * -strength).to_kind(kind))
}

fn inputs(name: &str, case: &Case, seed: u64, kind: Kind) -> Inputs {
    let &Case { b, t, h, dk, dv } = case;
    let numbers = |which: u64, width: i64| randn(seed + which, &[b, t, h, width], kind);
    Inputs::new(&numbers(0, dk), &numbers(1, dk), &numbers(2, dv), log_decay(name, case, seed + 3, kind).as_ref())
        .unwrap()
}

/// Runs the segments one after another, carrying states forward and gradients backward.
fn chained(
    x: &Inputs,
    d_o: &Tensor,
    cuts: &[i64],
    initial: Option<&Tensor>,
    chunk: i64,
) -> Result<(Outputs, Grads, Tensor)> {
    let mixer = Chunkwise::new(chunk, 0.7)?;
    let pieces: Vec<_> = cuts.windows(2).map(|w| (w[0], w[1] - w[0])).collect();
    let zero = Tensor::zeros([x.q.size()[0], x.q.size()[2], x.q.size()[3], x.v.size()[3]], (x.q.kind(), Device::Cpu));
    let mut state = initial.unwrap_or(&zero).shallow_clone();
    let (mut o, mut entries) = (Vec::new(), Vec::new());
    for &(start, length) in &pieces {
        let mut segment = mixer.forward(&x.narrow(start, length)?, None)?;
        let summary = segment.summarize(0)?;
        segment.run()?;
        segment.add_entry(0, &state)?;
        entries.push(state.shallow_clone());
        state = summary.after(&state)?;
        o.push(segment.finish()?);
    }
    let mut exit = zero.zeros_like();
    let mut grads = Vec::new();
    for (&(start, length), entry) in pieces.iter().zip(&entries).rev() {
        let mut segment = mixer.backward(&x.narrow(start, length)?, Some(entry), &d_o.narrow(1, start, length))?;
        let summary = segment.summarize_grad(0)?;
        segment.run_grad()?;
        segment.add_exit(0, &exit)?;
        exit = summary.after(&exit)?;
        grads.insert(0, segment.finish()?);
    }
    let cat = |f: &dyn Fn(&Grads) -> Tensor| Tensor::cat(&grads.iter().map(f).collect::<Vec<_>>(), 1);
    let dlog_decay = x.decay.tensor().map(|g| {
        let dg = cat(&|g| g.dlog_decay.as_ref().unwrap().shallow_clone());
        if g.dim() == 1 { dg.sum_dim_intlist([0, 1].as_slice(), false, None) } else { dg }
    });
    let all = Grads {
        dq: cat(&|g| g.dq.shallow_clone()),
        dk: cat(&|g| g.dk.shallow_clone()),
        dv: cat(&|g| g.dv.shallow_clone()),
        dlog_decay,
    };
    Ok((Outputs { o: Tensor::cat(&o, 1), final_state: state }, all, exit))
}

fn oracle(x: &Inputs, d_o: &Tensor, initial: Option<&Tensor>) -> (Outputs, OracleGrads) {
    let whole = Whole { inputs: x, cu_seqlens: None, initial_state: initial, causal: true, scale: 0.7 };
    (whole.forward().unwrap(), whole.backward(d_o).unwrap())
}

/// The inputs without their signs, whose gradients are sums of the magnitudes of the terms.
fn magnitudes(x: &Inputs) -> Inputs {
    Inputs::new(&x.q.abs(), &x.k.abs(), &x.v.abs(), x.decay.tensor()).unwrap()
}

fn check(kind: Kind, tolerance: f64) {
    let mut seed = 0;
    let cases = [
        (Case { b: 2, t: 67, h: 3, dk: 12, dv: 7 }, vec![0, 67]),
        (Case { b: 1, t: 130, h: 2, dk: 16, dv: 16 }, vec![0, 1, 40, 104, 130]),
        (Case { b: 1, t: 5, h: 1, dk: 3, dv: 9 }, vec![0, 2, 5]),
    ];
    for (case, cuts) in &cases {
        for decay in DECAYS {
            for with_initial in [false, true] {
                seed += 10;
                let x = inputs(decay, case, seed, kind);
                let d_o = randn(seed + 4, &x.v.size(), kind);
                let initial = with_initial.then(|| randn(seed + 5, &[case.b, case.h, case.dk, case.dv], kind));
                let (out, grads, d_initial) = chained(&x, &d_o, cuts, initial.as_ref(), 16).unwrap();
                let (truth, true_grads) = oracle(&x, &d_o, initial.as_ref());
                let name = |what: &str| format!("{what}, {decay}, T {}, initial {with_initial}, {kind:?}", case.t);
                assert_close(&name("o"), &out.o, &truth.o, tolerance);
                assert_close(&name("final_state"), &out.final_state, &truth.final_state, tolerance);
                assert_close(&name("dq"), &grads.dq, &true_grads.dq, tolerance);
                assert_close(&name("dk"), &grads.dk, &true_grads.dk, tolerance);
                assert_close(&name("dv"), &grads.dv, &true_grads.dv, tolerance);
                assert_close(&name("dinitial_state"), &d_initial, &true_grads.dinitial_state, tolerance);
                if let Some(dg) = &grads.dlog_decay {
                    let reference = true_grads.dlog_decay.unwrap();
                    // A few sums, which now and then come to nothing by chance: held against the magnitudes of their terms.
                    let terms = oracle(&magnitudes(&x), &d_o.abs(), initial.as_ref().map(Tensor::abs).as_ref()).1;
                    let scale = rms(&terms.dlog_decay.unwrap());
                    assert_close_at(&name("dlog_decay"), dg, &reference, scale, 0.1 * tolerance);
                }
            }
        }
    }
}

#[test]
fn chunkwise_equals_the_recurrence_in_f64() {
    check(Kind::Double, 1e-10);
}

#[test]
fn chunkwise_equals_the_recurrence_in_f32() {
    check(Kind::Float, 1e-5);
}

/// FlashAttention's rule: at most twice the error that a naive implementation in bf16 makes.
#[test]
fn bf16_is_as_good_as_naive_bf16() {
    let case = Case { b: 1, t: 100, h: 2, dk: 16, dv: 16 };
    let x = inputs("none", &case, 2, Kind::BFloat16);
    let d_o = randn(6, &x.v.size(), Kind::BFloat16);
    let (out, grads, _) = chained(&x, &d_o, &[0, 50, 100], None, 16).unwrap();
    let (truth, true_grads) = oracle(&x, &d_o, None);
    // ((q k^T) * mask) v, every product rounded to bf16.
    let leaf = |x: &Tensor| x.transpose(1, 2).contiguous().set_requires_grad(true);
    let (q, k, v) = (leaf(&x.q), leaf(&x.k), leaf(&x.v));
    let naive = (q.matmul(&k.transpose(-1, -2)).tril(0).matmul(&v) * 0.7).transpose(1, 2);
    (&naive * &d_o).sum(Kind::BFloat16).backward();
    let back = |x: &Tensor| x.grad().transpose(1, 2);
    for (name, ours, theirs, truth) in [
        ("o", &out.o, &naive, &truth.o),
        ("dq", &grads.dq, &back(&q), &true_grads.dq),
        ("dk", &grads.dk, &back(&k), &true_grads.dk),
        ("dv", &grads.dv, &back(&v), &true_grads.dv),
    ] {
        assert_close(name, ours, truth, 2.0 * relative_rms(theirs, truth));
    }
}

#[test]
fn a_token_changes_nothing_before_it() {
    for decay in DECAYS {
        let case = Case { b: 1, t: 90, h: 2, dk: 8, dv: 8 };
        let x = inputs(decay, &case, 3, Kind::Float);
        let mixer = Chunkwise::new(32, 1.0).unwrap();
        let before = mixer.forward(&x, None).unwrap().finish().unwrap();
        for j in [0, 31, 32, 50, 89] {
            let changed = |x: &Tensor| {
                let x = x.copy();
                let _ = x.narrow(1, j, 1).fill_(3.0);
                x
            };
            let decayed = x.decay.tensor().map(|g| {
                let g = g.copy();
                let _ = if g.dim() > 1 { g.narrow(1, j, 1).fill_(-0.5) } else { g.shallow_clone() };
                g
            });
            let y = Inputs::new(&changed(&x.q), &changed(&x.k), &changed(&x.v), decayed.as_ref()).unwrap();
            let after = mixer.forward(&y, None).unwrap().finish().unwrap();
            assert!(before.narrow(1, 0, j).equal(&after.narrow(1, 0, j)), "{decay}: token {j} leaks backwards");
            assert!(!before.narrow(1, j, 1).equal(&after.narrow(1, j, 1)), "{decay}: token {j} has no effect");
        }
    }
}

#[test]
fn wrong_inputs_are_named() {
    let x = randn(1, &[1, 4, 2, 8], Kind::Float);
    let error = Inputs::new(&x, &x, &x, Some(&randn(2, &[1, 4, 3], Kind::Float))).unwrap_err().to_string();
    assert!(error.contains("log_decay") && error.contains("[1, 4, 3]"), "{error}");
    let error = Chunkwise::new(48, 1.0).unwrap_err().to_string();
    assert!(error.contains("48") && error.contains("power of two"), "{error}");

    let (mixer, x) = (Chunkwise::new(4, 1.0).unwrap(), Inputs::new(&x, &x, &x, None).unwrap());
    let pieces = |lengths: [i64; 2]| lengths.map(|tokens| Piece { tokens, enters: false, leaves: false });
    let state = || Some(randn(3, &[1, 2, 8, 8], Kind::Float));
    let fails = |lengths, entries: &[Option<Tensor>]| match mixer.forward_pieces(&x, &pieces(lengths), entries) {
        Ok(_) => panic!("{lengths:?} passed"),
        Err(error) => error.to_string(),
    };
    for lengths in [[1, 2], [4, 0], [5, -1]] {
        let error = fails(lengths, &[None, None]);
        assert!(error.contains("[1, 4, 2, 8]") && error.contains(&format!("{lengths:?}")), "{error}");
    }
    assert!(fails([1, 3], &[None]).contains("each of 2"));
    assert!(fails([1, 3], &[None, state()]).contains("piece 1"));
}
