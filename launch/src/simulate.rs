//! `lasp simulate`: predicted step time, throughput and memory on machines that are not here, as a table or JSON lines; and the
//! cost model held against what was published. The model is `benches::simulate`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use benches::simulate::against::{self, Compared};
use benches::simulate::fit::{self, Fit};
use benches::simulate::sweep::{self, Groups, Refused, in_k};
use benches::simulate::{Machine, Method, Prediction, report};
use runtime::config::{Config, DecayKind, LayerKind};
use serde_json::json;

use crate::argument::at_least_one;
use crate::output::{self, bytes, grouped, table};

/// Predict step time, throughput and memory on a machine that is not here; needs no GPU and no ranks
#[derive(clap::Args)]
#[command(after_help = EXPLANATION)]
pub struct Args {
    /// a100-dgx, h100-dgx, h200-dgx, epyc-2core, or a TOML file, which may begin with base = "h100-dgx"
    #[arg(long, value_name = "NAME|FILE", default_value = "h100-dgx")]
    machine: String,
    /// The configuration, TOML; its model, element type and layout count
    #[arg(long, value_name = "CONFIG", required_unless_present_any = ["fit", "published", "against"])]
    model: Option<PathBuf>,
    /// Numbers of GPUs, doubled from the first to the last, or a list
    #[arg(long, value_name = "N..M", default_value = "8..1024")]
    gpus: String,
    /// Tokens of the sequence, likewise; K and M are 1024 and 1024^2
    #[arg(long, value_name = "N..M", default_value = "64K..4096K")]
    seq_lens: String,
    /// Lengths of the documents packed into a sequence, likewise, one after the other and again; its end cuts the last one [default:
    /// one document]
    #[arg(long, value_name = "N..M")]
    documents: Option<String>,
    /// Groups of GPUs, each with sequences of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one::<usize>)]
    dp: usize,
    /// Sequences of a step, over all groups; a group takes its own one after another [default: one a group]
    #[arg(long, value_name = "N", value_parser = at_least_one::<usize>)]
    batch: Option<usize>,
    /// A linear layer's method, a softmax layer's, or both, and a layout, as in lasp2,all_scan:blocks=8+ring@zigzag
    #[arg(long, value_name = "METHOD,..", value_delimiter = ',', default_value = "lasp2,lasp1,all_scan,hierarchical")]
    methods: Vec<String>,
    /// Change a setting of the configuration; may be repeated
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// Print a line of JSON for each point: times in seconds, amounts in bytes
    #[arg(long)]
    json: bool,
    /// Fit the constants of the published machines anew, and print them
    #[arg(long, value_name = "WHAT", value_parser = ["published"], conflicts_with = "model")]
    fit: Option<String>,
    /// Predict what lasp compare measured, from its results.jsonl; the machine is one that lasp calibrate wrote
    #[arg(long, value_name = "FILE,..", value_delimiter = ',', conflicts_with_all = ["model", "fit"])]
    against: Vec<PathBuf>,
    /// With --against: put the table into this Markdown file, in place of the last one
    #[arg(long, value_name = "FILE", requires = "against")]
    into: Option<PathBuf>,
    /// Write what was published beside what the model predicts, as Markdown
    #[arg(long, value_name = "FILE", conflicts_with = "model")]
    published: Option<PathBuf>,
}

const EXPLANATION: &str = "\
A step is one sequence on all GPUs (or one of each group: --dp, --batch), forward, backward and update.
  exposed   what the step would be shorter by if communication took no time
  waited    time that GPUs stand still for others, communication and imbalance; mean
  received  by the exchanges of layers, of a GPU; mean
  messages  collectives, sends and receives of a GPU for layers; mean
  state     weights, gradients, optimizer
  kept      activations kept for backward
  other     logits, what is gathered from other GPUs, what libraries hold
docs/cost-model.md says how far off the model is.";

