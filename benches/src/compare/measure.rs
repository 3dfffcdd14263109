//! All methods at one length: warm-up, then rounds in which every method has its turn, in another order each round, so that a
//! noisy machine favours none; then one more step of each for its memory.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use collectives::{Group, Mesh};
use tch::Device;

use super::lanes::{self, Counts, Lanes, Phase};
use super::memory::{self, Memory};
use super::method::Entrant;
use super::row::{Measured, Row};
use super::table::ranks;
use super::traffic::{Bound, Expected, expected};
use super::work::{self, Scene, Work};
use super::{Mode, Options};
use crate::exchange::gather;
use crate::{Timing, settle};

/// Rounds before those that count. On a GPU kernels are compiled in them, libraries try their variants, communicators come
/// about, and the clock rises.
pub(super) fn warm_up(device: Device) -> usize {
    if device.is_cuda() { 5 } else { 2 }
}

/// A method at work, and what its rounds gave on this rank.
struct Contender<'a> {
    entrant: &'a Entrant,
    work: Box<dyn Work>,
    /// By phase.
    expected: Vec<Expected>,
    rounds: Vec<Vec<(Counts, Phase)>>,
    memory: Option<Memory>,
}

/// Collective.
pub(super) fn rows(
    options: &Options,
    mesh: &Mesh,
    entrants: &[Entrant],
    tokens: i64,
    announce: &dyn Fn(Duration),
) -> Result<Vec<Row>> {
    let (world, device, warm_up) = (&mesh.world, options.device, warm_up(options.device));
    let (mut contenders, mut scene) = (Vec::new(), Scene::new(options, mesh, tokens));
    let what = |entrant: &Entrant| format!("{}, {}, {tokens} tokens", entrant.method.label(), ranks(world.size()));
    for entrant in entrants.iter().filter(|entrant| entrant.refused.is_none()) {
        let plan = work::plan(mesh, entrant.method.layout, tokens)?;
        let expected = expected(options, entrant, &plan);
        let work = named(scene.work(entrant), || what(entrant))?;
        contenders.push(Contender { entrant, work, expected, rounds: vec![], memory: None });
    }
    let count = contenders.len();
    let mut started = Instant::now();
    for round in 0..warm_up + options.rounds {
        if round + 1 == warm_up {
            started = Instant::now();
        } else if round == warm_up {
            // Memory takes one more.
            announce(started.elapsed() * (options.rounds as u32 + 1));
        }
        for turn in 0..count {
            let contender = &mut contenders[(round + turn) % count];
            tracing::debug!("rank {}: round {round}, {}", world.rank(), what(contender.entrant));
            let phases = named(step(world, device, contender.work.as_mut()), || what(contender.entrant))?;
            let phases_of = contender.work.phases();
            check(&what(contender.entrant), phases_of, world, &contender.expected, &phases)?;
            if round >= warm_up {
                contender.rounds.push(phases);
            }
        }
    }
    for contender in &mut contenders {
        let work = contender.work.as_mut();
        contender.memory = memory::of_step(world, device, || {
            (0..work.phases().len()).try_for_each(|phase| work.run(phase))?;
            work.tidy()
        })?;
    }
    let mut contenders = contenders.into_iter();
    let mut rows = Vec::with_capacity(entrants.len());
    for entrant in entrants {
        let measured = match entrant.refused {
            Some(_) => None,
            None => Some(measured(options, world, tokens, contenders.next().context("a method without a turn")?)?),
        };
        rows.push(Row {
            method: entrant.method.label(),
            quadratic: entrant.method.is_left_product(),
            layout: entrant.method.layout,
            mixer: options.mixer,
            mode: options.mode,
            ranks: world.size(),
            tokens,
            skipped: entrant.refused.clone(),
            measured,
        });
    }
    Ok(rows)
}

/// An error says in what it happened and, where memory has run out, what can be done.
fn named<T>(result: Result<T>, what: impl FnOnce() -> String) -> Result<T> {
    result.map_err(|error| {
        let hint = match format!("{error:#}").contains("out of memory") {
            true => " need more memory than there is: shorten --seq-lens, or leave the method out (--methods)",
            false => "",
        };
        error.context(format!("{}{hint}", what()))
    })
}

/// One step, each phase from a barrier until the device is through with it.
fn step(world: &Group, device: Device, work: &mut dyn Work) -> Result<Vec<(Counts, Phase)>> {
    let recorder = world.recorder();
    let mut phases = Vec::with_capacity(work.phases().len());
    for phase in 0..work.phases().len() {
        settle(device);
        world.barrier()?.wait()?;
        recorder.clear();
        let start = recorder.now();
        work.run(phase)?;
        settle(device);
        let end = recorder.now();
        recorder.settle();
        phases.push(lanes::read(recorder, start, end));
    }
    work.tidy()?;
    Ok(phases)
}

