//! `lasp attend` against the oracles, and on every input that it must refuse.

mod common;

use std::path::{Path, PathBuf};

use common::{Ran, Ranks, command, mpi, run};
use kernels::linear::Inputs;
use kernels::linear::oracle::Whole;
use kernels::softmax::{Tile, oracle as softmax};
use kernels::testing::assert_close_at;
use lasp_tests::randn;
use runtime::sequence::method;
use runtime::tensor_file;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

type Tensors = Vec<(String, Tensor)>;

const CU: [i64; 6] = [0, 3, 43, 43, 44, 67];
/// Documents that are shorter than any number of ranks.
const SHORT: [i64; 6] = [0, 1, 1, 3, 4, 6];
const SCALE: f64 = 0.7;

fn kind_of(dtype: &str) -> Kind {
    match dtype {
        "f64" => Kind::Double,
        "f32" => Kind::Float,
        _ => Kind::BFloat16,
    }
}

fn tolerance(dtype: &str) -> f64 {
    match dtype {
        "f64" => 1e-10,
        "f32" => 1e-5,
        _ => 1e-2,
    }
}

/// Runs `lasp attend` on `tensors` and gives its results.
struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn attend(&self, tensors: &Tensors, ranks: Ranks, args: &[&str]) -> Ran {
        tensor_file::write(&self.path("in"), tensors, &[]).unwrap();
        let mut command = command(ranks);
        command.arg("attend").arg("--input").arg(self.path("in")).arg("--output").arg(self.path("out")).args(args);
        if let Ranks::Threads(n) = ranks {
            command.args(["--ranks", &n.to_string()]);
        }
        run(&mut command)
    }

    fn results(&self) -> std::collections::BTreeMap<String, Tensor> {
        tensor_file::read(&self.path("out"), Device::Cpu).unwrap()
    }
}

/// Every tensor of `expected` is among the results, in its shape and the kind asked for; and nothing else is.
#[track_caller]
fn compare(folder: &Folder, name: &str, dtype: &str, expected: &[(&str, &Tensor)]) {
    let results = folder.results();
    let mut names: Vec<&str> = expected.iter().map(|(name, _)| *name).collect();
    names.sort();
    assert_eq!(results.keys().map(String::as_str).collect::<Vec<_>>(), names, "{name}");
    for (tensor, reference) in expected {
        let ours = &results[*tensor];
        assert_eq!(ours.kind(), kind_of(dtype), "{name}: {tensor}");
        // Some gradients are zero: inputs are of order 1.
        let scale = kernels::testing::rms(reference).max(0.01);
        assert_close_at(&format!("{tensor}, {name}"), ours, reference, scale, tolerance(dtype));
    }
}

#[derive(Clone, Copy, Debug)]
struct Linear {
    decay: &'static str,
    packed: bool,
    /// Boundaries of the packed documents; one that is not packed has as many tokens.
    cu: [i64; 6],
    initial: bool,
    causal: bool,
    layout: &'static str,
    dtype: &'static str,
    method: &'static str,
    ranks: Ranks,
}

