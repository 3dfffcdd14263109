//! `method = "auto"`: asks the cost model (`benches::simulate`), puts what it finds in the configuration's place and says why.
//! Rank 0 decides and tells the others, whose machine.toml might be another.

use std::path::Path;

use anyhow::{Context, Result};
use benches::simulate::Machine;
use benches::simulate::choose::{Candidate, Choice, choose};
use collectives::Group;
use runtime::config::{Config, LayerKind};
use runtime::sequence::method::AUTO;
use tch::Tensor;

/// The file that `lasp calibrate` writes.
const FILE: &str = "machine.toml";
/// Where nothing is said of the machine.
const GPU: &str = "h100-dgx";
const CPU: &str = "epyc-2core";

/// Decides what is left open, as [`decide`]; the same on every rank. Collective over `world`, and after
/// [`Config::resolve_ranks`].
pub fn agree(config: &mut Config, world: &Group, gpu: bool) -> Result<()> {
    if !is_open(config) {
        return Ok(());
    }
    let mut text = Vec::new();
    if world.rank() == 0 {
        decide(config, gpu)?;
        let names = format!("{}\n{}", config.parallel.linear_method, config.parallel.softmax_method);
        text = names.bytes().map(i64::from).collect();
    }
    let length = world.broadcast(&Tensor::f_from_slice(&[text.len() as i64])?, 0)?.wait()?.f_int64_value(&[0])?;
    text.resize(length as usize, 0);
    let text: Vec<i64> = Vec::try_from(world.broadcast(&Tensor::f_from_slice(&text)?, 0)?.wait()?)?;
    let names = String::from_utf8(text.into_iter().map(|byte| byte as u8).collect())?;
    let (linear, softmax) = names.split_once('\n').context("rank 0 named no two methods")?;
    linear.clone_into(&mut config.parallel.linear_method);
    softmax.clone_into(&mut config.parallel.softmax_method);
    Ok(())
}

fn is_open(config: &Config) -> bool {
    [&config.parallel.linear_method, &config.parallel.softmax_method].into_iter().any(|method| method == AUTO)
}

/// Puts methods in the place of "auto" in a configuration whose ranks are resolved, and logs from what they were chosen.
pub fn decide(config: &mut Config, gpu: bool) -> Result<()> {
    if !is_open(config) {
        return Ok(());
    }
    let (name, why) = machine(&config.parallel.machine, gpu, Path::new(FILE).exists());
    let machine = Machine::load(&name).context("parallel.machine, for which \"auto\" decides")?;
    let layers = config.model.layer_kinds();
    let (sp, kinds) = (config.parallel.sp, [LayerKind::Linear, LayerKind::Softmax]);
    let open = |config: &Config, kind: LayerKind| *method(&mut config.parallel.clone(), kind) == AUTO;
    let asked: Vec<LayerKind> =
        kinds.into_iter().filter(|&kind| open(config, kind) && layers.contains(&kind)).collect();
    for choice in choose(&machine, config, sp, &asked)? {
        let tokens = config.train.seq_len;
        tracing::info!(
            "{} = {AUTO:?}: {}, for {tokens} tokens on {sp} ranks by the cost model of {name} ({why}); predicted:",
            key(choice.kind),
            choice.method
        );
        choice.candidates.iter().for_each(|candidate| tracing::info!("  {}", line(candidate)));
        let Choice { kind, method: chosen, .. } = choice;
        *method(&mut config.parallel, kind) = chosen;
    }
    // No layer asks for these.
    for (kind, any) in kinds.into_iter().zip(["lasp2", "lasp2h"]) {
        if open(config, kind) {
            any.clone_into(method(&mut config.parallel, kind));
        }
    }
    Ok(())
}

/// The machine to decide for, and why it is that one.
fn machine(setting: &str, gpu: bool, has_file: bool) -> (String, &'static str) {
    match setting {
        "" if has_file => (FILE.to_owned(), "the file in this folder"),
        "" if gpu => (GPU.to_owned(), "the default for GPUs; parallel.machine names another"),
        "" => (CPU.to_owned(), "the default for CPUs; lasp calibrate measures this one"),
        named => (named.to_owned(), "parallel.machine"),
    }
}

fn method(parallel: &mut runtime::config::ParallelConfig, kind: LayerKind) -> &mut String {
    match kind {
        LayerKind::Linear => &mut parallel.linear_method,
        LayerKind::Softmax => &mut parallel.softmax_method,
    }
}

fn key(kind: LayerKind) -> &'static str {
    match kind {
        LayerKind::Linear => "parallel.linear_method",
        LayerKind::Softmax => "parallel.softmax_method",
    }
}

fn line(candidate: &Candidate) -> String {
    let memory = if candidate.out_of_memory { ", more memory than there is" } else { "" };
    match &candidate.found {
        Ok((step, exposed)) => format!(
            "{}: a sequence takes {:.2} ms, of which communication costs {:.2} ms{memory}",
            candidate.method,
            1e3 * step,
            1e3 * exposed
        ),
        Err(reason) => format!("{}: cannot run here: {reason}", candidate.method),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use collectives::local;

    fn config(set: &[&str]) -> Config {
        let set: Vec<String> = set.iter().map(|text| (*text).to_owned()).collect();
        let text = "[model]\nheads = 4\nkv_heads = 2\ndim = 64\nlayers = 2\npattern = \"LN\"\n[parallel]\n\
                    linear_method = \"auto\"\nsoftmax_method = \"auto\"\nmachine = \"h100-dgx\"\n";
        Config::from_toml_str(text, "test", &set).unwrap()
    }

    #[test]
    fn all_ranks_choose_the_same() {
        let found = local::run(2, |world| -> Result<_> {
            let mut config = config(&[]);
            // Only rank 0 is asked.
            if world.rank() > 0 {
                config.parallel.machine = "no such machine".to_owned();
            }
            config.resolve_ranks(world.size())?;
            agree(&mut config, &world, false)?;
            Ok((config.parallel.linear_method, config.parallel.softmax_method))
        });
        let found = found.unwrap();
        assert_eq!(found[0], found[1]);
        assert!(!is_open(&config(&["parallel.linear_method=lasp1", "parallel.softmax_method=ring"])));
        let mut alone = config(&[]);
        alone.resolve_ranks(2).unwrap();
        decide(&mut alone, false).unwrap();
        assert_eq!((alone.parallel.linear_method.clone(), alone.parallel.softmax_method.clone()), found[0]);
        assert!(!is_open(&alone));
    }

    #[test]
    fn a_method_that_was_named_stays_and_one_that_nobody_uses_costs_no_machine() {
        let mut named = config(&["parallel.linear_method=lasp1"]);
        named.resolve_ranks(8).unwrap();
        decide(&mut named, false).unwrap();
        assert_eq!(named.parallel.linear_method, "lasp1");
        // 4 heads on 8 ranks.
        assert_ne!(named.parallel.softmax_method, "ulysses");
        let mut linear = config(&["model.pattern=L"]);
        linear.resolve_ranks(2).unwrap();
        decide(&mut linear, false).unwrap();
        assert_eq!(linear.parallel.softmax_method, "lasp2h");
    }

    #[test]
    fn the_machine_is_the_one_that_is_named_or_measured() {
        assert_eq!(machine("h200-dgx", false, true).0, "h200-dgx");
        assert_eq!(machine("", true, true).0, FILE);
        assert_eq!([machine("", true, false).0, machine("", false, false).0], [GPU, CPU]);
        assert!([GPU, CPU].iter().all(|name| Machine::load(name).is_ok()));
    }
}
