//! What `kernels/emulator` is there to find, in kernels that are wrong.

mod emulator;

use std::process::Command;

use kernels::cuda::{Arg, Launch, Program, kernel};
use tch::{Device, Kind, Tensor};

const WRONG: Program = Program {
    name: "wrong",
    source: r#"
#include "hopper.cuh"

extern "C" __global__ void meets_nobody(float* out, const float*) {
    if (threadIdx.x < 32) named_sync(1, 64);
}

extern "C" __global__ void half_a_warp(float* out, const float*) {
    if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(~0u, 1.f, 1);
}

extern "C" __global__ void reads_what_nobody_wrote(float* out, const float*) {
    __shared__ float numbers[64], others[64];
    numbers[threadIdx.x] = 1.f;
    out[threadIdx.x] = others[threadIdx.x];
}

extern "C" __global__ void reads_what_its_last_round_wrote(float* out, const float* in) {
    for (int i = 0; i < 2; ++i) {
        float number[1];
        if (i == 0) number[0] = in[threadIdx.x];
        out[threadIdx.x] = number[0];
    }
}

extern "C" __global__ void reads_without_syncing(float* out, const float*) {
    __shared__ float numbers[64];
    numbers[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = numbers[63 - threadIdx.x];
}

extern "C" __global__ void writes_beyond_the_end(float* out, const float*) {
    extern __shared__ float room[];
    room[threadIdx.x + 1] = 1.f;
}

extern "C" __global__ void writes_beyond_an_array(float* out, const float*) {
    __shared__ float numbers[64];
    numbers[threadIdx.x + 1] = 1.f;
}

extern "C" __global__ void does_not_wait_for_a_copy(float* out, const float* in) {
    extern __shared__ float room[];
    __shared__ u64 bar;
    if (threadIdx.x == 0) {
        barrier_init(shared_address(&bar), 1);
        barrier_expect(shared_address(&bar), 256);
        bulk_load(shared_address(room), in, shared_address(&bar), 256);
    }
    __syncthreads();
    out[threadIdx.x] = room[threadIdx.x];
    barrier_wait(shared_address(&bar), 0);
}

extern "C" __global__ void expects_too_much(float* out, const float* in) {
    extern __shared__ float room[];
    __shared__ u64 bar;
    if (threadIdx.x == 0) {
        barrier_init(shared_address(&bar), 1);
        barrier_expect(shared_address(&bar), 512);
        bulk_load(shared_address(room), in, shared_address(&bar), 256);
    }
    __syncthreads();
    barrier_wait(shared_address(&bar), 0);
}
"#,
    headers: &[],
};

/// One block of 64 threads: what it writes, or the error.
fn run(name: &str, order: u32) -> Result<Tensor, String> {
    let out = Tensor::zeros([64], (Kind::Float, Device::Cpu));
    let input = Tensor::ones([64], (Kind::Float, Device::Cpu));
    let kernel = kernel(Device::Cpu, &WRONG, &[], name).unwrap();
    let launch = Launch { grid: [1, 1, 1], block: 64, shared: 256 };
    // SAFETY: two pointers to 64 numbers; what is wrong with the kernels stays inside the emulator.
    #[allow(unsafe_code)]
    let result =
        emulator::in_order(order, || unsafe { kernel.launch(launch, &[Arg::Tensor(&out), Arg::Tensor(&input)]) });
    result.map(|()| out).map_err(|error| error.to_string())
}

#[test]
fn the_emulator_finds_mistakes() {
    match emulator::device(90) {
        Some(Device::Cpu) => (),
        Some(_) => return println!("not tested: there is a GPU"),
        None => return,
    }
    let error = |name, part: &str| {
        let error = run(name, 0).unwrap_err();
        assert!(error.contains(name) && error.contains(part), "{name}: {error}");
    };
    error("meets_nobody", "deadlock:\n  32 threads at barrier 1, the first is 0");
    error("half_a_warp", "deadlock:\n  32 threads at a shuffle");
    error("writes_beyond_the_end", "beyond the end of dynamic shared memory, at byte 256");
    error("writes_beyond_an_array", "beyond the end of a variable in shared memory, at byte 256");
    error("expects_too_much", "deadlock:\n  64 threads at an mbarrier");
    let finite = |name, order| bool::try_from(run(name, order).unwrap().isfinite().all()).unwrap();
    assert!(!finite("reads_what_nobody_wrote", 0));
    // Only later compilers can tell.
    let version = Command::new("g++").arg("-dumpversion").output().unwrap().stdout;
    let major: u32 = String::from_utf8_lossy(&version).trim().split('.').next().unwrap().parse().unwrap();
    assert!(major < 12 || run("reads_what_its_last_round_wrote", 0).unwrap().double_value(&[0]) < -1e38);
    assert!(!finite("reads_without_syncing", 0) && !finite("reads_without_syncing", 1));
    assert!(!finite("does_not_wait_for_a_copy", 0) && finite("does_not_wait_for_a_copy", 1));
}