fn check_linear(case: Linear) {
    let (b, t, h, dk, dv) = (if case.packed { 1 } else { 2 }, case.cu[5], 3, 6, 5);
    let kind = kind_of(case.dtype);
    // As the program will see them.
    let rounded = |x: Tensor| x.to_kind(kind).to_kind(Kind::Double);
    let make = |seed, shape: &[i64]| rounded(randn(seed, shape));
    let (q, k, v, d_o) =
        (make(1, &[b, t, h, dk]), make(2, &[b, t, h, dk]), make(3, &[b, t, h, dv]), make(6, &[b, t, h, dv]));
    let decay = |shape: &[i64]| Some(rounded(randn(4, shape).abs() * -0.1));
    let log_decay = match case.decay {
        "head" => decay(&[h]),
        "token" => decay(&[b, t, h]),
        "channel" => decay(&[b, t, h, dk]),
        _ => None,
    };
    let states = if case.packed { case.cu.len() as i64 - 1 } else { b };
    let initial = case.initial.then(|| make(5, &[states, h, dk, dv]));
    let mut tensors: Tensors = vec![];
    let mut put = |name: &str, x: &Tensor| tensors.push((name.to_owned(), x.shallow_clone()));
    for (name, x) in [("q", &q), ("k", &k), ("v", &v), ("do", &d_o)] {
        put(name, x);
    }
    log_decay.iter().for_each(|x| put("log_decay", x));
    initial.iter().for_each(|x| put("initial_state", x));
    if case.packed {
        let cu = Tensor::from_slice(&case.cu);
        put("cu_seqlens", &if case.layout == "zigzag" { cu.to_kind(Kind::Int) } else { cu });
    }
    let folder = Folder::new();
    let mask = if case.causal { "causal" } else { "full" };
    let scale = SCALE.to_string();
    let args = [
        ["--mixer", "linear"],
        ["--method", case.method],
        ["--layout", case.layout],
        ["--mask", mask],
        ["--dtype", case.dtype],
        ["--chunk", "16"],
        ["--scale", &scale],
    ];
    folder.attend(&tensors, case.ranks, &args.concat()).succeeds();

    let inputs = Inputs::new(&q, &k, &v, log_decay.as_ref()).unwrap();
    let whole = Whole {
        inputs: &inputs,
        cu_seqlens: case.packed.then_some(&case.cu[..]),
        initial_state: initial.as_ref(),
        causal: case.causal,
        scale: SCALE,
    };
    let (out, grads) = (whole.forward().unwrap(), whole.backward(&d_o).unwrap());
    let mut expected = vec![
        ("o", &out.o),
        ("final_state", &out.final_state),
        ("dq", &grads.dq),
        ("dk", &grads.dk),
        ("dv", &grads.dv),
        ("dinitial_state", &grads.dinitial_state),
    ];
    expected.extend(grads.dlog_decay.as_ref().map(|dg| ("dlog_decay", dg)));
    if method::left_product(case.method).is_some() {
        expected.retain(|(name, _)| !name.ends_with("state"));
    }
    compare(&folder, &format!("{case:?}"), case.dtype, &expected);
}

const LINEAR: Linear = Linear {
    decay: "none",
    packed: true,
    cu: CU,
    initial: true,
    causal: true,
    layout: "zigzag",
    dtype: "f64",
    method: "lasp2",
    ranks: Ranks::Threads(3),
};

#[test]
fn linear_with_every_decay() {
    for decay in ["none", "head", "token", "channel"] {
        check_linear(Linear { decay, ..LINEAR });
        check_linear(Linear { decay, packed: false, initial: false, layout: "contiguous", ..LINEAR });
        check_linear(Linear { decay, initial: false, ranks: Ranks::Threads(1), ..LINEAR });
    }
}

#[test]
fn linear_by_every_method() {
    for method in method::SCANS.iter().copied().chain(["lasp2:splits=3", "all_scan:blocks=2", "hierarchical:node=2"]) {
        check_linear(Linear { method, decay: "channel", ranks: Ranks::Threads(4), ..LINEAR });
    }
    for (method, decay) in method::LEFT_PRODUCTS.iter().flat_map(|&method| [(method, "none"), (method, "head")]) {
        check_linear(Linear { method, decay, initial: false, ranks: Ranks::Threads(4), ..LINEAR });
        let whole = Linear { method, decay, packed: false, initial: false, layout: "contiguous", ..LINEAR };
        check_linear(Linear { ranks: Ranks::Threads(5), ..whole });
        check_linear(Linear { dtype: "bf16", ranks: Ranks::Threads(2), ..whole });
    }
}

#[test]
fn linear_without_mask() {
    for packed in [false, true] {
        check_linear(Linear { packed, causal: false, ..LINEAR });
        check_linear(Linear { packed, causal: false, initial: false, layout: "contiguous", ..LINEAR });
    }
}

