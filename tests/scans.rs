//! Scans by themselves, on made-up summaries: any number of ranks and nodes of any size against a fold over the whole
//! sequence, and bytes received against the table of algorithms.md, section 3.

use std::collections::BTreeMap;

use anyhow::Result;
use collectives::{Group, local};
use kernels::linear::{Summary, Transition};
use kernels::testing::assert_close;
use lasp_tests::{LAYOUTS, fits, randn};
use runtime::config::LayoutKind;
use runtime::sequence::scan::{DecayForm, Known, StateSize};
use runtime::sequence::{Chain, Layout, Messages, Plan, Traffic, method};
use tch::{Kind, Tensor};

const METHODS: [&str; 9] = [
    "lasp2",
    "lasp2:splits=5",
    "lasp2:truncate",
    "lasp1",
    "all_scan",
    "all_scan:blocks=100",
    "hierarchical:node=2",
    "hierarchical:node=3",
    "hierarchical:node=5",
];
const FORMS: [DecayForm; 4] = [DecayForm::None, DecayForm::Head, DecayForm::Token, DecayForm::Channel];

/// B, H, K, V.
const SIZES: [i64; 4] = [2, 3, 7, 4];

fn size(decay: DecayForm) -> StateSize {
    let [b, h, k, v] = SIZES.map(|n| n as u64);
    StateSize { heads: b * h, key: k, value: v, width: 8, decay }
}

fn chain(layout: LayoutKind, lengths: &[i64], ranks: usize, rank: usize) -> Result<Chain> {
    let mut cu = vec![0];
    for length in lengths {
        cu.push(cu[cu.len() - 1] + length);
    }
    Ok(Plan::new(Layout::new(layout, cu[cu.len() - 1], ranks)?, Some(&cu), rank)?.chain)
}

fn state(segment: usize) -> Tensor {
    randn(100 + segment as u64, &SIZES)
}

/// A segment's transition; `strength` is about the log-decay of a segment.
fn transition(form: DecayForm, strength: f64, segment: usize) -> Transition {
    let [b, h, k, _] = SIZES;
    let log = |seed, shape: &[i64]| -(randn(seed, shape).abs() + 0.5) * strength;
    match form {
        DecayForm::None => Transition::Identity,
        DecayForm::Head => Transition::Scalar(log(7, &[1, h]).expand([b, h], false)),
        DecayForm::Token => Transition::Scalar(log(200 + segment as u64, &[b, h])),
        DecayForm::Channel => Transition::Channel(log(200 + segment as u64, &[b, h, k])),
    }
}

fn summary(form: DecayForm, strength: f64, segment: usize) -> Summary {
    Summary { transition: transition(form, strength, segment), state: state(segment) }
}

fn known(chain: &Chain, form: DecayForm, strength: f64) -> Known {
    match form {
        DecayForm::None | DecayForm::Head => {
            Known::All((0..chain.links.len()).map(|segment| transition(form, strength, segment)).collect())
        }
        DecayForm::Token | DecayForm::Channel => Known::Nothing,
    }
}

/// The states that enter each segment (or, `reverse`, the gradients that come in at its end), by the recurrence.
fn reference(chain: &Chain, form: DecayForm, strength: f64, reverse: bool) -> Vec<Option<Tensor>> {
    let count = chain.links.len();
    let mut found: Vec<Option<Tensor>> = (0..count).map(|_| None).collect();
    let mut running: Option<Tensor> = None;
    for i in 0..count {
        let segment = if reverse { count - 1 - i } else { i };
        let link = chain.links[segment];
        let (enters, leaves) = if reverse { (link.leaves, link.enters) } else { (link.enters, link.leaves) };
        if enters {
            found[segment] = running.as_ref().map(Tensor::shallow_clone);
        }
        if !link.empty {
            let summary = summary(form, strength, segment);
            running = match running {
                Some(running) if link.through => Some(summary.after(&running).unwrap()),
                _ if leaves => Some(summary.state),
                _ => None,
            };
        }
    }
    found
}

