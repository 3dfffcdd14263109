//! Compiled kernels and chosen algorithms on disk, so that only the first run of a program compiles and chooses: a file each,
//! named by the hash of all that it depends on, and beginning with the hash of itself. A file that is damaged counts as absent.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use xxhash_rust::xxh3::{Xxh3, xxh3_128};

static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();

/// Where they are kept from now on; `None`: nowhere. The first call counts.
pub fn keep_in(folder: Option<PathBuf>) {
    let _ = FOLDER.set(folder);
}

pub(super) fn folder() -> Option<&'static Path> {
    FOLDER.get().and_then(|folder| folder.as_deref())
}

/// The name of a file for what follows from `parts`.
pub(super) fn name(of: &str, arch: &str, extension: &str, parts: &[&str]) -> String {
    let mut hash = Xxh3::new();
    for part in parts {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    format!("{of}-{arch}-{:032x}.{extension}", hash.digest128())
}

pub(super) fn read(folder: &Path, name: &str) -> Option<Vec<u8>> {
    let bytes = fs::read(folder.join(name)).ok()?;
    let (hash, cubin) = bytes.split_at_checked(16)?;
    (!cubin.is_empty() && hash == xxh3_128(cubin).to_le_bytes()).then(|| cubin.to_vec())
}

/// Written aside and put in its place. What is whole there stays: of several ranks that write at once the first says what all
/// of them find. A folder that cannot be written to costs the next run its time, nothing else.
pub(super) fn write(folder: &Path, name: &str, cubin: &[u8]) -> std::io::Result<()> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    fs::create_dir_all(folder)?;
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let aside = folder.join(format!("{name}.{}.{number}.tmp", std::process::id()));
    let written = fs::File::create(&aside).and_then(|mut file| {
        file.write_all(&xxh3_128(cubin).to_le_bytes())?;
        file.write_all(cubin)?;
        file.sync_all()
    });
    let place = || match fs::hard_link(&aside, folder.join(name)) {
        Ok(()) => fs::remove_file(&aside),
        Err(error) if error.kind() == ErrorKind::AlreadyExists && read(folder, name).is_some() => {
            fs::remove_file(&aside)
        }
        // Damaged, or a file system without links.
        Err(_) => fs::rename(&aside, folder.join(name)),
    };
    written.and_then(|()| place()).inspect_err(|_| drop(fs::remove_file(&aside)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_is_absent() {
        let folder = std::env::temp_dir().join(format!("lasp-cubins-{}", std::process::id()));
        let name = name("block", "sm_90a", "cubin", &["source", "options"]);
        assert_eq!(read(&folder, &name), None);
        write(&folder, &name, b"machine code").unwrap();
        write(&folder, &name, b"that of another").unwrap();
        assert_eq!(read(&folder, &name).unwrap(), b"machine code", "the first stays");
        let path = folder.join(&name);
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(read(&folder, &name), None);
        fs::write(&path, &bytes[..10]).unwrap();
        assert_eq!(read(&folder, &name), None);
        write(&folder, &name, b"anew").unwrap();
        assert_eq!(read(&folder, &name).unwrap(), b"anew");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "nothing is left aside");
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn whatever_a_cubin_depends_on_changes_its_name() {
        let names = [
            name("block", "sm_90a", "cubin", &["ab", "c"]),
            name("block", "sm_90a", "cubin", &["a", "bc"]),
            name("block", "sm_80", "cubin", &["ab", "c"]),
            name("linear", "sm_90a", "cubin", &["ab", "c"]),
        ];
        for (i, one) in names.iter().enumerate() {
            assert!(names[i + 1..].iter().all(|other| other != one));
        }
    }
}
