//! One training step on the timeline: forward and backward of every layer, the loss, the sum of gradients, AdamW. A linear
//! layer's order of work is that of `runtime::sequence::linear`: summarize, exchange in flight, intra-rank work, wait, add;
//! backward is its mirror.

use runtime::config::{Config, DeviceKind, LayerKind, LayoutKind, ParallelConfig};
use runtime::estimate::{self, Estimate};
use runtime::sequence::method;

use super::attention::Attend;
use super::costs::{Costs, Pass};
use super::exchange::Exchange;
use super::host::{self, Host};
use super::machine::{Machine, Sharding};
use super::memory::{count, parameter_bytes};
use super::method::{Linear, Method, Softmax};
use super::network::Network;
use super::timeline::{Timeline, latest};
use super::{Error, Prediction, Result, Workload};

/// The step time, memory and traffic of one point.
pub fn predict(machine: &Machine, method: &Method, work: &Workload) -> Result<Prediction> {
    let (costs, estimate) = costs(machine, method, work)?;
    let timeline = run(machine, &costs, method, work, Network::new(machine))?;
    let unhindered = run(machine, &costs, method, work, Network::free(machine))?;
    let memory = count(machine, &costs, method, &estimate);
    let [step_s, unhindered] = match &machine.host {
        None => [timeline.end(), unhindered.end()],
        Some(host) => [on_host(host, &costs, method, work, false)?, on_host(host, &costs, method, work, true)?],
    };
    let tokens_per_s = (work.seq_len * work.dp * work.passes) as f64 / step_s;
    Ok(Prediction {
        machine: machine.name.clone(),
        method: method.name.clone(),
        gpus: work.world(),
        seq_len: work.seq_len,
        dp: work.dp,
        step_s,
        tokens_per_s,
        tokens_per_s_per_gpu: tokens_per_s / work.world() as f64,
        exposed_s: step_s - unhindered,
        waited_s: timeline.waited(),
        received: timeline.received().iter().sum::<f64>() / work.gpus as f64,
        out_of_memory: memory.total > machine.memory.capacity_gb * 1e9,
        memory,
    })
}

/// The step time alone.
pub fn step_seconds(machine: &Machine, method: &Method, work: &Workload) -> Result<f64> {
    let (costs, _) = costs(machine, method, work)?;
    match &machine.host {
        None => Ok(run(machine, &costs, method, work, Network::new(machine))?.end()),
        Some(host) => on_host(host, &costs, method, work, false),
    }
}

/// A step of ranks that share the cores of a host: its operators simulated one by one, what is between them local to a rank.
fn on_host(host: &Host, costs: &Costs, method: &Method, work: &Workload, free: bool) -> Result<f64> {
    let unhindered = host.unhindered();
    let host = if free { &unhindered } else { host };
    let network = if free { None } else { host.network()? };
    let dense = [Pass::Forward, Pass::Backward].map(|pass| dense_on_host(host, costs, method, work, pass));
    let [dense_forward, dense_backward] = dense;
    let (dense_forward, dense_backward) = (dense_forward?, dense_backward?);
    // Costs are those of a rank with a core for itself.
    let (sharing, passes) = (work.world() as f64 / host.cores as f64, work.passes as f64);
    let update = parameter_bytes(costs.machine(), work.world()).iter().sum::<f64>() * costs.parameters();
    let mut local = passes * costs.loss() + costs.optimizer(update);
    let mut seconds = host.sum_gradients(network, work.world(), costs.parameters())?;
    // Groups compete for the cores as the ranks of one do.
    let crowd = sharing.max(1.0) / (work.gpus as f64 / host.cores as f64).max(1.0);
    let again = if work.config.train.activation_checkpointing { 2.0 } else { 1.0 };
    for softmax in [false, true] {
        let kind = if softmax { LayerKind::Softmax } else { LayerKind::Linear };
        let layers = work.config.model.layer_kinds().iter().filter(|found| **found == kind).count() as f64;
        if layers > 0.0 {
            let [forward, backward] =
                host::operator(host, network, work.config, method, softmax, work.gpus, work.seq_len)?;
            let dense = |pass: Pass, factor: f64| factor * costs.dense(kind, pass).iter().sum::<f64>();
            seconds += passes * crowd * layers * (again * forward + backward);
            local +=
                passes * layers * (again * dense(Pass::Forward, dense_forward) + dense(Pass::Backward, dense_backward));
        }
    }
    Ok(seconds + sharing * local)
}

