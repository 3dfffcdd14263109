//! Many points: ranges as typed, and the prediction of every combination. What a method cannot do is kept with its reason.

use runtime::config::Config;

use super::{Error, Machine, Method, Prediction, Result, Workload, packing, predict};

/// A point that could not be predicted.
#[derive(Clone, Debug, PartialEq)]
pub struct Refused {
    pub method: String,
    pub gpus: usize,
    pub seq_len: usize,
    pub reason: String,
}

/// `8..1024`: doubled from the first to at most the last; `64K,1M`: these; K and M are 1024 and 1024^2. `option` is for errors.
pub fn numbers(option: &'static str, text: &str) -> Result<Vec<usize>> {
    let wrong = |found: &str| Error::Range {
        option,
        found: found.to_owned(),
        expected: "numbers of at least 1, as in 8..1024 (doubled) or 64K,256K,1M",
    };
    let mut all = Vec::new();
    for part in text.split(',') {
        let bounds = part.split_once("..").unwrap_or((part, part));
        let (Some(first), Some(last)) = (number(bounds.0), number(bounds.1)) else { return Err(wrong(part)) };
        if first > last {
            return Err(wrong(part));
        }
        all.extend(std::iter::successors(Some(first), |n| n.checked_mul(2)).take_while(|n| *n <= last));
    }
    Ok(all)
}

/// `300`, `64K` or `1M`: a number of at least 1; K and M are 1024 and 1024^2.
pub fn number(text: &str) -> Option<usize> {
    let (digits, unit) = match text.char_indices().last()? {
        (at, 'k' | 'K') => (&text[..at], 1 << 10),
        (at, 'm' | 'M') => (&text[..at], 1 << 20),
        _ => (text, 1),
    };
    digits.parse::<usize>().ok()?.checked_mul(unit).filter(|n| *n > 0)
}

/// `1048576` as `1024K`, as papers on long sequences do.
pub fn in_k(tokens: usize) -> String {
    if tokens.is_multiple_of(1024) { format!("{}K", tokens / 1024) } else { tokens.to_string() }
}

/// How a step's sequences are shared out: `dp` groups of GPUs, and `batch` sequences over all groups.
#[derive(Clone, Copy, Debug)]
pub struct Groups {
    pub dp: usize,
    pub batch: usize,
}

impl Groups {
    fn work<'a>(self, config: &'a Config, gpus: usize, seq_len: usize) -> Result<Workload<'a>> {
        let Groups { dp, batch } = self;
        if dp == 0 || !gpus.is_multiple_of(dp) || batch == 0 || !batch.is_multiple_of(dp) {
            return Err(Error::Groups { gpus, dp, batch });
        }
        Ok(Workload { dp, passes: batch / dp, ..Workload::one(config, gpus / dp, seq_len) })
    }
}

/// By length, GPUs and method, in the order given. `documents`: lengths of the documents packed into a sequence, again and again until
/// it ends; none: it is one.
pub fn sweep(
    machine: &Machine,
    config: &Config,
    methods: &[Method],
    gpus: &[usize],
    seq_lens: &[usize],
    groups: Groups,
    documents: &[usize],
) -> Vec<std::result::Result<Prediction, Refused>> {
    let mut points = Vec::new();
    for &seq_len in seq_lens {
        let cu_seqlens = (!documents.is_empty()).then(|| packing::repeated(documents, seq_len));
        for &gpus in gpus {
            for method in methods {
                let point = groups
                    .work(config, gpus, seq_len)
                    .and_then(|work| predict(machine, method, &Workload { cu_seqlens: cu_seqlens.as_deref(), ..work }));
                points.push(point.map_err(|error| Refused {
                    method: method.name.clone(),
                    gpus,
                    seq_len,
                    reason: error.to_string(),
                }));
            }
        }
    }
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_share_out_gpus_and_sequences() {
        let config = Config::from_toml_str("[model]\ndim = 512\n", "test", &[]).unwrap();
        let machine = Machine::load("h100-dgx").unwrap();
        let at = |dp, batch| {
            let groups = Groups { dp, batch };
            let methods = [Method::parse("lasp2").unwrap()];
            sweep(&machine, &config, &methods, &[16], &[1 << 18], groups, &[]).pop().unwrap()
        };
        let [one, two, four] = [(1, 1), (2, 2), (2, 4)].map(|(dp, batch)| at(dp, batch).unwrap());
        // Half the GPUs for each of two sequences; then two sequences, one after the other, and gradients summed once.
        assert!(
            two.step_s > 1.5 * one.step_s && (1.5..2.0).contains(&(four.step_s / two.step_s)),
            "{one:?} {two:?} {four:?}"
        );
        assert_eq!((two.gpus, two.dp), (16, 2));
        assert!((four.tokens_per_s - f64::from(4 << 18) / four.step_s).abs() < 1.0);
        let uneven = at(3, 3).unwrap_err().reason;
        assert!(uneven.contains("16 GPUs") && uneven.contains("--dp"), "{uneven}");
    }

    #[test]
    fn ranges_double_and_lists_do_not() {
        assert_eq!(numbers("--gpus", "8..64").unwrap(), [8, 16, 32, 64]);
        assert_eq!(numbers("--gpus", "8..100,3").unwrap(), [8, 16, 32, 64, 3]);
        assert_eq!(numbers("--seq-lens", "64K..256K,1M").unwrap(), [65536, 131072, 262144, 1048576]);
        assert_eq!(in_k(1048576), "1024K");
        for wrong in ["", "8..", "0", "64..8", "8,,9", "1T"] {
            let message = numbers("--gpus", wrong).unwrap_err().to_string();
            assert!(message.starts_with("--gpus: found `"), "{message}");
        }
    }
}