#[test]
fn linear_in_f32_and_bf16() {
    for dtype in ["f32", "bf16"] {
        for decay in ["none", "head", "token", "channel"] {
            check_linear(Linear { decay, dtype, ..LINEAR });
        }
    }
}

#[test]
fn linear_under_mpirun() {
    if mpi() {
        for decay in ["head", "channel"] {
            check_linear(Linear { decay, ranks: Ranks::Mpi(2), ..LINEAR });
        }
        check_linear(Linear { packed: false, dtype: "bf16", ranks: Ranks::Mpi(3), ..LINEAR });
    }
}

#[derive(Clone, Copy, Debug)]
struct Softmax {
    packed: bool,
    cu: [i64; 6],
    kv_heads: i64,
    causal: bool,
    layout: &'static str,
    dtype: &'static str,
    method: &'static str,
    ranks: Ranks,
}

const SOFTMAX: Softmax = Softmax {
    packed: true,
    cu: CU,
    kv_heads: 2,
    causal: true,
    layout: "zigzag",
    dtype: "f64",
    method: "lasp2h",
    ranks: Ranks::Threads(3),
};

fn check_softmax(case: Softmax) {
    let Softmax { packed, cu, kv_heads, causal, layout, dtype, method, ranks } = case;
    let (b, t, h, dk, dv) = (if packed { 1 } else { 2 }, cu[5], 4, 8, 6);
    let make = |seed, shape: &[i64]| randn(seed, shape).to_kind(kind_of(dtype)).to_kind(Kind::Double);
    let (q, k, v) = (make(1, &[b, t, h, dk]), make(2, &[b, t, kv_heads, dk]), make(3, &[b, t, kv_heads, dv]));
    let d_o = make(4, &[b, t, h, dv]);
    let mut tensors: Tensors =
        [("q", &q), ("k", &k), ("v", &v), ("do", &d_o)].map(|(name, x)| (name.to_owned(), x.shallow_clone())).into();
    let documents: &[i64] = if packed { &cu } else { &[0, t] };
    if packed {
        tensors.push(("cu_seqlens".to_owned(), Tensor::from_slice(&cu)));
    }
    let folder = Folder::new();
    let mask = if causal { "causal" } else { "full" };
    let args = ["--mixer", "softmax", "--method", method, "--layout", layout, "--mask", mask, "--dtype", dtype];
    folder.attend(&tensors, ranks, &args).succeeds();

    let tiles: Vec<Tile> = documents
        .windows(2)
        .map(|w| Tile { q: w[0]..w[1], k: w[0]..w[1], causal })
        .filter(|t| !t.q.is_empty())
        .collect();
    let scale = 1.0 / (dk as f64).sqrt();
    let (o, lse) = softmax::forward(&q, &k, &v, &tiles, scale).unwrap();
    let (dq, dk, dv) = softmax::backward(&q, &k, &v, &o, &lse, &d_o, &tiles, scale).unwrap();
    compare(&folder, &format!("{case:?}"), dtype, &[("o", &o), ("dq", &dq), ("dk", &dk), ("dv", &dv)]);
}

#[test]
fn softmax_with_grouped_heads() {
    for packed in [false, true] {
        for (kv_heads, causal, layout) in [(4, true, "contiguous"), (2, true, "zigzag"), (1, false, "zigzag")] {
            check_softmax(Softmax { packed, kv_heads, causal, layout, ..SOFTMAX });
        }
    }
    for dtype in ["f32", "bf16"] {
        check_softmax(Softmax { dtype, ..SOFTMAX });
    }
    if mpi() {
        check_softmax(Softmax { ranks: Ranks::Mpi(2), ..SOFTMAX });
    }
}

#[test]
fn softmax_by_every_method() {
    for (i, &method) in method::ATTENTIONS.iter().enumerate() {
        check_softmax(Softmax { method, layout: ["zigzag", "contiguous"][i % 2], ranks: Ranks::Threads(4), ..SOFTMAX });
    }
}

