//! Model FLOPs utilisation: the floating-point operations that a step needs, over those that the devices could have done in
//! its time (PaLM, arXiv 2204.02311, appendix B).
//!
//! `6 N` a token for the matrices, N the parameters but for an embedding that is not also the output projection; for every
//! softmax layer `6 H K (L + 1)`, the causal half of the scores; for every linear layer `12 H K^2`, each token's part in
//! the state and its reading of it, forward once and backward twice. What activation checkpointing computes again does not
//! count.

use tch::Device;

use crate::config::{Config, LayerKind};

/// Floating-point operations of one token's training, of a model of `parameters` parameters.
pub fn flops_per_token(config: &Config, parameters: i64) -> f64 {
    let model = &config.model;
    let lookup = if model.tied { 0 } else { model.vocab * model.dim };
    let (heads, width, tokens) = (model.heads as f64, model.head_dim() as f64, config.train.seq_len as f64);
    let mixers: f64 = model
        .layer_kinds()
        .into_iter()
        .map(|kind| match kind {
            LayerKind::Softmax => 6.0 * heads * width * (tokens + 1.0),
            LayerKind::Linear => 12.0 * heads * width * width,
        })
        .sum();
    6.0 * (parameters - lookup) as f64 + mixers
}

/// Dense bf16 FLOP/s of a device: `train.peak_tflops`, or from its name, by the vendor's data sheets.
pub fn peak(config: &Config, device: Device) -> Option<f64> {
    if config.train.peak_tflops > 0.0 {
        return Some(config.train.peak_tflops * 1e12);
    }
    let name = if device.is_cuda() { kernels::cuda::name(device).ok()? } else { return None };
    [("H100", 989e12), ("H200", 989e12), ("A100", 312e12)]
        .into_iter()
        .find_map(|(model, peak)| name.contains(model).then_some(peak))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_hand() {
        let text = "[model]\nvocab = 256\ndim = 64\nlayers = 4\nheads = 4\nkv_heads = 2\npattern = \"LN\"\ntied = false\n\
                    [train]\nseq_len = 99\npeak_tflops = 2.5\n";
        let config = Config::from_toml_str(text, "test", &[]).unwrap();
        // H K = 64, K = 16; the embedding has 256 x 64 numbers.
        let expected = 6.0 * (100_000.0 - 16_384.0) + 2.0 * (6.0 * 64.0 * 100.0) + 2.0 * (12.0 * 64.0 * 16.0);
        assert_eq!(flops_per_token(&config, 100_000), expected);
        assert_eq!(peak(&config, Device::Cpu), Some(2.5e12));
    }
}
