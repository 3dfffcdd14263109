//! `lasp data`: makes a corpus file of text files, and shows what is in one.

use std::path::PathBuf;

use anyhow::Result;
use runtime::data::{self, Corpus, PrepareOptions};

use crate::output::{self, grouped};

/// Make a corpus of text files, or show what is in one
#[derive(clap::Subcommand)]
pub enum Command {
    Prepare(Prepare),
    Show(Show),
}

/// Make a corpus: one byte a token, duplicates dropped, documents shuffled
#[derive(clap::Args)]
pub struct Prepare {
    /// Files, and folders to look through
    #[arg(required = true, value_name = "DIR_OR_FILE")]
    inputs: Vec<PathBuf>,
    /// Take only files whose name matches, such as '*.py'; with a slash: whose path below the folder does
    #[arg(long, value_name = "PATTERN")]
    glob: Option<String>,
    /// The corpus to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Seed of the order of documents
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Show the size of a corpus and the head of its first document
#[derive(clap::Args)]
pub struct Show {
    corpus: PathBuf,
}

pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Prepare(args) => prepare(&args),
        Command::Show(args) => show(&args),
    }
}

fn prepare(args: &Prepare) -> Result<()> {
    let options = PrepareOptions { seed: args.seed };
    let found = data::prepare(&args.inputs, args.glob.as_deref(), &args.out, &options, true)?;
    let dropped: Vec<String> = [
        (found.duplicates, "duplicate"),
        (found.skipped_binary, "binary"),
        (found.skipped_empty, "empty"),
        (found.skipped_unreadable, "unreadable"),
    ]
    .into_iter()
    .filter(|(count, _)| *count > 0)
    .map(|(count, what)| format!("{} {what}", grouped(count)))
    .collect();
    let dropped =
        if dropped.is_empty() { "none left out".to_owned() } else { format!("left out {}", dropped.join(", ")) };
    output::print(&format!(
        "{}: {} documents, {} tokens, from {} files ({dropped})\n",
        args.out.display(),
        grouped(found.documents),
        grouped(found.tokens),
        grouped(found.files),
    ))
}

/// Lines and characters a line of the head.
const LINES: usize = 12;
const WIDTH: usize = 100;

fn show(args: &Show) -> Result<()> {
    let corpus = Corpus::open(&args.corpus)?;
    let first = corpus.document(0).unwrap_or_default();
    let mut text = format!(
        "{}: {} documents, {} tokens (bytes, with a separator before each document)\ndocument 0, {} bytes:\n",
        args.corpus.display(),
        grouped(corpus.documents() as u64),
        grouped(corpus.tokens()),
        grouped(first.len() as u64),
    );
    let head = String::from_utf8_lossy(&first[..first.len().min(LINES * WIDTH)]).into_owned();
    for line in head.lines().take(LINES) {
        let shown: String =
            line.chars().take(WIDTH).map(|c| if c.is_control() && c != '\t' { '·' } else { c }).collect();
        text += &format!("  {}\n", shown.trim_end());
    }
    output::print(&text)
}