/// The cost model's choice, as the log has it, gives the bits that the method gives when it is named.
#[test]
fn auto_is_the_method_that_the_log_names() {
    let x = |seed, heads| (randn(seed, &[1, 67, heads, 8]) * 0.3).to_kind(Kind::Float);
    let mut cases = vec![Ranks::Threads(1), Ranks::Threads(2), Ranks::Threads(4)];
    if mpi() {
        cases.push(Ranks::Mpi(2));
    }
    for (mixer, kv_heads, candidates) in [("linear", 4, "lasp1"), ("softmax", 2, "megatron_sp")] {
        let inputs = [("q", x(1, 4)), ("k", x(2, kv_heads)), ("v", x(3, kv_heads)), ("do", x(4, 4))];
        let mut tensors: Tensors = inputs.map(|(name, x)| (name.to_owned(), x)).into();
        let mut asked = "for 67 tokens on";
        for (case, &ranks) in cases.iter().enumerate() {
            if case == 1 {
                tensors.push(("cu_seqlens".to_owned(), Tensor::from_slice(&[0i64, 30, 30, 67])));
                asked = "for 67 tokens in 2 documents on";
            }
            let folder = Folder::new();
            let ran = folder.attend(&tensors, ranks, &["--mixer", mixer, "--method", "auto"]).succeeds();
            assert!(ran.err.contains(asked), "{}", ran.err);
            let chosen =
                ran.err.split("--method auto: ").nth(1).unwrap_or_else(|| panic!("no choice in:\n{}", ran.err));
            let chosen = chosen.split(", for 67 tokens").next().unwrap();
            for method in [candidates, chosen] {
                assert!(ran.err.contains(&format!("  {method}: forward and backward take ")), "{}", ran.err);
            }
            let found = folder.results();
            folder.attend(&tensors, ranks, &["--mixer", mixer, "--method", chosen]).succeeds();
            for (name, x) in folder.results() {
                assert!(x.equal(&found[&name]), "{mixer}, {chosen}, {ranks:?}: {name}");
            }
        }
    }
}

/// Good inputs, to be spoilt.
fn good() -> Tensors {
    let x = |seed| randn(seed, &[1, 9, 2, 4]);
    [("q", x(1)), ("k", x(2)), ("v", x(3))].map(|(name, x)| (name.to_owned(), x)).into()
}

fn with(changes: &[(&str, Tensor)]) -> Tensors {
    let mut tensors = good();
    for (name, x) in changes {
        tensors.retain(|(known, _)| known != name);
        tensors.push(((*name).to_owned(), x.shallow_clone()));
    }
    tensors
}

fn spoilt(x: Tensor, index: &[i64], value: f64) -> Tensor {
    let mut at = x.shallow_clone();
    for &i in index {
        at = at.select(0, i);
    }
    let _ = at.fill_(value);
    x
}

/// The program refuses, says `words` on one line, and leaves the earlier output as it was.
#[track_caller]
fn refused(tensors: &Tensors, args: &[&str], words: &[&str]) {
    refused_on(tensors, Ranks::Threads(2), args, words);
}

#[track_caller]
fn refused_on(tensors: &Tensors, ranks: Ranks, args: &[&str], words: &[&str]) {
    let folder = Folder::new();
    std::fs::write(folder.path("out"), b"as before").unwrap();
    let ran = folder.attend(tensors, ranks, args).fails_with(words);
    let lines: Vec<&str> = ran.err.lines().filter(|line| line.contains(words[0])).collect();
    assert_eq!(lines.len(), 1, "{}", ran.err);
    assert!(words.iter().all(|word| lines[0].contains(word)), "expected {words:?} in {}", lines[0]);
    assert_eq!(std::fs::read(folder.path("out")).unwrap(), b"as before");
}

const AS_LINEAR: [&str; 2] = ["--mixer", "linear"];
const AS_SOFTMAX: [&str; 2] = ["--mixer", "softmax"];

