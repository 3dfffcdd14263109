//! Decays that are constants of a head.

use tch::Tensor;

use super::Result;
use crate::config::DecayKind;

/// The log-decays `[H]` of layer `layer` of `layers`; `None` where there are none or they depend on the data.
///
/// Lightning (arXiv 2501.08313): minus ALiBi's slopes, weaker in later layers. Retention (arXiv 2307.08621):
/// `log(1 - 2^{-5-h})`.
pub fn constant_log_decay(kind: DecayKind, heads: i64, layer: usize, layers: usize) -> Option<Vec<f64>> {
    match kind {
        DecayKind::Lightning => {
            let depth = 1.0 - layer as f64 / (layers.max(2) - 1) as f64 + 1e-5;
            Some(slopes(heads).into_iter().map(|slope| -slope * depth).collect())
        }
        DecayKind::Retention => Some((0..heads).map(|h| (-(2f64.powi(-5 - h as i32))).ln_1p()).collect()),
        DecayKind::None | DecayKind::Token | DecayKind::Channel => None,
    }
}

/// [`constant_log_decay`] as a tensor, f64.
pub fn constant_decay(kind: DecayKind, heads: i64, layer: usize, layers: usize) -> Result<Option<Tensor>> {
    let logs = constant_log_decay(kind, heads, layer, layers);
    Ok(logs.map(|logs| Tensor::f_from_slice(&logs)).transpose()?)
}

/// ALiBi's slopes (arXiv 2108.12409): `2^{-8(h+1)/H}` for H a power of two; else those of the next lower power of two, then
/// every other one of the next higher.
fn slopes(heads: i64) -> Vec<f64> {
    let power = |n: i64| -> Vec<f64> { (1..=n).map(|h| 2f64.powf(-8.0 * h as f64 / n as f64)).collect() };
    let lower = if heads < 1 { 1 } else { 1 << heads.ilog2() };
    let mut slopes = power(lower);
    slopes.extend(power(2 * lower).into_iter().step_by(2).take((heads - lower).max(0) as usize));
    slopes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_alibis() {
        assert_eq!(slopes(8), [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]);
        let twelve = slopes(12);
        assert_eq!(twelve.len(), 12);
        assert_eq!(twelve[8..], [0.5f64.sqrt(), 0.125f64.sqrt(), 0.03125f64.sqrt(), 0.0078125f64.sqrt()]);
    }

    #[test]
    fn constants_are_at_most_zero() {
        for kind in [DecayKind::Lightning, DecayKind::Retention] {
            for layer in 0..4 {
                let logs = constant_decay(kind, 6, layer, 4).unwrap().unwrap();
                assert_eq!(logs.size(), [6]);
                assert!(logs.max().double_value(&[]) < 0.0);
            }
        }
        assert!(constant_decay(DecayKind::Token, 4, 0, 4).unwrap().is_none());
    }
}
