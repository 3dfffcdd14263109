//! How this process was started, found out from the environment: by mpirun (Open MPI, or another launcher that speaks
//! PMI or PMIx, such as srun), by torchrun, or alone. Nothing else reads these variables.

use std::env;
use std::thread;

use anyhow::{Result, bail};

/// Who started this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Launcher {
    /// An MPI launcher: this process is one rank. What it says of itself is known before MPI is initialised.
    Mpi { rank: Option<usize>, size: Option<usize>, on_node: Option<usize> },
    /// torchrun: `size` processes that have no MPI between them.
    Torchrun { rank: usize, size: usize },
    /// Nobody: ranks are threads of this process.
    None,
}

impl Launcher {
    pub fn detect() -> Launcher {
        Self::from_variables(|name| env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Launcher {
        let number = |names: &[&str]| names.iter().find_map(|name| variable(name)?.trim().parse::<usize>().ok());
        let size = number(&["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]);
        let rank = number(&["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"]);
        if size.is_some() || number(&["PMIX_RANK"]).is_some() {
            let on_node = number(&["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"]);
            return Launcher::Mpi { rank, size, on_node };
        }
        // RANK and WORLD_SIZE alone may be anything; torchrun sets these too.
        match (number(&["RANK"]), number(&["WORLD_SIZE"]), variable("LOCAL_RANK"), variable("MASTER_ADDR")) {
            (Some(rank), Some(size), Some(_), Some(_)) => Launcher::Torchrun { rank, size },
            _ => Launcher::None,
        }
    }

    /// This process's rank among several, where the launcher tells.
    pub fn rank(&self) -> Option<usize> {
        match self {
            Launcher::Mpi { rank, .. } => *rank,
            Launcher::Torchrun { rank, .. } => Some(*rank),
            Launcher::None => None,
        }
    }

    /// Number of processes, where the launcher tells.
    pub fn size(&self) -> Option<usize> {
        match self {
            Launcher::Mpi { size, .. } => *size,
            Launcher::Torchrun { size, .. } => Some(*size),
            Launcher::None => None,
        }
    }

    /// Whether ranks are processes; if not, they are threads. An error where this build cannot join the processes.
    pub fn joins_processes(&self) -> Result<bool> {
        match self {
            Launcher::Mpi { .. } if !cfg!(feature = "mpi") => bail!(
                "started by an MPI launcher, but this lasp was built without MPI: build it with the cargo feature mpi \
                 (the default), or start it without mpirun and with --ranks N for ranks as threads"
            ),
            Launcher::Mpi { .. } => Ok(true),
            Launcher::Torchrun { size, .. } if *size > 1 => bail!(
                "started by torchrun with WORLD_SIZE = {size}, whose processes lasp cannot join: it joins processes \
                 through MPI only; start it with `mpirun -n {size} lasp ..`, or once with --ranks {size} for ranks as \
                 threads"
            ),
            Launcher::Torchrun { .. } | Launcher::None => Ok(false),
        }
    }

    /// Gives each of the `ranks` ranks on this node its share of the cores as libtorch threads, at least one. Where the user has
    /// set OMP_NUM_THREADS libtorch follows that, and nothing is changed.
    pub fn share_cores(&self, ranks: usize) {
        if env::var_os("OMP_NUM_THREADS").is_some() {
            return;
        }
        let threads = (cores() / ranks.max(1)).max(1) as i32;
        tch::set_num_threads(threads);
    }
}

/// Cores that this process may use.
pub fn cores() -> usize {
    thread::available_parallelism().map_or(1, Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detect(variables: &[(&str, &str)]) -> Launcher {
        Launcher::from_variables(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn launchers_are_told_by_their_variables() {
        let open_mpi =
            [("OMPI_COMM_WORLD_SIZE", "4"), ("OMPI_COMM_WORLD_RANK", "3"), ("OMPI_COMM_WORLD_LOCAL_SIZE", "2")];
        assert_eq!(detect(&open_mpi), Launcher::Mpi { rank: Some(3), size: Some(4), on_node: Some(2) });
        assert_eq!(detect(&[("PMIX_RANK", "1")]), Launcher::Mpi { rank: Some(1), size: None, on_node: None });
        let torchrun = [("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "localhost")];
        assert_eq!(detect(&torchrun), Launcher::Torchrun { rank: 1, size: 2 });
        assert_eq!(detect(&torchrun[..2]), Launcher::None);
        // MPI wins: torchrun's variables may be left over from around it.
        assert!(matches!(detect(&[&torchrun[..], &open_mpi[..]].concat()), Launcher::Mpi { .. }));
        assert_eq!(detect(&[]), Launcher::None);
    }
}
