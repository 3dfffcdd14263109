//! The nodes that compute half a block at once against the body in plain tensor code: on the CPU in f64, where both are
//! exact, and on a GPU in bf16, where the fused one may err at most twice as much. And training on a GPU against the CPU.

use std::sync::Arc;

use collectives::{Group, Mesh, local};
use kernels::testing::{assert_close, cuda, relative_rms};
use runtime::config::Config;
use runtime::data::Source;
use runtime::model::{Context, Model, Unwritten};
use runtime::sequence::{Layout, Plan, Shard, method};
use runtime::train::{self, Error, Trainer};
use tch::{Device, Kind, Tensor};

const TOKENS: i64 = 83;

fn config(sets: &[&str]) -> Config {
    let text = "[model]\ndim = 64\nlayers = 2\nheads = 4\nkv_heads = 2\npattern = \"LN\"\nchunk = 16\n\
                [data]\nkind = \"random\"\ndocuments = false\nvalidation_fraction = 0.0\n\
                [train]\nseq_len = 128\nsteps = 20\n[parallel]\nsp = 1\n";
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    Config::from_toml_str(text, "test", &sets).unwrap()
}

/// How a model's gradients are computed.
#[derive(Clone, Copy)]
struct How {
    kind: Kind,
    device: Device,
    fused: bool,
    checkpoint: bool,
    ranks: usize,
    attention: &'static str,
    tokens: i64,
}

const PLAIN: How = How {
    kind: Kind::Double,
    device: Device::Cpu,
    fused: false,
    checkpoint: false,
    ranks: 1,
    attention: "lasp2h",
    tokens: TOKENS,
};

/// The loss and the gradient of all parameters, summed over ranks, of one sequence with three documents. The parameters are
/// the same bf16 numbers in every kind.
fn gradients(config: &Config, how: How) -> (Tensor, Tensor) {
    let parts = local::run(how.ranks, |group: Group| -> Result<(Tensor, Tensor), Error> {
        let model = Model::new(&config.model, how.kind, 3, how.device)?;
        let rounded = Model::new(&config.model, Kind::BFloat16, 3, Device::Cpu)?;
        let wide = rounded.params.flat.to_kind(Kind::Double);
        let bias = Tensor::linspace(-0.05, 0.05, wide.numel() as i64, (Kind::Double, Device::Cpu));
        // Norm weights apart from 1.
        let values = (wide * (bias + 1.0)).to_kind(Kind::BFloat16);
        let named: std::collections::HashMap<_, _> = model.params.split(&values)?.into_iter().collect();
        model.params.fill(&model.params.flat, |name| named.get(name).map(Tensor::shallow_clone))?;
        let grad = Tensor::f_zeros([model.params.numel()], (how.kind, how.device))?;
        model.params.share_grads(&grad)?;
        let layout = Layout::new(config.parallel.layout, how.tokens, how.ranks)?;
        let documents = [0, 20, 21, TOKENS].map(|end| end.min(how.tokens));
        let plan = Plan::new(layout, Some(&documents), group.rank())?;
        let (linear, attention) = (method::linear("lasp2", &group)?, method::attention(how.attention)?);
        let numbers = |factor: i64| -> Result<Tensor, Error> {
            let all = (Tensor::arange(how.tokens, (Kind::Int64, Device::Cpu)) * factor).remainder(251);
            Ok(plan.layout.shard(&all.unsqueeze(0), 1, plan.rank)?.to_device(how.device))
        };
        let (tokens, labels) = (numbers(7)?, numbers(31)?);
        let shard = Arc::new(Shard { group, plan, linear, attention });
        let rope = config.model.rope_base;
        let mut context = Context::new(shard, config.model.head_dim(), rope, how.kind, how.device)?;
        context.fused = how.fused;
        // Checkpointed MLPs go through several parts.
        context.hidden_at_once = 64 * config.model.mlp_dim;
        // What was there before must not matter where a backward is the first to write.
        let unwritten = model.unwritten(&context)?;
        assert_eq!(unwritten.is_empty(), !how.fused);
        unwritten.iter().for_each(|grad| drop(grad.shallow_clone().fill_(f64::NAN)));
        context.unwritten = Unwritten::new(unwritten);
        let loss = model.loss(&model.forward(&context, &tokens, how.checkpoint, None)?, &labels)?;
        kernels::bridge::backward(&loss, &loss.ones_like())?;
        Ok((loss.detach(), grad))
    });
    let mut parts = parts.unwrap().into_iter();
    let (mut loss, mut grad) = parts.next().unwrap();
    for (more_loss, more_grad) in parts {
        (loss, grad) = (loss + more_loss, grad + more_grad);
    }
    (loss, grad)
}

const DECAYS: [&str; 4] = ["none", "lightning", "token", "channel"];

