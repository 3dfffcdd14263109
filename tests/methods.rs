//! A method changes what travels, not what is learned: every rival trains to the losses of LASP-2 and LASP-2H, and errs no
//! more in bf16.

use anyhow::Result;
use collectives::local;
use kernels::softmax::{Tile, oracle};
use kernels::testing::{assert_close, relative_rms};
use lasp_tests::training::{config, train};
use lasp_tests::{LAYOUTS, randn};
use runtime::config::LayoutKind;
use runtime::metrics::StepRecord;
use runtime::sequence::attention::Inputs;
use runtime::sequence::{Layout, Plan, Shard, method};
use tch::{Kind, Tensor};

fn losses(folder: &std::path::Path, settings: &[&str]) -> Result<Vec<StepRecord>> {
    let settings: Vec<String> = settings.iter().chain(&["parallel.sp=2"]).map(|s| (*s).to_owned()).collect();
    train(tempfile::tempdir_in(folder)?.path(), config(&settings)?, 2)
}

fn same(ours: &[StepRecord], theirs: &[StepRecord], what: &str) {
    assert_eq!((ours.len(), theirs.len()), (8, 8), "{what}");
    for (a, b) in ours.iter().zip(theirs) {
        let error = ((a.loss - b.loss) / b.loss).abs().max(((a.grad_norm - b.grad_norm) / b.grad_norm).abs());
        assert!(error <= 1e-9, "{what}: step {} differs by {error:.1e}", a.step);
    }
}

#[test]
fn softmax_methods_train_to_the_same_losses() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let lasp2h = losses(folder.path(), &["parallel.softmax_method=lasp2h"])?;
    for name in method::ATTENTIONS.iter().filter(|name| **name != "lasp2h") {
        for layout in ["contiguous", "zigzag"] {
            let settings = [format!("parallel.softmax_method={name}"), format!("parallel.layout={layout}")];
            let ours = losses(folder.path(), &settings.each_ref().map(String::as_str))?;
            same(&ours, &lasp2h, &format!("{name}, {layout}"));
        }
    }
    Ok(())
}

#[test]
fn left_products_train_to_the_losses_of_lasp2() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for decay in ["none", "lightning"] {
        let decay = format!("model.decay={decay}");
        let lasp2 = losses(folder.path(), &[&decay])?;
        for name in method::LEFT_PRODUCTS {
            let ours = losses(folder.path(), &[&decay, &format!("parallel.linear_method={name}")])?;
            same(&ours, &lasp2, &format!("{name}, {decay}"));
        }
    }
    Ok(())
}

/// A ring computes only what some query sees: on contiguous shards the blocks up to its own, on zigzag all; and of packed
/// documents those that reach into the rank.
#[test]
fn a_ring_skips_blocks_that_nobody_sees() -> Result<()> {
    let computed = |layout: LayoutKind, documents: Option<&[i64]>| -> Result<Vec<usize>> {
        local::run(4, |group| -> Result<usize> {
            let plan = Plan::new(Layout::new(layout, 32, group.size())?, documents, group.rank())?;
            let (linear, attention) = (method::linear("lasp2", &group)?, method::attention("ring")?);
            let x = randn(35, &[1, plan.tokens(), 2, 4]);
            let recorder = group.recorder().clone();
            let shard = Shard { group, plan, linear, attention: attention.clone() };
            let forward = attention.forward(&shard, &Inputs::new(&x, &x, &x, 1.0, true)?)?;
            let count = |name| recorder.compute_spans().iter().filter(|span| span.name == name).count();
            let blocks = count("softmax");
            attention.backward(&shard, forward.saved, &x)?;
            assert_eq!(count("softmax_grad"), blocks);
            Ok(blocks)
        })
    };
    assert_eq!(computed(LayoutKind::Contiguous, None)?, [1, 2, 3, 4]);
    assert_eq!(computed(LayoutKind::Zigzag, None)?, [4, 4, 4, 4]);
    assert_eq!(computed(LayoutKind::Contiguous, Some(&[0, 8, 20, 32]))?, [1, 1, 2, 2]);
    Ok(())
}