/// Holds the bytes that were counted against the formula.
fn check(name: &str, phases: &[&str], world: &Group, expected: &[Expected], counted: &[(Counts, Phase)]) -> Result<()> {
    for ((phase, expected), (counts, _)) in phases.iter().zip(expected).zip(counted) {
        let most = if expected.bound == Bound::AtMost { "at most " } else { "" };
        ensure!(
            expected.allows(counts.method_received, counts.method_sent),
            "{name}: rank {} counted {} bytes received and {} bytes sent in {phase}, its formula says {most}{} bytes \
             received and {} bytes sent (runtime::sequence, traffic); so there are no figures",
            world.rank(),
            counts.method_received,
            counts.method_sent,
            expected.received,
            expected.sent
        );
    }
    Ok(())
}

fn measured(options: &Options, world: &Group, tokens: i64, contender: Contender) -> Result<Measured> {
    let Contender { work, rounds, expected, memory, .. } = contender;
    let counts: Vec<Vec<Counts>> =
        rounds.iter().map(|phases| phases.iter().map(|(counts, _)| *counts).collect()).collect();
    let ranks = gather(world, &counts)?;
    let slowest = |round: usize, phase: usize| {
        let ns = ranks.iter().map(|rounds| rounds[round][phase].ns).max().unwrap_or(0);
        ns as f64 / 1e6
    };
    let phases = work.phases().len();
    let rounds_of = |phase: usize| (0..rounds.len()).map(|round| slowest(round, phase)).collect::<Vec<_>>();
    let steps: Vec<f64> = (0..rounds.len()).map(|round| (0..phases).map(|phase| slowest(round, phase)).sum()).collect();

    let total = |rank: usize, round: usize, of: fn(&Counts) -> u64| ranks[rank][round].iter().map(of).sum::<u64>();
    let of_last = |of: fn(&Counts) -> u64| (0..ranks.len()).map(|rank| total(rank, rounds.len() - 1, of)).collect();
    let all = |of: fn(&Counts) -> u64| -> u64 { ranks.iter().flatten().flatten().map(of).sum() };
    let exposed = (0..rounds.len()).map(|round| {
        let waited: u64 = (0..ranks.len()).map(|rank| total(rank, round, |counts| counts.exposed_ns)).sum();
        waited as f64 / 1e6 / ranks.len() as f64 / steps[round]
    });
    let communication = all(|counts| counts.communication_ns);
    let hidden = all(|counts| counts.hidden_ns) as f64 / communication as f64;

    let step = Timing::of(steps.clone());
    let off = |round: &usize| (steps[*round] - step.median_ms).abs();
    let median = (0..rounds.len()).min_by(|a, b| off(a).total_cmp(&off(b))).context("no rounds")?;
    let spans: Vec<Phase> = rounds[median].iter().map(|(_, phase)| phase.clone()).collect();
    let lanes =
        Lanes { phases: work.phases().iter().map(|name| (*name).to_owned()).collect(), ranks: gather(world, &spans)? };
    let formula = expected.iter().fold(Expected::default(), |sum, phase| sum.plus(*phase));
    let timing = |phase: usize| (phases == 2).then(|| Timing::of(rounds_of(phase)));
    let batch = if options.mode == Mode::Train { options.config.train.batch } else { 1 };
    let tokens_per_s = tokens as f64 * batch as f64 / step.median_ms * 1e3;
    Ok(Measured {
        forward: timing(0),
        backward: timing(1),
        step,
        tokens_per_s,
        tokens_per_s_and_rank: tokens_per_s / world.size() as f64,
        memory,
        sent: of_last(|counts| counts.sent),
        received: of_last(|counts| counts.received),
        messages: of_last(|counts| counts.messages),
        layers_received: of_last(|counts| counts.method_received),
        formula_received: gather(world, &formula.received)?,
        formula: formula.bound,
        exposed: Timing::of(exposed.collect()).median_ms,
        hidden: (communication > 0).then_some(hidden),
        lanes: Some(lanes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_where_and_what_helps() {
        let error = |text: &'static str| {
            format!(
                "{:#}",
                named::<()>(Err(anyhow::anyhow!(text)), || "ring, 2 ranks, 9 tokens".to_owned()).unwrap_err()
            )
        };
        assert_eq!(error("no"), "ring, 2 ranks, 9 tokens: no");
        let found = error("CUDA out of memory. Tried to allocate 20.00 GiB");
        assert!(
            found.starts_with("ring, 2 ranks, 9 tokens need more memory than there is: shorten --seq-lens"),
            "{found}"
        );
        assert!(found.ends_with(": CUDA out of memory. Tried to allocate 20.00 GiB"), "{found}");
    }
}
