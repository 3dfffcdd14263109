//! Training is a function of (configuration, seed): not of how many ranks share a sequence, nor of the layout; and a
//! resumed run is the run that was never interrupted, bit for bit.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::Result;
use collectives::local;
use kernels::testing::assert_close;
use runtime::config::Config;
use runtime::data::{PrepareOptions, prepare};
use runtime::generate::Decoder;
use runtime::metrics::{self, StepRecord};
use runtime::model::{Context, LayerDone, Model, Spec, specs};
use runtime::sequence::{Layout, Plan, Shard, method};
use runtime::train::{Options, run};
use tch::{Device, Kind, Tensor};

/// Small documents of a made-up language, so that sequences hold several of them.
fn corpus(folder: &Path) -> Result<PathBuf> {
    let texts = folder.join("texts");
    std::fs::create_dir_all(&texts)?;
    for i in 0..60usize {
        let line = |j: usize| format!("def f{}(x): return x * {} + {}\n", (i * 7 + j) % 13, j % 9, i % 5);
        std::fs::write(texts.join(format!("{i:02}.py")), (0..1 + i % 6).map(line).collect::<String>())?;
    }
    let out = folder.join("corpus.bin");
    prepare(&[texts], None, &out, &PrepareOptions::default(), false)?;
    Ok(out)
}

fn config(corpus: &Path, settings: &[&str], ranks: usize) -> Result<Config> {
    let text = format!(
        "[model]\ndim = 32\nlayers = 4\nheads = 4\nkv_heads = 2\nchunk = 16\n\
         [train]\nsteps = 20\nseq_len = 101\nbatch = 2\nvalidate_sequences = 2\n[optimizer]\nwarmup_steps = 3\n\
         [data]\npath = {corpus:?}\nvalidation_fraction = 0.1\n"
    );
    let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
    let mut config = Config::from_toml_str(&text, "test", &settings)?;
    config.resolve_ranks(ranks)?;
    Ok(config)
}

fn train(run_dir: &Path, config: &Config, ranks: usize, resume: bool) -> Result<Vec<StepRecord>> {
    tch::set_num_threads(1);
    local::run(ranks, |world| -> Result<()> {
        run(world, config.clone(), run_dir, Options { resume, ..Options::default() })?;
        Ok(())
    })?;
    Ok(metrics::read(run_dir)?)
}

fn worst(ours: &[StepRecord], theirs: &[StepRecord]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let difference = |a: f64, b: f64| ((a - b) / b).abs();
    let pairs = ours.iter().zip(theirs);
    pairs
        .map(|(a, b)| {
            let val = match (a.val_loss, b.val_loss) {
                (Some(a), Some(b)) => difference(a, b),
                (None, None) => 0.0,
                _ => f64::INFINITY,
            };
            difference(a.loss, b.loss).max(val)
        })
        .fold(0.0, f64::max)
}

#[test]
fn losses_do_not_depend_on_the_ranks() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let corpus = corpus(folder.path())?;
    for decay in ["none", "lightning", "retention", "token", "channel"] {
        for (dtype, tolerance) in [("f64", 1e-9), ("f32", 1e-4)] {
            let (decay, dtype) = (format!("model.decay={decay}"), format!("train.dtype={dtype}"));
            let with = |more: &[&'static str], ranks: usize| -> Result<Vec<StepRecord>> {
                let settings: Vec<&str> =
                    [decay.as_str(), dtype.as_str()].into_iter().chain(more.iter().copied()).collect();
                train(tempfile::tempdir_in(&folder)?.path(), &config(&corpus, &settings, ranks)?, ranks, false)
            };
            let alone = with(&[], 1)?;
            assert!(alone[19].loss < alone[0].loss - 0.5, "it learns: {} to {}", alone[0].loss, alone[19].loss);
            for (settings, ranks) in [
                (&["parallel.sp=2"][..], 2),
                (&["parallel.sp=4", "parallel.layout=zigzag"], 4),
                (&["parallel.sp=2", "parallel.dp=2", "parallel.layout=zigzag"], 4),
                (&["parallel.sp=1", "parallel.dp=2", "train.activation_checkpointing=true"], 2),
                (&["parallel.sp=2", "train.activation_checkpointing=true"], 2),
            ] {
                let error = worst(&with(settings, ranks)?, &alone);
                assert!(error <= tolerance, "{decay} {dtype} {settings:?}: losses differ by {error:.1e}");
            }
        }
    }
    Ok(())
}

#[test]
fn losses_do_not_depend_on_the_micro_batch() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let corpus = corpus(folder.path())?;
    let with = |size: usize, ranks: usize| -> Result<Vec<StepRecord>> {
        let size = format!("train.micro_batch={size}");
        let settings =
            ["train.dtype=f64", "train.batch=4", "data.documents=false", "parallel.sp=1", "parallel.dp=0", &size];
        train(tempfile::tempdir_in(&folder)?.path(), &config(&corpus, &settings, ranks)?, ranks, false)
    };
    let one = with(1, 1)?;
    for (size, ranks) in [(2, 1), (4, 1), (1, 2), (2, 2)] {
        let error = worst(&with(size, ranks)?, &one);
        assert!(error <= 1e-9, "{size} sequences a pass, {ranks} ranks: losses differ by {error:.1e}");
    }
    Ok(())
}

