//! One training step on the timeline: forward and backward of every layer, the loss, the sum of gradients, AdamW. A linear
//! layer's order of work is that of `runtime::sequence::linear`: summarize, exchange in flight, intra-rank work, wait, add;
//! backward is its mirror. Checkpointed layers compute forward again, but for softmax attention where its output is
//! kept; on GPUs ours leaves out an MLP's output too.

use runtime::config::{Config, DecayKind, DeviceKind, LayerKind, LayoutKind, ParallelConfig};
use runtime::estimate::{self, Estimate};
use runtime::sequence::scan::{DecayForm, Reach};
use runtime::sequence::{self, Messages, method};

use super::attention::Attend;
use super::costs::{Costs, Pass, layer_sizes};
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
    let moved = Moved::new(&costs, method, work)?;
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
        documents: costs.packing.documents(),
        dp: work.dp,
        step_s,
        tokens_per_s,
        tokens_per_s_per_gpu: tokens_per_s / work.world() as f64,
        exposed_s: step_s - unhindered,
        waited_s: timeline.waited(),
        received: timeline.received().iter().sum::<f64>() / work.gpus as f64,
        messages: moved.messages,
        at_most: moved.at_most,
        out_of_memory: memory.total > machine.memory.capacity_gb * 1e9,
        memory,
    })
}

/// What the layers of a rank move in a step by the formulas of the methods, the mean of all ranks.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Moved {
    pub messages: f64,
    pub received: f64,
    /// It may be less.
    pub at_most: bool,
}

impl Moved {
    pub fn new(costs: &Costs, method: &Method, work: &Workload) -> Result<Moved> {
        let mut moved = Moved::default();
        let kinds = work.config.model.layer_kinds();
        let truncated = matches!(method.linear, Linear::Truncated { .. });
        let decay = DecayForm::of(costs.decay);
        let [softmax, linear] = [LayerKind::Softmax, LayerKind::Linear].map(|kind| layer_sizes(work.config, kind));
        // Layers of a kind are alike, but for how far a truncated scan reaches.
        let mut sorts: Vec<(LayerKind, Option<[Reach; 2]>, f64)> = Vec::new();
        for (layer, &kind) in kinds.iter().enumerate() {
            let reach = |pass| costs.reach(Some(layer), kinds.len(), pass);
            let reaches = match truncated && kind == LayerKind::Linear && decay == DecayForm::Head {
                true => Some([reach(Pass::Forward), reach(Pass::Backward)]),
                false => None,
            };
            match sorts.iter_mut().find(|(other, of, _)| *other == kind && *of == reaches) {
                Some((.., layers)) => *layers += 1.0,
                None => sorts.push((kind, reaches, 1.0)),
            }
        }
        let mut plan = costs.packing.plan(0);
        for rank in 0..work.gpus {
            costs.packing.turn(&mut plan, rank);
            for (kind, reaches, layers) in &sorts {
                let traffic = match (kind, method.linear.name()) {
                    (LayerKind::Softmax, _) => method::attention(&method.softmax.name())?.traffic(&plan, &softmax),
                    (LayerKind::Linear, None) => Default::default(),
                    (LayerKind::Linear, Some(name)) => {
                        method::linear_traffic_within(&name, &plan, &linear, decay, reaches.as_ref())?
                    }
                };
                let count = |of: &Messages| of.iter().map(|(_, count)| count.messages).sum::<u64>();
                let times = layers * work.passes as f64 / work.gpus as f64;
                let forwards = forwards(work, method, *kind)?;
                let [forward, backward] =
                    [&traffic.forward, &traffic.backward].map(|of| [count(of), of.bytes().received]);
                moved.messages += times * (forwards * forward[0] + backward[0]) as f64;
                moved.received += times * (forwards * forward[1] + backward[1]) as f64;
                moved.at_most |= traffic.at_most;
            }
        }
        Ok(moved)
    }
}