/// In bf16 no method errs by more than twice what a textbook bf16 attention does, however many ranks share the sequence.
#[test]
fn bf16_errs_at_most_twice_as_much_as_the_textbook() -> Result<()> {
    tch::set_num_threads(1);
    let (tokens, heads, kv_heads, width, scale) = (203, 8, 2, 16, 0.25);
    let make = |seed, heads| randn(seed, &[1, tokens, heads, width]).to_kind(Kind::BFloat16);
    let whole = || (make(31, heads), make(32, kv_heads), make(33, kv_heads), make(34, heads));
    let (q, k, v, d_o) = whole();
    let tile = [Tile { q: 0..tokens, k: 0..tokens, causal: true }];
    let (o, lse) = oracle::forward(&q, &k, &v, &tile, scale)?;
    let (dq, dk, dv) = oracle::backward(&q, &k, &v, &o, &lse, &d_o, &tile, scale)?;
    let truth = [o, dq, dk, dv];
    let textbook = textbook([&q, &k, &v, &d_o], scale);
    let allowed: Vec<f64> = textbook.iter().zip(&truth).map(|(x, truth)| 2.0 * relative_rms(x, truth)).collect();

    for name in method::ATTENTIONS {
        for layout in LAYOUTS {
            let shares = local::run(8, |group| -> Result<_> {
                let layout = Layout::new(layout, tokens, group.size())?;
                let plan = Plan::new(layout, None, group.rank())?;
                let (linear, attention) = (method::linear("lasp2", &group)?, method::attention(name)?);
                let (q, k, v, d_o) = whole();
                let mine = |x: &Tensor| plan.layout.shard(x, 1, group.rank());
                let (q, k, v, d_o) = (mine(&q)?, mine(&k)?, mine(&v)?, mine(&d_o)?);
                let shard = Shard { group, plan, linear, attention: attention.clone() };
                let forward = attention.forward(&shard, &Inputs::new(&q, &k, &v, scale, true)?)?;
                let grads = attention.backward(&shard, forward.saved, &d_o)?;
                Ok([forward.o, grads.dq, grads.dk, grads.dv])
            })?;
            let layout = Layout::new(layout, tokens, 8)?;
            for (i, what) in ["o", "dq", "dk", "dv"].iter().enumerate() {
                let parts: Vec<&Tensor> = shares.iter().map(|share| &share[i]).collect();
                let ours = layout.in_sequence_order(&Tensor::cat(&parts, 1), 1)?;
                assert_eq!(ours.kind(), Kind::BFloat16);
                assert_close(&format!("{what}, {name}, {layout:?}"), &ours, &truth[i], allowed[i]);
            }
        }
    }
    Ok(())
}

/// `[o, dq, dk, dv]` of causal attention in the kind of the inputs, by libtorch's autograd.
fn textbook([q, k, v, d_o]: [&Tensor; 4], scale: f64) -> [Tensor; 4] {
    let [q, k, v] = [q, k, v].map(|x| x.copy().set_requires_grad(true));
    let group = q.size()[2] / k.size()[2];
    let heads = |x: &Tensor, group: i64| x.repeat_interleave_self_int(group, 2, None).transpose(1, 2);
    let ahead = Tensor::ones([q.size()[1], k.size()[1]], (Kind::Bool, q.device())).triu(1);
    let scores =
        (heads(&q, 1).matmul(&heads(&k, group).transpose(2, 3)) * scale).masked_fill(&ahead, f64::NEG_INFINITY);
    let o = scores.softmax(-1, None).matmul(&heads(&v, group)).transpose(1, 2);
    let grads = Tensor::run_backward(&[(&o * d_o).sum(o.kind())], &[&q, &k, &v], false, false);
    let [dq, dk, dv] = <[Tensor; 3]>::try_from(grads).expect("three gradients");
    [o.detach(), dq, dk, dv]
}
