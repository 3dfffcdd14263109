//! One training sequence: its tokens with one more for the last label, and where its documents begin.

/// A label that counts neither in the loss nor in the number of tokens. No label of a corpus is one.
pub const IGNORE_INDEX: i64 = -100;

/// Tokens of one whole sequence, before any rank takes its share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// `[L + 1]`: the last one is only a label.
    pub tokens: Vec<i64>,
    /// `[N + 1]`: where each of the N documents begins, in tokens; starts with 0 and ends with L. A sequence that begins
    /// inside a document has the tail of it as its first.
    pub cu_seqlens: Vec<i64>,
}

impl Sequence {
    /// `[L]`: what the model reads.
    pub fn inputs(&self) -> &[i64] {
        &self.tokens[..self.tokens.len().saturating_sub(1)]
    }

    /// `[L]`: at each position the next token, so shifted before the sequence is sharded.
    pub fn labels(&self) -> &[i64] {
        self.tokens.get(1..).unwrap_or_default()
    }

    /// The same tokens as a single document: neither state nor attention stops inside.
    pub fn joined(mut self) -> Self {
        self.cu_seqlens = vec![0, self.inputs().len() as i64];
        self
    }
}
