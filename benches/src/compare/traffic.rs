//! What a method's own formula says a step moves, to be held against what the flight recorder counted.

use runtime::config::LayerKind;
use runtime::sequence::scan::DecayForm;
use runtime::sequence::{self, LayerSizes, Plan};
use serde::{Deserialize, Serialize};

use super::method::Entrant;
use super::{Mixer, Mode, Options};

/// How far a formula goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    Exact,
    /// What has decayed away does not travel, and the formula knows no decays.
    AtMost,
}

/// Bytes that one rank receives and sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expected {
    pub received: u64,
    pub sent: u64,
    pub bound: Bound,
}

impl Default for Expected {
    /// Nothing.
    fn default() -> Expected {
        Expected { received: 0, sent: 0, bound: Bound::Exact }
    }
}

impl Expected {
    pub(super) fn plus(self, other: Expected) -> Expected {
        let exact = self.bound == Bound::Exact && other.bound == Bound::Exact;
        Expected {
            received: self.received + other.received,
            sent: self.sent + other.sent,
            bound: if exact { Bound::Exact } else { Bound::AtMost },
        }
    }

    fn times(self, n: u64) -> Expected {
        Expected { received: n * self.received, sent: n * self.sent, ..self }
    }

    pub(super) fn allows(&self, received: u64, sent: u64) -> bool {
        match self.bound {
            Bound::Exact => (received, sent) == (self.received, self.sent),
            Bound::AtMost => received <= self.received && sent <= self.sent,
        }
    }
}

/// What the phases of a step move on the plan's rank: forward and backward, or one for a training step. The sum of gradients
/// over ranks is not among it.
pub(super) fn expected(options: &Options, entrant: &Entrant, plan: &Plan) -> Vec<Expected> {
    let (config, train) = (&options.config, &options.config.train);
    if options.mode != Mode::Train {
        let [forward, backward] = layer(options, entrant, plan, options.mixer, 1);
        return vec![forward, backward];
    }
    let passes = (train.batch / train.micro_batch.max(1)) as u64;
    let mut step = Expected::default();
    for kind in config.model.layer_kinds() {
        let mixer = if kind == LayerKind::Linear { Mixer::Linear } else { Mixer::Softmax };
        let forwards = sequence::forwards(kind, entrant.attention.attends_once(), train.activation_checkpointing);
        let [forward, backward] = layer(options, entrant, plan, mixer, train.micro_batch as i64);
        step = step.plus(forward.times(passes * forwards)).plus(backward.times(passes));
    }
    vec![step]
}

fn layer(options: &Options, entrant: &Entrant, plan: &Plan, mixer: Mixer, b: i64) -> [Expected; 2] {
    let (model, kind) = (&options.config.model, options.config.train.dtype.kind());
    let kv_heads = if mixer == Mixer::Linear { model.heads } else { model.kv_heads };
    let (dk, dv) = (model.head_dim(), model.head_dim());
    let sizes = LayerSizes { b, heads: model.heads, kv_heads, dk, dv, kind };
    let traffic = match mixer {
        Mixer::Linear => entrant.linear.traffic(plan, &sizes, DecayForm::of(model.decay)),
        Mixer::Softmax => entrant.attention.traffic(plan, &sizes),
    };
    let bound = if traffic.at_most { Bound::AtMost } else { Bound::Exact };
    [traffic.forward, traffic.backward].map(|messages| {
        let bytes = messages.bytes();
        Expected { received: bytes.received, sent: bytes.sent, bound }
    })
}