/// Seconds of a layer's forward and of its backward, of ranks that share the cores of a host.
pub fn layer_seconds(
    machine: &Machine,
    host: &Host,
    method: &Method,
    kind: LayerKind,
    work: &Workload,
) -> Result<[f64; 2]> {
    let (costs, _) = costs(machine, method, work)?;
    let softmax = kind == LayerKind::Softmax;
    let mut seconds = host::operator(host, host.network()?, work.config, method, softmax, work.gpus, work.seq_len)?;
    for (seconds, pass) in seconds.iter_mut().zip([Pass::Forward, Pass::Backward]) {
        let dense = dense_on_host(host, &costs, method, work, pass)? * costs.dense(kind, pass).iter().sum::<f64>();
        *seconds += work.world() as f64 / host.cores as f64 * dense;
    }
    Ok(seconds)
}

/// By how much a layer without its operator takes longer on a host than its operations and bytes say.
fn dense_on_host(host: &Host, costs: &Costs, method: &Method, work: &Workload, pass: Pass) -> Result<f64> {
    host.dense_factor(costs.dim, pass, work.world(), costs.tokens, |config| {
        let (measured, _) = self::costs(costs.machine(), method, &Workload::one(config, work.gpus, work.seq_len))?;
        Ok(measured.dense(LayerKind::Linear, pass).iter().sum())
    })
}

/// Seconds of the operator of one kind of layer by itself, forward and, if wanted, backward; and by how much it would be shorter if
/// communication took no time.
pub fn operator_seconds(
    machine: &Machine,
    method: &Method,
    kind: LayerKind,
    work: &Workload,
    backward: bool,
) -> Result<[f64; 2]> {
    let (costs, _) = costs(machine, method, work)?;
    let passes: &[Pass] = if backward { &[Pass::Forward, Pass::Backward] } else { &[Pass::Forward] };
    let seconds = |free: bool| -> Result<f64> {
        let Some(host) = &machine.host else {
            let network = if free { Network::free(machine) } else { Network::new(machine) };
            let timeline = Timeline::new(work.gpus, 0.0);
            let mut step = Step { machine, costs: &costs, method, network, timeline, begun: 0.0 };
            passes.iter().try_for_each(|&pass| step.operator(kind, pass))?;
            return Ok(step.timeline.end());
        };
        let (unhindered, network) = (host.unhindered(), if free { None } else { host.network()? });
        let host = if free { &unhindered } else { host };
        let softmax = kind == LayerKind::Softmax;
        let both = host::operator(host, network, work.config, method, softmax, work.gpus, work.seq_len)?;
        Ok(both.iter().take(passes.len()).sum())
    };
    let whole = seconds(false)?;
    Ok([whole, whole - seconds(true)?])
}

/// One exchange of states by itself, forward, from summaries ready everywhere until the last rank has its entry states.
pub fn exchange_seconds(machine: &Machine, method: &Method, work: &Workload) -> Result<f64> {
    let (costs, _) = costs(machine, method, work)?;
    let mut timeline = Timeline::new(work.gpus, 0.0);
    let ready = vec![0.0; work.gpus];
    let exchange = exchange(&costs, Network::new(machine), Pass::Forward);
    Ok(latest(&exchange.run(&mut timeline, method.linear, &ready, &ready)))
}

/// Softmax attention by itself, forward and backward: its rate on each GPU as a share of that of one GPU alone.
pub fn attention_share(machine: &Machine, method: &Method, work: &Workload) -> Result<f64> {
    let (costs, _) = costs(machine, method, work)?;
    let mut timeline = Timeline::new(work.gpus, 0.0);
    let mut alone = 0.0;
    for pass in [Pass::Forward, Pass::Backward] {
        let ready = timeline.computed().to_vec();
        attend(&costs, Network::new(machine), pass, false).run(&mut timeline, method.softmax, &ready)?;
        alone += costs.softmax(costs.whole * costs.whole / 2.0 / work.gpus as f64, pass);
    }
    Ok(alone / timeline.end())
}