/// Sums of few numbers at a time, while backward goes on, are those of all numbers at its end.
#[test]
fn losses_do_not_depend_on_how_the_gradient_is_summed() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let corpus = corpus(folder.path())?;
    for settings in [
        &["parallel.sp=2", "model.decay=token", "train.batch=2"][..],
        &["parallel.sp=2", "model.tied=false", "train.activation_checkpointing=true"],
        &["parallel.sp=1", "parallel.dp=2", "train.batch=4"],
    ] {
        let with = |bucket: &'static str| -> Result<Vec<StepRecord>> {
            let settings: Vec<&str> = settings.iter().copied().chain([bucket]).collect();
            train(tempfile::tempdir_in(&folder)?.path(), &config(&corpus, &settings, 2)?, 2, false)
        };
        let (whole, layers) = (with("parallel.gradient_bucket_mib=64")?, with("parallel.gradient_bucket_mib=0")?);
        for (a, b) in whole.iter().zip(&layers) {
            assert_eq!((a.step, a.loss, a.grad_norm), (b.step, b.loss, b.grad_norm), "{settings:?}");
        }
    }
    Ok(())
}

/// When backward says that a layer is done, nothing is added any more to the gradients of it and those behind it.
#[test]
fn gradients_are_complete_when_backward_says_so() -> Result<()> {
    for (checkpoint, decay, fused) in [
        (false, "token", false),
        (true, "channel", false),
        (false, "none", false),
        (false, "channel", true),
        (true, "none", true),
    ] {
        let settings = [format!("model.decay={decay}"), "model.tied=false".to_owned()];
        let config = lasp_tests::training::config(&settings)?;
        tch::set_num_threads(1);
        let said = local::run(1, |group| -> Result<Vec<usize>> {
            let model = Model::new(&config.model, Kind::Double, 5, Device::Cpu)?;
            let grad = Tensor::zeros([model.params.numel()], (Kind::Double, Device::Cpu));
            model.params.share_grads(&grad)?;
            let specs = specs(&config.model);
            let behind = |name: &str, layer: usize| {
                let of = specs.iter().find(|spec| spec.name == name).and_then(Spec::layer);
                of.map_or(name != "embedding", |of| of >= layer)
            };
            let shares = model.params.split(&grad)?;
            let copy = |layer: usize| -> Vec<(String, Tensor)> {
                let of = shares.iter().filter(|(name, _)| behind(name, layer));
                of.map(|(name, share)| (name.clone(), share.copy())).collect()
            };
            let seen = Arc::new(Mutex::new(Vec::new()));
            let done: LayerDone = {
                // Tensors may be looked at by any thread, one at a time.
                let (seen, flat) = (seen.clone(), Mutex::new(grad.shallow_clone()));
                Arc::new(move |layer| {
                    seen.lock().unwrap().push((layer, flat.lock().unwrap().copy()));
                    Ok(())
                })
            };
            let layout = Layout::new(config.parallel.layout, 77, 1)?;
            let (linear, attention) = (method::linear("lasp2", &group)?, method::attention("lasp2h")?);
            let shard = Arc::new(Shard { group, plan: Plan::new(layout, None, 0)?, linear, attention });
            let model_config = &config.model;
            let mut context = Context::new(shard, model_config.head_dim(), 10_000.0, Kind::Double, Device::Cpu)?;
            context.fused = fused;
            let tokens = Tensor::arange(77, (Kind::Int64, Device::Cpu)).unsqueeze(0);
            let hidden = model.forward(&context, &tokens, checkpoint, Some(&done))?;
            model.loss(&hidden, &tokens)?.backward();
            let seen = std::mem::take(&mut *seen.lock().unwrap());
            for (layer, flat) in &seen {
                let before = model.params.split(flat)?;
                for (name, now) in copy(*layer) {
                    let (_, before) = before.iter().find(|(other, _)| *other == name).expect("the same names");
                    assert!(now.abs().max().double_value(&[]) > 0.0, "{name} has no gradient");
                    assert_eq!(now, *before, "{name}, when layer {layer} was done");
                }
            }
            Ok(seen.into_iter().map(|(layer, _)| layer).collect())
        })?;
        assert_eq!(said, [[3, 2, 1, 0]], "{decay}, checkpointing {checkpoint}, fused {fused}");
    }
    Ok(())
}

#[test]
fn losses_do_not_depend_on_the_scan() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let corpus = corpus(folder.path())?;
    for layout in ["contiguous", "zigzag"] {
        let with = |method: &str| -> Result<Vec<StepRecord>> {
            let (layout, method) = (format!("parallel.layout={layout}"), format!("parallel.linear_method={method}"));
            let settings = ["model.decay=token", "train.dtype=f64", "parallel.sp=4", &layout, &method];
            train(tempfile::tempdir_in(&folder)?.path(), &config(&corpus, &settings, 4)?, 4, false)
        };
        let lasp2 = with("lasp2")?;
        for method in ["lasp2:splits=3", "lasp2:truncate", "lasp1", "all_scan:blocks=3", "hierarchical:node=2"] {
            let error = worst(&with(method)?, &lasp2);
            assert!(error <= 1e-9, "{method} {layout}: losses differ from lasp2's by {error:.1e}");
        }
    }
    Ok(())
}

