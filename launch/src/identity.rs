//! How this process was started, found out from the environment: by mpirun (Open MPI, or another launcher that speaks
//! PMI or PMIx, such as srun), by torchrun, by srun without MPI, or alone. Nothing else reads these variables.

use std::env;
use std::thread;

use anyhow::{Result, bail};

/// Who started this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Launcher {
    /// An MPI launcher: this process is one rank. What it says of itself is known before MPI is initialised.
    Mpi { rank: Option<usize>, size: Option<usize>, on_node: Option<usize>, local: Option<usize> },
    /// torchrun or srun: processes that have no MPI between them, and find each other over TCP.
    Tcp(Peer),
    /// Nobody: ranks are threads of this process.
    None,
}

/// One of several processes, and where rank 0 is to be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub rank: usize,
    pub size: usize,
    /// Its place among the processes of this node.
    pub local: usize,
    /// How many there are on this node.
    pub on_node: Option<usize>,
    pub address: String,
    pub port: u16,
    /// Names the job, in letters, digits and dashes.
    pub token: String,
}

impl Launcher {
    pub fn detect() -> Launcher {
        Self::from_variables(&|name| env::var(name).ok())
    }

    fn from_variables(variable: &dyn Fn(&str) -> Option<String>) -> Launcher {
        let number = |names: &[&str]| names.iter().find_map(|name| variable(name)?.trim().parse::<usize>().ok());
        let size = number(&["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]);
        let rank = number(&["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"]);
        if size.is_some() || number(&["PMIX_RANK"]).is_some() {
            let on_node = number(&["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"]);
            let local = number(&["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"]);
            return Launcher::Mpi { rank, size, on_node, local };
        }
        Self::torchrun(variable).or_else(|| Self::slurm(variable)).map_or(Launcher::None, Launcher::Tcp)
    }

    /// RANK and WORLD_SIZE alone may be anything; torchrun sets all of these.
    fn torchrun(variable: &dyn Fn(&str) -> Option<String>) -> Option<Peer> {
        let number = |name: &str| variable(name)?.trim().parse::<usize>().ok();
        let port = u16::try_from(number("MASTER_PORT")?).ok()?;
        // Its own store listens on MASTER_PORT.
        let taken = variable("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True");
        let [run, restart] =
            ["TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"].map(|name| variable(name).unwrap_or_default());
        Some(Peer {
            rank: number("RANK")?,
            size: number("WORLD_SIZE")?,
            local: number("LOCAL_RANK")?,
            on_node: number("LOCAL_WORLD_SIZE"),
            address: variable("MASTER_ADDR")?,
            port: port.saturating_add(taken.into()),
            token: word(&format!("torchrun-{run}-{restart}")),
        })
    }

    /// The variables of a step, which the script of a job does not have. MASTER_ADDR and MASTER_PORT go before what follows
    /// from the list of nodes and the number of the job.
    fn slurm(variable: &dyn Fn(&str) -> Option<String>) -> Option<Peer> {
        let number = |name: &str| variable(name)?.trim().parse::<usize>().ok();
        let size = number("SLURM_STEP_NUM_TASKS").filter(|&size| size > 1)?;
        let (job, step) = (number("SLURM_JOB_ID")?, number("SLURM_STEP_ID").unwrap_or(0));
        let first = first_node(&variable("SLURM_STEP_NODELIST")?)?;
        let port = number("MASTER_PORT").and_then(|port| u16::try_from(port).ok());
        let per_node = variable("SLURM_STEP_TASKS_PER_NODE").unwrap_or_default();
        Some(Peer {
            rank: number("SLURM_PROCID")?,
            size,
            local: number("SLURM_LOCALID")?,
            on_node: per_node.split(['(', ',']).next().and_then(|count| count.parse().ok()),
            address: variable("MASTER_ADDR").unwrap_or(first),
            // Sixteen ports a step, below those that systems give out by themselves.
            port: port.unwrap_or((12000 + (job + step) % 1000 * 16) as u16),
            token: word(&format!("slurm-{job}-{step}")),
        })
    }

    /// This process's rank among several, where the launcher tells.
    pub fn rank(&self) -> Option<usize> {
        match self {
            Launcher::Mpi { rank, .. } => *rank,
            Launcher::Tcp(peer) => Some(peer.rank),
            Launcher::None => None,
        }
    }

    /// Number of processes, where the launcher tells.
    pub fn size(&self) -> Option<usize> {
        match self {
            Launcher::Mpi { size, .. } => *size,
            Launcher::Tcp(peer) => Some(peer.size),
            Launcher::None => None,
        }
    }

    /// Number of processes on this node, where the launcher tells.
    pub fn on_node(&self) -> Option<usize> {
        match self {
            Launcher::Mpi { on_node, .. } => *on_node,
            Launcher::Tcp(peer) => peer.on_node,
            Launcher::None => None,
        }
    }

    /// This process's place among those of its node, where the launcher tells: which GPU is its own.
    pub fn local(&self) -> Option<usize> {
        match self {
            Launcher::Mpi { local, .. } => *local,
            Launcher::Tcp(peer) => Some(peer.local),
            Launcher::None => None,
        }
    }

    /// Whether ranks are processes; if not, they are threads. An error where this build cannot join the processes.
    pub fn joins_processes(&self) -> Result<bool> {
        match self {
            Launcher::Mpi { .. } if !cfg!(feature = "mpi") => bail!(
                "started by an MPI launcher, but this lasp was built without MPI: build it with the cargo feature mpi \
                 (the default), start it with torchrun, or without a launcher and with --ranks N for ranks as threads"
            ),
            Launcher::Mpi { .. } => Ok(true),
            Launcher::Tcp(peer) => Ok(peer.size > 1),
            Launcher::None => Ok(false),
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

/// Letters, digits and dashes.
fn word(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect()
}

/// The first of a list of nodes as Slurm writes it: `gpu[007-012,020],login1` is `gpu007`.
fn first_node(list: &str) -> Option<String> {
    let head = list.split(['[', ',']).next().filter(|head| !head.is_empty())?;
    match list[head.len()..].strip_prefix('[') {
        Some(numbers) => Some(format!("{head}{}", numbers.split(['-', ',', ']']).next()?)),
        None => Some(head.to_owned()),
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
        Launcher::from_variables(&|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string()))
    }

    const TORCHRUN: [(&str, &str); 8] = [
        ("RANK", "3"),
        ("WORLD_SIZE", "4"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("MASTER_ADDR", "head"),
        ("MASTER_PORT", "29500"),
        ("TORCHELASTIC_RUN_ID", "a b"),
        ("TORCHELASTIC_RESTART_COUNT", "1"),
    ];

    #[test]
    fn launchers_are_told_by_their_variables() {
        let open_mpi = [
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_RANK", "3"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ];
        let found = detect(&open_mpi);
        assert_eq!(found, Launcher::Mpi { rank: Some(3), size: Some(4), on_node: Some(2), local: Some(1) });
        let found = detect(&[("PMIX_RANK", "1")]);
        assert_eq!(found, Launcher::Mpi { rank: Some(1), size: None, on_node: None, local: None });
        // MPI wins: torchrun's variables may be left over from around it.
        assert!(matches!(detect(&[&TORCHRUN[..], &open_mpi[..]].concat()), Launcher::Mpi { .. }));
        assert_eq!(detect(&[]), Launcher::None);
    }

    #[test]
    fn torchrun_and_slurm_say_where_rank_0_is() {
        let mut peer = Peer {
            rank: 3,
            size: 4,
            local: 1,
            on_node: Some(2),
            address: "head".into(),
            port: 29500,
            token: "torchrun-a-b-1".into(),
        };
        assert_eq!(detect(&TORCHRUN), Launcher::Tcp(peer.clone()));
        peer.port = 29501;
        assert_eq!(detect(&[&TORCHRUN[..], &[("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat()), Launcher::Tcp(peer));
        assert_eq!(detect(&TORCHRUN[..5]), Launcher::None);

        let slurm = [
            ("SLURM_JOB_ID", "4242"),
            ("SLURM_STEP_ID", "1"),
            ("SLURM_STEP_NUM_TASKS", "6"),
            ("SLURM_STEP_NODELIST", "gpu[07-08,11]"),
            ("SLURM_STEP_TASKS_PER_NODE", "2(x3)"),
            ("SLURM_PROCID", "5"),
            ("SLURM_LOCALID", "1"),
        ];
        let mut peer = Peer {
            rank: 5,
            size: 6,
            local: 1,
            on_node: Some(2),
            address: "gpu07".into(),
            port: 12000 + 243 * 16,
            token: "slurm-4242-1".into(),
        };
        assert_eq!(detect(&slurm), Launcher::Tcp(peer.clone()));
        (peer.address, peer.port) = ("head".into(), 29500);
        assert_eq!(detect(&[&slurm[..], &TORCHRUN[4..6]].concat()), Launcher::Tcp(peer));
        // The script of a job is no step of it.
        assert_eq!(detect(&[("SLURM_JOB_ID", "4242"), ("SLURM_PROCID", "0"), ("SLURM_NTASKS", "6")]), Launcher::None);
    }

    #[test]
    fn lists_of_nodes_begin_with_the_first() {
        let found = ["n1", "n1,n2", "gpu[007-012,020],login1", "a-b[3,5]", ""].map(first_node);
        assert_eq!(found.map(Option::unwrap_or_default), ["n1", "n1", "gpu007", "a-b3", ""]);
    }
}
