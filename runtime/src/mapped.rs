//! Read-only memory maps of whole files: the one place of this crate that needs `unsafe`.

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::Mmap;

/// Maps the file at `path`. Files of this crate are replaced by renaming, never changed in place.
#[allow(unsafe_code)]
pub(crate) fn map(path: &Path) -> io::Result<Mmap> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    // SAFETY: the map is only read. Nothing in this crate writes to a file it did not just create under a name of its
    // own, so the bytes change only if someone else edits the file in place while it is in use, which the
    // documentation of `prepare` and of the checkpoints rules out.
    unsafe { Mmap::map(&file) }
}