pub fn run(args: Args) -> Result<()> {
    if !args.against.is_empty() {
        return against(&args);
    }
    if args.fit.is_some() || args.published.is_some() {
        return published(&args);
    }
    let path = args.model.as_ref().context("--model is missing: the configuration to simulate")?;
    let config = Config::load(path, &args.set)?;
    let machine = Machine::load(&args.machine)?;
    let methods = args.methods.iter().map(|name| Method::parse(name)).collect::<Result<Vec<_>, _>>()?;
    let gpus = sweep::numbers("--gpus", &args.gpus)?;
    let seq_lens = sweep::numbers("--seq-lens", &args.seq_lens)?;
    let groups = Groups { dp: args.dp, batch: args.batch.unwrap_or(args.dp) };
    let documents = args.documents.as_deref().map_or(Ok(vec![]), |text| sweep::numbers("--documents", text))?;
    let points = sweep::sweep(&machine, &config, &methods, &gpus, &seq_lens, groups, &documents);
    if let (true, Some(Err(refused))) = (points.iter().all(Result::is_err), points.first()) {
        bail!("{}: {}", refused.method, refused.reason);
    }
    output::print(&if args.json { lines(&points)? } else { show(&points, &config, !documents.is_empty()) })
}

fn published(args: &Args) -> Result<()> {
    let fits = fit::fit_published()?;
    if let Some(path) = &args.published {
        // What was measured here stays.
        let measured = fs::read_to_string(path).unwrap_or_default();
        let measured = measured.find(against::HEADING).map_or("", |at| &measured[at..]);
        let text = report::markdown(&fits)? + "\n" + measured;
        fs::write(path, text.trim_end().to_owned() + "\n")
            .with_context(|| format!("cannot write {} (--published)", path.display()))?;
    }
    match (&args.fit, args.json) {
        (None, _) => Ok(()),
        (_, true) => output::print(&(serde_json::to_string(&fits)? + "\n")),
        (_, false) => output::print(&fits.iter().map(constants).collect::<String>()),
    }
}

fn against(args: &Args) -> Result<()> {
    let machine = Machine::load(&args.machine)?;
    let mut results = String::new();
    for path in &args.against {
        results += &fs::read_to_string(path).with_context(|| format!("cannot read {} (--against)", path.display()))?;
    }
    let rows = against::against(&machine, &results)?;
    if let Some(path) = &args.into {
        let before = fs::read_to_string(path).with_context(|| format!("cannot read {} (--into)", path.display()))?;
        let before = before.find(against::HEADING).map_or(before.as_str(), |at| &before[..at]).trim_end();
        let text = format!("{before}\n\n{}", against::markdown(&machine, &rows));
        fs::write(path, text).with_context(|| format!("cannot write {} (--into)", path.display()))?;
    }
    if args.json {
        let lines = rows.iter().map(|row| Ok(serde_json::to_string(row)? + "\n")).collect::<Result<String>>()?;
        return output::print(&lines);
    }
    let [median, largest] = against::errors(&rows).map(|error| 100.0 * error);
    let rows_of = std::iter::once(AGAINST.map(str::to_owned).to_vec()).chain(rows.iter().map(compared));
    let text = table("llrrrrrrrr", &rows_of.collect::<Vec<_>>());
    output::print(&format!("{text}{} rows: median error {median:.1} %, largest {largest:.1} %\n", rows.len()))
}

const AGAINST: [&str; 10] =
    ["mode", "method", "ranks", "tokens", "forward", "predicted", "backward", "predicted", "step", "predicted"];

fn compared(row: &Compared) -> Vec<String> {
    let ms = |ms: f64| format!("{ms:.1} ms");
    let mut cells = vec![row.mode.name().to_owned(), row.method.clone(), row.ranks.to_string(), row.tokens.to_string()];
    // A training step has no passes of its own.
    let pairs =
        row.measured_ms.iter().zip(&row.predicted_ms).map(|(measured, predicted)| [ms(*measured), ms(*predicted)]);
    cells.extend(std::iter::repeat_n("-".to_owned(), 2 * (3 - pairs.len())));
    cells.extend(pairs.flatten());
    if let Some(last) = cells.last_mut() {
        *last += &format!(" ({:+.1} %)", 100.0 * row.error);
    }
    cells
}

