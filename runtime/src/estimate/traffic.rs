//! Messages of one rank in one optimizer step, validation apart: those of the layers by the formulas of their methods, which
//! `lasp compare` holds against what it counts, and those of `train`.

use serde::Serialize;

use super::{Parameters, Sizes};
use crate::config::{Config, LayerKind};
use crate::sequence::scan::DecayForm;
use crate::sequence::{self, Count, LayerSizes, Messages, Plan, method};

/// What `train` sums beside the gradient: loss, labels, the time waited, whether time is up.
const NUMBERS: i64 = 4;

/// All messages of a step, and their sums.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// On the sp axis.
    pub rank: usize,
    pub messages: Vec<Message>,
    pub total: Sum,
    /// Some of it is the most that can be: truncation sends nothing that has decayed away.
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
pub(super) fn count(config: &Config, s: &Sizes, plan: &Plan, parameters: &Parameters) -> sequence::Result<Traffic> {
    let forwards = s.passes * if config.train.activation_checkpointing { 2 } else { 1 };
    let mut messages = Vec::new();
    for (kind, place, places) in
        [(LayerKind::Linear, "linear layer", s.linear_layers), (LayerKind::Softmax, "softmax layer", s.softmax_layers)]
    {
        if places == 0 {
            continue;
        }
        let traffic = of_layer(config, s, plan, kind)?;
        let mut add = |what, times, moved: &Messages| {
            messages.extend(moved.iter().map(|((group, op), count)| {
                let (each, at_most) = (Sum::of(count).times(times), traffic.at_most);
                Message { place, what, group, op, each, places, at_most }
            }));
        };
        add("forward", forwards, &traffic.forward);
        add("backward", s.passes, &traffic.backward);
    }
    let world = (config.parallel.sp * config.parallel.dp) as i64;
    if world > 1 {
        for (what, each) in [
            ("gradient", all_reduce(parameters.total, s.wide, world)),
            ("loss and counts", all_reduce(NUMBERS, 8, world)),
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

/// Of one layer, in one forward and one backward pass.
fn of_layer(config: &Config, s: &Sizes, plan: &Plan, kind: LayerKind) -> sequence::Result<sequence::Traffic> {
    let kv_heads = if kind == LayerKind::Linear { s.h } else { s.kv };
    let sizes = LayerSizes { b: s.b, heads: s.h, kv_heads, dk: s.k, dv: s.k, kind: config.train.dtype.kind() };
    match kind {
        LayerKind::Linear => {
            method::linear_traffic(&config.parallel.linear_method, plan, &sizes, DecayForm::of(config.model.decay))
        }
        LayerKind::Softmax => Ok(method::attention(&config.parallel.softmax_method)?.traffic(plan, &sizes)),
    }
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
