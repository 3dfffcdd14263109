//! `method = "auto"`: asks the cost model (`benches::simulate`), puts what it finds in the configuration's place and says why;
//! of a training step ([`agree`]), or of an operator by itself ([`Operator`]: `lasp attend`, `lasp compare`). Rank 0 decides and tells
//! the others, whose machine.toml might be another.

use std::path::Path;

use anyhow::{Context, Result};
use benches::exchange::gather;
use benches::simulate::Machine;
use benches::simulate::choose::{Candidate, Choice, choose, choose_operator};
use collectives::Group;
use collectives::local::Network;
use runtime::config::{Config, DataKind, LayerKind};
use runtime::data::Source;
use runtime::sequence::method::AUTO;

/// The file that `lasp calibrate` writes.
const FILE: &str = "machine.toml";
/// Where nothing is said of the machine.
const GPU: &str = "h100-dgx";
const CPU: &str = "epyc-2core";
/// Sequences of packed documents of which the mean decides.
const PACKED: u64 = 4;

/// Decides what is left open, as [`decide`]; the same on every rank. Collective over `world`, and after
/// [`Config::resolve_ranks`].
pub fn agree(config: &mut Config, world: &Group, gpu: bool) -> Result<()> {
    if !is_open(config) {
        return Ok(());
    }
    let mut names = String::new();
    if world.rank() == 0 {
        decide(config, gpu)?;
        names = format!("{}\n{}", config.parallel.linear_method, config.parallel.softmax_method);
    }
    let names = gather(world, &names)?.swap_remove(0);
    let (linear, softmax) = names.split_once('\n').context("rank 0 named no two methods")?;
    linear.clone_into(&mut config.parallel.linear_method);
    softmax.clone_into(&mut config.parallel.softmax_method);
    Ok(())
}

/// An operator by itself, whose method is left open.
#[derive(Clone, Copy)]
pub struct Operator {
    pub kind: LayerKind,
    /// Whether gradients are computed too.
    pub backward: bool,
    pub gpu: bool,
    /// Between ranks that are threads, if one is emulated.
    pub network: Option<Network>,
    /// The option that asks, as the log names it.
    pub option: &'static str,
}

impl Operator {
    /// The method that is quickest for it among the ranks of `world`, the same on every rank. On rank 0 `config` has its sizes,
    /// length, layout and machine, and `cu_seqlens` where packed documents begin and end, if there are any. Collective.
    pub fn agree(self, config: Option<&Config>, cu_seqlens: Option<&[i64]>, world: &Group) -> Result<String> {
        let mut chosen = String::new();
        if let (0, Some(config)) = (world.rank(), config) {
            chosen = self
                .decide(config, cu_seqlens, world.size())
                .with_context(|| format!("{} {AUTO}: the cost model finds no method; name one", self.option))?;
        }
        Ok(gather(world, &chosen)?.swap_remove(0))
    }