#[test]
fn refuses_wrong_shapes() {
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let linear = |tensor: &str, shape: &[i64], words: &[&str]| {
        let words: Vec<&str> = [&[tensor, "found shape", "expected"], words].concat();
        refused(&with(&[(tensor.strip_prefix("tensor ").unwrap(), zeros(shape))]), &AS_LINEAR, &words);
    };
    linear("tensor q", &[9, 2, 4], &["[9, 2, 4]", "[B, T, H, K]"]);
    linear("tensor q", &[1, 0, 2, 4], &["[1, 0, 2, 4]"]);
    linear("tensor k", &[1, 9, 1, 4], &["[1, 9, 1, 4]", "Hkv = 2"]);
    linear("tensor k", &[1, 8, 2, 4], &["[1, 8, 2, 4]"]);
    linear("tensor v", &[1, 9, 3, 4], &["[1, 9, 3, 4]"]);
    linear("tensor log_decay", &[3], &["[3]", "[H] = [2]"]);
    linear("tensor log_decay", &[1, 9, 2, 3], &["[B, T, H, K] = [1, 9, 2, 4]"]);
    linear("tensor initial_state", &[2, 2, 4, 4], &["[B, H, K, V] = [1, 2, 4, 4]"]);
    linear("tensor do", &[1, 9, 2, 3], &["[1, 9, 2, 4]"]);
    let five_over_two = with(&[("q", zeros(&[1, 9, 5, 4]))]);
    refused(&five_over_two, &AS_SOFTMAX, &["tensor k", "[1, 9, 2, 4]", "divides the 5 heads"]);
    let packed = with(&[("cu_seqlens", Tensor::from_slice(&[0i64, 4, 9])), ("initial_state", zeros(&[1, 2, 4, 4]))]);
    refused(&packed, &AS_LINEAR, &["tensor initial_state", "[N, H, K, V] = [2, 2, 4, 4]"]);
}

#[test]
fn refuses_missing_tensors_and_wrong_kinds() {
    let mut tensors = good();
    tensors.retain(|(name, _)| name != "k");
    refused(&tensors, &AS_LINEAR, &["tensor k is missing", "found q, v"]);
    let whole = Tensor::ones([1, 9, 2, 4], (Kind::Int64, Device::Cpu));
    refused(&with(&[("v", whole)]), &AS_LINEAR, &["tensor v", "i64"]);
    refused(
        &with(&[("cu_seqlens", Tensor::from_slice(&[0f32, 9.0]))]),
        &AS_LINEAR,
        &["tensor cu_seqlens", "f32", "i64"],
    );
    refused(
        &with(&[("cu_seqlens", Tensor::from_slice(&[0i64, 9]).view([1, 2]))]),
        &AS_LINEAR,
        &["tensor cu_seqlens", "[1, 2]"],
    );
}

#[test]
fn refuses_numbers_that_cannot_be_computed_with() {
    let index = [0, 7, 1, 2];
    for (value, shown) in [(f64::NAN, "NaN"), (f64::INFINITY, "inf"), (f64::NEG_INFINITY, "-inf")] {
        for name in ["q", "k", "v", "do"] {
            let tensors = with(&[(name, spoilt(randn(8, &[1, 9, 2, 4]), &index, value))]);
            refused(&tensors, &AS_LINEAR, &[&format!("tensor {name}"), shown, "[0, 7, 1, 2]"]);
        }
    }
    let decay = -randn(9, &[1, 9, 2]).abs();
    let tensors = with(&[("log_decay", spoilt(decay.copy(), &[0, 3, 1], 0.25))]);
    refused(&tensors, &AS_LINEAR, &["tensor log_decay", "0.25", "[0, 3, 1]", "at most 0"]);
    let tensors = with(&[("log_decay", spoilt(decay, &[0, 3, 1], f64::NEG_INFINITY))]);
    refused(&tensors, &AS_LINEAR, &["tensor log_decay", "-inf", "[0, 3, 1]"]);
    let tensors = with(&[("initial_state", spoilt(randn(9, &[1, 2, 4, 4]), &[0, 1, 0, 0], f64::NAN))]);
    refused(&tensors, &AS_LINEAR, &["tensor initial_state", "NaN", "[0, 1, 0, 0]"]);
    let tensors = with(&[("q", spoilt(randn(9, &[1, 9, 2, 4]), &index, 1e300))]);
    refused(&tensors, &[&AS_LINEAR[..], &["--dtype", "f32"]].concat(), &["tensor q", "1e300", "--dtype f32"]);
}

