//! Ranks that are threads of one machine and share its cores, as on this project's test machines: what the operators of
//! `lasp compare` take there. `lasp calibrate` measures the kernels by themselves, at several sizes; what becomes of them when
//! ranks wait for each other, copy messages and compete for cores is simulated (`engine`), method by method and message by message.

mod engine;
mod linear;
mod ranks;
mod softmax;

use collectives::local::Network;
use runtime::config::{Config, DecayKind, LayerKind};
use runtime::sequence::scan::{Reach, StateSize};
use serde::{Deserialize, Serialize};

use super::costs::{Costs, Pass};
use super::method::{Linear, Method, Softmax};
use super::packing::Packing;
use super::{Error, Result, Workload};
use engine::Cores;
use ranks::Ranks;

/// Bytes of a number: f32, the CPU's element type here.
const WIDTH: f64 = 4.0;

/// Cores that ranks share, and what was measured on them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    pub cores: usize,
    /// Speed of a core while the others are idle, in that of one among busy ones.
    pub alone: f64,
    /// How long a thread keeps its core when others wait for one.
    pub slice_us: f64,
    /// Until a waiting thread runs that is handed something, with a core idle.
    pub wake_us: f64,
    /// The same while all cores are busy.
    pub wake_busy_us: f64,
    /// The network between ranks, as text, if it was emulated; else they meet in this machine's memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Sizes at which the kernels were measured.
    pub heads: i64,
    pub kv_heads: i64,
    pub head_dim: i64,
    pub chunk: i64,
    pub kernels: Vec<Kernel>,
}

/// What a kernel takes by size, on every core at once, or with all cores for itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    pub name: String,
    /// Libtorch threads.
    pub threads: usize,
    /// Tokens, or numbers of a copy; ascending.
    pub at: Vec<f64>,
    pub us: Vec<f64>,
}

impl Kernel {
    /// Seconds at a size: between those measured along straight lines of the logarithms, so too below them; above them with the
    /// size to the power `degree`.
    fn seconds(&self, size: f64, degree: f64) -> f64 {
        let last = self.at.len() - 1;
        if size > self.at[last] {
            return 1e-6 * self.us[last] * (size / self.at[last]).powf(degree);
        }
        let upper = self.at.partition_point(|at| *at < size).clamp(1, last);
        let [(x0, y0), (x1, y1)] = [upper - 1, upper].map(|i| (self.at[i].ln(), self.us[i].ln()));
        1e-6 * (y0 + (y1 - y0) * (size.ln() - x0) / (x1 - x0)).exp()
    }
}

