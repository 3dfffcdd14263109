//! The configuration as users meet it: a file, overrides, and messages that say what to change.

use proptest::prelude::*;
use runtime::config::{Config, DataKind, DecayKind, Dtype, Error, LayerKind, LayoutKind};
use tch::Kind;

fn load(text: &str, overrides: &[&str]) -> Result<Config, Error> {
    let overrides: Vec<String> = overrides.iter().map(|o| o.to_string()).collect();
    Config::from_toml_str(text, "quickstart.toml", &overrides)
}

#[track_caller]
fn message(text: &str, overrides: &[&str]) -> String {
    load(text, overrides).unwrap_err().to_string()
}

#[test]
fn an_empty_file_is_the_defaults() {
    let config = load("", &[]).unwrap();
    assert_eq!(config, Config::default());
    assert_eq!(config.model.mlp_dim, 704);
    assert_eq!(config.model.head_dim(), 64);
    assert_eq!(config.train.dtype.kind(), Kind::Float);
    assert!((config.optimizer.min_lr - 3e-4).abs() < 1e-12);
}

#[test]
fn derived_values_follow_what_was_typed() {
    let config = load("[model]\ndim = 512\n[optimizer]\nlr = 1e-3", &[]).unwrap();
    assert_eq!(config.model.mlp_dim, 1408);
    assert!((config.optimizer.min_lr - 1e-4).abs() < 1e-12);
    let config = load("[model]\nmlp_dim = 0\n[optimizer]\nmin_lr = 0", &[]).unwrap();
    assert_eq!(config.model.mlp_dim, 704);
    assert_eq!(config.optimizer.min_lr, 0.0);
}

#[test]
fn the_pattern_repeats() {
    let config = load("[model]\nlayers = 6\npattern = \"LLN\"", &[]).unwrap();
    use LayerKind::{Linear as L, Softmax as N};
    assert_eq!(config.model.layer_kinds(), [L, L, N, L, L, N]);
    let config = load("[model]\nlayers = 3", &[]).unwrap();
    assert_eq!(config.model.layer_kinds(), [L, L, L]);
}

#[test]
fn overrides_win_and_the_last_one_most() {
    let text = "[train]\nsteps = 5\ndtype = \"bf16\"";
    let config = load(
        text,
        &["train.steps=6", "train.steps = 7", "train.dtype=f64", "parallel.layout=\"zigzag\"", "data.documents=false"],
    )
    .unwrap();
    assert_eq!(config.train.steps, 7);
    assert_eq!(config.train.dtype, Dtype::F64);
    assert_eq!(config.parallel.layout, LayoutKind::Zigzag);
    assert!(!config.data.documents);
}

#[test]
fn an_override_of_a_string_may_look_like_anything() {
    for prompt in ["def main():", "12", "true", "2024-01-01", "[1, 2", "a=b", ""] {
        let config = load("", &[&format!("sample.prompt={prompt}")]).unwrap();
        assert_eq!(config.sample.prompt, prompt);
    }
    let config = load("", &["sample.prompt=\"a\\nb\""]).unwrap();
    assert_eq!(config.sample.prompt, "a\nb");
}

#[test]
fn unknown_keys_are_named_with_the_nearest_known_one() {
    let cases = [
        ("[train]\nstep = 3", "unknown key train.step in quickstart.toml; did you mean train.steps?"),
        ("[trian]\nsteps = 3", "unknown key trian in quickstart.toml; did you mean train?"),
        ("steps = 3", "unknown key steps in quickstart.toml; did you mean train.steps?"),
        ("[train]\nlr = 0.1", "unknown key train.lr in quickstart.toml; did you mean optimizer.lr?"),
        ("[model]\nquantum_foam = 1", "unknown key model.quantum_foam in quickstart.toml"),
    ];
    for (text, expected) in cases {
        assert_eq!(message(text, &[]), expected);
    }
    assert_eq!(
        message("", &["train.seqlen=9"]),
        "unknown key train.seqlen in override `train.seqlen=9`; did you mean train.seq_len?"
    );
    assert_eq!(message("", &["lr=9"]), "unknown key lr in override `lr=9`; did you mean optimizer.lr?");
    assert_eq!(
        message("", &["train.steps.x=9"]),
        "unknown key train.steps.x in override `train.steps.x=9`; did you mean train.steps?"
    );
}

