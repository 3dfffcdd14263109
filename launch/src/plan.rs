//! `lasp plan`: what a configuration would need on so many ranks, as tables or JSON. The formulas are `runtime::estimate`.

use std::path::PathBuf;

use anyhow::Result;
use runtime::config::{Config, DeviceKind};
use runtime::estimate::{self, Estimate};

use crate::argument::at_least_one;
use crate::auto;
use crate::output::{self, bytes, count, grouped, table};
use crate::train::wanted_ranks;

/// Show what a run would need: parameters, memory, messages and operations; needs no GPU and no ranks
#[derive(clap::Args)]
pub struct Args {
    /// The configuration, TOML
    config: PathBuf,
    /// Number of ranks to plan for [default: parallel.sp x parallel.dp]
    #[arg(long, value_name = "N", value_parser = at_least_one::<usize>)]
    ranks: Option<usize>,
    /// Change a setting of the configuration; may be repeated
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// Print JSON: bytes, numbers and operations as counts
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let mut config = Config::load(&args.config, &args.set)?;
    config.resolve_ranks(args.ranks.unwrap_or_else(|| wanted_ranks(&config)))?;
    let gpu = config.train.device == DeviceKind::Cuda;
    auto::decide(&mut config, gpu)?;
    let estimate = Estimate { traffic: estimate::busiest_traffic(&config)?, ..estimate::estimate(&config)? };
    let text = match args.json {
        true => serde_json::to_string_pretty(&estimate)? + "\n",
        false => show(&estimate, gpu),
    };
    output::print(&text)
}

fn show(e: &Estimate, gpu: bool) -> String {
    let most = e.tokens.per_rank.iter().max().copied().unwrap_or(0);
    let least = e.tokens.per_rank.iter().min().copied().unwrap_or(0);
    let share = if most == least { grouped(most as u64) } else { format!("{least} to {most}") };
    let sections = [
        format!(
            "{} ranks: sp {} x dp {}, {}; sequences of {} tokens, {share} a rank\n\
             a step: {} tokens, {} a rank in passes of {}\n",
            e.mesh.ranks,
            e.mesh.sp,
            e.mesh.dp,
            e.mesh.layout,
            grouped(e.tokens.sequence as u64),
            grouped(e.tokens.step as u64),
            plural(e.tokens.passes * e.tokens.micro_batch, "sequence"),
            e.tokens.micro_batch,
        ),
        format!("tensors of a rank\n{}", shapes(e)),
        format!("parameters\n{}", parameters(e)),
        format!("memory of a rank{}\n{}", if gpu { ", on a GPU" } else { "" }, memory(e, gpu)),
        format!("messages of the busiest rank of sp, {}, in a step\n{}", e.traffic.rank, traffic(e)),
        format!("operations (matrix products)\n{}", flops(e)),
    ];
    sections.join("\n")
}

fn plural(n: i64, noun: &str) -> String {
    format!("{} {noun}{}", grouped(n as u64), if n == 1 { "" } else { "s" })
}

fn row(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}

fn shapes(e: &Estimate) -> String {
    let rows = e.shapes.iter().map(|s| row(&[s.place, s.tensor, s.letters, &format!("{:?}", s.sizes), &s.kind]));
    table("lllll", &rows.collect::<Vec<_>>())
}

fn parameters(e: &Estimate) -> String {
    let p = &e.parameters;
    let classes = [
        ("embedding", p.embedding),
        ("linear attention", p.linear_attention),
        ("softmax attention", p.softmax_attention),
        ("MLP", p.mlp),
        ("norms", p.norms),
        ("total", p.total),
    ];
    let percent = |n: i64| format!("{:.1} %", 100.0 * n as f64 / p.total.max(1) as f64);
    let rows = classes.iter().filter(|(_, n)| *n > 0).map(|(name, n)| row(&[name, &grouped(*n as u64), &percent(*n)]));
    table("lrr", &rows.collect::<Vec<_>>())
}

fn memory(e: &Estimate, gpu: bool) -> String {
    let (m, a) = (&e.memory, &e.memory.activations);
    let used = |is: bool| if a.checkpointing == is { "" } else { "(not used)" };
    let master = if m.master_weights { "moments, master weights" } else { "moments" };
    let rows = [
        ("weights", m.weights, "throughout"),
        ("gradients", m.gradients, "throughout"),
        (master, m.optimizer, "throughout"),
        ("activations", a.without_checkpointing, used(false)),
        ("activations, checkpointed", a.with_checkpointing, used(true)),
        ("an operator at work", m.operator, "with the activations"),
        ("for and of other ranks", m.gathers, "with the activations"),
        ("loss, logits in chunks", m.loss, "or this instead"),
        ("sums of gradients under way", m.sums, "with the activations"),
        ("update", m.update, "without activations"),
        ("peak", m.total, ""),
    ];
    let rows = rows.iter().map(|(name, n, note)| row(&[name, &bytes(*n as u64), note]));
    let other = if gpu { "" } else { "  on the CPU; on a GPU: --set train.device=cuda\n" };
    table("lrl", &rows.collect::<Vec<_>>())
        + "  not counted: libtorch itself, and what an allocator leaves unused\n"
        + other
}

fn traffic(e: &Estimate) -> String {
    if e.traffic.messages.is_empty() {
        return "  none\n".to_owned();
    }
    let mut rows = vec![row(&["in each of", "operation", "places", "messages", "sent", "received"])];
    rows.extend(e.traffic.messages.iter().map(|m| {
        let op = if m.group == "node" { format!("{}, in the node", m.op) } else { m.op.to_owned() };
        row(&[
            &format!("{}: {}{}", m.place, m.what, if m.at_most { ", at most" } else { "" }),
            &op,
            &m.places.to_string(),
            &m.each.messages.to_string(),
            &bytes(m.each.bytes_sent as u64),
            &bytes(m.each.bytes_received as u64),
        ])
    }));
    let total = &e.traffic.total;
    rows.push(row(&[
        if e.traffic.at_most { "total, at most" } else { "total" },
        "",
        "",
        &total.messages.to_string(),
        &bytes(total.bytes_sent as u64),
        &bytes(total.bytes_received as u64),
    ]));
    table("llrrrr", &rows)
}

fn flops(e: &Estimate) -> String {
    let f = &e.flops;
    let rows = [
        ("a token, forward", f.token_forward),
        ("  projections", f.token_projections),
        ("  linear attention", f.token_linear),
        ("  softmax attention", f.token_softmax),
        ("  logits", f.token_logits),
        ("a token, with backward", f.token_step),
        ("a step, forward", f.forward),
        ("a step, with backward", f.step),
    ];
    let rows = rows.iter().filter(|(_, n)| *n > 0.0).map(|(name, n)| row(&[name, &count(*n, "FLOP")]));
    table("lr", &rows.collect::<Vec<_>>())
}