impl Host {
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        for (key, found) in [("cores", self.cores as f64), ("alone", self.alone), ("slice_us", self.slice_us)] {
            if !(found.is_finite() && found > 0.0) {
                return Err(format!("host.{key}: found {found}, expected a number above 0"));
            }
        }
        for kernel in &self.kernels {
            let rising =
                kernel.at.windows(2).all(|pair| pair[0] < pair[1]) && kernel.at.first().is_some_and(|at| *at > 0.0);
            if kernel.at.len() < 2
                || kernel.at.len() != kernel.us.len()
                || !rising
                || kernel.us.iter().any(|us| *us <= 0.0 || us.is_nan())
            {
                return Err(format!(
                    "host.kernels: {}: found {} sizes and {} times, expected two or more rising sizes and as many times above 0",
                    kernel.name,
                    kernel.at.len(),
                    kernel.us.len()
                ));
            }
        }
        Ok(())
    }

    pub(super) fn network(&self) -> Result<Option<Network>> {
        let parsed = self.network.as_deref().map(str::parse).transpose();
        parsed
            .map_err(|e: collectives::Error| Error::Machine { name: "host.network".to_owned(), message: e.to_string() })
    }

    /// Where messages take no time: nothing is copied, and nobody has to wake.
    pub(super) fn unhindered(&self) -> Host {
        let mut host = Host { wake_us: 0.0, wake_busy_us: 0.0, ..self.clone() };
        for kernel in host.kernels.iter_mut().filter(|kernel| [COPY, ADD].contains(&kernel.name.as_str())) {
            kernel.us.fill(0.0);
        }
        host
    }

    /// Seconds in which all of `ranks` sum up the gradients of so many parameters, each with what it does itself.
    pub(super) fn sum_gradients(&self, network: Option<Network>, ranks: usize, parameters: f64) -> Result<f64> {
        if ranks < 2 {
            return Ok(0.0);
        }
        let all: Vec<usize> = (0..ranks).collect();
        let mut simulated = Ranks::new(self, network, ranks);
        let part = parameters * WIDTH / ranks as f64;
        let issued = simulated.all_now();
        let summed = simulated.reduce_scatter(part, &issued)?;
        let gathered = simulated.all_gather(&all, part, &summed)?;
        let times = simulated.engine.run(self.cores());
        Ok(gathered.into_iter().map(|end| times[end]).fold(0.0, f64::max))
    }

    /// By how much a layer without its operator takes longer than `modelled` says of it, for each of `ranks` with so many tokens, in
    /// a model of this width: as between the two widths that were measured. 1 where none was; `modelled` counts one core a rank.
    pub(super) fn dense_factor(
        &self,
        width: f64,
        pass: Pass,
        ranks: usize,
        tokens: f64,
        modelled: impl Fn(&Config) -> Result<f64>,
    ) -> Result<f64> {
        let cores = (ranks as f64 / self.cores as f64).min(1.0);
        let mut logs = [0.0; 2];
        for (log, measured) in logs.iter_mut().zip(DENSE_WIDTHS) {
            let name = dense_kernel(measured, pass);
            if !self.kernels.iter().any(|kernel| kernel.name == name) {
                return Ok(1.0);
            }
            let seconds = self.by_tokens(&name, ranks, tokens)?;
            *log = (seconds / (cores * modelled(&dense_model(measured, self.head_dim)?)?)).ln();
        }
        let [narrow, wide] = DENSE_WIDTHS.map(|width| (width as f64).ln());
        let at = ((width.ln() - narrow) / (wide - narrow)).clamp(0.0, 1.0);
        Ok((logs[0] + (logs[1] - logs[0]) * at).exp())
    }

    /// Of those measured for other numbers of threads the nearest.
    fn kernel(&self, name: &str, threads: usize) -> Result<&Kernel> {
        let found = self.kernels.iter().filter(|kernel| kernel.name == name);
        let nearest = found.min_by_key(|kernel| kernel.threads.abs_diff(threads));
        nearest.ok_or_else(|| Error::Kernel { name: name.to_owned() })
    }

    /// Seconds of a kernel that works through `tokens` on each of `ranks`. Where several ranks share a core they find its caches
    /// as one rank with all their tokens would; what a call costs by itself, each pays.
    fn by_tokens(&self, name: &str, ranks: usize, tokens: f64) -> Result<f64> {
        let sharing = (ranks as f64 / self.cores as f64).max(1.0);
        let kernel = self.kernel(name, self.threads(ranks))?;
        Ok(kernel.seconds(tokens, 1.0).max(kernel.seconds(sharing * tokens, 1.0) / sharing))
    }

    /// Seconds of a tile with as many keys as queries; `name` gives the kernel with a causal mask, or without. A causal tile longer
    /// than any measured is two of half the length and a square.
    fn tile(&self, name: &dyn Fn(bool) -> String, causal: bool, ranks: usize, tokens: f64) -> Result<f64> {
        if tokens <= 0.0 {
            return Ok(0.0);
        }
        let kernel = self.kernel(&name(causal), self.threads(ranks))?;
        if causal && kernel.at.last().is_some_and(|longest| tokens > *longest) {
            let half = tokens / 2.0;
            return Ok(2.0 * self.tile(name, true, ranks, half)? + self.tile(name, false, ranks, half)?);
        }
        Ok(kernel.seconds(tokens, 2.0))
    }

    /// Libtorch threads of one of `ranks`.
    fn threads(&self, ranks: usize) -> usize {
        (self.cores / ranks).max(1)
    }

    /// Seconds to copy so many bytes, on one thread. What ranks copy was written by another core, or long ago: it takes the time
    /// of the longest copy measured.
    fn copy(&self, bytes: f64) -> Result<f64> {
        self.cold(COPY, bytes)
    }

    /// Seconds to add so many bytes to as many others.
    fn add(&self, bytes: f64) -> Result<f64> {
        self.cold(ADD, bytes)
    }

    /// Seconds to put keys and values side by side.
    fn join(&self, bytes: f64) -> Result<f64> {
        self.cold(JOIN, bytes)
    }

    fn cold(&self, name: &str, bytes: f64) -> Result<f64> {
        let kernel = self.kernel(name, 1)?;
        let (numbers, last) = (bytes / WIDTH, kernel.at.len() - 1);
        Ok(1e-6 * (kernel.us[0] + kernel.us[last] / kernel.at[last] * numbers))
    }

    fn cores(&self) -> Cores {
        Cores {
            number: self.cores,
            alone: self.alone,
            slice: 1e-6 * self.slice_us,
            wake: [1e-6 * self.wake_us, 1e-6 * self.wake_busy_us],
        }
    }
}