#[test]
fn every_scan_is_the_fold_over_the_whole_sequence() {
    tch::set_num_threads(1);
    let documents: [&[i64]; 5] = [&[97], &[3, 60, 0, 1, 33], &[30, 30, 30], &[1, 1, 1], &[2, 9]];
    for ranks in [1, 2, 3, 4, 5, 6, 7, 9, 12] {
        let check = |group: Group| -> Result<()> {
            for name in METHODS {
                let scan = method::scan(name, &group)?;
                let cases = documents.iter().flat_map(|d| LAYOUTS.map(|layout| (d, layout)));
                for (documents, layout) in cases {
                    let chain = chain(layout, documents, ranks, group.rank())?;
                    for (form, strength) in FORMS.into_iter().flat_map(|form| [(form, 0.3), (form, 30.0)]) {
                        if !chain.flows() {
                            continue;
                        }
                        let mine = chain.held.iter().map(|&s| summary(form, strength, s)).collect();
                        let known = known(&chain, form, strength);
                        let (entries, transitions) = scan.forward(&group, &chain, mine, known)?.wait()??;
                        let grads = chain.held.iter().map(|&s| state(s)).collect();
                        let exits = scan.backward(&group, &chain, grads, transitions)?.wait()??;
                        for (what, ours, reverse) in [("entry", entries, false), ("exit", exits, true)] {
                            let truth = reference(&chain, form, strength, reverse);
                            for (&segment, ours) in chain.held.iter().zip(ours) {
                                let case = format!(
                                    "{name}: {what} of segment {segment}, rank {} of {ranks}, {layout:?}, documents \
                                     {documents:?}, decay {form:?} {strength}",
                                    group.rank()
                                );
                                match (&ours, &truth[segment]) {
                                    (Some(ours), Some(truth)) => assert_close(&case, ours, truth, 1e-14),
                                    (None, None) => {}
                                    _ => panic!(
                                        "{case}: found {}, expected {}",
                                        ours.is_some(),
                                        truth[segment].is_some()
                                    ),
                                }
                            }
                        }
                    }
                }
            }
            Ok(())
        };
        if let Err(error) = local::run(ranks, check) {
            panic!("{ranks} ranks: {error}");
        }
    }
}

/// What the scans of one document moved on one rank, forward and backward, and the method's own formula.
struct Moved {
    forward: Messages,
    backward: Messages,
    formula: Traffic,
}

impl Moved {
    fn received(&self) -> u64 {
        self.forward.bytes().received
    }

    /// By operation the number of messages.
    fn operations(&self) -> BTreeMap<&'static str, u64> {
        self.forward.iter().map(|((_, op), count)| (op, count.messages)).collect()
    }
}

fn moved(name: &str, layout: LayoutKind, ranks: usize, form: DecayForm, strength: f64) -> Vec<Moved> {
    moved_of(name, layout, &[100], ranks, form, strength)
}

