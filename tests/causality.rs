//! What must not move, to the bit: outputs before a changed token, and everything in the documents beside a changed one. And
//! nothing is read that was never written: memory that held NaN before changes no result.

use std::sync::{Arc, Mutex};

use anyhow::Result;
use collectives::local;
use kernels::linear::Inputs;
use kernels::linear::chunkwise::Chunkwise;
use lasp_tests::{LAYOUTS, randn};
use runtime::config::LayoutKind;
use runtime::sequence::{Layout, Plan, Shard, attention, linear, method};
use tch::{Device, Kind, Tensor};

const TOKENS: i64 = 61;
const RANKS: usize = 3;
const DECAYS: [&str; 4] = ["none", "head", "token", "channel"];

/// q, k, v, do `[1, T, H, K]` and the log-decay of a whole sequence.
struct Whole {
    tensors: [Tensor; 4],
    log_decay: Option<Tensor>,
}

impl Whole {
    fn new(decay: &str) -> Self {
        let make = |seed| randn(seed, &[1, TOKENS, 2, 8]).to_kind(Kind::Float);
        let gate = |shape: &[i64]| Some((randn(5, shape).abs() * -0.1).to_kind(Kind::Float));
        let log_decay = match decay {
            "head" => gate(&[2]),
            "token" => gate(&[1, TOKENS, 2]),
            "channel" => gate(&[1, TOKENS, 2, 8]),
            _ => None,
        };
        Self { tensors: [1, 2, 3, 4].map(make), log_decay }
    }

    /// The same with other numbers in `range`.
    fn changed(&self, range: std::ops::Range<i64>) -> Self {
        let change = |x: &Tensor| {
            let x = x.copy();
            if x.dim() > 1 {
                let _ = x.narrow(1, range.start, range.end - range.start).fill_(-0.75);
            }
            x
        };
        Self { tensors: self.tensors.each_ref().map(change), log_decay: self.log_decay.as_ref().map(change) }
    }

    /// o, dq, dk, dv of the whole sequence, computed on shards.
    fn run(&self, mixer: &str, layout: LayoutKind, cu_seqlens: &[i64]) -> Result<Vec<Tensor>> {
        // A tensor may go to another thread, but not be used by two.
        let whole = Mutex::new(self.changed(0..0));
        let parts = local::run(RANKS, |group| -> Result<Vec<Tensor>> {
            let plan = Plan::new(Layout::new(layout, TOKENS, RANKS)?, Some(cu_seqlens), group.rank())?;
            let rank = group.rank();
            let shard = Arc::new(Shard {
                linear: method::linear("lasp2", &group)?,
                attention: method::attention("lasp2h")?,
                group,
                plan,
            });
            let mine = whole.lock().expect("no rank panics while copying").changed(0..0);
            let of = |x: &Tensor| shard.plan.layout.shard(x, 1, rank);
            let [q, k, v, d_o] = mine.tensors.each_ref().map(|x| of(x).expect("a shard"));
            Ok(if mixer == "linear" {
                let log_decay =
                    mine.log_decay.as_ref().map(|g| if g.dim() > 1 { of(g).expect("a shard") } else { g.copy() });
                let mixer = Chunkwise::new(16, 1.0)?;
                let forward = linear::forward(&shard, &mixer, Inputs::new(&q, &k, &v, log_decay.as_ref())?, None)?;
                let grads = linear::backward(&shard, &mixer, forward.saved, &d_o)?.grads;
                vec![forward.o, grads.dq, grads.dk, grads.dv]
            } else {
                let forward = shard.attention.forward(&shard, &attention::Inputs::new(&q, &k, &v, 0.3, true)?)?;
                let grads = shard.attention.backward(&shard, forward.saved, &d_o)?;
                vec![forward.o, grads.dq, grads.dk, grads.dv]
            })
        })?;
        let layout = Layout::new(layout, TOKENS, RANKS)?;
        (0..4)
            .map(|i| {
                let gathered = Tensor::cat(&parts.iter().map(|p| p[i].shallow_clone()).collect::<Vec<_>>(), 1);
                Ok(layout.in_sequence_order(&gathered, 1)?)
            })
            .collect()
    }
}

fn cases() -> impl Iterator<Item = (&'static str, &'static str, LayoutKind)> {
    let linear = DECAYS.into_iter().map(|decay| ("linear", decay));
    let all = linear.chain([("softmax", "none")]);
    all.flat_map(|(mixer, decay)| LAYOUTS.into_iter().map(move |layout| (mixer, decay, layout)))
}

#[test]
fn a_token_changes_no_output_before_it() -> Result<()> {
    tch::set_num_threads(1);
    for (mixer, decay, layout) in cases() {
        let whole = Whole::new(decay);
        let before = whole.run(mixer, layout, &[0, TOKENS])?;
        for token in [0, 1, 20, 21, 40, 60] {
            let after = whole.changed(token..token + 1).run(mixer, layout, &[0, TOKENS])?;
            let name = format!("{mixer} {decay} {layout:?}, token {token}");
            assert!(before[0].narrow(1, 0, token).equal(&after[0].narrow(1, 0, token)), "{name}: o before it moved");
            assert!(!before[0].narrow(1, token, 1).equal(&after[0].narrow(1, token, 1)), "{name}: o did not move");
        }
    }
    Ok(())
}

#[test]
fn a_document_changes_nothing_beside_it() -> Result<()> {
    tch::set_num_threads(1);
    let cu_seqlens = [0, 7, 30, 55, TOKENS];
    for (mixer, decay, layout) in cases() {
        let whole = Whole::new(decay);
        let before = whole.run(mixer, layout, &cu_seqlens)?;
        for changed in 0..4 {
            let range = |n: usize| cu_seqlens[n]..cu_seqlens[n + 1];
            let after = whole.changed(range(changed)).run(mixer, layout, &cu_seqlens)?;
            for document in (0..4).filter(|document| *document != changed) {
                let (start, length) = (range(document).start, range(document).end - range(document).start);
                for (name, before, after) in
                    [("o", 0), ("dq", 1), ("dk", 2), ("dv", 3)].map(|(n, i)| (n, &before[i], &after[i]))
                {
                    assert!(
                        before.narrow(1, start, length).equal(&after.narrow(1, start, length)),
                        "{mixer} {decay} {layout:?}: {name} of document {document} moved with document {changed}"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn memory_that_held_nan_changes_nothing() -> Result<()> {
    tch::set_num_threads(1);
    for (mixer, decay, layout) in cases() {
        let whole = Whole::new(decay);
        let before = whole.run(mixer, layout, &[0, TOKENS])?;
        // Freed at once: the allocator hands these blocks out again.
        for size in 0..24 {
            let nan = || Tensor::full([(1i64 << size) / 4 + 1], f64::NAN, (Kind::Float, Device::Cpu));
            drop((nan(), nan(), nan()));
        }
        let after = whole.run(mixer, layout, &[0, TOKENS])?;
        for (before, after) in before.iter().zip(&after) {
            assert!(before.equal(after), "{mixer} {decay} {layout:?}: results depend on what memory held before");
        }
    }
    Ok(())
}