/// Widths of the models whose layers were measured without their operators.
pub const DENSE_WIDTHS: [i64; 2] = [128, 512];

/// The model of such a layer; `heads` and their width as those of the other kernels.
pub fn dense_model(width: i64, head_dim: i64) -> Result<Config> {
    let heads = width / head_dim;
    let text = format!("[model]\ndim = {width}\nheads = {heads}\nkv_heads = {heads}\nlayers = 1\npattern = \"L\"\n");
    Ok(Config::from_toml_str(&text, "the layer that calibrate measures", &[])?)
}

/// The name of what a layer of linear attention does besides the operator.
pub fn dense_kernel(width: i64, pass: Pass) -> String {
    format!("dense {width} {}", name(pass))
}

/// Names of kernels that are no method's.
pub const COPY: &str = "copy";
pub const ADD: &str = "add";
/// Keys and values side by side, head by head.
pub const JOIN: &str = "join";

/// The name of a part of linear attention.
pub fn linear_kernel(decay: DecayKind, pass: Pass, part: &str) -> String {
    let decay = match decay {
        DecayKind::None => "none",
        DecayKind::Lightning | DecayKind::Retention => "head",
        DecayKind::Token => "token",
        DecayKind::Channel => "channel",
    };
    format!("linear {decay} {} {part}", name(pass))
}

/// The name of attention over pairs, by a softmax or as a left product, with a causal mask or without.
pub fn pairs_kernel(kind: &str, causal: bool, pass: Pass) -> String {
    format!("{kind} {} {}", if causal { "causal" } else { "full" }, name(pass))
}

/// Left products by the decays with which they can be computed: none, or a constant per head.
pub fn left_product_kind(decay: DecayKind) -> &'static str {
    if decay == DecayKind::None { "left_product" } else { "left_product head" }
}

fn name(pass: Pass) -> &'static str {
    if pass == Pass::Forward { "forward" } else { "backward" }
}

/// One operator: sizes, and where its tokens are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes<'a> {
    pub packing: &'a Packing,
    pub ranks: usize,
    /// Of the whole sequence, and of one rank.
    pub whole: f64,
    pub tokens: f64,
    pub slots: f64,
    pub heads: f64,
    pub kv_heads: f64,
    pub dim: f64,
    pub chunk: f64,
    pub decay: DecayKind,
    /// Of a linear layer.
    pub size: StateSize,
}

impl<'a> Sizes<'a> {
    fn new(costs: &'a Costs, config: &Config) -> Self {
        let model = &config.model;
        Sizes {
            packing: &costs.packing,
            ranks: costs.ranks,
            whole: costs.whole,
            tokens: costs.tokens,
            slots: costs.slots,
            size: costs.size,
            heads: model.heads as f64,
            kv_heads: model.kv_heads as f64,
            dim: model.head_dim() as f64,
            chunk: model.chunk as f64,
            decay: model.decay,
        }
    }

    /// Bytes of a tensor of `heads` heads for `tokens` tokens.
    fn bytes(&self, tokens: f64, heads: f64) -> f64 {
        tokens * heads * self.dim * WIDTH
    }
}

