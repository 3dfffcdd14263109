//! Finding shared libraries: where PyTorch's wheels have them, and then where the loader looks; or, for tests, the emulator.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::Library;

use crate::{Error, Result};

/// A struct of a library's functions, each by its symbol, which keeps the library open.
macro_rules! functions {
    ($(#[$about:meta])* $table:ident { $($name:ident = $symbol:literal ( $($type:ty),* $(,)? ) -> $result:ty;)* }) => {
        $(#[$about])*
        struct $table {
            $($name: unsafe extern "C" fn($($type),*) -> $result,)*
            _library: libloading::Library,
        }

        impl $table {
            /// # Safety
            /// The signatures are those of the library's header.
            unsafe fn of(library: libloading::Library) -> $crate::Result<Self> {
                let failed = |e: libloading::Error| $crate::Error::Cuda(e.to_string());
                // SAFETY: as the caller promises.
                unsafe { Ok(Self { $($name: *library.get($symbol).map_err(failed)?,)* _library: library }) }
            }
        }
    };
}
pub(super) use functions;

static EMULATOR: OnceLock<PathBuf> = OnceLock::new();

/// Takes `library`, `kernels/emulator` compiled, for the driver and its compiler: from then on the kernels run on tensors on
/// the CPU, slowly. For tests where there is no GPU; nothing else calls it. An error in a process that has a driver already.
pub fn emulate(library: &Path) -> Result<()> {
    if EMULATOR.get_or_init(|| library.to_owned()) != library || !super::driver::driver()?.emulated {
        return Err(Error::Cuda(format!("emulating by {}: this process has a driver already", library.display())));
    }
    Ok(())
}

pub(super) fn emulator() -> Option<&'static Path> {
    EMULATOR.get().map(PathBuf::as_path)
}

/// The folders `nvidia/*/lib` beside libtorch's own package, as PyTorch's wheels lie; sorted, the newest CUDA first.
pub(super) fn beside_libtorch() -> Vec<PathBuf> {
    let Some(libtorch) = crate::bridge::libtorch_path() else { return Vec::new() };
    // .../site-packages/torch/lib/libtorch_cpu.so
    let Some(packages) = libtorch.ancestors().nth(3) else { return Vec::new() };
    let entries = std::fs::read_dir(packages.join("nvidia")).into_iter().flatten().flatten();
    let mut folders: Vec<PathBuf> = entries.map(|e| e.path().join("lib")).filter(|p| p.is_dir()).collect();
    folders.sort();
    folders.reverse();
    folders
}

/// The files in `folder` whose names begin with `prefix`, the last name first.
pub(super) fn matching(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let of_name = |path: &PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix));
    let mut found: Vec<PathBuf> = entries.map(|e| e.path()).filter(of_name).collect();
    found.sort();
    found.reverse();
    found
}

/// Opens the first of `names` that opens: a path, or a name that the loader looks for. The error has every reason.
pub(super) fn open_any(names: &[PathBuf], what: &str) -> Result<Library> {
    let mut reasons = Vec::new();
    for name in names {
        // SAFETY: these are NVIDIA's libraries, whose initialisers may run at any time.
        match unsafe { Library::new(name) } {
            Ok(library) => return Ok(library),
            Err(error) => reasons.push(error.to_string()),
        }
    }
    Err(Error::Cuda(format!("cannot open {what}: {}", reasons.join("; "))))
}
