//! Running a test program again under mpirun, with what Open MPI needs set here and not in the shell.

use std::process::{Command, Stdio};

/// A command that runs `program` on `ranks` ranks: as root, with more ranks than cores, one libtorch thread each.
pub fn mpirun(ranks: usize, program: &std::path::Path) -> Command {
    let mut command = Command::new("mpirun");
    command
        .args(["--oversubscribe", "--bind-to", "none", "-n", &ranks.to_string()])
        .arg(program)
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env("OMP_NUM_THREADS", "1")
        .stdin(Stdio::null());
    command
}

/// Whether this process was started by mpirun.
pub fn inside() -> bool {
    std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some()
}

/// Whether there is an mpirun to start.
pub fn available() -> bool {
    Command::new("mpirun")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}