#[test]
fn refuses_boundaries_that_do_not_fit() {
    for cu in [&[0i64, 6, 4, 9][..], &[1, 9], &[0, 8], &[0, 10], &[0], &[]] {
        let tensors = with(&[("cu_seqlens", Tensor::from_slice(cu))]);
        refused(&tensors, &AS_LINEAR, &["cu_seqlens: found", &format!("{cu:?}"), "9"]);
        refused(&tensors, &AS_SOFTMAX, &["cu_seqlens: found"]);
    }
    let two = |seed| randn(seed, &[2, 9, 2, 4]);
    let tensors = with(&[("q", two(1)), ("k", two(2)), ("v", two(3)), ("cu_seqlens", Tensor::from_slice(&[0i64, 9]))]);
    refused(&tensors, &AS_LINEAR, &["tensor cu_seqlens", "B = 2", "B = 1"]);
}

#[test]
fn refuses_what_does_not_go_together() {
    let with_decay = with(&[("log_decay", -randn(9, &[2]).abs())]);
    refused(&with_decay, &AS_SOFTMAX, &["tensor log_decay", "--mixer softmax"]);
    refused(&with_decay, &["--mixer", "linear", "--mask", "full"], &["tensor log_decay", "--mask full"]);
    refused(
        &with(&[("initial_state", randn(9, &[1, 2, 4, 4]))]),
        &AS_SOFTMAX,
        &["tensor initial_state", "--mixer softmax"],
    );
    for method in method::LEFT_PRODUCTS {
        let args = ["--mixer", "linear", "--method", method];
        let gates = with(&[("log_decay", -randn(9, &[1, 9, 2]).abs())]);
        refused(&gates, &args, &["tensor log_decay", "[1, 9, 2]", "[H] = [2]", method, "--method lasp2"]);
        let state = with(&[("initial_state", randn(9, &[1, 2, 4, 4]))]);
        refused(&state, &args, &["tensor initial_state", method, "--method lasp2"]);
        refused(
            &good(),
            &[&args[..], &["--mask", "full"]].concat(),
            &["--method", method, "--mask full", "--mask causal"],
        );
    }
    for mixer in ["linear", "softmax"] {
        let args = ["--mixer", mixer, "--method", "auto", "--mask", "full"];
        refused(&good(), &args, &["--method", "auto", "--mask full", "causal attention only"]);
    }
    refused(&good(), &["--mixer", "linear", "--method", "lasp2h"], &["--method", "lasp2h", "linear", "lasp2"]);
    refused(&good(), &["--mixer", "softmax", "--method", "lasp2"], &["--method", "softmax", "lasp2h"]);
    refused(&good(), &["--mixer", "linear", "--chunk", "48"], &["chunk", "48", "power of two"]);
    if !tch::Cuda::is_available() && !Path::new("/proc/driver/nvidia").exists() {
        refused(&good(), &["--mixer", "linear", "--device", "cuda"], &["--device cuda", "lasp doctor"]);
    }
}

#[test]
fn refuses_alike_under_mpirun() {
    if mpi() {
        let tensors = with(&[("q", spoilt(randn(8, &[1, 9, 2, 4]), &[0, 7, 1, 2], f64::NAN))]);
        refused_on(&tensors, Ranks::Mpi(2), &AS_LINEAR, &["tensor q", "NaN", "rank 0: "]);
        refused_on(&good(), Ranks::Mpi(2), &["--mixer", "linear", "--chunk", "48"], &["chunk", "48"]);
        refused_on(&good(), Ranks::Mpi(2), &["--mixer", "linear", "--ranks", "3"], &["--ranks: found 3, expected 2"]);
    }
}