/// How often a layer's operator runs forward.
fn forwards(work: &Workload, method: &Method, kind: LayerKind) -> Result<u64> {
    let once = method::attention(&method.softmax.name())?.attends_once();
    Ok(sequence::forwards(kind, once, work.config.train.activation_checkpointing))
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
            let [forward, backward] = operators(host, network, costs, method, kind, work)?;
            let dense = |pass: Pass, factor: f64| factor * costs.dense(kind, pass).iter().sum::<f64>();
            seconds += passes * crowd * (forwards(work, method, kind)? as f64 * forward + backward);
            local +=
                passes * layers * (again * dense(Pass::Forward, dense_forward) + dense(Pass::Backward, dense_backward));
        }
    }
    Ok(seconds + sharing * local)
}

/// Seconds of forward and of backward of the operators of all layers of a kind. They are alike, but for how far back a truncated
/// scan listens.
fn operators(
    host: &Host,
    network: Option<collectives::local::Network>,
    costs: &Costs,
    method: &Method,
    kind: LayerKind,
    work: &Workload,
) -> Result<[f64; 2]> {
    let kinds = work.config.model.layer_kinds();
    let truncated = kind == LayerKind::Linear && matches!(method.linear, Linear::Truncated { .. });
    let (mut sum, mut last) = ([0.0; 2], None);
    for (layer, _) in kinds.iter().enumerate().filter(|(_, found)| **found == kind) {
        let layer = truncated.then_some(layer);
        let reach = |pass| costs.reach(layer, kinds.len(), pass);
        let reaches = [reach(Pass::Forward), reach(Pass::Backward)];
        let seconds = match last {
            Some((of, seconds)) if of == reaches => seconds,
            _ => host::operator(host, network, costs, method, kind, work, &reaches)?,
        };
        sum = [sum[0] + seconds[0], sum[1] + seconds[1]];
        last = Some((reaches, seconds));
    }
    Ok(sum)
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
    let mut seconds = host::operator(host, host.network()?, &costs, method, kind, work, &everywhere())?;
    for (seconds, pass) in seconds.iter_mut().zip([Pass::Forward, Pass::Backward]) {
        let dense = dense_on_host(host, &costs, method, work, pass)? * costs.dense(kind, pass).iter().sum::<f64>();
        *seconds += work.world() as f64 / host.cores as f64 * dense;
    }
    Ok(seconds)
}

/// Seconds of forward and of backward of the operator of one kind of layer by itself, of ranks that share the cores of a host.
pub fn operator_on_host(
    machine: &Machine,
    host: &Host,
    method: &Method,
    kind: LayerKind,
    work: &Workload,
) -> Result<[f64; 2]> {
    let (costs, _) = costs(machine, method, work)?;
    host::operator(host, host.network()?, &costs, method, kind, work, &everywhere())
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
            let layers = work.config.model.layers;
            let mut step = Step { machine, costs: &costs, method, layers, network, timeline, begun: 0.0 };
            passes.iter().try_for_each(|&pass| step.operator(kind, pass, None))?;
            return Ok(step.timeline.end());
        };
        let (unhindered, network) = (host.unhindered(), if free { None } else { host.network()? });
        let host = if free { &unhindered } else { host };
        let both = host::operator(host, network, &costs, method, kind, work, &everywhere())?;
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
    let exchange = exchange(&costs, Network::new(machine), Pass::Forward, Reach::full());
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
        alone += costs.softmax(costs.packing.whole_pairs() / work.gpus as f64, pass);
    }
    Ok(alone / timeline.end())
}

fn costs<'a>(machine: &'a Machine, method: &Method, work: &Workload) -> Result<(Costs<'a>, Estimate)> {
    let (gpus, seq_len) = (work.gpus, work.seq_len);
    if gpus == 0 || seq_len < gpus || work.dp == 0 || work.passes == 0 {
        return Err(Error::Point { gpus, seq_len });
    }
    let model = &work.config.model;
    let depends = matches!(model.decay, DecayKind::Token | DecayKind::Channel);
    let left_product = matches!(method.linear, Linear::RingLeftProduct | Linear::MegatronSpLeftProduct);
    if depends && left_product && model.layer_kinds().contains(&LayerKind::Linear) {
        return Err(Error::LeftProduct { method: method.name.clone() });
    }
    let layout = method.layout.unwrap_or(work.config.parallel.layout);
    let mut config = resolved(work.config, layout, gpus, seq_len)?;
    // What layers keep depends on it.
    config.parallel.softmax_method = method.softmax.name();
    let estimate = estimate::estimate(&config)?;
    let activations = estimate.memory.activations.clone();
    Ok((Costs::new(machine, work, layout, estimate.parameters.clone(), activations)?, estimate))
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

fn exchange<'a>(costs: &'a Costs<'a>, network: Network<'a>, pass: Pass, reach: Reach) -> Exchange<'a> {
    Exchange { network, chain: costs.packing.chain(pass), pass, size: costs.size, reach, per_byte: costs.bytes(1.0) }
}

