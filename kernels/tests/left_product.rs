//! The left product against the recurrence, in one tile and cut into tiles that add up.

use kernels::linear::left_product::{Tile, backward, forward};
use kernels::linear::oracle::Whole;
use kernels::linear::{Decay, Inputs};
use kernels::testing::{assert_close, randn};
use tch::{Device, Kind, Tensor};

const SCALE: f64 = 0.7;

/// Tiles that cut `tokens` into runs at `cuts`.
fn tiles(cuts: &[i64]) -> Vec<Tile> {
    let runs: Vec<_> = cuts.windows(2).map(|w| w[0]..w[1]).collect();
    let tile = |(i, j): (usize, usize)| {
        let (q, k) = (runs[i].clone(), runs[j].clone());
        Tile { ahead: q.start - k.start, q, k }
    };
    (0..runs.len()).flat_map(|i| (0..=i).map(move |j| (i, j))).map(tile).collect()
}

fn check(tokens: i64, decay: Option<f64>, cuts: &[&[i64]], kind: Kind, tolerance: f64) {
    let (b, h) = (2, 3);
    let numbers = |seed, width| randn(seed, &[b, tokens, h, width]).to_kind(kind);
    let (q, k, v, d_o) = (numbers(1, 5), numbers(2, 5), numbers(3, 4), numbers(4, 4));
    let log_decay = decay.map(|rate| (Tensor::arange(h, (Kind::Double, Device::Cpu)) + 0.5) * -rate);
    let x = Inputs::new(&q, &k, &v, log_decay.as_ref()).unwrap();
    let whole = Whole { inputs: &x, cu_seqlens: None, initial_state: None, causal: true, scale: SCALE };
    let (truth, grads) = (whole.forward().unwrap(), whole.backward(&d_o).unwrap());
    for cuts in cuts {
        let tiles = tiles(cuts);
        let o = forward(&q, &k, &v, &x.decay, &tiles, SCALE).unwrap();
        let ours = backward(&q, &k, &v, &x.decay, true, &d_o, &tiles, SCALE).unwrap();
        let name = |what: &str| format!("{what}, {tokens} tokens, decay {decay:?}, cut at {cuts:?}, {kind:?}");
        assert_close(&name("o"), &o, &truth.o, tolerance);
        assert_close(&name("dq"), &ours.dq, &grads.dq, tolerance);
        assert_close(&name("dk"), &ours.dk, &grads.dk, tolerance);
        assert_close(&name("dv"), &ours.dv, &grads.dv, tolerance);
        match (&ours.dlog_decay, &grads.dlog_decay) {
            (Some(ours), Some(truth)) => assert_close(&name("dlog_decay"), ours, truth, tolerance),
            (None, None) => {}
            other => panic!("{}: {other:?}", name("dlog_decay")),
        }
    }
}

#[test]
fn tiles_add_up_to_the_recurrence() {
    for (kind, tolerance) in [(Kind::Double, 1e-10), (Kind::Float, 1e-5)] {
        for decay in [None, Some(0.0), Some(0.01), Some(40.0)] {
            check(1, decay, &[&[0, 1]], kind, tolerance);
            check(67, decay, &[&[0, 67], &[0, 20, 20, 21, 67]], kind, tolerance);
        }
        // Several blocks in a tile.
        check(600, Some(0.01), &[&[0, 600], &[0, 530, 600]], kind, tolerance);
    }
}

/// Changing a token leaves all outputs before it bit for bit as they were.
#[test]
fn nothing_comes_from_the_future() {
    let numbers = |seed| randn(seed, &[1, 700, 2, 8]).to_kind(Kind::Float);
    let (q, k, v) = (numbers(1), numbers(2), numbers(3));
    let decay = Decay::Head(Tensor::from_slice(&[-0.1f32, -0.5]));
    let tile = [Tile { q: 0..700, k: 0..700, ahead: 0 }];
    let before = forward(&q, &k, &v, &decay, &tile, SCALE).unwrap();
    for changed in [1, 300, 511, 512, 699] {
        let v = v.copy();
        let _ = v.select(1, changed).fill_(7.0);
        let after = forward(&q, &k, &v, &decay, &tile, SCALE).unwrap();
        assert!(before.narrow(1, 0, changed).equal(&after.narrow(1, 0, changed)), "token {changed}");
        assert!(!before.select(1, changed).equal(&after.select(1, changed)), "token {changed}");
    }
}

#[test]
fn a_decay_per_token_is_refused() {
    let x = Tensor::zeros([1, 4, 2, 3], (Kind::Float, Device::Cpu));
    let decay = Decay::Token(Tensor::zeros([1, 4, 2], (Kind::Float, Device::Cpu)));
    let error = forward(&x, &x, &x, &decay, &[], SCALE).unwrap_err().to_string();
    assert!(error.contains("log_decay: found shape [1, 4, 2], expected [H] = [2] or none"), "{error}");
}