fn costs<'a>(machine: &'a Machine, method: &Method, work: &Workload) -> Result<(Costs<'a>, Estimate)> {
    let (gpus, seq_len) = (work.gpus, work.seq_len);
    if gpus == 0 || seq_len < gpus || work.dp == 0 || work.passes == 0 {
        return Err(Error::Point { gpus, seq_len });
    }
    let layout = method.layout.unwrap_or(work.config.parallel.layout);
    let estimate = estimate::estimate(&resolved(work.config, layout, gpus, seq_len)?)?;
    let activations = estimate.memory.activations.clone();
    Ok((Costs::new(machine, work, layout, estimate.parameters.clone(), activations), estimate))
}

/// The configuration with one sequence of `seq_len` tokens on `gpus` ranks.
pub(super) fn resolved(config: &Config, layout: LayoutKind, gpus: usize, seq_len: usize) -> Result<Config> {
    let mut config = config.clone();
    (config.parallel.sp, config.parallel.dp) = (gpus, 1);
    config.parallel.layout = layout;
    // What the step estimates does not depend on the method that is still to be chosen.
    let ParallelConfig { linear_method, softmax_method, .. } = &mut config.parallel;
    for (chosen, any) in [(linear_method, "lasp2"), (softmax_method, "lasp2h")] {
        if chosen == method::AUTO {
            any.clone_into(chosen);
        }
    }
    // Activations are those of plain tensor code; the machine's description says by how much a trainer keeps less.
    config.train.device = DeviceKind::Cpu;
    (config.train.batch, config.train.micro_batch, config.train.seq_len) = (1, 1, seq_len);
    config.resolve_ranks(gpus)?;
    Ok(config)
}

fn exchange<'a>(costs: &Costs<'a>, network: Network<'a>, pass: Pass) -> Exchange<'a> {
    Exchange {
        network,
        layout: costs.layout,
        pass,
        state: costs.state(),
        decays: costs.decays(pass),
        per_byte: costs.bytes(1.0),
    }
}

fn attend<'a>(costs: &'a Costs<'a>, network: Network<'a>, pass: Pass, left_product: bool) -> Attend<'a> {
    Attend { costs, network, pass, left_product }
}

struct Step<'a> {
    machine: &'a Machine,
    costs: &'a Costs<'a>,
    method: &'a Method,
    network: Network<'a>,
    timeline: Timeline,
    /// When the last rank began the layer before.
    begun: f64,
}

fn run<'a>(
    machine: &'a Machine,
    costs: &'a Costs<'a>,
    method: &'a Method,
    work: &Workload,
    network: Network<'a>,
) -> Result<Timeline> {
    let timeline = Timeline::new(work.gpus, machine.overhead.step_ms * 1e-3);
    let mut step = Step { machine, costs, method, network, begun: timeline.end(), timeline };
    let layers = work.config.model.layer_kinds();
    for pass in 0..work.passes {
        for &kind in &layers {
            step.gather_weights(kind);
            step.layer(kind, Pass::Forward)?;
        }
        step.timeline.work(costs.loss());
        for &kind in layers.iter().rev() {
            step.gather_weights(kind);
            if work.config.train.activation_checkpointing {
                step.layer(kind, Pass::Forward)?;
            }
            step.layer(kind, Pass::Backward)?;
            // Gradients of passes before the last stay where they are.
            if machine.training.gradient_overlap && pass + 1 == work.passes {
                step.sum_gradients(costs.layer_parameters(kind));
            }
        }
    }
    let summed: f64 = match machine.training.gradient_overlap {
        true => layers.iter().map(|&kind| costs.layer_parameters(kind)).sum(),
        false => 0.0,
    };
    step.sum_gradients(costs.parameters() - summed);
    step.update();
    Ok(step.timeline)
}

