//! Methods by their names in a configuration and on the command line. A new method is a file of its own and a line here.

use std::sync::Arc;

use super::attention::{Attention, Lasp2h};
use super::scan::{Lasp2, Scan};
use super::{Error, Result};

/// Names of the scans, for linear layers.
pub const SCANS: &[&str] = &["lasp2"];
/// Names of the methods for softmax layers.
pub const ATTENTIONS: &[&str] = &["lasp2h"];

pub fn scan(name: &str) -> Result<Arc<dyn Scan>> {
    match name {
        "lasp2" => Ok(Arc::new(Lasp2)),
        _ => Err(unknown(name, "linear", SCANS)),
    }
}

pub fn attention(name: &str) -> Result<Arc<dyn Attention>> {
    match name {
        "lasp2h" => Ok(Arc::new(Lasp2h::default())),
        _ => Err(unknown(name, "softmax", ATTENTIONS)),
    }
}

fn unknown(name: &str, kind: &str, known: &[&str]) -> Error {
    Error::Unsupported(format!("method {name:?} for {kind} attention: expected one of {}", known.join(", ")))
}
