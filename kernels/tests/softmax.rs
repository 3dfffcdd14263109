//! Softmax attention against the f64 oracle: both engines, forward and backward, over the tilings that the runtime
//! uses.

use std::ops::Range;

use kernels::softmax::{self, Tile, blockwise, oracle};
use kernels::testing::{assert_close, cuda, randn, relative_rms};
use kernels::{Error, Result};
use tch::{Device, Kind, Tensor};

type Forward = fn(&Tensor, &Tensor, &Tensor, &[Tile], f64) -> Result<(Tensor, Tensor)>;
type Backward =
    fn(&Tensor, &Tensor, &Tensor, &Tensor, &Tensor, &Tensor, &[Tile], f64) -> Result<(Tensor, Tensor, Tensor)>;

const ENGINES: [(&str, Forward, Backward); 2] =
    [("default", softmax::forward, softmax::backward), ("blockwise", blockwise::forward, blockwise::backward)];

fn tile(q: Range<i64>, k: Range<i64>, causal: bool) -> Tile {
    Tile { q, k, causal }
}

fn whole(tq: i64, tk: i64, causal: bool) -> Vec<Tile> {
    vec![tile(0..tq, 0..tk, causal)]
}

struct Case {
    name: &'static str,
    b: i64,
    tq: i64,
    tk: i64,
    h: i64,
    hkv: i64,
    k: i64,
    v: i64,
    tiles: Vec<Tile>,
}

struct Inputs {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_o: Tensor,
    scale: f64,
}

impl Case {
    fn is_one_full_tile(&self) -> bool {
        self.b * self.tq * self.tk > 0
            && self.tiles.len() == 1
            && (&self.tiles[0].q, &self.tiles[0].k) == (&(0..self.tq), &(0..self.tk))
    }

    fn inputs(&self, kind: Kind) -> Inputs {
        self.inputs_on(Device::Cpu, kind)
    }

    fn inputs_on(&self, device: Device, kind: Kind) -> Inputs {
        let numbers = |seed, size: [i64; 4]| randn(seed, &size).to_kind(kind).to_device(device);
        Inputs {
            q: numbers(7, [self.b, self.tq, self.h, self.k]),
            k: numbers(8, [self.b, self.tk, self.hkv, self.k]),
            v: numbers(9, [self.b, self.tk, self.hkv, self.v]),
            d_o: numbers(10, [self.b, self.tq, self.h, self.v]),
            scale: 1.3 / (self.k as f64).sqrt(),
        }
    }
}

fn cases() -> Vec<Case> {
    let case = |name, [b, tq, tk, h, hkv, k, v]: [i64; 7], tiles| Case { name, b, tq, tk, h, hkv, k, v, tiles };
    let documents = vec![
        tile(0..13, 0..40, true),
        tile(13..14, 40..41, true),
        tile(14..14, 41..41, true),
        tile(20..57, 41..78, true),
        tile(57..63, 70..70, false),
        tile(63..70, 60..97, false),
    ];
    let shuffled = vec![tile(40..71, 0..31, true), tile(0..40, 20..71, true)];
    vec![
        case("causal", [2, 63, 63, 4, 4, 16, 16], whole(63, 63, true)),
        case("causal across blocks", [1, 700, 700, 2, 1, 32, 32], whole(700, 700, true)),
        case("causal with offset, groups of 4, K > V", [2, 37, 101, 8, 2, 20, 12], whole(37, 101, true)),
        case("causal with offset 1", [1, 530, 531, 2, 2, 8, 8], whole(530, 531, true)),
        case("causal with offset, groups of 4, wide", [1, 200, 456, 8, 2, 128, 128], whole(200, 456, true)),
        case("unmasked, groups of 2, K < V", [3, 33, 5, 4, 2, 7, 24], whole(33, 5, false)),
        case("unmasked across blocks", [1, 600, 1000, 3, 1, 16, 16], whole(600, 1000, false)),
        case("one query", [1, 1, 1000, 4, 1, 64, 128], whole(1, 1000, true)),
        case("one query, groups of 4", [2, 1, 130, 4, 1, 64, 64], whole(1, 130, true)),
        case("one dimension", [1, 9, 9, 1, 1, 1, 1], whole(9, 9, true)),
        case("documents, gaps and empty tiles", [2, 75, 97, 4, 2, 16, 8], documents),
        case("tiles out of order, keys overlap", [1, 71, 71, 2, 2, 16, 16], shuffled),
        case("no tiles", [1, 5, 6, 2, 2, 4, 4], vec![]),
        case("no queries", [1, 0, 6, 2, 1, 4, 4], whole(0, 6, true)),
        case("no keys", [1, 5, 0, 2, 1, 4, 4], whole(5, 0, false)),
        case("nothing", [2, 0, 0, 2, 1, 4, 4], whole(0, 0, true)),
        case("no batch", [0, 5, 5, 2, 1, 4, 4], whole(5, 5, true)),
    ]
}

