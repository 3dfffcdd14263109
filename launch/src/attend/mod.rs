//! `lasp attend`: one attention operator, sharded over the ranks, on tensors that a user brings from PyTorch.
//!
//! Rank 0 reads and checks the file (`inputs`), hands each rank its tokens (`exchange`), all compute (`operator`), and rank 0
//! collects the results and writes them. The others hold no more than their share and the states.

mod exchange;
mod inputs;
mod operator;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use collectives::Group;
use runtime::config::{Config, DecayKind, LayerKind, LayoutKind};
use runtime::sequence::method::AUTO;
use runtime::sequence::{Layout, method};
use runtime::tensor_file;
use tch::{Device, Kind, Tensor};

use crate::argument::at_least_one;
use crate::gpu::Place;
use crate::identity::Launcher;
use crate::{auto, job, output};

/// Run one attention operator, sharded over ranks, on tensors of a safetensors file
#[derive(clap::Args)]
#[command(after_help = TENSORS)]
pub struct Args {
    /// The tensors to read; converted to --dtype
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// Where to write the results: whole at the end, or on any error not at all
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// The operator
    #[arg(long, value_enum)]
    mixer: Mixer,
    #[arg(long, help = methods())]
    method: Option<String>,
    /// Number of ranks, as threads; under mpirun, if given, its number of processes [default: 1]
    #[arg(long, value_name = "N", value_parser = at_least_one::<usize>)]
    ranks: Option<usize>,
    /// Rank r of W holds segment r of W; zigzag: r and 2W-1-r of 2W, which balances causal softmax
    #[arg(long, value_enum, default_value_t = Order::Contiguous)]
    layout: Order,
    /// What a token sees: its past and itself, or its whole document
    #[arg(long, value_enum, default_value_t = Mask::Causal)]
    mask: Mask,
    /// Element type of inputs and results; states and sums are kept in f32, for f64 in f64
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// Chunk length of linear attention: a power of two, at most 1024
    #[arg(long, value_name = "C", default_value_t = 64)]
    chunk: i64,
    /// What scores are multiplied by [default: 1 for linear, 1/sqrt(K) for softmax]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    scale: Option<f64>,
    /// Where to compute; with several GPUs, rank r takes GPU r modulo their number
    #[arg(long, value_enum, default_value_t = Place::Cpu)]
    device: Place,
}

fn methods() -> String {
    let (linear, softmax) = (method::LINEAR, method::ATTENTIONS);
    format!(
        "How ranks exchange what they know, with settings as in {}:blocks=8; {AUTO}: as the cost model finds quickest here \
         [default: {} for linear, {} for softmax] [possible values: linear: {}; softmax: {}; {AUTO}]",
        "all_scan",
        linear[0],
        softmax[0],
        linear.join(", "),
        softmax.join(", ")
    )
}

const TENSORS: &str = "\
Inputs (B batch, T tokens, H heads, K key and V value dimension, N packed documents):
  q              [B, T, H, K]
  k              [B, T, Hkv, K]    Hkv divides H; linear: Hkv = H
  v              [B, T, Hkv, V]
  log_decay      [H], [B, T, H] or [B, T, H, K], at most 0; optional, linear and causal only
  cu_seqlens     [N + 1], from 0 to T: where documents begin and end; optional, B = 1 only
  initial_state  [B, H, K, V], packed [N, H, K, V]; optional, linear only
                 (with a left product: log_decay [H] only, no initial_state)
  do             [B, T, H, V], the gradient of o; optional, asks for gradients

Outputs:
  o              [B, T, H, V]
  final_state    [B, H, K, V], packed [N, H, K, V]; linear only, not by a left product
  dq, dk, dv     as q, k, v; given do
  dlog_decay     as log_decay; given do, linear only
  dinitial_state as final_state; given do, linear only, not by a left product

Linear, causal: M_t = diag(exp(log_decay_t)) M_{t-1} + k_t^T v_t,  o_t = scale q_t M_t
Linear, full:   o_t = scale q_t (initial_state + sum over the document of k_i^T v_i)
Softmax:        o_t = softmax(scale q_t k^T) v
";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mixer {
    Linear,
    Softmax,
}

#[derive(Clone, Copy, ValueEnum)]
enum Order {
    Contiguous,
    Zigzag,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mask {
    Causal,
    Full,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F64,
    F32,
    Bf16,
}

/// What is asked for, as the parts of this command know it.
#[derive(Clone)]
struct Task {
    mixer: Mixer,
    method: String,
    causal: bool,
    layout: LayoutKind,
    kind: Kind,
    chunk: i64,
    scale: Option<f64>,
    device: Place,
}

impl Task {
    fn new(args: &Args) -> Result<Task> {
        let (mixer, methods) = match args.mixer {
            Mixer::Linear => ("linear", method::LINEAR),
            Mixer::Softmax => ("softmax", method::ATTENTIONS),
        };
        let method = args.method.as_deref().unwrap_or(methods[0]);
        let expected = match args.mixer {
            Mixer::Linear => method::check_linear(method).err(),
            Mixer::Softmax => method::check_attention(method).err(),
        };
        if let Some(expected) = expected.filter(|_| method != AUTO) {
            bail!("--method: found {method:?}, expected for --mixer {mixer} {expected}, or {AUTO:?}");
        }
        if args.mask == Mask::Full && method == AUTO {
            bail!(
                "--method: found {AUTO:?} with --mask full, expected the name of a method: the cost model knows causal attention only"
            );
        }
        if args.mask == Mask::Full && method::left_product(method).is_some() {
            bail!(
                "--method: found {method:?} with --mask full, expected --mask causal: without a mask there is nothing to \
                 scan, and {} does it",
                methods[0]
            );
        }
        if let Some(scale) = args.scale.filter(|scale| !scale.is_finite()) {
            bail!("--scale: found {scale}, expected a finite number");
        }
        Ok(Task {
            mixer: args.mixer,
            method: method.to_owned(),
            causal: args.mask == Mask::Causal,
            layout: match args.layout {
                Order::Contiguous => LayoutKind::Contiguous,
                Order::Zigzag => LayoutKind::Zigzag,
            },
            kind: match args.dtype {
                Dtype::F64 => Kind::Double,
                Dtype::F32 => Kind::Float,
                Dtype::Bf16 => Kind::BFloat16,
            },
            chunk: args.chunk,
            scale: args.scale,
            device: args.device,
        })
    }