#[test]
fn wrong_kinds_say_found_and_expected() {
    let cases = [
        (
            "[train]\nsteps = \"ten\"",
            "train.steps in quickstart.toml: found \"ten\", expected a whole number, zero or more",
        ),
        ("[train]\nsteps = -1", "train.steps in quickstart.toml: found -1, expected a whole number, zero or more"),
        ("[train]\nsteps = 1.5", "train.steps in quickstart.toml: found 1.5, expected a whole number, zero or more"),
        ("[optimizer]\nlr = true", "optimizer.lr in quickstart.toml: found true, expected a number"),
        ("[model]\ntied = 1", "model.tied in quickstart.toml: found 1, expected true or false"),
        (
            "[model]\npattern = [\"L\"]",
            "model.pattern in quickstart.toml: found a list of 1, expected a string in quotes",
        ),
        ("train = 5", "train in quickstart.toml: found 5, expected a section"),
        (
            "[train]\ndtype = \"fp8\"",
            "train.dtype in quickstart.toml: found \"fp8\", expected one of `f32`, `bf16`, `f64`",
        ),
        (
            "[parallel]\nlayout = \"zig\"",
            "parallel.layout in quickstart.toml: found \"zig\", expected `contiguous` or `zigzag`",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(message(text, &[]), expected);
    }
    assert_eq!(message("", &["train.steps"]), "override `train.steps`: expected key=value, such as train.steps=100");
    assert!(message("[train\nsteps = 3", &[]).starts_with("quickstart.toml is not valid TOML: "));
}

#[test]
fn broken_rules_name_the_knob_and_the_numbers() {
    let cases = [
        ("model.chunk=48", "a power of two of at most 1024"),
        ("model.heads=3", "a divisor of model.dim = 256"),
        ("model.heads=256", "an even head_dim"),
        ("model.kv_heads=3", "a divisor of model.heads = 4"),
        ("model.vocab=255", "at least 256"),
        ("model.pattern=LXN", "a string of L"),
        ("model.pattern=", "a string of L"),
        ("model.layers=0", "at least 1"),
        ("train.steps=0", "at least 1"),
        ("train.seq_len=0", "at least 1"),
        ("train.micro_batch=2", "data.documents = false"),
        ("train.minutes=-1", "0 (no limit) or more"),
        ("parallel.dp=2", "a multiple of parallel.dp x train.micro_batch = 2 x 1"),
        ("parallel.linear_method=lasp3", "\"lasp2\""),
        ("parallel.linear_method=all_scan:blocks=0", "all_scan:blocks=N with a whole number N of at least 1"),
        ("optimizer.lr=0", "a number above 0"),
        ("optimizer.lr=nan", "a number above 0"),
        ("optimizer.min_lr=1", "between 0 and optimizer.lr = 0.003"),
        ("optimizer.beta2=1", "below 1"),
        ("data.validation_fraction=1", "below 1"),
        ("sample.temperature=-1", "zero"),
    ];
    for (text, expected) in cases {
        let found = message("", &[text]);
        assert!(found.contains(expected), "{text}: {found}");
    }
    assert_eq!(
        message("[model]\nheads = 3", &[]),
        "model.heads in quickstart.toml: found 3, expected a divisor of model.dim = 256"
    );
}

#[test]
fn methods_take_their_settings_along() {
    let config =
        load("", &["parallel.linear_method=all_scan:blocks=8", "parallel.softmax_method=lasp2h:stages=2"]).unwrap();
    assert_eq!(config.parallel.linear_method, "all_scan:blocks=8");
    assert_eq!(config.parallel.softmax_method, "lasp2h:stages=2");
    let found = message("", &["parallel.softmax_method=lasp2h:splits=2"]);
    assert!(found.contains("expected lasp2h with no other setting than stages=N, each once"), "{found}");
}

#[test]
fn ranks_fill_in_the_degrees_left_open() {
    let resolve = |overrides: &[&str], ranks| {
        let mut config = load("", overrides).unwrap();
        let result = config.resolve_ranks(ranks);
        (result.map_err(|e| e.to_string()), config.parallel.sp, config.parallel.dp)
    };
    assert_eq!(resolve(&[], 8), (Ok(()), 8, 1));
    assert_eq!(resolve(&[], 1), (Ok(()), 1, 1));
    assert_eq!(resolve(&["parallel.dp=2", "train.batch=4"], 8), (Ok(()), 4, 2));
    assert_eq!(resolve(&["parallel.sp=2", "parallel.dp=0", "train.batch=4"], 8), (Ok(()), 2, 4));
    assert_eq!(resolve(&["parallel.dp=0"], 3), (Ok(()), 3, 1));
    let mesh = resolve(&["parallel.sp=3", "parallel.dp=2", "train.batch=2"], 8).0.unwrap_err();
    assert_eq!(
        mesh,
        "8 ranks cannot be arranged as parallel.sp x parallel.dp = 3 x 2: expected a product of 8, \
         or 0 for the one that shall follow from the other"
    );
    assert!(resolve(&["parallel.dp=3", "train.batch=3"], 8).0.is_err());
    assert!(resolve(&["parallel.sp=16"], 8).0.is_err());
    let batch = resolve(&["parallel.sp=2", "parallel.dp=0", "train.batch=6"], 8).0.unwrap_err();
    assert!(batch.contains("train.batch = 6") && batch.contains("dp = 4"), "{batch}");
}

#[test]
fn methods_that_do_not_fit_are_refused() {
    let found = message("", &["parallel.linear_method=ring_left_product", "model.decay=token"]);
    assert!(found.contains("found \"ring_left_product\", expected a method that carries states"), "{found}");
    assert!(load("", &["parallel.linear_method=ring_left_product", "model.decay=retention"]).is_ok());

    let heads = ["model.heads=12", "model.kv_heads=3", "model.dim=96", "parallel.softmax_method=ulysses"];
    let mut config = load("", &heads).unwrap();
    assert_eq!(
        config.resolve_ranks(8).unwrap_err().to_string(),
        "ulysses needs the sp degree to divide the heads: 12 heads, sp = 8 (parallel.sp); use lasp2h, or one of \
         1, 2, 3, 4, 6, 12"
    );
    assert!(config.resolve_ranks(6).is_ok());
    // Nothing to divide where no layer is softmax.
    assert!(load("", &[&heads[..], &["model.pattern=L"]].concat()).unwrap().resolve_ranks(8).is_ok());
}

#[test]
fn a_missing_file_is_named() {
    let error = Config::load(std::path::Path::new("nowhere.toml"), &[]).unwrap_err();
    assert!(error.to_string().starts_with("cannot read the configuration nowhere.toml: "));
}

proptest! {
    #[test]
    fn what_is_written_reads_back_the_same(
        heads in 1i64..9, half_head in 1i64..65, layers in 1usize..20, pattern in "[LN]{1,6}",
        decay in prop::sample::select(vec![DecayKind::None, DecayKind::Lightning, DecayKind::Channel]),
        lr in 1e-9f64..10.0, min in 0.0f64..1.0, seed in 0u64..i64::MAX as u64, batch in 1usize..9,
        prompt in any::<String>(), random in any::<bool>(), minutes in 0.0f64..1e6,
    ) {
        let mut config = Config::default();
        config.model.heads = heads;
        config.model.kv_heads = heads;
        config.model.dim = heads * 2 * half_head;
        config.model.layers = layers;
        config.model.pattern = pattern;
        config.model.decay = decay;
        config.optimizer.lr = lr;
        config.optimizer.min_lr = lr * min;
        config.train.seed = seed;
        config.train.batch = batch;
        config.train.minutes = minutes;
        config.sample.prompt = prompt;
        config.data.kind = if random { DataKind::Random } else { DataKind::Corpus };
        let text = config.to_toml().unwrap();
        prop_assert_eq!(Config::from_toml_str(&text, "config.toml", &[]).unwrap(), config);
    }

    #[test]
    fn no_text_panics(text in any::<String>(), over in any::<String>()) {
        let _ = Config::from_toml_str(&text, "x.toml", &[]);
        let _ = Config::from_toml_str("", "x.toml", &[over]);
    }
}

#[test]
fn the_written_configuration_has_every_key() {
    let text = load("", &[]).unwrap().to_toml().unwrap();
    for key in ["mlp_dim", "min_lr", "sp", "prompt", "validation_fraction"] {
        assert!(text.contains(&format!("\n{key} = ")), "{key} missing in\n{text}");
    }
}