#[test]
fn fused_nodes_are_exact() {
    for decay in DECAYS {
        for gate in [true, false] {
            let config = config(&[&format!("model.decay={decay}"), &format!("model.output_gate={gate}")]);
            let (loss, grad) = gradients(&config, PLAIN);
            let [gather, ring, heads] = ["lasp2h", "ring", "ulysses"];
            for (checkpoint, ranks, attention) in [
                (false, 1, gather),
                (true, 1, gather),
                (false, 2, heads),
                (true, 3, gather),
                (true, 2, ring),
                (true, 2, heads),
            ] {
                let how = How { fused: true, checkpoint, ranks, attention, ..PLAIN };
                let (fused_loss, fused_grad) = gradients(&config, how);
                let name =
                    format!("decay {decay}, gate {gate}, checkpointing {checkpoint}, sp = {ranks} by {attention}");
                assert_close(&format!("{name}: loss"), &fused_loss, &loss, 1e-12);
                assert_close(&format!("{name}: gradient"), &fused_grad, &grad, 1e-10);
            }
        }
    }
}

#[test]
fn ranks_without_tokens() {
    let how = How { tokens: 2, ..PLAIN };
    let config = config(&["model.decay=token"]);
    let (loss, grad) = gradients(&config, how);
    for (fused, checkpoint) in [(false, true), (true, false), (true, true)] {
        let (other_loss, other) = gradients(&config, How { fused, checkpoint, ranks: 3, ..how });
        assert_close(&format!("fused {fused}, checkpointing {checkpoint}: loss"), &other_loss, &loss, 1e-12);
        assert_close(&format!("fused {fused}, checkpointing {checkpoint}: gradient"), &other, &grad, 1e-10);
    }
}

#[test]
fn fused_nodes_err_little_in_bf16_on_cuda() {
    let Some(device) = cuda() else { return };
    for decay in DECAYS {
        let config = config(&[&format!("model.decay={decay}")]);
        let (loss, grad) = gradients(&config, PLAIN);
        let plain = How { kind: Kind::BFloat16, device, ..PLAIN };
        let allowed = 2.0 * relative_rms(&gradients(&config, plain).1, &grad);
        for checkpoint in [false, true] {
            let (fused_loss, fused_grad) = gradients(&config, How { fused: true, checkpoint, ..plain });
            assert_close(&format!("decay {decay}: loss"), &fused_loss, &loss, 1e-3);
            assert_close(&format!("decay {decay}: gradient"), &fused_grad, &grad, allowed);
        }
    }
}

fn losses(config: &Config, device: Device) -> Vec<f64> {
    let run = |world: Group| -> Result<Vec<f64>, Error> {
        let (source, validation) = Source::open(config)?;
        let mut trainer = Trainer::on(device, Mesh::new(world, 1, 1)?, config.clone(), source, validation)?;
        (0..config.train.steps).map(|_| Ok(trainer.step(false)?.loss)).collect()
    };
    local::run(1, run).unwrap().swap_remove(0)
}

#[test]
fn twenty_steps_on_cuda_have_the_losses_of_the_cpu() {
    let Some(device) = cuda() else { return };
    for (dtype, batch, tolerance) in [("f32", 1, 1e-3), ("f32", 2, 1e-3), ("bf16", 1, 1e-2), ("bf16", 2, 1e-2)] {
        let sets = [format!("train.dtype={dtype}"), format!("train.batch={batch}"), "model.decay=token".to_owned()];
        let config = config(&sets.each_ref().map(String::as_str));
        let (ours, cpu) = (losses(&config, device), losses(&config, Device::Cpu));
        for (step, (ours, cpu)) in ours.iter().zip(&cpu).enumerate() {
            assert!(
                (ours / cpu - 1.0).abs() < tolerance,
                "{dtype}, step {}: {ours} on CUDA, {cpu} on the CPU",
                step + 1
            );
        }
        assert!(ours[19] < ours[0], "it learns");
    }
}

/// A run on a GPU, cut in the middle, goes on where it was: on the GPU, and on the CPU.
#[test]
fn checkpoints_move_between_cuda_and_the_cpu() {
    let Some(device) = cuda() else { return };
    let folder = tempfile::tempdir().unwrap();
    let train = |name: &str, steps: u64, device: Device, resume: bool| -> f64 {
        // The length of the cosine must not depend on where a run is cut.
        let sets = [format!("train.steps={steps}"), "train.dtype=bf16".to_owned(), "optimizer.min_lr=0.003".to_owned()];
        let mut config = config(&sets.each_ref().map(String::as_str));
        config.optimizer.lr = 0.003;
        let options = train::Options { resume, device, ..train::Options::default() };
        let run = |world: Group| train::run(world, config.clone(), &folder.path().join(name), options);
        local::run(1, run).unwrap().swap_remove(0).loss
    };
    let whole = train("whole", 8, device, false);
    for (name, first, second) in
        [("gpu", device, device), ("to-cpu", device, Device::Cpu), ("to-gpu", Device::Cpu, device)]
    {
        train(name, 4, first, false);
        let resumed = train(name, 8, second, true);
        assert!((resumed / whole - 1.0).abs() < 1e-2, "{name}: {resumed}, in one run {whole}");
    }
}