fn constants(fit: &Fit) -> String {
    let row = |(constant, value): &(fit::Constant, f64)| vec![constant.key().to_owned(), format!("{value:.4}")];
    let rows: Vec<_> = fit.constants.iter().map(row).collect();
    let error = 100.0 * fit.rms;
    format!("{}: {} figures, error {error:.1} % (root mean square)\n{}", fit.machine, fit.figures, table("lr", &rows))
}

fn lines(points: &[Result<Prediction, Refused>]) -> Result<String> {
    let mut text = String::new();
    for point in points {
        let value = match point {
            Ok(prediction) => serde_json::to_value(prediction)?,
            Err(Refused { method, gpus, seq_len, reason }) => {
                json!({"method": method, "gpus": gpus, "seq_len": seq_len, "refused": reason})
            }
        };
        text += &format!("{value}\n");
    }
    Ok(text)
}

fn show(points: &[Result<Prediction, Refused>], config: &Config, packed: bool) -> String {
    let head = [
        "tokens", "GPUs", "method", "step", "tokens/s", "a GPU", "exposed", "waited", "received", "messages", "state",
        "kept", "other", "memory", "",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let mut reasons: Vec<&str> = Vec::new();
    for point in points {
        rows.push(match point {
            Ok(prediction) => row(prediction),
            Err(refused) => {
                if !reasons.contains(&refused.reason.as_str()) {
                    reasons.push(&refused.reason);
                }
                vec![in_k(refused.seq_len), refused.gpus.to_string(), refused.method.clone(), "-".to_owned()]
            }
        });
    }
    let mut notes: String = reasons.iter().map(|reason| format!("- {reason}\n")).collect();
    if points.iter().flatten().any(|point| point.at_most) {
        let decay = format!("{:?}", config.model.decay).to_lowercase();
        notes += &format!(
            "- at most: model.decay = {decay} depends on the data, so nobody can tell beforehand how far back a truncated scan listens; \
             it is counted as if no state died\n"
        );
    }
    let truncated = points.iter().flatten().any(|point| point.method.contains("truncate"));
    if truncated && config.model.decay == DecayKind::None && config.model.layer_kinds().contains(&LayerKind::Linear) {
        notes += "- lasp2:truncate is lasp2 here: model.decay = none, so no state dies\n";
    }
    if packed {
        let mut counts: Vec<String> = points
            .iter()
            .flatten()
            .map(|point| format!("{} in {}", grouped(point.documents), in_k(point.seq_len)))
            .collect();
        counts.dedup();
        notes += &format!("- documents of a sequence: {}\n", counts.join(", "));
    }
    table("rrlrrrrrrrrrrrl", &rows) + &notes
}

fn row(p: &Prediction) -> Vec<String> {
    let m = &p.memory;
    let amount = |amount: f64| bytes(amount as u64);
    let at_most = |text: String| if p.at_most { format!("at most {text}") } else { text };
    vec![
        in_k(p.seq_len),
        p.gpus.to_string(),
        p.method.clone(),
        seconds(p.step_s),
        grouped(p.tokens_per_s as u64),
        grouped(p.tokens_per_s_per_gpu as u64),
        seconds(p.exposed_s),
        seconds(p.waited_s),
        at_most(amount(p.received)),
        at_most(format!("{:.0}", p.messages)),
        amount(m.weights + m.gradients + m.optimizer),
        amount(m.activations),
        amount(m.logits + m.gathered + m.reserved),
        amount(m.total),
        if p.out_of_memory { "OOM" } else { "" }.to_owned(),
    ]
}

fn seconds(seconds: f64) -> String {
    match seconds {
        long if long >= 1.0 => format!("{long:.2} s"),
        _ => format!("{:.1} ms", 1e3 * seconds),
    }
}
