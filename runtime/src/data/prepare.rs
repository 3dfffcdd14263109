//! Makes a corpus file from text files. Two passes: the first finds the documents and hashes them, so that duplicates
//! and binary files drop out; the second writes them in a shuffled order. Only one document is in memory at a time.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use globset::{Glob, GlobMatcher};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use walkdir::WalkDir;
use xxhash_rust::xxh3::xxh3_128;

use super::corpus::{MAGIC, SEPARATOR, TOKEN_WIDTH, VERSION};
use super::{Error, Permutation, Result};
use crate::atomic::{self, Failure};

/// How documents are arranged.
#[derive(Debug, Clone, Default)]
pub struct PrepareOptions {
    /// Seed of the order of documents. They are shuffled so that the end, held out for validation, is like the rest.
    pub seed: u64,
}

/// What `prepare` found and wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Files whose name matched.
    pub files: u64,
    pub skipped_empty: u64,
    /// Files with a NUL byte.
    pub skipped_binary: u64,
    /// Files inside a folder that could not be opened: no permission, or a link to nothing.
    pub skipped_unreadable: u64,
    /// Files with the same bytes as an earlier one.
    pub duplicates: u64,
    /// Documents written.
    pub documents: u64,
    /// Tokens written: the bytes of the documents and a separator before each.
    pub tokens: u64,
}

struct Document {
    path: PathBuf,
    bytes: u64,
    hash: u128,
}

/// Writes the corpus `out` from the files `inputs`, and from those under the folders among them, whose name matches
/// `glob` (a pattern with a slash is matched against the path below the folder). Any bytes but NUL are text. The same
/// files, in the same order of inputs, give the same corpus. Links to folders are not followed. On any error an earlier
/// `out` is untouched; it must not be edited in place while a run uses it. `progress`: draw on stderr if it is a terminal.
pub fn prepare(
    inputs: &[PathBuf],
    glob: Option<&str>,
    out: &Path,
    options: &PrepareOptions,
    progress: bool,
) -> Result<Summary> {
    let matcher = glob.map(compile).transpose()?;
    let mut summary = Summary::default();
    let files = find(inputs, matcher.as_ref(), &mut summary)?;
    let documents = survey(files, &mut summary, progress)?;
    if documents.is_empty() {
        let named: Vec<String> = inputs.iter().map(|input| input.display().to_string()).collect();
        return Err(Error::NoDocuments {
            out: out.to_owned(),
            inputs: named.join(", "),
            glob: glob.unwrap_or("*").to_owned(),
            matched: summary.files,
            empty: summary.skipped_empty,
            binary: summary.skipped_binary,
            unreadable: summary.skipped_unreadable,
        });
    }
    summary.documents = documents.len() as u64;
    summary.tokens = documents.iter().map(|document| document.bytes + 1).sum();
    let order = Permutation::new(summary.documents, options.seed, 0);
    let shuffled: Vec<&Document> = (0..summary.documents).map(|i| &documents[order.at(i) as usize]).collect();
    write(out, &shuffled, summary.tokens, progress)?;
    Ok(summary)
}

fn compile(pattern: &str) -> Result<GlobMatcher> {
    let glob =
        Glob::new(pattern).map_err(|e| Error::Glob { pattern: pattern.to_owned(), message: e.kind().to_string() })?;
    Ok(glob.compile_matcher())
}

/// A file to read, and whether it was named by the user: then it must be readable.
struct Candidate {
    path: PathBuf,
    named: bool,
}

