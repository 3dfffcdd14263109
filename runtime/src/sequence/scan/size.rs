//! The size of what one segment sums up to: from it each method counts its messages without sending any.

use kernels::linear::{Decay, Inputs, accumulation_kind};

use crate::config::DecayKind;
use crate::sequence::LayerSizes;

/// What a decay depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecayForm {
    None,
    /// A constant per head.
    Head,
    /// One number per token and head.
    Token,
    /// K numbers per token and head.
    Channel,
}

/// Sizes of one segment's summary `(A, S)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateSize {
    /// B H.
    pub heads: u64,
    /// K.
    pub key: u64,
    /// V.
    pub value: u64,
    /// Bytes of a number of the accumulation kind.
    pub width: u64,
    pub decay: DecayForm,
}

impl DecayForm {
    pub fn of(decay: DecayKind) -> Self {
        match decay {
            DecayKind::None => Self::None,
            DecayKind::Lightning | DecayKind::Retention => Self::Head,
            DecayKind::Token => Self::Token,
            DecayKind::Channel => Self::Channel,
        }
    }
}

impl StateSize {
    pub fn of_layer(layer: &LayerSizes, decay: DecayForm) -> Self {
        let width = accumulation_kind(layer.kind).elt_size_in_bytes() as u64;
        let (heads, key, value) = ((layer.b * layer.heads) as u64, layer.dk as u64, layer.dv as u64);
        Self { heads, key, value, width, decay }
    }

    pub fn of(x: &Inputs) -> Self {
        let (q, v) = (x.q.size(), x.v.size());
        let at = |size: &[i64], dim: usize| size.get(dim).copied().unwrap_or(0) as u64;
        let decay = match &x.decay {
            Decay::None => DecayForm::None,
            Decay::Head(_) => DecayForm::Head,
            Decay::Token(_) => DecayForm::Token,
            Decay::Channel(_) => DecayForm::Channel,
        };
        let width = accumulation_kind(x.q.kind()).elt_size_in_bytes() as u64;
        Self { heads: at(&q, 0) * at(&q, 2), key: at(&q, 3), value: at(&v, 3), width, decay }
    }

    /// Bytes of a state.
    pub fn state(&self) -> u64 {
        self.rows(self.key)
    }

    /// Bytes of the log-decays that travel: those that depend on the data.
    pub fn decays(&self) -> u64 {
        self.decays_of(self.key)
    }

    /// Bytes of a slice of a state, `rows` of its K rows.
    pub(super) fn rows(&self, rows: u64) -> u64 {
        self.heads * rows * self.value * self.width
    }

    /// Bytes of the log-decays that belong to such a slice.
    pub(super) fn decays_of(&self, rows: u64) -> u64 {
        let numbers = match self.decay {
            DecayForm::None | DecayForm::Head => 0,
            DecayForm::Token => 1,
            DecayForm::Channel => rows,
        };
        self.heads * numbers * self.width
    }
}
