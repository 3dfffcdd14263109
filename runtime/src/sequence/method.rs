//! Methods by their names in a configuration and on the command line. A new method is a file of its own and a line here.
//!
//! Linear layers: `lasp2` (`splits=N`, `truncate`), `lasp1`, `all_scan` (`blocks=N`), `hierarchical` (`node=N`), each
//! setting as in `all_scan:blocks=8`; and the paper's baselines, `ring_left_product` and `megatron_sp_left_product`.
//!
//! Softmax layers: `lasp2h` (`stages=N`), `ring`, `ulysses`, `megatron_sp`.

use std::sync::Arc;

use collectives::Group;

use super::attention::{Attention, Lasp2h, MegatronSp, Ring, Ulysses};
use super::left_product::{LeftProduct, MegatronSpLeftProduct, RingLeftProduct};
use super::scan::{
    AllScan, DecayForm, Hierarchical, Lasp1, Lasp2, Reach, Scan, StateSize, Truncated, hierarchical_traffic,
};
use super::settings::Settings;
use super::{Error, LayerSizes, LinearMethod, Plan, Result, Traffic};

/// Names of the scans, for linear layers.
pub const SCANS: &[&str] = &["lasp2", "lasp1", "all_scan", "hierarchical"];
/// Names of the left products, for linear layers too: the paper's baselines.
pub const LEFT_PRODUCTS: &[&str] = &["ring_left_product", "megatron_sp_left_product"];
/// Names of all methods for linear layers.
pub const LINEAR: &[&str] = &joined::<{ SCANS.len() + LEFT_PRODUCTS.len() }>(SCANS, LEFT_PRODUCTS);
/// Names of the methods for softmax layers.
pub const ATTENTIONS: &[&str] = &["lasp2h", "ring", "ulysses", "megatron_sp"];

/// In a configuration: whichever the cost model finds quickest. The program puts a method in its place before it builds anything.
pub const AUTO: &str = "auto";

/// The keys of a configuration that name methods.
pub(super) const LINEAR_KEY: &str = "parallel.linear_method";
const SOFTMAX_KEY: &str = "parallel.softmax_method";

/// GPUs of most nodes.
const NODE: usize = 8;

/// The scan that `found` names, for the ranks of `group`, connected. Collective: to be called once in a run, on every rank, before
/// anything is under way.
pub fn scan(found: &str, group: &Group) -> Result<Arc<dyn Scan>> {
    decided(found, LINEAR_KEY)?;
    let choice = choose(found).map_err(unknown(LINEAR_KEY, found))?;
    let scan: Arc<dyn Scan> = match choice {
        Choice::Lasp2(scan) => Arc::new(scan),
        Choice::Truncated(scan) => Arc::new(scan),
        Choice::Lasp1(scan) => Arc::new(scan),
        Choice::AllScan(scan) => Arc::new(scan),
        Choice::Hierarchical { node } => Arc::new(Hierarchical::new(group, node)?),
    };
    scan.connect(group)?;
    Ok(scan)
}

/// The method that `found` names, a scan or a left product. Collective as [`scan`] is.
pub fn linear(found: &str, group: &Group) -> Result<LinearMethod> {
    decided(found, LINEAR_KEY)?;
    match left_product(found) {
        Some(method) => {
            method.connect(group)?;
            Ok(LinearMethod::LeftProduct(method))
        }
        None => {
            check_linear(found).map_err(unknown(LINEAR_KEY, found))?;
            Ok(LinearMethod::Scan(scan(found, group)?))
        }
    }
}

/// The method that `found` names for softmax layers. Collective as [`scan`] is.
pub fn softmax(found: &str, group: &Group) -> Result<Arc<dyn Attention>> {
    let method = attention(found)?;
    method.connect(group)?;
    Ok(method)
}

/// What the plan's rank moves for one linear layer under the method that `found` names. No group is needed.
pub fn linear_traffic(found: &str, plan: &Plan, layer: &LayerSizes, decay: DecayForm) -> Result<Traffic> {
    linear_traffic_within(found, plan, layer, decay, None)
}

