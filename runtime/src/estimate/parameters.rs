//! Parameters by class, from the list that the model itself is made of.

use serde::Serialize;

use crate::config::{LayerKind, ModelConfig};
use crate::model;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Parameters {
    /// The token embedding and, where it is not the same, the output projection.
    pub embedding: i64,
    pub linear_attention: i64,
    pub softmax_attention: i64,
    pub mlp: i64,
    pub norms: i64,
    pub total: i64,
    /// Matrices of the layers: what a token is multiplied with, but for the output projection.
    #[serde(skip)]
    pub(crate) matrices: i64,
}

impl Parameters {
    pub fn count(config: &ModelConfig) -> Parameters {
        let kinds = config.layer_kinds();
        let mut counted = Parameters::default();
        for spec in model::specs(config) {
            let layer =
                spec.name.strip_prefix("layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
            let class = match layer.and_then(|layer| kinds.get(layer)) {
                _ if spec.name.ends_with("norm") => &mut counted.norms,
                None => &mut counted.embedding,
                Some(_) if spec.name.contains(".mlp.") => &mut counted.mlp,
                Some(LayerKind::Linear) => &mut counted.linear_attention,
                Some(LayerKind::Softmax) => &mut counted.softmax_attention,
            };
            *class += spec.numel();
            counted.total += spec.numel();
            if layer.is_some() && spec.shape.len() == 2 {
                counted.matrices += spec.numel();
            }
        }
        counted
    }
}
