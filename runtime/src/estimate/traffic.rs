//! Messages of one rank in one optimizer step, validation apart: those of the layers by the formulas of their methods, which
//! `lasp compare` holds against what it counts, and those of `train`.

use serde::Serialize;

use super::{Sizes, memory};
use crate::config::{Config, LayerKind};
use crate::model::constant_log_decay;
use crate::sequence::scan::{DecayForm, Reach};
use crate::sequence::{self, Count, LayerSizes, Messages, Plan, method};
use crate::train::gradients;

/// What `train` sums beside the gradient and the loss: labels, the time waited, whether time is up.
const NUMBERS: i64 = 3;

/// All messages of a step, and their sums.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// On the sp axis.
    pub rank: usize,
    pub messages: Vec<Message>,
    pub total: Sum,
    /// Some of it is the most that can be: truncation sends nothing that has decayed away, and decays depend on the data.
    pub at_most: bool,
}

/// Operations of one sort.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `linear layer`, `softmax layer` or `step`.
    pub place: &'static str,
    pub what: &'static str,
    pub group: &'static str,
    pub op: &'static str,
    /// In one such place in one step.
    pub each: Sum,
    /// How many such places there are.
    pub places: i64,
    /// It may be less.
    pub at_most: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Sum {
    pub messages: i64,
    pub bytes_sent: i64,
    pub bytes_received: i64,
}

impl Sum {
    fn of(count: Count) -> Sum {
        let Count { messages, bytes } = count;
        Sum { messages: messages as i64, bytes_sent: bytes.sent as i64, bytes_received: bytes.received as i64 }
    }

    pub(super) fn bytes(self) -> i64 {
        self.bytes_sent + self.bytes_received
    }

    fn times(self, n: i64) -> Sum {
        Sum { messages: n * self.messages, bytes_sent: n * self.bytes_sent, bytes_received: n * self.bytes_received }
    }
}

/// `plan`: of one document.
pub(super) fn count(config: &Config, s: &Sizes, plan: &Plan) -> sequence::Result<Traffic> {
    let mut messages = Vec::new();
    for (kind, place, places) in
        [(LayerKind::Linear, "linear layer", s.linear_layers), (LayerKind::Softmax, "softmax layer", s.softmax_layers)]
    {
        if places == 0 {
            continue;
        }
        let once = memory::attends_once(config);
        let forwards = s.passes * sequence::forwards(kind, once, config.train.activation_checkpointing) as i64;
        for (traffic, places) in of_layers(config, s, plan, kind, places)? {
            let mut add = |what, times, moved: &Messages| {
                messages.extend(moved.iter().map(|((group, op), count)| {
                    let (each, at_most) = (Sum::of(count).times(times), traffic.at_most);
                    Message { place, what, group, op, each, places, at_most }
                }));
            };
            add("forward", forwards, &traffic.forward);
            add("backward", s.passes, &traffic.backward);
        }
    }
    let world = (config.parallel.sp * config.parallel.dp) as i64;
    if world > 1 {
        let (buckets, width) = (gradients::buckets(config).into_iter(), memory::gradient_width(config, s));
        let gradient = buckets.map(|bucket| all_reduce(bucket.range.end - bucket.range.start, width, world));
        for (what, each) in [
            ("gradient", gradient.fold(Sum::default(), plus)),
            ("loss", all_reduce(1, 8, world)),
            ("counts", all_reduce(NUMBERS, 8, world)),
        ] {
            messages.push(Message {
                place: "step",
                what,
                group: "world",
                op: "all_reduce",
                each,
                places: 1,
                at_most: false,
            });
        }
    }
    let total = messages.iter().map(|message| message.each.times(message.places)).fold(Sum::default(), plus);
    let at_most = messages.iter().any(|message| message.at_most);
    Ok(Traffic { rank: plan.rank, messages, total, at_most })
}

/// Of one layer, in one forward and one backward pass, with the number of layers that move the same. Layers of a kind are alike,
/// but for how far a truncated scan reaches under constant decays.
fn of_layers(
    config: &Config,
    s: &Sizes,
    plan: &Plan,
    kind: LayerKind,
    places: i64,
) -> sequence::Result<Vec<(sequence::Traffic, i64)>> {
    let model = &config.model;
    let kv_heads = if kind == LayerKind::Linear { s.h } else { s.kv };
    let sizes = LayerSizes { b: s.b, heads: s.h, kv_heads, dk: s.k, dv: s.k, kind: config.train.dtype.kind() };
    if kind == LayerKind::Softmax {
        return Ok(vec![(method::attention(&config.parallel.softmax_method)?.traffic(plan, &sizes), places)]);
    }
    let (name, decay) = (&config.parallel.linear_method, DecayForm::of(model.decay));
    let traffic = method::linear_traffic(name, plan, &sizes, decay)?;
    if !traffic.at_most || decay != DecayForm::Head {
        return Ok(vec![(traffic, places)]);
    }
    let mut alike: Vec<(sequence::Traffic, i64)> = Vec::new();
    for (layer, _) in model.layer_kinds().iter().enumerate().filter(|(_, found)| **found == kind) {
        let reaches = match constant_log_decay(model.decay, model.heads, layer, model.layers) {
            Some(log_decay) => Reach::both_ways(&log_decay, &plan.chain, s.wide as u64),
            None => [Reach::full(), Reach::full()],
        };
        let traffic = method::linear_traffic_within(name, plan, &sizes, decay, Some(&reaches))?;
        match alike.iter_mut().find(|(other, _)| *other == traffic) {
            Some((_, layers)) => *layers += 1,
            None => alike.push((traffic, 1)),
        }
    }
    Ok(alike)
}

fn plus(a: Sum, b: Sum) -> Sum {
    Sum {
        messages: a.messages + b.messages,
        bytes_sent: a.bytes_sent + b.bytes_sent,
        bytes_received: a.bytes_received + b.bytes_received,
    }
}

fn all_reduce(numbers: i64, width: i64, w: i64) -> Sum {
    let bytes = 2 * (w - 1) * numbers / w * width;
    Sum { messages: 1, bytes_sent: bytes, bytes_received: bytes }
}
