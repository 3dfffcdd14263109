//! The gradient is summed over ranks while backward still goes on: in buckets of whole layers, from the last layer to the first,
//! as DistributedDataParallel does (arXiv 2006.15704).

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use collectives::{Group, Pending, Reduce};
use tch::Tensor;

use crate::config::{Config, ModelConfig};
use crate::model::{self, LayerDone};
use crate::sequence::{self, Place};

/// What is summed in one message of the flat gradient `[P]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bucket {
    pub range: Range<i64>,
    /// The layer with which backward completes it; with none, it takes all of backward.
    pub after: Option<usize>,
}

/// In the order in which backward completes them. The weights of layers lie in the flat order as in the model; before them lies
/// the embedding, behind them the projection to the vocabulary, if there is one, and what weight decay leaves alone.
pub(crate) fn buckets(config: &Config) -> Vec<Bucket> {
    let width = config.train.dtype.kind().elt_size_in_bytes().max(4) as i64;
    let bytes = config.parallel.gradient_bucket_mib.saturating_mul(1 << 20).min(i64::MAX as u64);
    buckets_of(&config.model, bytes as i64 / width)
}

/// `least`: numbers of a bucket of layers.
fn buckets_of(config: &ModelConfig, least: i64) -> Vec<Bucket> {
    let specs = model::specs(config);
    let (mut starts, mut decayed) = (Vec::new(), 0);
    for spec in specs.iter().filter(|spec| spec.decayed) {
        if spec.layer() == Some(starts.len()) {
            starts.push(decayed);
        }
        decayed += spec.numel();
    }
    let total = specs.iter().map(model::Spec::numel).sum();
    let (mut buckets, mut end) = (Vec::new(), decayed);
    for (layer, start) in starts.into_iter().enumerate().rev() {
        if end - start >= least.max(1) {
            buckets.push(Bucket { range: start..end, after: Some(layer) });
            end = start;
        }
    }
    if buckets.is_empty() {
        decayed = total;
        end = total;
    }
    let rest = [0..end, decayed..total].into_iter().filter(|range| !range.is_empty());
    buckets.extend(rest.map(|range| Bucket { range, after: None }));
    buckets
}

/// Sums under way at once, of which more would need memory where they have no place of their own.
pub(crate) const UNDER_WAY: usize = 2;

/// The sum over the ranks of a group, in place, of one step's gradient.
pub(super) struct Summing {
    world: Group,
    buckets: Vec<Bucket>,
    state: Mutex<State>,
}

struct State {
    grad: Tensor,
    /// How many buckets have been issued.
    issued: usize,
    under_way: VecDeque<Pending<()>>,
}

impl Summing {
    pub fn new(world: &Group, grad: &Tensor, buckets: Vec<Bucket>) -> Arc<Self> {
        let state = Mutex::new(State { grad: grad.shallow_clone(), issued: 0, under_way: VecDeque::new() });
        Arc::new(Self { world: world.clone(), buckets, state })
    }

    /// For the last backward of the step.
    pub fn follows(self: &Arc<Self>) -> LayerDone {
        let sum = self.clone();
        Arc::new(move |layer| sum.issue(Some(layer)).map_err(sequence::Error::into_kernels))
    }

    /// Sums what is complete when backward has passed `layer`, or has ended.
    fn issue(&self, layer: Option<usize>) -> sequence::Result<()> {
        let _place = self.world.recorder().place(Place::Gradient.name());
        let mut state = self.state();
        while let Some(Bucket { range, after }) = self.buckets.get(state.issued) {
            if layer.is_some_and(|passed| after.is_none_or(|after| passed > after)) {
                break;
            }
            if state.under_way.len() == UNDER_WAY
                && let Some(first) = state.under_way.pop_front()
            {
                first.wait()?;
            }
            let part = state.grad.f_narrow(0, range.start, range.end - range.start)?;
            let summed = self.world.all_reduce_in_place(&part, Reduce::Sum)?;
            state.issued += 1;
            state.under_way.push_back(summed);
        }
        Ok(())
    }

    /// Sums the rest. The gradient is there, or on a GPU will be for what is enqueued next.
    pub fn finish(&self) -> sequence::Result<()> {
        self.issue(None)?;
        let under_way = std::mem::take(&mut self.state().under_way);
        under_way.into_iter().try_for_each(|summed| Ok(summed.wait()?))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> ModelConfig {
        ModelConfig { vocab: 64, dim: 16, layers: 3, heads: 2, kv_heads: 2, mlp_dim: 64, ..ModelConfig::default() }
    }

    #[test]
    fn every_number_is_in_one_bucket_behind_the_layers_it_belongs_to() {
        for tied in [true, false] {
            let config = ModelConfig { tied, ..model() };
            let params = model::Params::new(&model::specs(&config), tch::Kind::Float, 1, tch::Device::Cpu).unwrap();
            let names = params.split(&Tensor::arange(params.numel(), (tch::Kind::Int64, tch::Device::Cpu))).unwrap();
            let specs = model::specs(&config);
            for least in [0, 5_000, 10_000, i64::MAX] {
                let buckets = buckets_of(&config, least);
                let mut ranges: Vec<_> = buckets.iter().map(|bucket| bucket.range.clone()).collect();
                ranges.sort_by_key(|range| range.start);
                assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start), "{ranges:?}");
                assert_eq!((ranges[0].start, ranges[ranges.len() - 1].end), (0, params.numel()));
                for (name, places) in &names {
                    let (first, last) = (places.min().int64_value(&[]), places.max().int64_value(&[]));
                    let bucket = buckets.iter().find(|bucket| bucket.range.contains(&first)).unwrap();
                    assert!(bucket.range.contains(&last), "{name} is in two buckets");
                    let layer = specs.iter().find(|spec| spec.name == *name).and_then(model::Spec::layer);
                    match (bucket.after, layer) {
                        (Some(after), Some(layer)) => assert!(after <= layer, "{name} is summed before its backward"),
                        (Some(_), None) => assert_eq!(name, "lm_head"),
                        (None, _) => {}
                    }
                }
                let after: Vec<usize> = buckets.iter().filter_map(|bucket| bucket.after).collect();
                assert!(after.is_sorted_by(|a, b| a > b), "{after:?}");
                assert_eq!(after.len(), if least == 0 { 3 } else { after.len().min(2) });
            }
            assert_eq!(buckets_of(&config, i64::MAX), [Bucket { range: 0..params.numel(), after: None }]);
        }
    }
}