/// [`linear_traffic`] of a layer of which it is known how far a truncated scan reaches, forward and backward ([`Reach::both_ways`]).
pub fn linear_traffic_within(
    found: &str,
    plan: &Plan,
    layer: &LayerSizes,
    decay: DecayForm,
    reaches: Option<&[Reach; 2]>,
) -> Result<Traffic> {
    decided(found, LINEAR_KEY)?;
    if let Some(method) = left_product(found) {
        return Ok(method.traffic(plan, layer));
    }
    let choice = choose(found).map_err(unknown(LINEAR_KEY, found))?;
    let scan: &dyn Scan = match &choice {
        Choice::Lasp2(scan) => scan,
        Choice::Truncated(scan) => {
            let size = StateSize::of_layer(layer, decay);
            if let Some(reaches) = reaches {
                return Ok(scan.traffic_within(reaches, &plan.chain, plan.rank, &size));
            }
            scan
        }
        Choice::Lasp1(scan) => scan,
        Choice::AllScan(scan) => scan,
        Choice::Hierarchical { node } => {
            return Ok(hierarchical_traffic(*node, &plan.chain, plan.rank, &StateSize::of_layer(layer, decay)));
        }
    };
    Ok(scan.traffic(&plan.chain, plan.rank, &StateSize::of_layer(layer, decay)))
}

/// Whether `found` names a method for linear layers; if not, what was expected.
pub fn check_linear(found: &str) -> std::result::Result<(), String> {
    let name = name(found);
    if LEFT_PRODUCTS.contains(&found) {
        Ok(())
    } else if LEFT_PRODUCTS.contains(&name) {
        Err(format!("{name} without settings"))
    } else if SCANS.contains(&name) {
        check_scan(found)
    } else {
        Err(one_of(LINEAR))
    }
}

/// The left product that `name` names, if it names one.
pub fn left_product(name: &str) -> Option<Arc<dyn LeftProduct>> {
    match name {
        "ring_left_product" => Some(Arc::new(RingLeftProduct)),
        "megatron_sp_left_product" => Some(Arc::new(MegatronSpLeftProduct)),
        _ => None,
    }
}

const fn joined<const N: usize>(first: &[&'static str], second: &[&'static str]) -> [&'static str; N] {
    let (mut all, mut i) = ([""; N], 0);
    while i < N {
        all[i] = if i < first.len() { first[i] } else { second[i - first.len()] };
        i += 1;
    }
    all
}

/// Whether `found` names a scan; if not, what was expected.
pub fn check_scan(found: &str) -> std::result::Result<(), String> {
    choose(found).map(|_| ())
}

enum Choice {
    Lasp2(Lasp2),
    Truncated(Truncated),
    Lasp1(Lasp1),
    AllScan(AllScan),
    Hierarchical { node: usize },
}

fn choose(found: &str) -> std::result::Result<Choice, String> {
    let (name, mut settings) = Settings::split(found);
    let choice = match name {
        "lasp2" => {
            let gather = Lasp2 { splits: settings.number("splits", Lasp2::default().splits)? };
            match settings.flag("truncate")? {
                true => Choice::Truncated(Truncated { undecayed: gather }),
                false => Choice::Lasp2(gather),
            }
        }
        "lasp1" => Choice::Lasp1(Lasp1),
        "all_scan" => Choice::AllScan(AllScan { blocks: settings.number("blocks", AllScan::default().blocks)? }),
        "hierarchical" => Choice::Hierarchical { node: settings.number("node", NODE)? },
        _ => return Err(one_of(SCANS)),
    };
    settings.end()?;
    Ok(choice)
}

/// Ranks of a node, if `found` names the hierarchical scan.
pub(crate) fn node_size(found: &str) -> Option<usize> {
    match choose(found) {
        Ok(Choice::Hierarchical { node }) => Some(node),
        _ => None,
    }
}

fn one_of(known: &[&str]) -> String {
    let quoted: Vec<String> = known.iter().map(|name| format!("{name:?}")).collect();
    format!("one of {}", quoted.join(", "))
}

/// An error if the method is still to be chosen.
fn decided(found: &str, key: &'static str) -> Result<()> {
    if found == AUTO { Err(Error::Undecided { key }) } else { Ok(()) }
}

/// The method that `found` names for softmax layers, which is still to be connected.
pub fn attention(found: &str) -> Result<Arc<dyn Attention>> {
    decided(found, SOFTMAX_KEY)?;
    Ok(match choose_attention(found).map_err(unknown(SOFTMAX_KEY, found))? {
        AttentionChoice::Lasp2h(method) => Arc::new(method),
        AttentionChoice::Ring => Arc::new(Ring),
        AttentionChoice::Ulysses => Arc::new(Ulysses),
        AttentionChoice::MegatronSp => Arc::new(MegatronSp),
    })
}

/// Whether `found` names a method for softmax layers; if not, what was expected.
pub fn check_attention(found: &str) -> std::result::Result<(), String> {
    choose_attention(found).map(|_| ())
}

