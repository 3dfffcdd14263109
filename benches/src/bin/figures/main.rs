//! The README's figures from scratch. `figures measure RUN` runs every command behind them on this machine and keeps in the
//! folder RUN what each gave, with the command that made it. `figures write RUN` puts the table of the README and the
//! pictures in docs/figures together from such a folder, and from nothing else.

mod measure;
mod pictures;
mod table;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;

#[derive(Parser)]
enum Options {
    /// Run the commands; minutes each, on a quiet machine
    Measure {
        /// Where results go, by custom benches/runs/DATE-MACHINE
        run: PathBuf,
        /// Only these, by name
        #[arg(long, value_delimiter = ',')]
        only: Vec<String>,
    },
    /// Write the README's table and docs/figures
    Write { run: PathBuf },
}

fn main() -> Result<()> {
    match Options::parse() {
        Options::Measure { run, only } => measure::all(&run, &only),
        Options::Write { run } => {
            pictures::write(&run)?;
            table::write(&run)
        }
    }
}
