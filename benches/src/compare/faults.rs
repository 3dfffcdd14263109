//! What must end a comparison: a gradient that is wrong on one rank, and messages that the formula does not know of.

use std::sync::Arc;

use anyhow::Result;
use collectives::{Mesh, local};
use runtime::config::{Config, LayoutKind};
use runtime::sequence::attention::{Attention, Forward, Grads, Inputs, Lasp2h, Saved};
use runtime::sequence::{self, LayerSizes, Plan, Shard, Traffic};
use tch::{Device, Tensor};

use super::method::{Entrant, Method};
use super::{Mixer, Mode, Options, measure, parity};

/// LASP-2H with a fault.
#[derive(Clone, Copy)]
enum Faulty {
    /// dk of rank 1 is off by a thousandth.
    Gradient,
    /// Backward moves more than it says.
    Formula,
}

impl Attention for Faulty {
    fn forward(&self, shard: &Shard, x: &Inputs) -> sequence::Result<Forward> {
        Lasp2h::default().forward(shard, x)
    }

    fn backward(&self, shard: &Shard, saved: Saved, d_o: &Tensor) -> sequence::Result<Grads> {
        let mut grads = Lasp2h::default().backward(shard, saved, d_o)?;
        if matches!(self, Faulty::Gradient) && shard.group.rank() == 1 {
            grads.dk = grads.dk.f_mul_scalar(1.001)?;
        }
        Ok(grads)
    }

    fn traffic(&self, plan: &Plan, layer: &LayerSizes) -> Traffic {
        let mut traffic = Lasp2h::default().traffic(plan, layer);
        if matches!(self, Faulty::Formula) {
            traffic.backward = traffic.forward.clone();
        }
        traffic
    }
}

/// What every rank of three is told.
fn errors(fault: Faulty) -> Vec<String> {
    let sizes = "[model]\nheads = 2\nkv_heads = 1\ndim = 32\n";
    let options = Options {
        mixer: Mixer::Softmax,
        mode: Mode::Operator,
        methods: Method::list("lasp2h", Mixer::Softmax, LayoutKind::Contiguous).unwrap(),
        rounds: 1,
        device: Device::Cpu,
        config: Config::from_toml_str(sizes, "sizes", &[]).unwrap(),
    };
    let compare = |world: collectives::Group| -> Result<String> {
        let mesh = Mesh::new(world, 1, 3)?;
        let mut entrant = Entrant::new(&options.methods[0], &options, &mesh.sp)?;
        entrant.attention = Arc::new(fault);
        let entrants = [entrant];
        let found = parity::check(&options, &mesh.sp, &entrants)
            .and_then(|()| measure::rows(&options, &mesh, &entrants, 60, &|_| {}).map(drop));
        Ok(found.err().map_or_else(String::new, |error| error.to_string()))
    };
    local::run(3, compare).unwrap()
}

#[test]
fn a_wrong_gradient_on_one_rank_gives_no_figures() {
    for error in errors(Faulty::Gradient) {
        let expected =
            "lasp2h: dk on rank 1 of 3 differs from the f64 oracle: relative RMS error 1.00e-3, expected at most 1e-5";
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn bytes_that_differ_from_the_formula_give_no_figures() {
    // 20 tokens of 1 KV head of 16 + 16 numbers on each rank, gathered from two others and scattered to them.
    for (rank, error) in errors(Faulty::Formula).iter().enumerate() {
        let expected = format!(
            "lasp2h, 3 ranks, 60 tokens: rank {rank} counted 10240 bytes received and 7680 bytes sent in backward, its \
             formula says 5120 bytes received and 2560 bytes sent"
        );
        assert!(error.starts_with(&expected), "{error}");
    }
}