    /// What the cost model is asked about. It knows one sequence of a batch, and heads whose keys are as wide as their values.
    fn config(&self, whole: &inputs::Inputs) -> Config {
        let sizes = whole.sizes;
        let mut config = Config::default();
        let model = &mut config.model;
        (model.heads, model.kv_heads, model.chunk) = (sizes.heads, sizes.kv_heads, self.chunk);
        model.dim = sizes.heads * sizes.key.max(sizes.value);
        model.decay = match whole.log_decay.as_ref().map(Tensor::dim) {
            None => DecayKind::None,
            Some(1) => DecayKind::Lightning,
            Some(3) => DecayKind::Token,
            Some(_) => DecayKind::Channel,
        };
        config.train.seq_len = sizes.tokens as usize;
        config.parallel.layout = self.layout;
        config
    }

    /// The same task with a method, where that is left to the cost model. Collective; `whole` is there on rank 0.
    fn decided(&self, world: &Group, whole: Option<&inputs::Inputs>) -> Result<Task> {
        let mut task = self.clone();
        if task.method == AUTO {
            let config = whole.map(|whole| self.config(whole));
            let kind = match self.mixer {
                Mixer::Linear => LayerKind::Linear,
                Mixer::Softmax => LayerKind::Softmax,
            };
            let backward = whole.is_some_and(|whole| whole.d_o.is_some());
            let gpu = self.device == Place::Cuda;
            let operator = auto::Operator { kind, backward, gpu, network: None, option: "--method" };
            let cu_seqlens = whole.and_then(|whole| whole.cu_seqlens.as_deref());
            task.method = operator.agree(config.as_ref(), cu_seqlens, world)?;
        }
        Ok(task)
    }

    /// Whether the method knows neither states nor decays that depend on the data.
    fn is_left_product(&self) -> bool {
        self.mixer == Mixer::Linear && method::left_product(&self.method).is_some()
    }

    fn device(&self, rank: usize) -> Result<Device> {
        match self.device {
            Place::Cpu => Ok(Device::Cpu),
            Place::Cuda => {
                let gpus = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
                Ok(Device::Cuda(rank.checked_rem(gpus).context("--device cuda: no CUDA device")?))
            }
        }
    }
}

pub fn run(args: Args, launcher: &Launcher) -> Result<()> {
    let task = Task::new(&args)?;
    if task.device == Place::Cuda {
        let why = match kernels::bridge::open_cuda() {
            Err(error) => Some(error.to_string()),
            Ok(()) => (!tch::Cuda::is_available()).then(|| "libtorch finds no CUDA device".to_owned()),
        };
        if let Some(why) = why {
            bail!("--device cuda: {why}; `lasp doctor` says what is missing, --device cpu needs no GPU");
        }
    }
    job::on_ranks(launcher, args.ranks, |world| on_rank(&args, &task, world))
}

fn on_rank(args: &Args, task: &Task, world: &Group) -> Result<()> {
    let _guard = tch::no_grad_guard();
    let whole = if world.rank() == 0 {
        output::check_file("--output", &args.output)?;
        let whole = inputs::read(&args.input, task).with_context(|| format!("--input {}", args.input.display()))?;
        if task.mixer == Mixer::Softmax && task.method != AUTO {
            let check = method::attention(&task.method)?.check(whole.sizes.heads, world.size());
            check.with_context(|| format!("--ranks {}", world.size()))?;
        }
        Some(whole)
    } else {
        None
    };
    let task = &task.decided(world, whole.as_ref())?;
    let (layout, share) = exchange::distribute(task, world, whole)?;
    let results = operator::run(task, world, layout.clone(), share)?;
    let results = collect(task, world, &layout, results)?;
    if world.rank() > 0 {
        return Ok(());
    }
    tensor_file::write(&args.output, &results, &[])?;
    let listed: Vec<_> = results.iter().map(|(name, x)| format!("{name} {:?}", x.size())).collect();
    output::print(&format!("wrote {}: {}\n", args.output.display(), listed.join(", ")))
}

/// The results of the whole sequence, in the kind asked for, on rank 0; nothing on the others.
fn collect(
    task: &Task,
    world: &Group,
    layout: &Layout,
    results: Vec<(&'static str, operator::Part)>,
) -> Result<Vec<(&'static str, Tensor)>> {
    let mut collected = Vec::new();
    for (name, part) in results {
        let whole = match part {
            operator::Part::Tokens(x) => exchange::gather(world, layout, &x.f_to_kind(task.kind)?)?,
            operator::Part::Whole(x) => (world.rank() == 0).then_some(x),
        };
        if let Some(x) = whole {
            collected.push((name, x.f_to_device(Device::Cpu)?.f_to_kind(task.kind)?.f_contiguous()?));
        }
    }
    Ok(collected)
}