/// Compares log-sum-exps: minus infinity in the same places, close elsewhere.
fn assert_close_lse(name: &str, ours: &Tensor, reference: &Tensor, tolerance: f64) {
    let empty = |x: &Tensor| x.eq(f64::NEG_INFINITY);
    assert_eq!(empty(ours), empty(reference), "{name}: rows without keys");
    let finite = |x: &Tensor| x.masked_fill(&empty(x), 0.0);
    assert_close(name, &finite(ours), &finite(reference), tolerance);
}

fn assert_matches_oracle(device: Device, kind: Kind, tolerance: f64) {
    for case in cases() {
        let Inputs { q, k, v, d_o, scale } = case.inputs_on(device, kind);
        let (o_ref, lse_ref) = oracle::forward(&q, &k, &v, &case.tiles, scale).unwrap();
        let (dq_ref, dk_ref, dv_ref) =
            oracle::backward(&q, &k, &v, &o_ref, &lse_ref, &d_o, &case.tiles, scale).unwrap();
        for (engine, forward, backward) in ENGINES {
            let name = |tensor| format!("{}, {engine}, {kind:?}: {tensor}", case.name);
            let (o, lse) = forward(&q, &k, &v, &case.tiles, scale).unwrap();
            let (dq, dk, dv) = backward(&q, &k, &v, &o, &lse, &d_o, &case.tiles, scale).unwrap();
            for x in [&o, &lse, &dq, &dk, &dv] {
                assert_eq!(x.kind(), kind, "{}", name("kind"));
                assert!(x.is_contiguous(), "{}", name("contiguous"));
            }
            assert_close(&name("o"), &o, &o_ref, tolerance);
            assert_close_lse(&name("lse"), &lse, &lse_ref, tolerance);
            assert_close(&name("dq"), &dq, &dq_ref, tolerance);
            assert_close(&name("dk"), &dk, &dk_ref, tolerance);
            assert_close(&name("dv"), &dv, &dv_ref, tolerance);
        }
    }
}

#[test]
fn f64_matches_the_oracle() {
    assert_matches_oracle(Device::Cpu, Kind::Double, 1e-10);
}

#[test]
fn f32_matches_the_oracle() {
    assert_matches_oracle(Device::Cpu, Kind::Float, 1e-5);
}

#[test]
fn cuda_matches_the_oracle() {
    let Some(device) = cuda() else { return };
    assert_matches_oracle(device, Kind::Double, 1e-10);
    assert_matches_oracle(device, Kind::Float, 1e-5);
}

/// The textbook in the inputs' own kind, with the gradients of libtorch's autograd: `[o, dq, dk, dv]`.
fn textbook(inputs: &Inputs, causal: bool) -> [Tensor; 4] {
    let [q, k, v] = [&inputs.q, &inputs.k, &inputs.v].map(|x| x.copy().set_requires_grad(true));
    let group = q.size()[2] / k.size()[2];
    let heads = |x: &Tensor, group: i64| x.repeat_interleave_self_int(group, 2, None).transpose(1, 2);
    let mut scores = heads(&q, 1).matmul(&heads(&k, group).transpose(2, 3)) * inputs.scale;
    if causal {
        let (tq, tk) = (q.size()[1], k.size()[1]);
        let ahead = Tensor::ones([tq, tk], (Kind::Bool, q.device())).triu(tk - tq + 1);
        scores = scores.masked_fill(&ahead, f64::NEG_INFINITY);
    }
    let o = scores.softmax(-1, None).matmul(&heads(&v, group)).transpose(1, 2);
    let grads = Tensor::run_backward(&[(&o * &inputs.d_o).sum(o.kind())], &[&q, &k, &v], false, false);
    let [dq, dk, dv] = <[Tensor; 3]>::try_from(grads).unwrap();
    [o.detach(), dq, dk, dv]
}

fn oracle_gradients(inputs: &Inputs, tiles: &[Tile]) -> [Tensor; 4] {
    let Inputs { q, k, v, d_o, scale } = inputs;
    let (o, lse) = oracle::forward(q, k, v, tiles, *scale).unwrap();
    let (dq, dk, dv) = oracle::backward(q, k, v, &o, &lse, d_o, tiles, *scale).unwrap();
    [o, dq, dk, dv]
}

