//! The corpus file, memory-mapped: a header of 32 bytes, where each document begins, then the tokens, one byte each.
//!
//! ```text
//! 0   magic "LASPDATA"            8 bytes
//! 8   version 1                   u32, little-endian as all numbers here
//! 12  bytes a token, 1            u32
//! 16  number of documents N       u64
//! 24  number of tokens            u64
//! 32  N + 1 offsets               u64 each, in tokens: document n is offsets[n]..offsets[n + 1]
//! ..  tokens
//! ```
//!
//! Each document begins with the token `SEPARATOR`, which is therefore also the label of a document's last byte.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use super::{Error, Result, Sequence};
use crate::mapped;

/// The token before each document: the byte 0, which no document has inside.
pub const SEPARATOR: u8 = 0;

pub(super) const MAGIC: &[u8; 8] = b"LASPDATA";
pub(super) const VERSION: u32 = 1;
pub(super) const TOKEN_WIDTH: u32 = 1;
pub(super) const HEADER: usize = 32;

/// An open corpus. Clones share the map.
#[derive(Debug, Clone)]
pub struct Corpus {
    map: Arc<Mmap>,
    path: Arc<PathBuf>,
    documents: usize,
    tokens: u64,
}

impl Corpus {
    /// Maps the corpus at `path` and checks its header, its length and its offsets.
    pub fn open(path: &Path) -> Result<Self> {
        let map = mapped::map(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        let foreign = |found: String| Error::Foreign { path: path.to_owned(), found };
        let damaged = |found: String| Error::Damaged { path: path.to_owned(), found };
        if map.len() < HEADER || map[..8] != *MAGIC {
            let start = String::from_utf8_lossy(&map[..map.len().min(8)]).into_owned();
            return Err(foreign(format!("its {} bytes begin with {start:?}", map.len())));
        }
        let (version, width) = (read_u32(&map, 8), read_u32(&map, 12));
        if (version, width) != (VERSION, TOKEN_WIDTH) {
            return Err(foreign(format!("version {version} with {width} bytes a token")));
        }
        let (documents, tokens) = (read_u64(&map, 16), read_u64(&map, 24));
        let expected = documents
            .checked_add(1)
            .and_then(|offsets| offsets.checked_mul(8))
            .and_then(|bytes| bytes.checked_add(tokens))
            .and_then(|bytes| bytes.checked_add(HEADER as u64));
        if expected != Some(map.len() as u64) {
            return Err(damaged(format!(
                "{} bytes, where {documents} documents of {tokens} tokens take {}",
                map.len(),
                expected.map_or_else(|| "more than there can be".to_owned(), |bytes| bytes.to_string()),
            )));
        }
        let corpus =
            Corpus { map: Arc::new(map), path: Arc::new(path.to_owned()), documents: documents as usize, tokens };
        let ascending = (0..corpus.documents).all(|n| corpus.offset(n) < corpus.offset(n + 1));
        if documents == 0 || !ascending || corpus.offset(0) != 0 || corpus.offset(corpus.documents) != tokens {
            return Err(damaged(format!(
                "the offsets of its {documents} documents do not ascend from 0 to its {tokens} tokens"
            )));
        }
        Ok(corpus)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of documents.
    pub fn documents(&self) -> usize {
        self.documents
    }

    /// Number of tokens, separators included.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The bytes of document `n`, without its separator.
    pub fn document(&self, n: usize) -> Option<&[u8]> {
        (n < self.documents).then(|| self.bytes(self.offset(n) + 1..self.offset(n + 1)))
    }

    /// Cuts at a document boundary: the last documents, as near to `validation_fraction` of the tokens as whole documents
    /// come, are for validation, the others for training. Above 0, each side gets at least one document if there are two.
    pub fn split(&self, validation_fraction: f64) -> (Split, Split) {
        let wanted = (self.tokens as f64 * (1.0 - validation_fraction)) as u64;
        let after = partition_point(self.documents + 1, |n| self.offset(n) < wanted);
        let nearest = if after > 0 && wanted.abs_diff(self.offset(after - 1)) < self.offset(after).abs_diff(wanted) {
            after - 1
        } else {
            after
        };
        let cut = if validation_fraction > 0.0 && self.documents >= 2 {
            nearest.clamp(1, self.documents - 1)
        } else {
            self.documents
        };
        let part = |name, documents: Range<usize>| Split {
            corpus: self.clone(),
            name,
            tokens: self.offset(documents.start)..self.offset(documents.end),
            documents,
        };
        (part("training", 0..cut), part("validation", cut..self.documents))
    }

    /// Where document `n` begins, in tokens; for n the number of documents, where the last one ends.
    fn offset(&self, n: usize) -> u64 {
        read_u64(&self.map, HEADER + 8 * n)
    }

    fn bytes(&self, tokens: Range<u64>) -> &[u8] {
        let start = HEADER + 8 * (self.documents + 1);
        &self.map[start + tokens.start as usize..start + tokens.end as usize]
    }
}

/// Some consecutive documents of a corpus, seen as one run of tokens.
#[derive(Debug, Clone)]
pub struct Split {
    corpus: Corpus,
    name: &'static str,
    documents: Range<usize>,
    tokens: Range<u64>,
}

impl Split {
    /// Number of tokens, separators included.
    pub fn tokens(&self) -> u64 {
        self.tokens.end - self.tokens.start
    }

    /// Number of documents.
    pub fn documents(&self) -> usize {
        self.documents.len()
    }

    /// Number of sequences of `seq_len` tokens and one label more; windows share only that label. An error if there is none.
    pub fn windows(&self, seq_len: usize) -> Result<u64> {
        match self.tokens().saturating_sub(1).checked_div(seq_len as u64) {
            None | Some(0) => Err(Error::TooShort {
                path: self.corpus.path().to_owned(),
                split: self.name,
                seq_len,
                tokens: self.tokens(),
            }),
            Some(windows) => Ok(windows),
        }
    }

    /// The sequence in window `window`, of `seq_len` tokens.
    pub fn sequence(&self, window: u64, seq_len: usize) -> Result<Sequence> {
        let windows = self.windows(seq_len)?;
        if window >= windows {
            return Err(Error::Window { split: self.name, window, windows, seq_len });
        }
        Ok(self.sequence_unchecked(window, seq_len))
    }

    /// As `sequence`, for a window known to be below `windows(seq_len)`.
    pub(super) fn sequence_unchecked(&self, window: u64, seq_len: usize) -> Sequence {
        let start = self.tokens.start + window * seq_len as u64;
        let end = start + seq_len as u64;
        let tokens = self.corpus.bytes(start..end + 1).iter().map(|&b| i64::from(b)).collect();
        let offset = |n: usize| self.corpus.offset(n);
        let first = partition_point(self.corpus.documents + 1, |n| offset(n) <= start);
        let inside = (first..self.documents.end).map(offset).take_while(|&at| at < end);
        let mut cu_seqlens = vec![0];
        cu_seqlens.extend(inside.map(|at| (at - start) as i64));
        cu_seqlens.push(seq_len as i64);
        Sequence { tokens, cu_seqlens }
    }
}

/// The first of `0..n` for which `before` is false, where it is true up to there; n if it always is.
fn partition_point(n: usize, before: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, n);
    while low < high {
        let middle = low + (high - low) / 2;
        if before(middle) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

fn read_u32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn read_u64(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}
