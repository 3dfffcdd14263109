//! `auto`: the methods that the model finds quickest for a configuration, a number of ranks and a machine. A function of its
//! arguments alone: ranks that know the same come to the same choice.

use runtime::config::{Config, LayerKind};

use super::{Machine, Method, Prediction, Result, Workload, operator_seconds, predict};

/// What was chosen for one kind of layer, and from what.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    pub kind: LayerKind,
    /// As in `parallel.linear_method` or `parallel.softmax_method`.
    pub method: String,
    pub candidates: Vec<Candidate>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    pub method: String,
    /// Seconds of what was predicted, and how many of them communication costs; or why it cannot run.
    pub found: std::result::Result<(f64, f64), String>,
    /// Whether the model says that it needs more memory than there is.
    pub out_of_memory: bool,
}

/// Candidates for linear layers: exact, and of linear work. A node smaller than the group makes a hierarchy.
fn linear(machine: &Machine, sp: usize) -> Vec<String> {
    let mut names = vec!["lasp2".to_owned(), "lasp1".to_owned(), "all_scan".to_owned()];
    let node = machine.gpus_per_node;
    if node > 1 && node < sp {
        names.push(format!("hierarchical:node={node}"));
    }
    names
}

fn softmax() -> Vec<String> {
    ["lasp2h", "ring", "ulysses", "megatron_sp"].map(str::to_owned).into()
}

fn candidates(
    machine: &Machine,
    kind: LayerKind,
    sp: usize,
    predict: impl Fn(&Method) -> Result<(f64, f64, bool)>,
) -> Vec<Candidate> {
    let names = if kind == LayerKind::Linear { linear(machine, sp) } else { softmax() };
    let candidate = |name: String| {
        let (found, out_of_memory) = match Method::parse(&name).and_then(|method| predict(&method)) {
            Ok((seconds, exposed, out_of_memory)) => (Ok((seconds, exposed)), out_of_memory),
            Err(error) => (Err(error.to_string()), false),
        };
        Candidate { method: name, found, out_of_memory }
    };
    names.into_iter().map(candidate).collect()
}

/// Of equals the first, and of those that fit into memory, if any does.
fn best(candidates: &[Candidate]) -> Option<String> {
    let time = |candidate: &Candidate| candidate.found.as_ref().map_or(f64::INFINITY, |(seconds, _)| *seconds);
    let quickest = |fits: bool| {
        let able = candidates.iter().filter(|candidate| candidate.found.is_ok() && !(fits && candidate.out_of_memory));
        able.min_by(|a, b| time(a).total_cmp(&time(b)))
    };
    quickest(true).or_else(|| quickest(false)).map(|candidate| candidate.method.clone())
}

/// The quickest methods for the kinds of layers that ask for it; `sp` ranks share a sequence of the configuration's length.
/// `packed`: boundaries of documents in sequences of the data, of which the mean counts; none: each is one document.
pub fn choose(
    machine: &Machine,
    config: &Config,
    sp: usize,
    kinds: &[LayerKind],
    packed: &[Vec<i64>],
) -> Result<Vec<Choice>> {
    let mut config = config.clone();
    let mut choices = Vec::new();
    for &kind in kinds {
        // Layers of the other kind take what they take, whatever this one does.
        let work = Workload::one(&config, sp, config.train.seq_len);
        let sequences: Vec<Workload> = match packed {
            [] => vec![work.clone()],
            packed => packed.iter().map(|of| Workload { cu_seqlens: Some(of), ..work.clone() }).collect(),
        };
        let candidates = candidates(machine, kind, sp, |method| {
            let mut mean = (0.0, 0.0, false);
            for work in &sequences {
                let Prediction { step_s, exposed_s, out_of_memory, .. } = predict(machine, method, work)?;
                let share = 1.0 / sequences.len() as f64;
                mean = (mean.0 + share * step_s, mean.1 + share * exposed_s, mean.2 | out_of_memory);
            }
            Ok(mean)
        });
        let Some(best) = best(&candidates) else {
            // All fail for the same reason: the point itself.
            predict(machine, &Method::parse("lasp2")?, &work)?;
            continue;
        };
        match kind {
            LayerKind::Linear => config.parallel.linear_method.clone_from(&best),
            LayerKind::Softmax => config.parallel.softmax_method.clone_from(&best),
        }
        choices.push(Choice { kind, method: best, candidates });
    }
    Ok(choices)
}

