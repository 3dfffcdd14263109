//! Messages of one rank in one optimizer step, validation apart: the operations that `sequence` and `train` issue, with their
//! bytes by the formulas of `collectives::Totals`.

use serde::Serialize;

use super::{Parameters, Sizes};
use crate::config::{Config, DecayKind};
use crate::sequence::Layout;
use crate::sequence::attention::Lasp2h;

/// What `train` sums beside the gradient: loss, labels, the time waited, whether time is up.
const NUMBERS: i64 = 4;

/// All messages of a step, and their sums.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Traffic {
    pub messages: Vec<Message>,
    pub total: Sum,
    /// Methods in use whose messages are not among them: only those of lasp2 and lasp2h are counted.
    pub not_counted: Vec<String>,
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
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Sum {
    pub messages: i64,
    pub bytes_sent: i64,
    pub bytes_received: i64,
}

impl Sum {
    fn times(self, n: i64) -> Sum {
        Sum { messages: n * self.messages, bytes_sent: n * self.bytes_sent, bytes_received: n * self.bytes_received }
    }
}

pub(super) fn count(config: &Config, s: &Sizes, layout: &Layout, parameters: &Parameters, rank: usize) -> Traffic {
    let world = (config.parallel.sp * config.parallel.dp) as i64;
    let forwards = s.passes * if config.train.activation_checkpointing { 2 } else { 1 };
    let (linear, softmax) = (&config.parallel.linear_method, &config.parallel.softmax_method);
    let (splits, gathers_keys) = (splits(linear), softmax == "lasp2h");
    let mut messages = Vec::new();
    let mut add = |place, places, group, op, what, each: Sum| {
        if places > 0 && each.messages > 0 {
            messages.push(Message { place, what, group, op, each, places });
        }
    };
    if s.w > 1 {
        let (place, n) = ("linear layer", s.linear_layers);
        let state = s.b * s.h * s.k * s.k;
        let decay = match config.model.decay {
            DecayKind::Token => s.b * s.h,
            DecayKind::Channel => s.b * s.h * s.k,
            DecayKind::None | DecayKind::Lightning | DecayKind::Retention => 0,
        };
        if let Some(splits) = splits {
            let gather = |row: i64| Sum { messages: splits.min(row), ..all_gather(s.slots * row * s.wide, s.w) };
            add(place, n, "sp", "all_gather", "states, forward", gather(state + decay).times(forwards));
            add(place, n, "sp", "all_gather", "states, backward", gather(state).times(s.passes));
        }

        let (place, n) = ("softmax layer", if gathers_keys { s.softmax_layers } else { 0 });
        let mine = layout.tokens_per_rank().get(rank).copied().unwrap_or(0);
        let row = |kv_heads: i64, width: i64| s.b * kv_heads * 2 * s.k * width;
        let gather = |heads: i64| Sum {
            messages: 1,
            bytes_sent: mine * row(heads, s.width),
            bytes_received: (s.l - mine) * row(heads, s.width),
        };
        let scatter = |heads: i64| Sum {
            messages: 1,
            bytes_sent: (s.l - mine) * row(heads, s.wide),
            bytes_received: (s.w - 1) * mine * row(heads, s.wide),
        };
        let stages = Lasp2h::default().stages(s.kv);
        let all = |of: &dyn Fn(i64) -> Sum| stages.iter().map(|(_, heads)| of(*heads)).fold(Sum::default(), plus);
        add(place, n, "sp", "all_gather_v", "keys and values, forward", all(&gather).times(forwards));
        add(place, n, "sp", "all_gather_v", "keys and values, backward", all(&gather).times(s.passes));
        add(place, n, "sp", "reduce_scatter_v", "their gradients", all(&scatter).times(s.passes));
    }
    if world > 1 {
        add("step", 1, "world", "all_reduce", "gradient", all_reduce(parameters.total, s.wide, world));
        add("step", 1, "world", "all_reduce", "loss and counts", all_reduce(NUMBERS, 8, world));
    }
    let total = messages.iter().map(|message| message.each.times(message.places)).fold(Sum::default(), plus);
    let used = |layers: i64| s.w > 1 && layers > 0;
    let mut not_counted = Vec::new();
    not_counted.extend((splits.is_none() && used(s.linear_layers)).then(|| linear.clone()));
    not_counted.extend((!gathers_keys && used(s.softmax_layers)).then(|| softmax.clone()));
    Traffic { messages, total, not_counted }
}

/// Messages of one of LASP-2's gathers; nothing for another method.
fn splits(method: &str) -> Option<i64> {
    match method.split_once(':') {
        None => (method == "lasp2").then_some(1),
        Some((name, setting)) => setting.strip_prefix("splits=")?.parse().ok().filter(|_| name == "lasp2"),
    }
}

fn plus(a: Sum, b: Sum) -> Sum {
    Sum {
        messages: a.messages + b.messages,
        bytes_sent: a.bytes_sent + b.bytes_sent,
        bytes_received: a.bytes_received + b.bytes_received,
    }
}

fn all_gather(bytes: i64, w: i64) -> Sum {
    Sum { messages: 1, bytes_sent: bytes, bytes_received: (w - 1) * bytes }
}

fn all_reduce(numbers: i64, width: i64, w: i64) -> Sum {
    let bytes = 2 * (w - 1) * numbers / w * width;
    Sum { messages: 1, bytes_sent: bytes, bytes_received: bytes }
}