enum AttentionChoice {
    Lasp2h(Lasp2h),
    Ring,
    Ulysses,
    MegatronSp,
}

fn choose_attention(found: &str) -> std::result::Result<AttentionChoice, String> {
    let (name, mut settings) = Settings::split(found);
    let choice = match name {
        "lasp2h" => AttentionChoice::Lasp2h(Lasp2h { stages: settings.number("stages", Lasp2h::default().stages)? }),
        "ring" => AttentionChoice::Ring,
        "ulysses" => AttentionChoice::Ulysses,
        "megatron_sp" => AttentionChoice::MegatronSp,
        _ => return Err(one_of(ATTENTIONS)),
    };
    settings.end()?;
    Ok(choice)
}

/// LASP-2H with its settings, if `found` names it.
pub fn lasp2h(found: &str) -> Option<Lasp2h> {
    match choose_attention(found) {
        Ok(AttentionChoice::Lasp2h(method)) => Some(method),
        _ => None,
    }
}

/// The method's name without its settings.
pub(crate) fn name(found: &str) -> &str {
    Settings::split(found).0
}

fn unknown(key: &'static str, found: &str) -> impl FnOnce(String) -> Error {
    move |expected| Error::Method { key, found: found.to_owned(), expected }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_a_method() {
        assert!(LINEAR.iter().all(|name| check_linear(name).is_ok()));
        assert!(LEFT_PRODUCTS.iter().all(|name| left_product(name).is_some_and(|method| method.name() == *name)));
        assert!(ATTENTIONS.iter().all(|name| attention(name).is_ok()));
        for (wrong, expected) in [
            (
                "lasp3",
                format!("one of {}", LINEAR.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ")),
            ),
            ("ring_left_product:blocks=2", "ring_left_product without settings".to_owned()),
            ("lasp1:node=2", "lasp1 without settings; it knows no \"node\"".to_owned()),
        ] {
            assert_eq!(check_linear(wrong), Err(expected), "{wrong}");
        }
    }

    #[test]
    fn auto_must_be_decided_before() {
        for (found, key) in [
            (collectives::local::run(1, |group| linear(AUTO, &group).map(drop)).unwrap_err(), "parallel.linear_method"),
            (attention(AUTO).map(drop).unwrap_err(), "parallel.softmax_method"),
        ] {
            let message = found.to_string();
            assert!(message.contains(&format!("{key} = \"auto\"")), "{message}");
        }
    }

    #[test]
    fn settings_are_part_of_the_name() {
        for right in ["lasp2", "lasp2:splits=4", "lasp2:truncate", "lasp2:truncate, splits=2", "all_scan:blocks=8"] {
            assert_eq!(check_scan(right), Ok(()), "{right}");
        }
        assert!(SCANS.iter().all(|name| check_scan(name).is_ok()));
        for (wrong, expected) in [
            ("lasp3", "one of \"lasp2\", \"lasp1\", \"all_scan\", \"hierarchical\""),
            ("lasp2:splits=0", "lasp2:splits=N with a whole number N of at least 1"),
            ("lasp2:splits", "lasp2:splits=N with a whole number N of at least 1"),
            ("lasp2:truncate=yes", "lasp2:truncate, without a value"),
            ("lasp2:blocks=3", "lasp2 with no other setting than splits=N, truncate, each once; not \"blocks\""),
            (
                "lasp2:splits=2,splits=3",
                "lasp2 with no other setting than splits=N, truncate, each once; not \"splits\"",
            ),
            ("lasp1:node=2", "lasp1 without settings; it knows no \"node\""),
        ] {
            assert_eq!(check_scan(wrong), Err(expected.to_owned()), "{wrong}");
        }
        assert_eq!(lasp2h("lasp2h:stages=2").map(|method| method.stages), Some(2));
        assert_eq!(lasp2h("lasp2h").map(|method| method.stages), Some(Lasp2h::default().stages));
        assert!(lasp2h("lasp2h:splits=2").is_none() && lasp2h("ring").is_none());
        assert_eq!(check_attention("lasp2h:stages=2"), Ok(()));
        for (wrong, expected) in [
            ("lasp2", "one of \"lasp2h\", \"ring\", \"ulysses\", \"megatron_sp\""),
            ("lasp2h:stages=0", "lasp2h:stages=N with a whole number N of at least 1"),
            ("lasp2h:splits=2", "lasp2h with no other setting than stages=N, each once; not \"splits\""),
            ("ring:stages=2", "ring without settings; it knows no \"stages\""),
        ] {
            assert_eq!(check_attention(wrong), Err(expected.to_owned()), "{wrong}");
        }
    }
}