/// The quickest method for one operator by itself, of the configuration's sizes, length and layout: forward and, if wanted,
/// backward. `cu_seqlens`: boundaries of documents `[N + 1]`; none: it is one. `None` if no candidate can run.
pub fn choose_operator(
    machine: &Machine,
    config: &Config,
    kind: LayerKind,
    ranks: usize,
    backward: bool,
    cu_seqlens: Option<&[i64]>,
) -> Result<Option<Choice>> {
    let work = Workload { cu_seqlens, ..Workload::one(config, ranks, config.train.seq_len) };
    let predict = |method: &Method| {
        let [seconds, exposed] = operator_seconds(machine, method, kind, &work, backward)?;
        Ok((seconds, exposed, false))
    };
    let candidates = candidates(machine, kind, ranks, predict);
    let Some(method) = best(&candidates) else {
        // Of linear layers all fail for the same reason; of softmax layers LASP-2H runs wherever any does.
        predict(&Method::parse(if kind == LayerKind::Linear { "lasp2" } else { "lasp2h" })?)?;
        return Ok(None);
    };
    Ok(Some(Choice { kind, method, candidates }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: &str = "[model]\nvocab = 1024\ndim = 2048\nlayers = 4\nheads = 16\nkv_heads = 4\npattern = \"LN\"\n\
                         [train]\ndtype = \"bf16\"\nseq_len = 262144\n";

    fn chosen(machine: &Machine, sp: usize, set: &[&str]) -> [Choice; 2] {
        chosen_packed(machine, sp, set, &[])
    }

    fn chosen_packed(machine: &Machine, sp: usize, set: &[&str], packed: &[Vec<i64>]) -> [Choice; 2] {
        let set: Vec<String> = set.iter().map(|text| (*text).to_owned()).collect();
        let config = Config::from_toml_str(MODEL, "test", &set).unwrap();
        choose(machine, &config, sp, &[LayerKind::Linear, LayerKind::Softmax], packed).unwrap().try_into().unwrap()
    }

    /// A network of which only latency, or only bandwidth, matters.
    fn machine(latency_us: f64, gbps: f64, node: usize) -> Machine {
        let mut machine = Machine::load("h100-dgx").unwrap();
        machine.gpus_per_node = node;
        let network = &mut machine.network;
        for protocol in [&mut network.simple, &mut network.ll128, &mut network.ll] {
            (protocol.base_us, protocol.intra_us, protocol.inter_us) = (0.0, latency_us, latency_us);
        }
        (network.intra_gbps, network.inter_gbps, network.across_gbps) = (gbps, gbps, gbps);
        machine
    }

    #[test]
    fn the_choice_follows_the_machine() {
        let short = ["train.seq_len=8192"];
        // Many ranks, a slow link: a gather moves W - 1 states, a chain one.
        let [linear, _] = chosen(&machine(0.1, 0.05, 64), 64, &short);
        assert!(linear.method == "lasp1" || linear.method == "all_scan", "{linear:?}");
        // Links without end, hops that take long: the fewest dependent steps. A ring's gather has as many hops as a chain.
        let [linear, _] = chosen(&machine(500.0, 1e6, 8), 64, &short);
        assert_eq!(linear.method, "hierarchical:node=8", "{linear:?}");
        // All-to-all is one hop, a ring has seven, a gather seven in one message.
        let [_, softmax] = chosen(&machine(500.0, 1e6, 64), 8, &short);
        assert_eq!(softmax.method, "ulysses", "{softmax:?}");
        // Nodes whose inside is free: the scan across nodes has log2 of them.
        let mut nodes = machine(0.1, 1e6, 8);
        nodes.network.across_gbps = 0.5;
        nodes.network.inter_gbps = 0.5;
        let [linear, _] = chosen(&nodes, 64, &short);
        assert_eq!(linear.method, "hierarchical:node=8", "{linear:?}");
    }

    #[test]
    fn documents_change_the_choice() {
        let machine = machine(0.1, 0.05, 64);
        let set = ["train.seq_len=65536"];
        let of = |choice: &Choice, method: &str| {
            choice.candidates.iter().find(|candidate| candidate.method == method).unwrap().found.clone().unwrap()
        };
        let [_, one] = chosen(&machine, 16, &set);
        // Of documents that no rank shares states do not travel, and softmax layers have a sixteenth of the work.
        let shares: Vec<i64> = (0..=16).map(|n| n * 4096).collect();
        let [linear, softmax] = chosen_packed(&machine, 16, &set, std::slice::from_ref(&shares));
        assert_eq!(of(&linear, "lasp2"), of(&linear, "lasp1"));
        assert!(of(&softmax, "ring").0 < of(&one, "ring").0);
        // Of several sequences the mean counts.
        let whole = vec![0, 65536];
        let [_, both] = chosen_packed(&machine, 16, &set, &[shares, whole]);
        let mean = (of(&softmax, "ulysses").0 + of(&one, "ulysses").0) / 2.0;
        // Linear layers' choice, made before, may differ.
        assert!((of(&both, "ulysses").0 / mean - 1.0).abs() < 0.05, "{both:?}");
    }

    #[test]
    fn documents_count_for_an_operator_too() {
        let config = Config::from_toml_str(MODEL, "test", &["train.seq_len=65536".to_owned()]).unwrap();
        let shares: Vec<i64> = (0..=16).map(|n| n * 4096).collect();
        for machine in [machine(0.1, 0.05, 64), Machine::load("epyc-2core").unwrap()] {
            let of = |kind, cu_seqlens| {
                let choice = choose_operator(&machine, &config, kind, 16, true, cu_seqlens).unwrap().unwrap();
                choice.candidates.into_iter().map(|candidate| candidate.found.unwrap()).collect::<Vec<_>>()
            };
            // No state travels, whatever the method, so that nothing is left but threads that wake; and softmax attention has a
            // sixteenth of the work.
            let (one, packed) = (of(LayerKind::Linear, None), of(LayerKind::Linear, Some(&shares[..])));
            assert!(packed.iter().all(|found| found.0 == packed[0].0 && found.1 < 1e-3 * found.0), "{packed:?}");
            assert!(packed.iter().zip(&one).all(|(packed, one)| packed.0 < one.0), "{packed:?} {one:?}");
            let (one, packed) = (of(LayerKind::Softmax, None), of(LayerKind::Softmax, Some(&shares[..])));
            assert!(packed.iter().zip(&one).all(|(packed, one)| packed.0 < one.0), "{packed:?} {one:?}");
        }
    }

    #[test]
    fn what_cannot_run_is_no_choice_and_says_why() {
        let [_, softmax] = chosen(&machine(500.0, 1e6, 64), 32, &[]);
        let ulysses = softmax.candidates.iter().find(|candidate| candidate.method == "ulysses").unwrap();
        assert!(ulysses.found.as_ref().unwrap_err().contains("16 heads, 32 GPUs"), "{ulysses:?}");
        assert_ne!(softmax.method, "ulysses");
    }

    #[test]
    fn the_quickest_candidate_is_chosen() {
        for choice in chosen(&Machine::load("h100-dgx").unwrap(), 16, &[]) {
            let time = |candidate: &Candidate| candidate.found.as_ref().unwrap().0;
            let chosen = choice.candidates.iter().find(|candidate| candidate.method == choice.method).unwrap();
            assert!(choice.candidates.iter().all(|other| time(chosen) <= time(other)), "{choice:?}");
        }
    }
}