#[test]
fn files_and_folders_that_are_not_there() {
    let folder = Folder::new();
    tensor_file::write(&folder.path("in"), &good(), &[]).unwrap();
    let attend = |input: &str, output: &str| {
        let (input, output) = (folder.path(input), folder.path(output));
        let mut command = command(Ranks::Threads(1));
        command.arg("attend").arg("--input").arg(input).arg("--output").arg(output).args(AS_LINEAR);
        run(&mut command)
    };
    attend("nothing", "out").fails_with(&["nothing", "No such file"]);
    attend("in", "no/out").fails_with(&["--output", "there is no folder"]);
    attend("in", ".").fails_with(&["--output", "a folder"]);
    std::fs::write(folder.path("text"), b"no tensors here").unwrap();
    attend("text", "out").fails_with(&["text", "no safetensors file"]);
    assert!(!folder.path("out").exists());
    // In place, and with a tensor that nobody knows.
    tensor_file::write(&folder.path("in"), &with(&[("mask", randn(1, &[3]))]), &[]).unwrap();
    let ran = attend("in", "in").succeeds();
    assert!(ran.err.contains("warning: tensor mask"), "{}", ran.err);
    let results = tensor_file::read(&folder.path("in"), Device::Cpu).unwrap();
    assert_eq!(results.keys().collect::<Vec<_>>(), ["final_state", "o"]);
}

/// Fewer tokens than ranks, documents of one and two tokens, and nodes whose size does not divide the ranks: every method
/// gives the right results, and none waits for ever.
#[test]
fn short_sequences_by_every_linear_method() {
    let scans = method::SCANS.iter().copied().chain(["lasp2:truncate", "hierarchical:node=2", "hierarchical:node=3"]);
    let cases = scans.map(|method| (method, "token", true));
    let products = method::LEFT_PRODUCTS.iter().map(|&method| (method, "head", false));
    for (i, (method, decay, initial)) in cases.chain(products).enumerate() {
        let layout = ["zigzag", "contiguous"][i % 2];
        let case = Linear { method, decay, initial, cu: SHORT, layout, ranks: Ranks::Threads(7), ..LINEAR };
        check_linear(case);
        check_linear(Linear { packed: false, ranks: Ranks::Threads(8), ..case });
    }
}

#[test]
fn short_sequences_by_every_softmax_method() {
    for (i, &method) in method::ATTENTIONS.iter().enumerate() {
        let layout = ["zigzag", "contiguous"][i % 2];
        let (more, many) = if method == "ulysses" { (4, 4) } else { (7, 8) };
        let case = Softmax { method, cu: SHORT, layout, ranks: Ranks::Threads(more), ..SOFTMAX };
        check_softmax(case);
        let two = [0, 0, 0, 1, 2, 2];
        check_softmax(Softmax { packed: false, cu: two, ranks: Ranks::Threads(many), ..case });
    }
    if mpi() {
        let ring = Softmax { method: "ring", cu: SHORT, ranks: Ranks::Mpi(7), ..SOFTMAX };
        check_softmax(ring);
        check_linear(Linear {
            method: "hierarchical:node=2",
            decay: "channel",
            cu: SHORT,
            ranks: Ranks::Mpi(7),
            ..LINEAR
        });
    }
}

#[test]
fn ulysses_says_which_numbers_of_ranks_it_takes() {
    let args = [&AS_SOFTMAX[..], &["--method", "ulysses"]].concat();
    let words = ["--ranks 3: ulysses", "2 heads, sp = 3", "use lasp2h, or one of 1, 2"];
    refused_on(&good(), Ranks::Threads(3), &args, &words);
    if mpi() {
        refused_on(&good(), Ranks::Mpi(3), &args, &words);
    }
}
