//! The CUDA kernels among ranks: bf16 linear attention by every scan, with ranks as threads. Where there is no GPU the kernels
//! run on the emulator; where there is one, `parity_nccl` has the same cases.

#[path = "../kernels/tests/emulator/mod.rs"]
mod emulator;

use collectives::local;
use kernels::cuda::linear::supports;
use kernels::linear::Inputs;
use lasp_tests::{cuda_linear_cases, scans};
use tch::{Device, Kind, Tensor};

#[test]
fn linear_attention_errs_at_most_twice_as_much_as_the_textbook() {
    let Some(Device::Cpu) = emulator::device(90) else { return };
    let x = Tensor::zeros([1, 1, 1, 8], (Kind::BFloat16, Device::Cpu));
    assert!(supports(&Inputs::new(&x, &x, &x, None).unwrap()), "the kernels would not run");
    for case in cuda_linear_cases() {
        for ranks in [1, 3] {
            if let Err(error) = local::run(ranks, |group| case.check(&group, &scans(&group)?)) {
                panic!("{}: {error}", case.name);
            }
        }
    }
}
