//! What one rank did in one phase of a step, from its flight recorder: counts, and spans on a clock that starts where the
//! barrier let the rank go. Barriers themselves are left out.

use collectives::Recorder;
use serde::{Deserialize, Serialize};

/// One rank in one phase. Communication is counted but for barriers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Counts {
    pub ns: u64,
    /// For how long the rank was blocked.
    pub exposed_ns: u64,
    /// While any operation was under way, from when it was taken up to its result; and the part of that time in which the rank
    /// was not blocked.
    pub communication_ns: u64,
    pub hidden_ns: u64,
    pub sent: u64,
    pub received: u64,
    pub messages: u64,
    /// Of `sent` and `received` what groups other than the world moved: the methods, without the sum of gradients.
    pub method_sent: u64,
    pub method_received: u64,
}

/// What happened on one rank in one phase.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    pub ns: u64,
    pub computing: Vec<Span>,
    pub communicating: Vec<Span>,
    /// From when to when the rank was blocked.
    pub waiting: Vec<(u64, u64)>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Span {
    pub name: String,
    pub start_ns: u64,
    pub end_ns: u64,
}

/// One step of a method on all ranks, phase by phase: `[rank][phase]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Lanes {
    pub phases: Vec<String>,
    pub ranks: Vec<Vec<Phase>>,
}

/// Reads what was recorded since the recorder was cleared; the phase ran from `start` to `end` on its clock.
pub(super) fn read(recorder: &Recorder, start: u64, end: u64) -> (Counts, Phase) {
    let mut counts = Counts { ns: end - start, ..Counts::default() };
    for ((group, op), totals) in recorder.totals_by_op() {
        if op == "barrier" {
            continue;
        }
        counts.exposed_ns += totals.exposed_ns;
        counts.sent += totals.bytes_sent;
        counts.received += totals.bytes_received;
        counts.messages += totals.messages;
        if &*group != "world" {
            counts.method_sent += totals.bytes_sent;
            counts.method_received += totals.bytes_received;
        }
    }
    let since = |ns: u64| ns.saturating_sub(start);
    let mut phase = Phase { ns: counts.ns, ..Phase::default() };
    for span in recorder.comm_spans().into_iter().filter(|span| span.op != "barrier") {
        phase.communicating.push(Span {
            name: span.op.to_owned(),
            start_ns: since(span.started_ns),
            end_ns: since(span.ended_ns),
        });
    }
    let under_way = || phase.communicating.iter().map(|span| (span.start_ns, span.end_ns));
    phase.waiting = recorder.waits().into_iter().map(|(from, to)| (since(from), since(to))).collect();
    let waits = || phase.waiting.iter().copied();
    counts.communication_ns = covered(under_way());
    counts.hidden_ns = covered(under_way().chain(waits())) - covered(waits());
    phase.computing = recorder
        .compute_spans()
        .into_iter()
        .map(|span| Span { name: span.name.to_owned(), start_ns: since(span.started_ns), end_ns: since(span.ended_ns) })
        .collect();
    (counts, phase)
}

/// Nanoseconds that at least one of the intervals covers.
fn covered(intervals: impl Iterator<Item = (u64, u64)>) -> u64 {
    let mut intervals: Vec<(u64, u64)> = intervals.collect();
    intervals.sort_unstable();
    let (mut sum, mut reached) = (0, 0);
    for (start, end) in intervals {
        sum += end.saturating_sub(start.max(reached));
        reached = reached.max(end);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_overlaps_is_counted_once() {
        assert_eq!(covered([(5, 9), (0, 2), (1, 4), (6, 7), (9, 9)].into_iter()), 8);
        assert_eq!(covered(std::iter::empty()), 0);
    }
}
