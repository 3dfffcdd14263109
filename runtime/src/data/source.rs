//! Where the trainer gets sequence number i: a shuffled corpus or random tokens. Both are functions of (seed, i) alone,
//! so that a resumed run, and every rank, sees the same.

use super::permutation::mix;
use super::{Corpus, Permutation, Result, Sequence, Split};
use crate::config::{Config, DataKind};

/// Seed of the order of validation sequences, the same in every run so that their losses compare.
const VALIDATION_SEED: u64 = 0x7a11_da7e;

/// Sequences by number.
#[derive(Debug, Clone)]
pub enum Source {
    Corpus(Sampler),
    Random(RandomSource),
}

impl Source {
    /// The sources of training and, unless `data.validation_fraction` is 0, of validation.
    pub fn open(config: &Config) -> Result<(Source, Option<Source>)> {
        let (data, seq_len, seed) = (&config.data, config.train.seq_len, config.train.seed);
        let validates = data.validation_fraction > 0.0;
        match data.kind {
            DataKind::Corpus => {
                let (train, validation) = Corpus::open(&data.path)?.split(data.validation_fraction);
                let sampler = |split, seed| Sampler::new(split, seq_len, seed, data.documents).map(Source::Corpus);
                let validation = validates.then(|| sampler(validation, VALIDATION_SEED)).transpose()?;
                Ok((sampler(train, seed)?, validation))
            }
            DataKind::Random => {
                let random = |seed| Source::Random(RandomSource::new(config.model.vocab, seq_len, seed));
                Ok((random(seed), validates.then(|| random(mix(seed ^ VALIDATION_SEED)))))
            }
        }
    }

    /// Sequence number `index`, counted from the start of training.
    pub fn sequence(&self, index: u64) -> Sequence {
        match self {
            Source::Corpus(sampler) => sampler.sequence(index),
            Source::Random(random) => random.sequence(index),
        }
    }

    /// Sequences of one epoch; random tokens have no end.
    pub fn windows(&self) -> Option<u64> {
        match self {
            Source::Corpus(sampler) => Some(sampler.windows()),
            Source::Random(_) => None,
        }
    }
}

/// The windows of a split, epoch after epoch, in another pseudo-random order each.
#[derive(Debug, Clone)]
pub struct Sampler {
    split: Split,
    seq_len: usize,
    seed: u64,
    documents: bool,
    windows: u64,
}

impl Sampler {
    /// `documents`: whether sequences keep the boundaries of their documents. An error if the split is shorter than a window.
    pub fn new(split: Split, seq_len: usize, seed: u64, documents: bool) -> Result<Self> {
        let windows = split.windows(seq_len)?;
        Ok(Sampler { split, seq_len, seed, documents, windows })
    }

    /// Sequences of one epoch.
    pub fn windows(&self) -> u64 {
        self.windows
    }

    /// Sequence number `index`, counted from the start of training through all epochs.
    pub fn sequence(&self, index: u64) -> Sequence {
        let (epoch, position) = (index / self.windows, index % self.windows);
        let window = Permutation::new(self.windows, self.seed, epoch).at(position);
        let sequence = self.split.sequence_unchecked(window, self.seq_len);
        if self.documents { sequence } else { sequence.joined() }
    }
}

/// Uniform random tokens, each sequence one document.
#[derive(Debug, Clone)]
pub struct RandomSource {
    vocab: u64,
    seq_len: usize,
    seed: u64,
}

impl RandomSource {
    /// Tokens are in `0..vocab`.
    pub fn new(vocab: i64, seq_len: usize, seed: u64) -> Self {
        RandomSource { vocab: vocab.max(1) as u64, seq_len, seed }
    }

    /// Sequence number `index`.
    pub fn sequence(&self, index: u64) -> Sequence {
        let key = mix(self.seed ^ mix(index));
        let token = |at: u64| (u128::from(mix(key.wrapping_add(mix(at)))) * u128::from(self.vocab)) >> 64;
        Sequence {
            tokens: (0..=self.seq_len as u64).map(|at| token(at) as i64).collect(),
            cu_seqlens: vec![0, self.seq_len as i64],
        }
    }
}