    /// Logs from what it chooses.
    fn decide(self, config: &Config, cu_seqlens: Option<&[i64]>, ranks: usize) -> Result<String> {
        let (name, why) = machine(&config.parallel.machine, self.gpu, Path::new(FILE).exists());
        let mut machine = Machine::load(&name).context("parallel.machine, for which \"auto\" decides")?;
        let mut on = String::new();
        if let (Some(network), Some(host)) = (self.network, &mut machine.host) {
            (machine.gpus_per_node, host.network) = (network.node, Some(network.to_string()));
            on = format!(", with the emulated network {network}");
        }
        let choice =
            choose_operator(&machine, config, self.kind, ranks, self.backward, cu_seqlens)?.context("none can run")?;
        let tokens = config.train.seq_len;
        let documents = cu_seqlens.map_or_else(String::new, |of| {
            format!(" in {} documents", of.windows(2).filter(|ends| ends[0] < ends[1]).count())
        });
        tracing::info!(
            "{} {AUTO}: {}, for {tokens} tokens{documents} on {ranks} ranks by the cost model of {name} ({why}){on}; predicted of \
             the operator alone:",
            self.option,
            choice.method
        );
        let what = if self.backward { "forward and backward take" } else { "forward takes" };
        choice.candidates.iter().for_each(|candidate| tracing::info!("  {}", line(candidate, what)));
        Ok(choice.method)
    }
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
    let (packed, documents) = if asked.is_empty() { (vec![], String::new()) } else { packed(config) };
    for choice in choose(&machine, config, sp, &asked, &packed)? {
        let tokens = config.train.seq_len;
        tracing::info!(
            "{} = {AUTO:?}: {}, for {tokens} tokens{documents} on {sp} ranks by the cost model of {name} ({why}); predicted:",
            key(choice.kind),
            choice.method
        );
        choice.candidates.iter().for_each(|candidate| tracing::info!("  {}", line(candidate, "a sequence takes")));
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

/// Boundaries of documents in the first sequences of the training data, and how the log describes them; none if each sequence is one
/// document, or if the data is not here, as for `lasp plan`.
fn packed(config: &Config) -> (Vec<Vec<i64>>, String) {
    if config.data.kind != DataKind::Corpus || !config.data.documents {
        return (vec![], String::new());
    }
    match Source::open(config) {
        Ok((source, _)) => {
            let count = source.windows().map_or(PACKED, |windows| windows.min(PACKED));
            let packed: Vec<Vec<i64>> = (0..count).map(|index| source.sequence(index).cu_seqlens).collect();
            let documents = packed.iter().map(|of| of.len() - 1).sum::<usize>() as f64 / packed.len().max(1) as f64;
            (packed, format!(" in {documents:.1} documents, the mean of the first {count} sequences,"))
        }
        Err(error) => {
            tracing::warn!("{AUTO:?} takes each sequence for one document, as the data cannot be read: {error}");
            (vec![], String::new())
        }
    }
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

fn line(candidate: &Candidate, what: &str) -> String {
    let memory = if candidate.out_of_memory { ", more memory than there is" } else { "" };
    match &candidate.found {
        Ok((seconds, exposed)) => format!(
            "{}: {what} {:.2} ms, of which communication costs {:.2} ms{memory}",
            candidate.method,
            1e3 * seconds,
            1e3 * exposed
        ),
        Err(reason) => format!("{}: cannot run here: {reason}", candidate.method),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use collectives::local;
    use runtime::data::{PrepareOptions, prepare};

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
    fn an_operator_is_decided_by_rank_0_for_the_network_that_it_runs_on() {
        let kinds = [(LayerKind::Linear, "hierarchical:node=2"), (LayerKind::Softmax, "ring")];
        for (kind, expected) in kinds {
            let found = local::run(8, move |world| -> Result<_> {
                let mut config = config(&["parallel.machine=epyc-2core", "model.heads=8"]);
                config.train.seq_len = 64;
                // Hops between nodes are all that counts: log2 of four nodes; a ring crosses them four times, an all-to-all
                // seven, in every round.
                let network = Some("node=2,intra=1ns/1TB/s,inter=50ms/1TB/s".parse()?);
                let of = Operator { kind, backward: true, gpu: false, network, option: "--method" };
                of.agree((world.rank() == 0).then_some(&config), None, &world)
            });
            assert_eq!(found.unwrap(), [expected; 8]);
        }
        let of = Operator { kind: LayerKind::Linear, backward: false, gpu: false, network: None, option: "--method" };
        let mut short = config(&[]);
        short.train.seq_len = 3;
        let error = local::run(4, move |world| of.agree(Some(&short), None, &world)).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains("--method auto: the cost model finds no method; name one"), "{error}");
    }

    #[test]
    fn the_documents_of_the_data_count() {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in [("a.txt", 700), ("b.txt", 50), ("c.txt", 3000)] {
            std::fs::write(folder.path().join(name), name[..1].repeat(bytes)).unwrap();
        }
        let path = folder.path().join("corpus.bin");
        prepare(&[folder.path().to_owned()], None, &path, &PrepareOptions { seed: 1 }, false).unwrap();
        let of = |set: &[&str]| {
            let path = format!("data.path={path:?}");
            packed(&config(&[set, &[path.as_str(), "train.seq_len=1024", "data.validation_fraction=0"]].concat()))
        };
        let (sequences, text) = of(&[]);
        assert!(!sequences.is_empty() && sequences.len() <= PACKED as usize);
        assert!(sequences.iter().all(|of| of.first() == Some(&0) && of.last() == Some(&1024)), "{sequences:?}");
        assert!(sequences.iter().any(|of| of.len() > 2) && text.contains("documents"), "{sequences:?} {text}");
        // Each sequence as one; data that is nowhere.
        assert_eq!(of(&["data.documents=false"]), (vec![], String::new()));
        assert_eq!(packed(&config(&["data.path=nowhere.bin"])), (vec![], String::new()));
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
