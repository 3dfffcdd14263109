//! The parity list with ranks as threads.

use collectives::local;
use lasp_tests::{bf16_linear_cases, determinism, left_product_cases, linear_cases, overlap, scans, softmax_cases};

const RANKS: [usize; 5] = [1, 2, 3, 4, 8];

#[test]
fn linear_attention_on_every_rank() {
    tch::set_num_threads(1);
    for case in linear_cases() {
        for ranks in RANKS {
            if let Err(error) = local::run(ranks, |group| case.check(&group, &scans(&group)?)) {
                panic!("{}: {error}", case.name);
            }
        }
    }
}

#[test]
fn linear_attention_in_bf16_errs_at_most_twice_as_much_as_the_textbook() {
    tch::set_num_threads(1);
    for case in bf16_linear_cases() {
        for ranks in 1..=4 {
            if let Err(error) = local::run(ranks, |group| case.check(&group, &scans(&group)?)) {
                panic!("{}: {error}", case.name);
            }
        }
    }
}

#[test]
fn repeated_runs_of_every_method_give_the_same_bits() {
    tch::set_num_threads(1);
    for ranks in 1..=4 {
        if let Err(error) = local::run(ranks, |group| determinism::check(&group)) {
            panic!("{error}");
        }
    }
}

#[test]
fn the_all_gather_hides_behind_intra_rank_work() {
    tch::set_num_threads(1);
    if let Err(error) = local::run(2, |group| overlap::check(&group)) {
        panic!("{error}");
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

#[test]
fn left_products_on_every_rank() {
    tch::set_num_threads(1);
    for case in left_product_cases() {
        for ranks in RANKS {
            if let Err(error) = local::run(ranks, |group| case.check(&group)) {
                panic!("{}: {error}", case.name);
            }
        }
    }
}