#[test]
fn the_oracle_agrees_with_autograd() {
    for case in cases().into_iter().filter(Case::is_one_full_tile) {
        let inputs = case.inputs(Kind::Double);
        let ours = oracle_gradients(&inputs, &case.tiles);
        let reference = textbook(&inputs, case.tiles[0].causal);
        for (tensor, (ours, reference)) in ["o", "dq", "dk", "dv"].iter().zip(ours.iter().zip(&reference)) {
            assert_close(&format!("{}: {tensor}", case.name), ours, reference, 1e-12);
        }
    }
}

#[test]
fn bf16_errs_at_most_twice_as_much_as_the_textbook() {
    assert_bf16_errs_little(Device::Cpu);
}

#[test]
fn bf16_errs_at_most_twice_as_much_as_the_textbook_on_cuda() {
    let Some(device) = cuda() else { return };
    assert_bf16_errs_little(device);
}

fn assert_bf16_errs_little(device: Device) {
    for case in cases().into_iter().filter(Case::is_one_full_tile) {
        let inputs = case.inputs_on(device, Kind::BFloat16);
        let reference = oracle_gradients(&inputs, &case.tiles);
        let naive = textbook(&inputs, case.tiles[0].causal);
        let Inputs { q, k, v, d_o, scale } = &inputs;
        for (engine, forward, backward) in ENGINES {
            let (o, lse) = forward(q, k, v, &case.tiles, *scale).unwrap();
            let (dq, dk, dv) = backward(q, k, v, &o, &lse, d_o, &case.tiles, *scale).unwrap();
            assert_eq!([&o, &dq].map(Tensor::kind), [Kind::BFloat16; 2]);
            assert_eq!([&lse, &dk, &dv].map(Tensor::kind), [Kind::Float; 3]);
            for (index, (tensor, ours)) in [("o", o), ("dq", dq), ("dk", dk), ("dv", dv)].into_iter().enumerate() {
                let allowed = 2.0 * relative_rms(&naive[index], &reference[index]);
                assert!(allowed < 0.1, "the textbook itself is off by {allowed}");
                assert_close(&format!("{}, {engine}: {tensor}", case.name), &ours, &reference[index], allowed);
            }
        }
    }
}

#[test]
fn bf16_partial_sums_are_as_accurate_as_f32() {
    for case in cases() {
        let Inputs { q, k, v, d_o, scale } = case.inputs(Kind::BFloat16);
        let (o, lse) = oracle::forward(&q, &k, &v, &case.tiles, scale).unwrap();
        let (_, dk_ref, dv_ref) = oracle::backward(&q, &k, &v, &o, &lse, &d_o, &case.tiles, scale).unwrap();
        for (engine, _, backward) in ENGINES {
            let (_, dk, dv) = backward(&q, &k, &v, &o, &lse, &d_o, &case.tiles, scale).unwrap();
            assert_close(&format!("{}, {engine}: dk", case.name), &dk, &dk_ref, 1e-5);
            assert_close(&format!("{}, {engine}: dv", case.name), &dv, &dv_ref, 1e-5);
        }
    }
}

/// A rank's queries against the keys of every rank in turn, as in a ring: the merged result and the summed gradients
/// are those of the whole.
#[test]
fn partial_key_ranges_merge_to_the_whole() {
    let shards = [0..40, 40..71, 71..100];
    let case =
        Case { name: "", b: 2, tq: 31, tk: 100, h: 4, hkv: 2, k: 16, v: 12, tiles: vec![tile(0..31, 0..71, true)] };
    let steps = [tile(0..31, 0..40, false), tile(0..31, 0..31, true), tile(0..31, 0..0, false)];
    for (kind, tolerance) in [(Kind::Double, 1e-10), (Kind::Float, 1e-5)] {
        let inputs = case.inputs(kind);
        let Inputs { q, k, v, d_o, scale } = &inputs;
        let (o_ref, lse_ref) = oracle::forward(q, k, v, &case.tiles, *scale).unwrap();
        let reference = oracle_gradients(&inputs, &case.tiles);
        let on_shard =
            |x: &Tensor, shard: usize| x.narrow(1, shards[shard].start, shards[shard].end - shards[shard].start);
        for (engine, forward, backward) in ENGINES {
            // The last shard, which shows nothing, comes first and last.
            let mut merged: Option<(Tensor, Tensor)> = None;
            for shard in [2, 1, 0, 2] {
                let (k, v) = (on_shard(k, shard), on_shard(v, shard));
                let (o, lse) = forward(q, &k, &v, std::slice::from_ref(&steps[shard]), *scale).unwrap();
                merged = Some(match merged {
                    None => (o, lse),
                    Some((o1, lse1)) => softmax::merge(&o1, &lse1, &o, &lse).unwrap(),
                });
            }
            let (o, lse) = merged.unwrap();
            assert_close(&format!("{engine}: o"), &o, &o_ref, tolerance);
            assert_close_lse(&format!("{engine}: lse"), &lse, &lse_ref, tolerance);

            let mut dq = q.zeros_like();
            let (mut dk, mut dv) = (Vec::new(), Vec::new());
            for (shard, step) in steps.iter().enumerate() {
                let (k, v) = (on_shard(k, shard), on_shard(v, shard));
                let grads = backward(q, &k, &v, &o, &lse, d_o, std::slice::from_ref(step), *scale).unwrap();
                dq += grads.0;
                dk.push(grads.1);
                dv.push(grads.2);
            }
            assert_close(&format!("{engine}: dq"), &dq, &reference[1], tolerance);
            assert_close(&format!("{engine}: dk"), &Tensor::cat(&dk, 1), &reference[2], tolerance);
            assert_close(&format!("{engine}: dv"), &Tensor::cat(&dv, 1), &reference[3], tolerance);
        }
    }
}

