//! The parity list with ranks as threads.

use collectives::local;
use lasp_tests::{linear_cases, softmax_cases};

const RANKS: [usize; 5] = [1, 2, 3, 4, 8];

#[test]
fn linear_attention_on_every_rank() {
    tch::set_num_threads(1);
    for case in linear_cases() {
        for ranks in RANKS {
            if let Err(error) = local::run(ranks, |group| case.check(&group)) {
                panic!("{}: {error}", case.name);
            }
        }
    }
}

#[test]
fn softmax_attention_on_every_rank() {
    tch::set_num_threads(1);
    for case in softmax_cases() {
        for ranks in RANKS {
            if let Err(error) = local::run(ranks, |group| case.check(&group)) {
                panic!("{}: {error}", case.name);
            }
        }
    }
}
