//! What can go wrong with a sharded sequence.

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot lay {tokens} tokens over {ranks} ranks: expected none or more tokens and at least one rank")]
    Layout { tokens: i64, ranks: usize },
    #[error("cu_seqlens: found {}, expected boundaries that ascend from 0 to the length of the sequence, {tokens}{}", shorten(.found), descends(.descends_at))]
    CuSeqlens { found: Vec<i64>, tokens: i64, descends_at: Option<usize> },
    #[error("{tensor}: found shape {found:?}, expected {expected}")]
    Shape { tensor: &'static str, found: Vec<i64>, expected: String },
    #[error("method {found:?}: expected {expected} ({key})")]
    Method { key: &'static str, found: String, expected: String },
    #[error(
        "{key} = \"auto\" is still to be decided: expected the name of a method here; lasp decides before it starts ranks \
         (parallel.machine), a program of your own must name one"
    )]
    Undecided { key: &'static str },
    #[error("{0}")]
    Unsupported(String),
    #[error(transparent)]
    Kernels(#[from] kernels::Error),
    #[error(transparent)]
    Collectives(#[from] collectives::Error),
    #[error(transparent)]
    Tch(#[from] tch::TchError),
}

impl Error {
    /// For a backward callback, whose errors travel through libtorch as text.
    pub(crate) fn into_kernels(self) -> kernels::Error {
        match self {
            Self::Kernels(error) => error,
            other => kernels::Error::Unsupported(other.to_string()),
        }
    }
}

fn shorten(list: &[i64]) -> String {
    if list.len() <= 12 { format!("{list:?}") } else { format!("{:?}.. ({} numbers)", &list[..12], list.len()) }
}

fn descends(at: &Option<usize>) -> String {
    at.map_or_else(String::new, |at| format!("; it descends after index {at}"))
}