#[test]
fn merge_takes_bf16_outputs_and_sides_without_keys() {
    let o1 = Tensor::from_slice(&[1f32, 2., 3., 4.]).view([1, 4, 1, 1]).to_kind(Kind::BFloat16);
    let o2 = Tensor::from_slice(&[5f32, 6., 7., 8.]).view([1, 4, 1, 1]);
    let none = f32::NEG_INFINITY;
    let lse1 = Tensor::from_slice(&[0f32, none, 3., none]).view([1, 1, 4]);
    let lse2 = Tensor::from_slice(&[0f32, 1., none, none]).view([1, 1, 4]);
    let (o, lse) = softmax::merge(&o1, &lse1, &o2, &lse2).unwrap();
    assert_eq!((o.kind(), lse.kind()), (Kind::Float, Kind::Float));
    assert_eq!(Vec::<f32>::try_from(o.flatten(0, -1)).unwrap(), [3., 6., 3., 0.]);
    assert_eq!(Vec::<f32>::try_from(lse.flatten(0, -1)).unwrap(), [2f32.ln(), 1., 3., none]);
}

#[test]
fn a_later_token_changes_no_bit_before_it() {
    let (t, offset) = (300, 77);
    for kind in [Kind::Float, Kind::BFloat16] {
        let tiles = whole(t, t + offset, true);
        let case = Case { name: "", b: 1, tq: t, tk: t + offset, h: 4, hkv: 2, k: 16, v: 16, tiles };
        let Inputs { q, k, v, scale, .. } = case.inputs(kind);
        for (engine, forward, _) in ENGINES {
            let (o, lse) = forward(&q, &k, &v, &case.tiles, scale).unwrap();
            for token in [1, 63, 64, 150, 299] {
                let (q, k, v) = (q.copy(), k.copy(), v.copy());
                let _ = q.narrow(1, token, 1).fill_(3.0);
                let _ = k.narrow(1, offset + token, 1).fill_(-5.0);
                let _ = v.narrow(1, offset + token, 1).fill_(100.0);
                let (changed_o, changed_lse) = forward(&q, &k, &v, &case.tiles, scale).unwrap();
                assert_eq!(
                    changed_o.narrow(1, 0, token),
                    o.narrow(1, 0, token),
                    "{engine}, {kind:?}, token {token}: o"
                );
                let same_lse = changed_lse.narrow(2, 0, token) == lse.narrow(2, 0, token);
                assert!(same_lse, "{engine}, {kind:?}, token {token}: lse");
                assert_ne!(changed_o.narrow(1, token, 1), o.narrow(1, token, 1));
            }
        }
    }
}

#[test]
fn a_neighbouring_document_changes_no_bit() {
    let tiles = vec![tile(0..30, 0..30, true), tile(30..61, 30..61, true), tile(61..90, 61..90, true)];
    let case = Case { name: "", b: 2, tq: 90, tk: 90, h: 4, hkv: 2, k: 16, v: 16, tiles };
    let Inputs { q, k, v, d_o, scale } = case.inputs(Kind::Float);
    for (engine, forward, backward) in ENGINES {
        let run = |q: &Tensor, k: &Tensor, v: &Tensor, d_o: &Tensor| {
            let (o, lse) = forward(q, k, v, &case.tiles, scale).unwrap();
            let (dq, dk, dv) = backward(q, k, v, &o, &lse, d_o, &case.tiles, scale).unwrap();
            [o, dq, dk, dv]
        };
        let before = run(&q, &k, &v, &d_o);
        let spoil = |x: &Tensor| {
            let x = x.copy();
            let _ = x.narrow(1, 30, 31).fill_(f64::NAN);
            x
        };
        let after = run(&spoil(&q), &spoil(&k), &spoil(&v), &spoil(&d_o));
        for (before, after) in before.iter().zip(&after) {
            for (start, len) in [(0, 30), (61, 29)] {
                assert_eq!(after.narrow(1, start, len), before.narrow(1, start, len), "{engine}");
            }
        }
    }
}

