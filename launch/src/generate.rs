//! `lasp generate`: text from a trained model, byte by byte as it comes.

use std::path::PathBuf;

use anyhow::Result;
use clap::ValueEnum;
use runtime::config::DeviceKind;
use runtime::generate;

use crate::gpu;
use crate::identity::Launcher;
use crate::output::print_bytes;

/// Continue a text with the newest checkpoint of a run.
#[derive(clap::Args)]
pub struct Args {
    /// The folder of a training run
    run_dir: PathBuf,
    /// The text to continue; it is printed first
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: String,
    /// Most tokens to generate; the model may end the document before
    #[arg(long, value_name = "N", default_value_t = 200)]
    tokens: usize,
    /// What the logits are divided by; 0 always takes the likeliest token
    #[arg(long, value_name = "X", default_value_t = 0.8, allow_negative_numbers = true)]
    temperature: f64,
    /// How many of the likeliest tokens to draw from; 0: all
    #[arg(long, value_name = "N", default_value_t = 0)]
    top_k: usize,
    /// What to compute on; auto: a GPU where there is one
    #[arg(long, value_enum, value_name = "DEVICE", default_value = "auto")]
    device: Place,
    /// The same seed gives the same text
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Place {
    Auto,
    Cpu,
    Cuda,
}

pub fn run(args: Args, launcher: &Launcher) -> Result<()> {
    launcher.share_cores(1);
    let options =
        generate::Options { tokens: args.tokens, temperature: args.temperature, top_k: args.top_k, seed: args.seed };
    let device = gpu::alone(match args.device {
        Place::Auto => DeviceKind::Auto,
        Place::Cpu => DeviceKind::Cpu,
        Place::Cuda => DeviceKind::Cuda,
    })?;
    let mut begun = false;
    let mut printed = Ok(());
    generate::run(&args.run_dir, device, args.prompt.as_bytes(), options, &mut |bytes| {
        // Not before the first token, so that an error is not preceded by text.
        let prompt = if begun { &[][..] } else { args.prompt.as_bytes() };
        begun = true;
        if printed.is_ok() {
            printed = print_bytes(&[prompt, bytes].concat());
        }
    })?;
    printed?;
    if !begun {
        print_bytes(args.prompt.as_bytes())?;
    }
    print_bytes(b"\n")
}
