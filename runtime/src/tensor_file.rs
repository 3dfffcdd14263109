//! Tensors in safetensors files, as PyTorch and everyone else writes them: every kind bit for bit, in both directions.
//! A file is written aside and renamed, so that it is there whole or not at all.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata, SafeTensorError, SafeTensors, TensorInfo};
use tch::{Device, Kind, TchError, Tensor};

use crate::atomic::{self, Failure};
use crate::mapped;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: std::io::Error },
    #[error("{} is damaged or no safetensors file: {source}", path.display())]
    Format { path: PathBuf, source: SafeTensorError },
    #[error("tensor {tensor} of {} has elements of kind {found}; expected one of {expected}", path.display())]
    Kind { path: PathBuf, tensor: String, found: String, expected: String },
    #[error("tensor {tensor} of {}: found {found}, expected {expected}", path.display())]
    Content { path: PathBuf, tensor: String, found: String, expected: &'static str },
    #[error("tensor {tensor} of {}: {source}", path.display())]
    Tch { path: PathBuf, tensor: String, source: TchError },
}

const KINDS: [(Kind, Dtype); 10] = [
    (Kind::Double, Dtype::F64),
    (Kind::Float, Dtype::F32),
    (Kind::BFloat16, Dtype::BF16),
    (Kind::Half, Dtype::F16),
    (Kind::Int64, Dtype::I64),
    (Kind::Int, Dtype::I32),
    (Kind::Int16, Dtype::I16),
    (Kind::Int8, Dtype::I8),
    (Kind::Uint8, Dtype::U8),
    (Kind::Bool, Dtype::BOOL),
];

/// Every tensor of the file at `path`, by name, on `device`, in the kind it was written.
pub fn read(path: &Path, device: Device) -> Result<BTreeMap<String, Tensor>> {
    let map = mapped::map(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let file = SafeTensors::deserialize(&map).map_err(|source| Error::Format { path: path.to_owned(), source })?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter() {
        let Some(&(kind, _)) = KINDS.iter().find(|(_, dtype)| *dtype == view.dtype()) else {
            return Err(Error::Kind {
                path: path.to_owned(),
                tensor: name.to_owned(),
                found: format!("{:?}", view.dtype()),
                expected: expected(|(_, dtype)| format!("{dtype:?}")),
            });
        };
        let bytes = view.data();
        if let Some(other) = bytes.iter().find(|&&byte| kind == Kind::Bool && byte > 1) {
            return Err(Error::Content {
                path: path.to_owned(),
                tensor: name.to_owned(),
                found: format!("the truth value {other}"),
                expected: "0 or 1",
            });
        }
        let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
        // `deserialize` has checked that the bytes are as many as shape and kind need.
        let tensor = Tensor::f_from_data_size(bytes, &shape, kind).and_then(|tensor| tensor.f_to_device(device));
        tensors.insert(name.to_owned(), tensor.map_err(|source| failure(path, name, source))?);
    }
    Ok(tensors)
}

/// Writes `tensors`, of any device and layout, and `metadata` (pairs of strings) to `path`; an earlier file there is
/// replaced at the end or, on any error, kept. The same tensors give the same bytes. Needs the memory of the largest one.
pub fn write<S, T>(path: &Path, tensors: &[(S, T)], metadata: &[(&str, &str)]) -> Result<()>
where
    S: AsRef<str>,
    T: Borrow<Tensor>,
{
    let entries = arrange(path, tensors)?;
    let header = header(path, &entries, metadata)?;
    let mut buffer = Vec::new();
    let written = atomic::replace(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        for entry in &entries {
            buffer.resize(entry.bytes, 0);
            let copied = entry.tensor.f_copy_data_u8(&mut buffer, entry.tensor.numel());
            copied.map_err(|source| Failure::Source(failure(path, entry.name, source)))?;
            file.write_all(&buffer)?;
        }
        Ok(())
    });
    written.map_err(|failure| failure.named(|source| Error::Write { path: path.to_owned(), source }))
}

struct Entry<'a> {
    name: &'a str,
    tensor: &'a Tensor,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: usize,
}

/// Checks names and kinds, and orders by falling element size, so that every tensor is aligned, then by name.
fn arrange<'a, S: AsRef<str>, T: Borrow<Tensor>>(path: &Path, tensors: &'a [(S, T)]) -> Result<Vec<Entry<'a>>> {
    let mut names = BTreeSet::new();
    let mut entries = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let (name, tensor) = (name.as_ref(), tensor.borrow());
        if !names.insert(name) {
            return Err(Error::Content {
                path: path.to_owned(),
                tensor: name.to_owned(),
                found: "its name twice".to_owned(),
                expected: "distinct names",
            });
        }
        let kind = tensor.f_kind().map_err(|source| failure(path, name, source))?;
        let Some(&(_, dtype)) = KINDS.iter().find(|(known, _)| *known == kind) else {
            return Err(Error::Kind {
                path: path.to_owned(),
                tensor: name.to_owned(),
                found: format!("{kind:?}"),
                expected: expected(|(kind, _)| format!("{kind:?}")),
            });
        };
        entries.push(Entry {
            name,
            tensor,
            dtype,
            shape: tensor.size().iter().map(|&size| size as usize).collect(),
            bytes: tensor.numel() * kind.elt_size_in_bytes(),
        });
    }
    entries.sort_by(|a, b| b.dtype.bitsize().cmp(&a.dtype.bitsize()).then(a.name.cmp(b.name)));
    Ok(entries)
}

/// The JSON header, padded with spaces to a multiple of 8 bytes.
fn header(path: &Path, entries: &[Entry], metadata: &[(&str, &str)]) -> Result<Vec<u8>> {
    let mut end = 0;
    let infos = entries.iter().map(|entry| {
        let start = end;
        end += entry.bytes;
        let info = TensorInfo { dtype: entry.dtype, shape: entry.shape.clone(), data_offsets: (start, end) };
        (entry.name.to_owned(), info)
    });
    let infos = infos.collect();
    let pairs: HashMap<String, String> =
        metadata.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    let pairs = (!pairs.is_empty()).then_some(pairs);
    let mut json = Metadata::new(pairs, infos)
        .and_then(|metadata| Ok(serde_json::to_vec(&metadata)?))
        .map_err(|source| Error::Format { path: path.to_owned(), source })?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok(json)
}

fn failure(path: &Path, tensor: &str, source: TchError) -> Error {
    Error::Tch { path: path.to_owned(), tensor: tensor.to_owned(), source }
}

fn expected(name: impl Fn(&(Kind, Dtype)) -> String) -> String {
    KINDS.iter().map(name).collect::<Vec<_>>().join(", ")
}