/// Every matching file, in the order of the inputs and sorted by name inside each.
fn find(inputs: &[PathBuf], matcher: Option<&GlobMatcher>, summary: &mut Summary) -> Result<Vec<Candidate>> {
    let mut files = Vec::new();
    for input in inputs {
        for entry in WalkDir::new(input).sort_by_file_name() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => {
                    let path = error.path().unwrap_or(input).to_owned();
                    let named = error.depth() == 0;
                    let source = io::Error::from(error);
                    if named || !may_skip(&source) {
                        return Err(Error::Read { path, source });
                    }
                    summary.skipped_unreadable += 1;
                    continue;
                }
            };
            let named = entry.depth() == 0;
            let path = entry.path();
            let matches = matcher.is_none_or(|matcher| {
                matcher.is_match(entry.file_name())
                    || path.strip_prefix(input).is_ok_and(|below| matcher.is_match(below))
            });
            if !matches {
                continue;
            }
            let kind = entry.file_type();
            let is_file = if kind.is_symlink() {
                match fs::metadata(path) {
                    Ok(target) => target.is_file(),
                    Err(_) if !named => {
                        summary.files += 1;
                        summary.skipped_unreadable += 1;
                        continue;
                    }
                    Err(source) => {
                        let path = path.to_owned();
                        return Err(Error::Read { path, source });
                    }
                }
            } else {
                kind.is_file()
            };
            if is_file {
                summary.files += 1;
                let path = entry.into_path();
                files.push(Candidate { path, named });
            }
        }
    }
    Ok(files)
}

fn may_skip(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound)
}

/// Reads every file once and keeps those that are documents.
fn survey(files: Vec<Candidate>, summary: &mut Summary, progress: bool) -> Result<Vec<Document>> {
    let bar = bar(progress, files.len() as u64, "reading  {bar:30} {pos}/{len} files  {msg}  {eta} left");
    let (mut documents, mut seen, mut bytes) = (Vec::new(), HashSet::new(), 0u64);
    for Candidate { path, named } in files {
        bar.inc(1);
        let content = match fs::read(&path) {
            Ok(content) => content,
            Err(error) if !named && may_skip(&error) => {
                summary.skipped_unreadable += 1;
                continue;
            }
            Err(source) => return Err(Error::Read { path, source }),
        };
        bytes += content.len() as u64;
        bar.set_message(format!("{:.1} MB", bytes as f64 / 1e6));
        if content.is_empty() {
            summary.skipped_empty += 1;
        } else if content.contains(&SEPARATOR) {
            summary.skipped_binary += 1;
        } else {
            let hash = xxh3_128(&content);
            if seen.insert(hash) {
                let bytes = content.len() as u64;
                documents.push(Document { path, bytes, hash });
            } else {
                summary.duplicates += 1;
            }
        }
    }
    bar.finish_and_clear();
    Ok(documents)
}

fn write(out: &Path, documents: &[&Document], tokens: u64, progress: bool) -> Result<()> {
    let bar = bar(progress, tokens, "writing  {bar:30} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left");
    let written = atomic::replace(out, |file| {
        file.write_all(MAGIC)?;
        file.write_all(&VERSION.to_le_bytes())?;
        file.write_all(&TOKEN_WIDTH.to_le_bytes())?;
        file.write_all(&(documents.len() as u64).to_le_bytes())?;
        file.write_all(&tokens.to_le_bytes())?;
        let mut offset = 0u64;
        for document in documents {
            file.write_all(&offset.to_le_bytes())?;
            offset += document.bytes + 1;
        }
        file.write_all(&offset.to_le_bytes())?;
        for document in documents {
            let path = || document.path.clone();
            let content =
                fs::read(&document.path).map_err(|source| Failure::Source(Error::Read { path: path(), source }))?;
            if xxh3_128(&content) != document.hash {
                return Err(Failure::Source(Error::Changed { path: path() }));
            }
            file.write_all(&[SEPARATOR])?;
            file.write_all(&content)?;
            bar.inc(document.bytes + 1);
        }
        Ok(())
    });
    bar.finish_and_clear();
    written.map_err(|failure| failure.named(|source| Error::Write { path: out.to_owned(), source }))
}

fn bar(visible: bool, length: u64, template: &str) -> ProgressBar {
    let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(length), target).with_style(style)
}