/// Seconds of forward and of backward of the operator of one kind of layer, from a barrier to the slowest rank. `reaches`: how far back
/// a truncated scan listens, in each of the two.
pub fn operator(
    host: &Host,
    network: Option<Network>,
    costs: &Costs,
    method: &Method,
    kind: LayerKind,
    work: &Workload,
    reaches: &[Reach; 2],
) -> Result<[f64; 2]> {
    let sizes = Sizes::new(costs, work.config);
    let heads = work.config.model.heads as usize;
    let softmax = kind == LayerKind::Softmax;
    if softmax && method.softmax == Softmax::Ulysses && !heads.is_multiple_of(work.gpus) {
        return Err(Error::Ulysses { heads, ranks: work.gpus });
    }
    let mut seconds = [0.0; 2];
    for ((seconds, pass), reach) in seconds.iter_mut().zip([Pass::Forward, Pass::Backward]).zip(reaches) {
        let mut ranks = Ranks::new(host, network, work.gpus);
        match (softmax, method.linear) {
            (true, _) => softmax::run(host, &mut ranks, &sizes, method.softmax, pass, false)?,
            (false, Linear::RingLeftProduct) => softmax::run(host, &mut ranks, &sizes, Softmax::Ring, pass, true)?,
            (false, Linear::MegatronSpLeftProduct) => {
                softmax::run(host, &mut ranks, &sizes, Softmax::MegatronSp, pass, true)?
            }
            (false, scan) => linear::run(host, &mut ranks, &sizes, scan, pass, reach)?,
        }
        let ends = ranks.all_now();
        let times = ranks.engine.run(host.cores());
        *seconds = ends.into_iter().map(|end| times[end]).fold(0.0, f64::max);
    }
    Ok(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulate::packing::repeated;
    use crate::simulate::{Machine, operator_seconds, step_seconds};

    fn host() -> Host {
        Machine::load("epyc-2core").unwrap().host.unwrap()
    }

    fn config(set: &str) -> Config {
        let text = "[model]\nheads = 8\nkv_heads = 2\ndim = 512\nchunk = 64\ndecay = \"none\"\n";
        Config::from_toml_str(text, "test", &[set.to_owned()]).unwrap()
    }

    fn takes(host: &Host, network: &str, method: &str, ranks: usize, tokens: usize) -> f64 {
        packed(host, network, method, ranks, tokens, None)
    }

    fn packed(
        host: &Host,
        network: &str,
        method: &str,
        ranks: usize,
        tokens: usize,
        cu_seqlens: Option<&[i64]>,
    ) -> f64 {
        let method = Method::parse(method).unwrap();
        let softmax = ["lasp2h", "ring", "ulysses", "megatron_sp"].contains(&method.name.split('@').next().unwrap());
        let kind = if softmax { LayerKind::Softmax } else { LayerKind::Linear };
        let mut machine = Machine::load("epyc-2core").unwrap();
        machine.host = Some(Host { network: Some(network.to_owned()), ..host.clone() });
        let config = config("model.chunk=64");
        let work = Workload { cu_seqlens, ..Workload::one(&config, ranks, tokens) };
        operator_seconds(&machine, &method, kind, &work, true).unwrap()[0]
    }

    const QUICK: &str = "node=8,intra=1ns/1TB/s,inter=1ns/1TB/s";

    #[test]
    fn cores_are_shared_and_shards_add_up() {
        let host = host();
        for method in ["lasp2", "lasp1", "all_scan", "hierarchical:node=2", "ring@zigzag", "ulysses", "megatron_sp"] {
            let two = takes(&host, QUICK, method, 2, 16384);
            let eight = takes(&host, QUICK, method, 8, 16384);
            // The same work on the same two cores.
            assert!((0.9..1.25).contains(&(eight / two)), "{method}: {two} {eight}");
        }
        // Contiguous shards of a causal layer: the last rank of two has three quarters of the work.
        let balanced = takes(&host, QUICK, "lasp2h@zigzag", 2, 16384);
        let last = takes(&host, QUICK, "lasp2h@contiguous", 2, 16384);
        assert!((1.3..1.55).contains(&(last / balanced)), "{last} {balanced}");
    }

    #[test]
    fn a_gather_hides_behind_intra_rank_work_and_no_further() {
        let host = host();
        let free = takes(&host, QUICK, "lasp2", 2, 8192);
        let hidden = takes(&host, "node=2,intra=5ms/1TB/s,inter=5ms/1TB/s", "lasp2", 2, 8192);
        let shown = takes(&host, "node=2,intra=100ms/1TB/s,inter=100ms/1TB/s", "lasp2", 2, 8192);
        assert!(hidden < 1.01 * free, "{free} {hidden}");
        assert!(shown > free + 0.12 && shown < free + 0.2, "{free} {shown}");
    }

    #[test]
    fn packed_documents_cost_what_is_left_of_them() {
        let host = host();
        let tokens = 8192;
        let at = |network: &str, method: &str, length: usize| {
            packed(&host, network, method, 4, tokens, Some(&repeated(&[length], tokens)))
        };
        // A sixteenth of the pairs.
        for method in ["lasp2h", "ring@zigzag", "ulysses", "megatron_sp", "ring_left_product"] {
            assert!(at(QUICK, method, tokens / 16) < 0.35 * at(QUICK, method, tokens), "{method}");
        }
        assert!((0.8..1.3).contains(&(at(QUICK, "lasp2", tokens / 16) / at(QUICK, "lasp2", tokens))));
        // Documents of a rank's share or less leave nothing to send, and those of two shares one hop of three.
        let slow = "node=1,intra=200ms/1TB/s,inter=200ms/1TB/s";
        for method in ["lasp2", "lasp1", "all_scan", "hierarchical:node=2", "lasp2:truncate"] {
            assert!(at(slow, method, tokens / 4) < 1.05 * at(QUICK, method, tokens / 4), "{method}");
            assert!(at(slow, method, tokens) > at(QUICK, method, tokens) + 0.35, "{method}");
        }
        let hops = |length| at(slow, "lasp1", length) - at(QUICK, "lasp1", length);
        assert!((0.3..0.5).contains(&hops(tokens / 2)) && hops(tokens) > 1.0, "{}", hops(tokens / 2));
    }

    #[test]
    fn a_truncated_scan_waits_for_its_neighbours_alone() {
        let mut machine = Machine::load("epyc-2core").unwrap();
        machine.host.as_mut().unwrap().network = Some("node=1,intra=200ms/1TB/s,inter=200ms/1TB/s".to_owned());
        let step = |method: &str, decay: &str| {
            let text = format!(
                "[model]\nheads = 2\nkv_heads = 2\ndim = 128\nlayers = 1\npattern = \"L\"\ndecay = {decay:?}\n"
            );
            let config = Config::from_toml_str(&text, "test", &[]).unwrap();
            let work = Workload::one(&config, 4, 4 * 4096);
            step_seconds(&machine, &Method::parse(method).unwrap(), &work).unwrap()
        };
        let of = |decay: &str| ["lasp2", "lasp2:truncate"].map(|method| step(method, decay));
        // Forward and backward: one hop each in place of the gather's two rounds.
        let [lasp2, truncated] = of("retention");
        assert!((lasp2 - truncated - 0.4).abs() < 0.05, "{lasp2} {truncated}");
        // Decays that depend on the data take two rounds of their own, in forward.
        let [lasp2, truncated] = of("token");
        assert!((lasp2 - truncated).abs() < 0.05, "{lasp2} {truncated}");
        let [lasp2, truncated] = of("none");
        assert_eq!(lasp2, truncated);
    }

    #[test]
    fn left_products_with_a_decay_take_what_was_measured_with_one() {
        let mut host = host();
        let machine = |host: &Host| Machine { host: Some(host.clone()), ..Machine::load("epyc-2core").unwrap() };
        let takes = |host: &Host, decay: &str| {
            let config = config(&format!("model.decay={decay}"));
            let method = Method::parse("ring_left_product").unwrap();
            let work = Workload::one(&config, 2, 2048);
            operator_seconds(&machine(host), &method, LayerKind::Linear, &work, true).map(|seconds| seconds[0])
        };
        let (without, with) = (takes(&host, "none").unwrap(), takes(&host, "lightning").unwrap());
        assert!(with > 1.05 * without, "{without} {with}");
        host.kernels.retain(|kernel| !kernel.name.starts_with("left_product head"));
        assert_eq!(takes(&host, "none").unwrap(), without);
        let error = takes(&host, "retention").unwrap_err().to_string();
        assert!(error.contains("left_product head causal forward") && error.contains("lasp calibrate"), "{error}");
    }

    #[test]
    fn chains_take_their_hops_and_gathers_their_rounds() {
        let host = host();
        let slow = "node=1,intra=50ms/1TB/s,inter=50ms/1TB/s";
        // Forward and backward: seven hops, or three rounds, each.
        for (method, steps) in [("lasp1", 7.0), ("lasp2", 3.0), ("ring@zigzag", 14.5)] {
            let found = takes(&host, slow, method, 8, 1024);
            let least = if method.starts_with("ring") { 14.0 } else { 2.0 * steps };
            assert!((least * 0.05..(least + 2.0) * 0.05).contains(&found), "{method}: {found}");
        }
    }

    #[test]
    fn kernels_grow_between_and_beyond_what_was_measured() {
        let kernel = Kernel { name: "k".to_owned(), threads: 1, at: vec![10.0, 100.0], us: vec![5.0, 20.0] };
        let us = |size: f64, degree: f64| 1e6 * kernel.seconds(size, degree);
        for (found, expected) in [
            (us(10.0, 2.0), 5.0),
            (us(100.0, 2.0), 20.0),
            (us(1000f64.sqrt(), 2.0), 10.0),
            (us(200.0, 2.0), 80.0),
            (us(200.0, 1.0), 40.0),
        ] {
            assert!((found / expected - 1.0).abs() < 1e-9, "{found} {expected}");
        }
        let broken = Kernel { us: vec![5.0], ..kernel };
        let error = Host { kernels: vec![broken], ..host() }.check().unwrap_err();
        assert!(error.contains("k: found 2 sizes and 1 times"), "{error}");
    }

    #[test]
    fn what_cannot_run_is_an_error() {
        let of = |host: Host, method: &str, ranks| {
            let machine = Machine { host: Some(host), ..Machine::load("epyc-2core").unwrap() };
            let (method, config) = (Method::parse(method).unwrap(), config("model.chunk=64"));
            let work = Workload::one(&config, ranks, 64);
            operator_seconds(&machine, &method, LayerKind::Softmax, &work, true).unwrap_err().to_string()
        };
        let at = |method: &str, ranks| of(host(), method, ranks);
        assert!(at("ulysses", 3).contains("8 heads, 3 GPUs"));
        assert!(at("ring", 65).contains("64 tokens"));
        let error = of(Host { kernels: vec![], ..host() }, "ring", 2);
        assert!(error.contains("was not measured: run lasp calibrate"), "{error}");
    }

    #[test]
    fn layers_take_what_was_measured_of_them() {
        let kernel = |width: i64, us: f64| {
            [Pass::Forward, Pass::Backward].map(|pass| Kernel {
                name: dense_kernel(width, pass),
                threads: 1,
                at: vec![256.0, 1024.0],
                us: vec![us, 4.0 * us],
            })
        };
        let bare = Host { kernels: vec![], cores: 2, ..host() };
        let of = Host { kernels: [kernel(128, 100.0), kernel(512, 1600.0)].concat(), ..bare.clone() };
        let modelled = |config: &Config| Ok(if config.model.dim == 128 { 50e-6 } else { 400e-6 });
        let factor = |host: &Host, width: f64, ranks: usize, tokens: f64| {
            host.dense_factor(width, Pass::Backward, ranks, tokens, modelled).unwrap()
        };
        let close = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-9, "{found} {expected}");
        close(factor(&of, 128.0, 2, 256.0), 2.0);
        close(factor(&of, 512.0, 2, 256.0), 4.0);
        // Between them along the logarithms, beyond them as at the nearest.
        close(factor(&of, 256.0, 2, 256.0), 8f64.sqrt());
        close(factor(&of, 64.0, 2, 256.0), 2.0);
        close(factor(&of, 2048.0, 2, 256.0), 4.0);
        // One rank's work is counted for one core, and measured on both.
        close(factor(&of, 128.0, 1, 256.0), 4.0);
        close(factor(&bare, 256.0, 2, 256.0), 1.0);
    }

    #[test]
    fn a_training_step_on_a_host_costs_its_communication() {
        let machine = Machine::load("epyc-2core").unwrap();
        let mut slow = machine.clone();
        slow.host.as_mut().unwrap().network = Some("node=1,intra=20ms/100MB/s,inter=20ms/100MB/s".to_owned());
        let config = config("model.pattern=LN");
        let step = |machine: &Machine, ranks| {
            let work = Workload::one(&config, ranks, 4096);
            crate::simulate::predict(machine, &Method::parse("lasp2").unwrap(), &work).unwrap()
        };
        let (near, far) = (step(&machine, 4), step(&slow, 4));
        assert!(near.exposed_s >= 0.0 && near.exposed_s < 0.2 * near.step_s, "{near:?}");
        assert!(far.exposed_s > 0.3 && (far.step_s - near.step_s) > 0.3, "{far:?}");
    }
}