#[test]
fn views_are_taken_and_autograd_records_nothing() {
    let case = Case { name: "", b: 2, tq: 20, tk: 20, h: 4, hkv: 2, k: 8, v: 8, tiles: whole(20, 20, true) };
    let Inputs { q, k, v, d_o, scale } = case.inputs(Kind::Double);
    let view = |x: &Tensor| x.transpose(1, 2).contiguous().transpose(1, 2).set_requires_grad(true);
    for (engine, forward, backward) in ENGINES {
        let (o_ref, lse_ref) = forward(&q, &k, &v, &case.tiles, scale).unwrap();
        let (dq_ref, ..) = backward(&q, &k, &v, &o_ref, &lse_ref, &d_o, &case.tiles, scale).unwrap();
        let (o, lse) = forward(&view(&q), &view(&k), &view(&v), &case.tiles, scale).unwrap();
        let (dq, dk, dv) =
            backward(&view(&q), &view(&k), &view(&v), &view(&o), &lse, &view(&d_o), &case.tiles, scale).unwrap();
        assert_close(&format!("{engine}: o"), &o, &o_ref, 0.0);
        assert_close(&format!("{engine}: dq"), &dq, &dq_ref, 1e-14);
        assert!([o, lse, dq, dk, dv].iter().all(|x| !x.requires_grad()), "{engine}");
    }
}

#[test]
fn arguments_that_disagree_are_errors() {
    let zeros = |size: [i64; 4]| Tensor::zeros(size, (Kind::Float, Device::Cpu));
    let q = zeros([1, 6, 4, 8]);
    let kv = zeros([1, 9, 2, 8]);
    let message = |q: &Tensor, k: &Tensor, v: &Tensor, tiles: &[Tile]| {
        softmax::forward(q, k, v, tiles, 1.0).unwrap_err().to_string()
    };
    let tiles = |tiles: &[Tile]| message(&q, &kv, &kv, tiles);
    for (found, part) in [
        (message(&q.squeeze_dim(0), &kv, &kv, &[]), "q: found shape [6, 4, 8]"),
        (message(&q, &zeros([2, 9, 2, 8]), &kv, &[]), "k: found shape [2, 9, 2, 8], expected [1, 9, 2, 8]"),
        (message(&q, &kv, &zeros([1, 8, 2, 8]), &[]), "v: found shape [1, 8, 2, 8], expected [1, 9, 2, 8]"),
        (message(&q, &zeros([1, 9, 3, 8]), &zeros([1, 9, 3, 8]), &[]), "divides the 4 query heads"),
        (message(&q, &kv.to_kind(Kind::BFloat16), &kv, &[]), "k: found BFloat16, expected Float"),
        (message(&q.to_kind(Kind::Int), &kv, &kv, &[]), "q: found Int"),
        (tiles(&[tile(0..7, 0..9, false)]), "tile 0: found Tile { q: 0..7"),
        (tiles(&[tile(0..1, 0..1, false), tile(1..2, -1..9, false)]), "expected a range of keys within 0..9"),
        (tiles(&[tile(Range { start: 3, end: 2 }, 0..1, false)]), "expected a range of queries within 0..6"),
        (tiles(&[tile(0..6, 0..5, true)]), "at least as many keys as queries when causal, not 5 for 6"),
        (tiles(&[tile(3..6, 0..5, false), tile(0..4, 0..5, false)]), "disjoint from those of tile 1, 0..4"),
    ] {
        assert!(found.contains(part), "{found:?} does not say {part:?}");
    }
    let lse = Tensor::zeros([1, 6, 4], (Kind::Float, Device::Cpu));
    let error = softmax::backward(&q, &kv, &kv, &q, &lse, &q, &[], 1.0).unwrap_err();
    assert!(matches!(error, Error::Shape { tensor: "lse", .. }), "{error}");
    let error = softmax::merge(&q, &lse, &q, &lse).unwrap_err();
    assert!(matches!(error, Error::Shape { tensor: "lse1", .. }), "{error}");
}