impl Step<'_> {
    fn layer(&mut self, kind: LayerKind, pass: Pass) -> Result<()> {
        let [before, after] = self.costs.dense(kind, pass);
        // Backward comes to the mixer from the other side.
        let (enter, leave) = if pass == Pass::Forward { (before, after) } else { (after, before) };
        self.timeline.work(enter);
        self.operator(kind, pass)?;
        self.timeline.work(leave);
        Ok(())
    }

    fn operator(&mut self, kind: LayerKind, pass: Pass) -> Result<()> {
        let ready = self.timeline.computed().to_vec();
        let attend = |left_product| attend(self.costs, self.network, pass, left_product);
        match (kind, self.method.linear) {
            (LayerKind::Softmax, _) => attend(false).run(&mut self.timeline, self.method.softmax, &ready)?,
            (_, Linear::RingLeftProduct) => attend(true).run(&mut self.timeline, Softmax::Ring, &ready)?,
            (_, Linear::MegatronSpLeftProduct) => attend(true).run(&mut self.timeline, Softmax::MegatronSp, &ready)?,
            (LayerKind::Linear, _) => self.linear(pass),
        }
        Ok(())
    }

    fn linear(&mut self, pass: Pass) {
        let (costs, method) = (self.costs, self.method.linear);
        let [summarize, intra] = costs.linear(pass);
        let ready = self.timeline.work(summarize);
        let exchange = exchange(costs, self.network, pass);
        if self.method.released {
            let begun = match method {
                Linear::Lasp1 => vec![latest(&ready); costs.ranks],
                _ => ready.clone(),
            };
            let entries = exchange.run(&mut self.timeline, method, &begun, &begun);
            self.timeline.compute_all(&entries, 0.0);
        }
        let done = self.timeline.work(intra);
        if costs.ranks == 1 || method == Linear::None {
            return;
        }
        let entries = match self.method.released {
            true => done,
            false => exchange.run(&mut self.timeline, method, &ready, &done),
        };
        let gathered = match method {
            Linear::Lasp2 { .. } => costs.ranks as f64,
            Linear::Hierarchical { node } => node.min(costs.ranks) as f64,
            _ => 0.0,
        };
        let fold = costs.bytes(gathered * costs.slots * costs.state());
        self.timeline.compute_all(&entries, fold + costs.add_entry(pass));
    }

    /// Sharded weights are gathered one layer ahead, once all ranks have begun the layer before.
    fn gather_weights(&mut self, kind: LayerKind) {
        let (ranks, training) = (self.costs.ranks, &self.machine.training);
        let now = self.timeline.end();
        if training.sharding == Sharding::Full {
            let group = training.shard_group(self.costs.world);
            let own = training.weight_bytes * self.costs.layer_parameters(kind) / group as f64;
            let arrived = self.timeline.in_background(self.begun, self.network.all_gather(group, own));
            self.timeline.compute_all(&vec![arrived; ranks], 0.0);
        }
        self.begun = now;
    }

    /// Sums the gradients of so many parameters over all ranks, or leaves each rank its shard of the sum.
    fn sum_gradients(&mut self, parameters: f64) {
        let (ranks, training) = (self.costs.world, &self.machine.training);
        let bytes = training.gradient_bytes * parameters;
        let group = training.shard_group(ranks);
        let own = bytes / group as f64;
        let seconds = match training.sharding {
            Sharding::None => self.network.all_reduce(ranks, bytes),
            Sharding::Optimizer | Sharding::Full => {
                self.network.all_gather(group, own) + self.network.all_reduce_replicas(ranks.div_ceil(group), own)
            }
        };
        self.timeline.in_background(self.timeline.end(), seconds);
    }

    fn update(&mut self) {
        let ranks = self.costs.ranks;
        let summed = vec![self.timeline.background(); ranks];
        let bytes: f64 = parameter_bytes(self.machine, self.costs.world).iter().sum();
        let updated = self.timeline.compute_all(&summed, self.costs.optimizer(bytes * self.costs.parameters()));
        if self.machine.training.sharding == Sharding::Optimizer {
            let group = self.machine.training.shard_group(self.costs.world);
            let own = self.machine.training.weight_bytes * self.costs.parameters() / group as f64;
            let gathered = self.timeline.in_background(latest(&updated), self.network.all_gather(group, own));
            self.timeline.compute_all(&vec![gathered; ranks], 0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: &str = "[model]\nvocab = 1024\ndim = 2048\nlayers = 8\nheads = 16\nkv_heads = 4\ndecay = \"channel\"\n\
                         [train]\ndtype = \"bf16\"\n";

    fn config(overrides: &[&str]) -> Config {
        let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        Config::from_toml_str(MODEL, "test", &overrides).unwrap()
    }

    fn point(config: &Config, method: &str, gpus: usize, seq_len: usize) -> Prediction {
        let machine = Machine::load("h100-dgx").unwrap();
        predict(&machine, &Method::parse(method).unwrap(), &Workload::one(config, gpus, seq_len)).unwrap()
    }

    #[test]
    fn lasp2_and_lasp2h_receive_what_lasp_plan_says() {
        for (layout, again) in [("contiguous", false), ("zigzag", false), ("contiguous", true)] {
            let set = format!("train.activation_checkpointing={again}");
            let config = config(&[&format!("parallel.layout={layout:?}"), &set]);
            let plan = estimate::estimate(&resolved(&config, config.parallel.layout, 16, 65536).unwrap()).unwrap();
            let layers = plan.traffic.messages.iter().filter(|message| message.place != "step");
            let planned: i64 = layers.map(|message| message.places * message.each.bytes_received).sum();
            let found = point(&config, "lasp2+lasp2h", 16, 65536).received;
            assert!((found / planned as f64 - 1.0).abs() < 1e-9, "{layout} {again}: {found} {planned}");
        }
    }

    #[test]
    fn other_methods_receive_what_their_formulas_say() {
        let (w, l, e) = (16.0, 65536.0, 2.0);
        let (t, d, kv) = (l / w, 2048.0, 4.0 * 2.0 * 128.0);
        let pure =
            |pattern: &str| config(&[&format!("model.pattern={pattern:?}"), "model.decay=\"none\"", "model.layers=1"]);
        let received = |pattern, method| point(&pure(pattern), method, 16, 65536).received;
        let state = d * 128.0 * 4.0;
        for (pattern, method, expected) in [
            ("L", "lasp2", 2.0 * (w - 1.0) * state),
            // The first rank of each direction receives nothing.
            ("L", "lasp1", 2.0 * (w - 1.0) / w * state),
            ("L", "all_scan:blocks=8", 2.0 * (w - 1.0) / w * state),
            ("L", "none", 0.0),
            // K and V twice, the sums of their gradients in f32 and once more to come home.
            ("N", "ring", 2.0 * (l - t) * kv * e + l * kv * 4.0),
            ("L", "ring_left_product", 2.0 * (l - t) * 2.0 * d * e + l * 2.0 * d * 4.0),
            ("N", "megatron_sp", 5.0 * (l - t) * d * e),
            // Four times q, k, v repeated to 16 ranks' heads, and o; dk, dv in f32.
            ("N", "ulysses", (w - 1.0) / w * t * (4.0 * d * e + 4.0 * kv * (e + 4.0))),
        ] {
            let found = received(pattern, method);
            assert!((found - expected).abs() <= 1e-9 * expected, "{method}: {found} {expected}");
        }
    }

    #[test]
    fn overlap_hides_a_gather_and_released_code_does_not() {
        let config = config(&["model.pattern=\"L\""]);
        let overlapped = point(&config, "lasp2", 64, 1 << 21);
        let released = point(&config, "lasp2:released", 64, 1 << 21);
        assert!(overlapped.exposed_s < 0.5 * released.exposed_s, "{overlapped:?} {released:?}");
        assert!(overlapped.step_s >= point(&config, "none", 64, 1 << 21).step_s);
        assert!(overlapped.exposed_s >= 0.0 && overlapped.waited_s >= 0.0);
    }

    #[test]
    fn sharded_state_takes_less_memory_and_more_messages() {
        let config = config(&[]);
        let mut machine = Machine::load("h100-dgx").unwrap();
        let mut of = |sharding, shards| {
            (machine.training.sharding, machine.training.shards) = (sharding, shards);
            let work = Workload::one(&config, 16, 65536);
            predict(&machine, &Method::parse("lasp2").unwrap(), &work).unwrap()
        };
        let [none, zero, full, by_node] =
            [(Sharding::None, 0), (Sharding::Optimizer, 0), (Sharding::Full, 0), (Sharding::Full, 8)]
                .map(|(s, n)| of(s, n));
        assert!((none.memory.optimizer / zero.memory.optimizer - 16.0).abs() < 1e-9);
        assert!((none.memory.weights / by_node.memory.weights - 8.0).abs() < 1e-9);
        assert!(full.memory.total < zero.memory.total && zero.memory.total < none.memory.total);
        assert!([&zero, &full, &by_node].iter().all(|point| point.step_s > 0.5 * none.step_s));
    }

    #[test]
    fn a_thousand_gpus_take_no_time_to_simulate() {
        let config = config(&["model.layers=16"]);
        let start = std::time::Instant::now();
        for method in ["lasp2+lasp2h", "lasp1+ring@zigzag", "all_scan+megatron_sp", "hierarchical"] {
            point(&config, method, 1024, 1 << 22);
        }
        assert!(start.elapsed().as_secs_f64() < 5.0, "{:?}", start.elapsed());
    }
}
