//! The learning rate: a linear warm-up, then half a cosine down to its minimum at the last step (arXiv 1608.03983).

use crate::config::OptimizerConfig;

/// Learning rate of step `step`, counted from 1, of `steps`.
pub fn learning_rate(config: &OptimizerConfig, step: u64, steps: u64) -> f64 {
    let (lr, min, warmup) = (config.lr, config.min_lr, config.warmup_steps);
    if step <= warmup {
        return lr * step as f64 / warmup as f64;
    }
    let progress = (step - warmup) as f64 / steps.saturating_sub(warmup).max(1) as f64;
    min + 0.5 * (lr - min) * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_then_falls_to_the_minimum() {
        let config = OptimizerConfig { lr: 1.0, min_lr: 0.1, warmup_steps: 4, ..OptimizerConfig::default() };
        assert_eq!(learning_rate(&config, 1, 20), 0.25);
        assert_eq!(learning_rate(&config, 4, 20), 1.0);
        assert!((learning_rate(&config, 12, 20) - 0.55).abs() < 1e-12);
        assert!((learning_rate(&config, 20, 20) - 0.1).abs() < 1e-12);
        let flat = OptimizerConfig { warmup_steps: 0, ..config };
        assert!(learning_rate(&flat, 1, 1) >= 0.1);
    }
}
