//! What a method's own formula says a step moves, to be held against what the flight recorder counted.

use kernels::linear::accumulation_kind;
use runtime::config::{DecayKind, LayerKind};
use runtime::sequence::scan::{DecayForm, Scan, StateSize};
use runtime::sequence::{LayerSizes, LinearMethod, Plan, Traffic};
use serde::{Deserialize, Serialize};

use super::method::Entrant;
use super::{Mixer, Mode, Options};

/// How far a formula goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    Exact,
    /// What has decayed away does not travel, and the formula knows no decays; or decays that forward has brought.
    AtMost,
}

/// Bytes that one rank receives, and sends where the formula says that too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expected {
    pub received: u64,
    pub sent: Option<u64>,
    pub bound: Bound,
}

impl Default for Expected {
    /// Nothing.
    fn default() -> Expected {
        Expected { received: 0, sent: Some(0), bound: Bound::Exact }
    }
}

impl Expected {
    pub(super) fn plus(self, other: Expected) -> Expected {
        let exact = self.bound == Bound::Exact && other.bound == Bound::Exact;
        Expected {
            received: self.received + other.received,
            sent: self.sent.zip(other.sent).map(|(a, b)| a + b),
            bound: if exact { Bound::Exact } else { Bound::AtMost },
        }
    }

    fn times(self, n: u64) -> Expected {
        Expected { received: n * self.received, sent: self.sent.map(|sent| n * sent), ..self }
    }

    pub(super) fn allows(&self, received: u64, sent: u64) -> bool {
        match self.bound {
            Bound::Exact => received == self.received && self.sent.is_none_or(|expected| sent == expected),
            Bound::AtMost => received <= self.received,
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
    let forwards = if train.activation_checkpointing { 2 } else { 1 };
    let mut step = Expected::default();
    for kind in config.model.layer_kinds() {
        let mixer = if kind == LayerKind::Linear { Mixer::Linear } else { Mixer::Softmax };
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
    let state = StateSize {
        heads: (b * model.heads) as u64,
        key: dk as u64,
        value: dv as u64,
        width: accumulation_kind(kind).elt_size_in_bytes() as u64,
        decay: match model.decay {
            DecayKind::None => DecayForm::None,
            DecayKind::Lightning | DecayKind::Retention => DecayForm::Head,
            DecayKind::Token => DecayForm::Token,
            DecayKind::Channel => DecayForm::Channel,
        },
    };
    match (mixer, &entrant.linear) {
        (Mixer::Softmax, _) => both(entrant.attention.traffic(plan, &sizes)),
        (_, LinearMethod::LeftProduct(method)) => both(method.traffic(plan, &sizes)),
        (_, LinearMethod::Scan(scan)) => {
            let name = match options.mixer {
                Mixer::Linear => entrant.method.name.as_str(),
                Mixer::Softmax => options.config.parallel.linear_method.as_str(),
            };
            scanned(name, scan.as_ref(), plan, &state)
        }
    }
}

fn both(traffic: Traffic) -> [Expected; 2] {
    [traffic.forward, traffic.backward].map(|bytes| Expected {
        received: bytes.received,
        sent: Some(bytes.sent),
        bound: Bound::Exact,
    })
}

/// A scan's formula is that of forward; backward is the same scan on the reversed chain, with less log-decays to send, as
/// forward has brought some.
fn scanned(name: &str, scan: &dyn Scan, plan: &Plan, size: &StateSize) -> [Expected; 2] {
    let truncates = name.contains("truncate") && size.decay != DecayForm::None;
    let travels = matches!(size.decay, DecayForm::Token | DecayForm::Channel);
    let bound = |exact: bool| if exact { Bound::Exact } else { Bound::AtMost };
    let of = |chain, size: &StateSize, bound| Expected {
        received: scan.received(chain, plan.rank, size),
        sent: None,
        bound,
    };
    // After the gather of forward every rank knows all log-decays.
    let backward = if name.starts_with("lasp2") { StateSize { decay: DecayForm::None, ..*size } } else { *size };
    let hierarchical = name.starts_with("hierarchical");
    let back = if truncates { *size } else { backward };
    [
        of(&plan.chain, size, bound(!truncates)),
        of(&plan.chain.reversed(), &back, bound(!(truncates || hierarchical && travels))),
    ]
}