fn moved_of(
    name: &str,
    layout: LayoutKind,
    documents: &[i64],
    ranks: usize,
    form: DecayForm,
    strength: f64,
) -> Vec<Moved> {
    let run = |group: Group| -> Result<Moved> {
        let scan = method::scan(name, &group)?;
        let chain = chain(layout, documents, ranks, group.rank())?;
        let formula = scan.traffic(&chain, group.rank(), &size(form));
        if !chain.flows() {
            return Ok(Moved { forward: Messages::default(), backward: Messages::default(), formula });
        }
        let mine = chain.held.iter().map(|&s| summary(form, strength, s)).collect();
        group.recorder().clear();
        let (_, transitions) = scan.forward(&group, &chain, mine, known(&chain, form, strength))?.wait()??;
        let forward = lasp_tests::moved(&group);
        group.recorder().clear();
        let grads = chain.held.iter().map(|&s| state(s)).collect();
        scan.backward(&group, &chain, grads, transitions)?.wait()??;
        Ok(Moved { forward, backward: lasp_tests::moved(&group), formula })
    };
    local::run(ranks, run).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn bytes_are_those_of_the_table() {
    let st = size(DecayForm::None).state();
    let one = |rank: usize| if rank > 0 { st } else { 0 };
    let check = |name: &str, expected: &dyn Fn(usize) -> u64| {
        for (rank, moved) in moved(name, LayoutKind::Contiguous, 8, DecayForm::None, 1.0).iter().enumerate() {
            assert_eq!(moved.received(), expected(rank), "{name}, rank {rank}");
            assert_eq!(moved.formula.forward.bytes().received, expected(rank), "{name}, rank {rank}");
        }
    };
    for name in ["lasp2", "lasp2:splits=3", "lasp2:truncate"] {
        check(name, &|_| 7 * st);
    }
    for name in ["lasp1", "all_scan", "all_scan:blocks=3"] {
        check(name, &one);
    }
    check("hierarchical", &|_| 7 * st);
    check("hierarchical:node=1", &|rank| [0, 1, 2, 2, 3, 3, 3, 3][rank] * st);
    // K = 7 is scanned as 3 + 4 rows by the two ranks of a node: 3 / 7 and 4 / 7 of a state.
    let row = st / 7;
    check("hierarchical:node=2", &|rank| {
        let (mine, other) = if rank % 2 == 0 { (3 * row, 4 * row) } else { (4 * row, 3 * row) };
        st + [0, 1, 2, 2][rank / 2] * mine + if rank < 2 { 0 } else { other }
    });
}

/// On both layouts, with log-decays that travel, documents and empty segments, forward and backward: what was moved is what
/// the formula says, which for a truncated scan is a bound; and a bound that is reached where nothing dies.
#[test]
fn messages_are_those_of_the_methods_own_formula() {
    tch::set_num_threads(1);
    for (name, form) in METHODS.into_iter().flat_map(|name| FORMS.map(|form| (name, form))) {
        for (layout, documents) in LAYOUTS.into_iter().flat_map(|layout| [(layout, &[100][..]), (layout, &[2, 9, 1])]) {
            for (ranks, strength) in [1, 2, 5, 8].into_iter().flat_map(|ranks| [(ranks, 1e-6), (ranks, 30.0)]) {
                for (rank, moved) in moved_of(name, layout, documents, ranks, form, strength).iter().enumerate() {
                    let dies = moved.formula.at_most && strength > 1.0;
                    assert!(!dies || name == "lasp2:truncate", "{name}");
                    let name = format!("{name}, rank {rank} of {ranks}, {layout:?} {documents:?}, {form:?} {strength}");
                    for (ours, formula) in
                        [(&moved.forward, &moved.formula.forward), (&moved.backward, &moved.formula.backward)]
                    {
                        assert!(fits(ours, formula, dies), "{name}: moved {ours:?}, expected {formula:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn what_has_died_is_not_sent() {
    let st = size(DecayForm::None).state();
    let received = |form, strength| -> Vec<u64> {
        moved("lasp2:truncate", LayoutKind::Contiguous, 6, form, strength).iter().map(Moved::received).collect()
    };
    let decays = 5 * size(DecayForm::Channel).decays();
    // 2^-53 is e^-36.7, and no head or channel decays by less than half the strength.
    assert_eq!(received(DecayForm::Head, 80.0), [0, st, st, st, st, st]);
    assert_eq!(received(DecayForm::Channel, 80.0), [0, st, st, st, st, st].map(|states| decays + states));
    assert_eq!(
        received(DecayForm::Channel, 1e-6),
        [0, st, 2 * st, 3 * st, 4 * st, 5 * st].map(|states| decays + states)
    );
}

#[test]
fn messages_are_as_many_as_the_settings_say() {
    let count = |name: &str| -> Vec<BTreeMap<&'static str, u64>> {
        let moved = moved(name, LayoutKind::Contiguous, 3, DecayForm::Token, 1.0);
        moved.iter().map(Moved::operations).collect()
    };
    assert_eq!(count("lasp2:splits=5")[1], BTreeMap::from([("all_gather", 5)]));
    assert_eq!(count("lasp1"), [[("send", 1)].into(), [("recv", 1), ("send", 1)].into(), [("recv", 1)].into()]);
    assert_eq!(count("all_scan:blocks=3")[1], BTreeMap::from([("recv", 3), ("send", 3)]));
    assert_eq!(count("all_scan:blocks=100")[1], BTreeMap::from([("recv", 7), ("send", 7)]));
}

#[test]
fn states_in_f32_stay_f32() {
    for name in METHODS {
        let run = |group: Group| -> Result<Vec<Kind>> {
            let scan = method::scan(name, &group)?;
            let chain = chain(LayoutKind::Zigzag, &[40], 3, group.rank())?;
            // Mixers add log-decays up in f64.
            let summary =
                |&s: &usize| Summary { state: state(s).to_kind(Kind::Float), ..summary(DecayForm::Channel, 1.0, s) };
            let mine = chain.held.iter().map(summary).collect();
            let (entries, _) = scan.forward(&group, &chain, mine, Known::Nothing)?.wait()??;
            Ok(entries.into_iter().flatten().map(|entry| entry.kind()).collect())
        };
        let kinds = local::run(3, run).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(kinds.into_iter().flatten().all(|kind| kind == Kind::Float), "{name}");
    }
}