/// How far back a truncated scan listens, forward and backward, if nobody knows the decays.
fn everywhere() -> [Reach; 2] {
    [Reach::full(), Reach::full()]
}

fn attend<'a>(costs: &'a Costs<'a>, network: Network<'a>, pass: Pass, left_product: bool) -> Attend<'a> {
    Attend { costs, network, pass, left_product }
}

struct Step<'a> {
    machine: &'a Machine,
    costs: &'a Costs<'a>,
    method: &'a Method,
    /// Of the model.
    layers: usize,
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
    let layers = work.config.model.layer_kinds();
    let begun = timeline.end();
    let mut step = Step { machine, costs, method, layers: layers.len(), network, timeline, begun };
    for pass in 0..work.passes {
        for layer in layers.iter().copied().enumerate() {
            step.gather_weights(layer.1);
            step.layer(layer, Pass::Forward)?;
        }
        step.timeline.work(costs.loss());
        for layer in layers.iter().copied().enumerate().rev() {
            let kind = layer.1;
            step.gather_weights(kind);
            if forwards(work, method, kind)? > 1 {
                step.layer(layer, Pass::Forward)?;
            } else if work.config.train.activation_checkpointing {
                step.timeline.work(costs.dense(kind, Pass::Forward).iter().sum());
            }
            step.layer(layer, Pass::Backward)?;
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
    fn layer(&mut self, (layer, kind): (usize, LayerKind), pass: Pass) -> Result<()> {
        let [before, after] = self.costs.dense(kind, pass);
        // Backward comes to the mixer from the other side.
        let (enter, leave) = if pass == Pass::Forward { (before, after) } else { (after, before) };
        self.timeline.work(enter);
        self.operator(kind, pass, Some(layer))?;
        self.timeline.work(leave);
        Ok(())
    }

    /// `layer`: which one, if it is one of the model's.
    fn operator(&mut self, kind: LayerKind, pass: Pass, layer: Option<usize>) -> Result<()> {
        let ready = self.timeline.computed().to_vec();
        let attend = |left_product| attend(self.costs, self.network, pass, left_product);
        match (kind, self.method.linear) {
            (LayerKind::Softmax, _) => attend(false).run(&mut self.timeline, self.method.softmax, &ready)?,
            (_, Linear::RingLeftProduct) => attend(true).run(&mut self.timeline, Softmax::Ring, &ready)?,
            (_, Linear::MegatronSpLeftProduct) => attend(true).run(&mut self.timeline, Softmax::MegatronSp, &ready)?,
            (LayerKind::Linear, _) => self.linear(pass, layer)?,
        }
        Ok(())
    }

    fn linear(&mut self, pass: Pass, layer: Option<usize>) -> Result<()> {
        let (costs, method, ranks) = (self.costs, self.method.linear, self.costs.ranks);
        let truncated = matches!(method, Linear::Truncated { .. });
        let reach = costs.reach(layer.filter(|_| truncated), self.layers, pass);
        let flows = costs.packing.chain(pass).flows() && method != Linear::None;
        let work: Vec<[f64; 2]> = (0..ranks).map(|rank| costs.linear(rank, pass)).collect();
        let part = |timeline: &mut Timeline, part: usize| -> Vec<f64> {
            (0..ranks).map(|rank| timeline.compute(rank, 0.0, work[rank][part])).collect()
        };
        let mut ready = part(&mut self.timeline, 0);
        let exchange = exchange(costs, self.network, pass, reach);
        if flows {
            ready = exchange.learn(&mut self.timeline, method, &ready);
            self.timeline.compute_all(&ready, 0.0);
        }
        if self.method.released && flows {
            let begun = match method {
                Linear::Lasp1 => vec![latest(&ready); ranks],
                _ => ready.clone(),
            };
            let entries = exchange.run(&mut self.timeline, method, &begun, &begun);
            self.timeline.compute_all(&entries, 0.0);
        }
        let done = part(&mut self.timeline, 1);
        if !flows {
            return Ok(());
        }
        let entries = match self.method.released {
            true => done,
            false => exchange.run(&mut self.timeline, method, &ready, &done),
        };
        for (rank, &entered) in entries.iter().enumerate() {
            let folded = match method {
                Linear::Lasp2 { .. } | Linear::Truncated { .. } => {
                    costs.packing.folded(rank, pass, &exchange.reach) as f64
                }
                Linear::Hierarchical { node } => node.min(ranks) as f64 * costs.slots,
                _ => 0.0,
            };
            let seconds = costs.bytes(folded * costs.state()) + costs.add_entry(rank, pass);
            self.timeline.compute(rank, entered, seconds);
        }
        Ok(())
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
            // K and V twice, the sums of their gradients in f32.
            ("N", "ring", (l - t) * kv * (2.0 * e + 4.0)),
            ("L", "ring_left_product", (l - t) * 2.0 * d * (2.0 * e + 4.0)),
            ("N", "megatron_sp", 5.0 * (l - t) * d * e),
            // Four times q, k, v repeated to 16 ranks' heads, and o; dk, dv in f32.
            ("N", "ulysses", (w - 1.0) / w * t * (4.0 * d * e + 4.0 * kv * (e + 4.0))),
        ] {
            let found = received(pattern, method);
            assert!((found - expected).abs() <= 1e-9 * expected, "{method}: {found} {expected}");
        }
    }

    /// What the simulated exchanges carry is what the runtime's formulas say, document by document.
    #[test]
    fn packed_documents_move_what_the_runtime_says() {
        let machine = Machine::load("h100-dgx").unwrap();
        let linear = [
            "lasp2",
            "lasp2:truncate",
            "lasp1",
            "all_scan:blocks=8",
            "hierarchical:node=4",
            "ring_left_product",
            "none",
        ];
        let tokens = 4096;
        let packed = [
            None,
            Some(vec![0, 100, 1000, 1000, 3000, 4096]),
            // Documents of one rank's share, of half of it, and one that goes round the zigzag's turn.
            Some((0..=16).map(|n| n * 256).collect::<Vec<i64>>()),
            Some((0..=32).map(|n| n * 128).collect()),
            Some(vec![0, 1024, 3072, 4096]),
        ];
        for (decay, pattern) in [("channel", "L"), ("retention", "L"), ("none", "N")] {
            for cu_seqlens in &packed {
                for method in if pattern == "L" { &linear[..] } else { &["lasp2h", "ring", "ulysses"] } {
                    for layout in ["contiguous", "zigzag"] {
                        // There is none with a decay that depends on the data.
                        if decay == "channel" && *method == "ring_left_product" {
                            continue;
                        }
                        let config = config(&[
                            &format!("model.pattern={pattern}"),
                            &format!("model.decay={decay}"),
                            &format!("parallel.layout={layout}"),
                            "model.layers=3",
                        ]);
                        let work = Workload { cu_seqlens: cu_seqlens.as_deref(), ..Workload::one(&config, 16, tokens) };
                        let method = Method::parse(method).unwrap();
                        let found = predict(&machine, &method, &work).unwrap();
                        let expected = Moved::new(&costs(&machine, &method, &work).unwrap().0, &method, &work).unwrap();
                        assert!(
                            (found.received - expected.received).abs() <= 1e-9 * expected.received,
                            "{} {layout} {decay} {cu_seqlens:?}: {} {}",
                            method.name,
                            found.received,
                            expected.received
                        );
                        assert_eq!(found.at_most, decay == "channel" && method.name == "lasp2:truncate");
                        let documents =
                            cu_seqlens.as_ref().map_or(1, |of| of.windows(2).filter(|w| w[0] < w[1]).count());
                        assert_eq!(found.documents, documents);
                    }
                }
            }
        }
    }

    #[test]
    fn documents_lower_the_work_of_quadratic_layers_alone() {
        let machine = Machine::load("h100-dgx").unwrap();
        let tokens = 1 << 20;
        let step = |pattern: &str, method: &str, length: usize| {
            let config = config(&[&format!("model.pattern={pattern}"), "model.decay=\"none\""]);
            let cu_seqlens = crate::simulate::packing::repeated(&[length], tokens);
            let work = Workload { cu_seqlens: Some(&cu_seqlens), ..Workload::one(&config, 8, tokens) };
            predict(&machine, &Method::parse(method).unwrap(), &work).unwrap()
        };
        for method in ["lasp2h", "ring@zigzag", "ulysses", "megatron_sp"] {
            let (whole, packed) = (step("N", method, tokens), step("N", method, tokens / 64));
            assert!(packed.step_s < 0.3 * whole.step_s, "{method}: {packed:?} {whole:?}");
        }
        let (whole, packed) = (step("L", "ring_left_product", tokens), step("L", "ring_left_product", tokens / 64));
        assert!(packed.step_s < 0.3 * whole.step_s);
        // States do not cross ranks between documents; the work of a token stays.
        let (whole, packed) = (step("L", "lasp1", tokens), step("L", "lasp1", tokens / 64));
        assert!((0.8..1.0).contains(&(packed.step_s / whole.step_s)), "{packed:?} {whole:?}");
        assert_eq!((packed.received, packed.messages), (0.0, 0.0));
        // One document: contiguous shards wait for the last rank. Many: nobody waits for its work.
        let waits =
            |length| step("N", "lasp2h@contiguous", length).waited_s / step("N", "lasp2h@contiguous", length).step_s;
        assert!(waits(tokens) > 0.3 && waits(tokens / 64) < 0.15, "{} {}", waits(tokens), waits(tokens / 64));
    }

    #[test]
    fn a_truncated_scan_sends_less_where_its_decays_are_known() {
        let of = |decay: &str, method: &str, tokens: usize| {
            let config =
                config(&[&format!("model.decay={decay}"), "model.pattern=L", "model.layers=4", "model.heads=4"]);
            point(&config, method, 16, tokens)
        };
        // Forward and backward of 4 layers; a message is sent once and received once. Retention's weakest head keeps e^-(T / 256):
        // a rank of 4,096 tokens hears of its neighbour and of the one before it (e^-16 is above 2^-24), no further.
        let near = of("retention", "lasp2:truncate", 16 * 4096);
        assert_eq!(near.messages, 8.0 * 2.0 * (15.0 + 14.0) / 16.0);
        assert!(!near.at_most && near.received < of("retention", "lasp2", 16 * 4096).received / 5.0);
        // Lightning's last layer hardly decays: its states go everywhere.
        let lightning = of("lightning", "lasp2:truncate", 16 * 4096);
        assert!(lightning.messages > 2.0 * 2.0 * 120.0 / 16.0 && !lightning.at_most, "{lightning:?}");
        // What depends on the data is gathered, once a layer, and then assumed not to have died.
        let token = of("token", "lasp2:truncate", 16 * 4096);
        assert!(token.at_most);
        assert_eq!(token.messages, 4.0 + 8.0 * 2.0 * 120.0 / 16.0);
        let left = config(&["model.decay=token", "model.pattern=L"]);
        let work = Workload::one(&left, 16, 65536);
        let machine = Machine::load("h100-dgx").unwrap();
        let error = predict(&machine, &Method::parse("ring_left_product").unwrap(), &work).unwrap_err().to_string();
        assert!(error.contains("ring_left_product with a decay per token"), "{error}");
        // Nothing dies: LASP-2.
        let (none, lasp2) = (of("none", "lasp2:truncate", 65536), of("none", "lasp2", 65536));
        assert_eq!((none.messages, none.step_s, none.received), (8.0, lasp2.step_s, lasp2.received));
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
        for method in ["lasp2+lasp2h", "lasp1+ring@zigzag", "all_scan+megatron_sp", "hierarchical", "lasp2:truncate"] {
            point(&config, method, 1024, 1 << 22);
        }
        assert!(start.elapsed().as_secs_f64() < 5.0, "{:?}", start.elapsed());
    }
}
