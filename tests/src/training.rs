//! Short training runs with ranks as threads, on random tokens: nothing but a configuration is needed.

use std::path::Path;

use anyhow::Result;
use collectives::local;
use runtime::config::Config;
use runtime::metrics::{self, StepRecord};
use runtime::train::{Options, run};

/// A small hybrid model in f64, every other layer softmax, for some steps on sequences that no number of ranks divides; with
/// `settings`, each `section.key=value`, laid over it.
pub fn config(settings: &[String]) -> Result<Config> {
    let text = "[model]\ndim = 32\nlayers = 4\nheads = 4\nkv_heads = 2\nchunk = 16\npattern = \"LN\"\n\
                [train]\nsteps = 8\nseq_len = 101\nbatch = 2\ndtype = \"f64\"\n[optimizer]\nwarmup_steps = 3\n\
                [data]\nkind = \"random\"\nvalidation_fraction = 0.0\n";
    Ok(Config::from_toml_str(text, "test", settings)?)
}

/// What each step of `config` on `ranks` ranks was recorded as.
pub fn train(run_dir: &Path, mut config: Config, ranks: usize) -> Result<Vec<StepRecord>> {
    tch::set_num_threads(1);
    config.resolve_ranks(ranks)?;
    local::run(ranks, |world| -> Result<()> {
        run(world, config.clone(), run_dir, Options::default())?;
        Ok(())
    })?;
    Ok(metrics::read(run_dir)?)
}