#[test]
fn a_resumed_run_is_the_run_that_was_not_interrupted() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let corpus = corpus(folder.path())?;
    for dtype in ["f32", "bf16"] {
        let dtype = format!("train.dtype={dtype}");
        let settings = [dtype.as_str(), "model.decay=token", "checkpoint.every=5"];
        let whole = config(&corpus, &settings, 2)?;
        let folder = tempfile::tempdir_in(&folder)?;
        let unbroken = train(&folder.path().join("unbroken"), &whole, 2, false)?;
        // Interrupted by the clock after the step at which the time is up: the first.
        let mut short = whole.clone();
        short.train.minutes = 1e-9;
        let broken = folder.path().join("broken");
        assert_eq!(train(&broken, &short, 2, false)?.len(), 1);
        let resumed = train(&broken, &whole, 2, true)?;
        assert_eq!(unbroken.len(), 20);
        for (a, b) in unbroken.iter().zip(&resumed) {
            assert_eq!((a.step, a.loss, a.grad_norm), (b.step, b.loss, b.grad_norm), "{dtype}");
        }
        let last = |run: &str| -> Result<Vec<u8>> {
            let path = runtime::checkpoint::latest(&folder.path().join(run))?.expect("a checkpoint");
            Ok(std::fs::read(path.join("model.safetensors"))?)
        };
        assert!(last("unbroken")? == last("broken")?, "{dtype}: the final weights differ");
    }
    Ok(())
}

#[test]
fn resuming_another_model_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let corpus = corpus(folder.path())?;
    let run_dir = folder.path().join("run");
    train(&run_dir, &config(&corpus, &["train.steps=1"], 1)?, 1, false)?;
    let error = train(&run_dir, &config(&corpus, &["train.steps=2", "train.seed=3"], 1)?, 1, true).unwrap_err();
    assert!(error.to_string().contains("train.seed was 0"), "{error}");
    let error = train(&run_dir, &config(&corpus, &[], 1)?, 1, false).unwrap_err();
    assert!(error.to_string().contains("earlier run"), "{error}");
    let error = train(&folder.path().join("nowhere"), &config(&corpus, &[], 1)?, 1, true).unwrap_err();
    assert!(error.to_string().contains("no checkpoint"), "{error}");
    Ok(())
}

#[test]
fn a_run_that_keeps_no_checkpoint_writes_none() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let corpus = corpus(folder.path())?;
    let run_dir = folder.path().join("run");
    train(&run_dir, &config(&corpus, &["train.steps=2", "checkpoint.keep=0", "checkpoint.every=1"], 1)?, 1, false)?;
    assert!(run_dir.join("report.html").exists());
    assert!(!run_dir.join("checkpoints").exists());
    Ok(())
}

/// Decoding, by chunks and token by token, equals the forward of training.
#[test]
fn decoding_equals_the_training_forward() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let corpus = corpus(folder.path())?;
    for decay in ["none", "lightning", "retention", "token", "channel"] {
        let config = config(&corpus, &[&format!("model.decay={decay}")], 1)?;
        let model = Model::new(&config.model, Kind::Float, 5, Device::Cpu)?;
        let tokens: Vec<i64> = (0..77).map(|i| (i * i + 3 * i) % 200).collect();
        let whole = local::run(1, |group| -> Result<Tensor> {
            let _guard = tch::no_grad_guard();
            let plan = Plan::new(Layout::new(config.parallel.layout, 77, 1)?, None, 0)?;
            let (linear, attention) = (method::linear("lasp2", &group)?, method::attention("lasp2h")?);
            let shard = Shard { group, plan, linear, attention };
            let rope = config.model.rope_base;
            let context = Context::new(shard.into(), config.model.head_dim(), rope, Kind::Float, Device::Cpu)?;
            let hidden = model_forward(&config, &context, &tokens)?;
            Ok(hidden)
        })?;
        let mut decoder = Decoder::new(&model);
        let mut position = 0;
        for length in [40, 1, 1, 17, 1, 16, 1] {
            let logits = decoder.feed(&tokens[position..position + length])?;
            position += length;
            assert_close(&format!("{decay}, position {position}"), &logits, &whole[0].get(position as i64 - 1), 1e-4);
        }
        assert_eq!(position, 77);
    }
    Ok(())
}

/// Logits `[T, vocab]`, f64, of the model that the test also decodes with.
fn model_forward(config: &Config, context: &Context, tokens: &[i64]) -> Result<Tensor> {
    let model = Model::new(&config.model, Kind::Float, 5, Device::Cpu)?;
    let hidden = model.forward(context, &Tensor::from_slice(tokens).unsqueeze(0), false, None)?;
    Ok(model.logits(&hidden)?.select(0, 0).to_kind(Kind::Double))
}
