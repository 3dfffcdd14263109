//! The launches of `kernels/cuda/linear.cu`: one function a kernel, with its shapes.

use tch::{Device, Tensor};

use super::super::driver::{TileMap, driver};
use super::super::segments::{Call, DecayGrad, Enters, Out, Params, Pass, SEGMENTS, Summing, aligned, blocks, plan};
use super::super::{Arg, Kernel, Launch, NUMBERS, Program, kernel, stream};
use super::Hopper;
use crate::{Error, Result};

/// Linear attention with a scalar decay, on Hopper.
pub const LINEAR: Program = Program {
    name: "linear",
    source: include_str!("../../../cuda/linear.cu"),
    headers: &[
        NUMBERS,
        SEGMENTS,
        ("chunks.cuh", include_str!("../../../cuda/chunks.cuh")),
        ("mma.cuh", include_str!("../../../cuda/mma.cuh")),
        ("hopper.cuh", include_str!("../../../cuda/hopper.cuh")),
        ("wgmma.cuh", include_str!("../../../cuda/wgmma.cuh")),
    ],
};

/// The largest key or value size of one launch: a head wider than that is several, whose outputs add up.
pub const WIDEST: i64 = 128;

/// Segments of a chain in which `run` looks back, at most. On an H200, at 16,384 tokens, it saves 16 us with 8 of them and 5 us with 16
/// (benches/runs/2026-11-30-h200-b).
pub const LONGEST: i64 = 16;

/// Bytes of a chunk of 64 channels.
const BLOCK: i64 = 8192;
const SUM_STAGES: i64 = 5;

/// What `linear.cu` is compiled for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Variant {
    pub decay: bool,
    pub reverse: bool,
    /// dv and dk at once, backwards in time.
    pub dual: bool,
    /// Only what an entering state adds.
    pub late: bool,
    pub dots: bool,
    /// Sums up its segments itself.
    pub looks_back: bool,
    /// Sizes of y and of z.
    pub dk: i64,
    pub dv: i64,
}

impl Variant {
    fn stages(&self) -> i64 {
        if self.late {
            4
        } else if self.dual || self.dots {
            2
        } else {
            3
        }
    }

    pub fn defines(&self) -> Vec<String> {
        vec![
            format!("DECAY={}", i32::from(self.decay)),
            format!("REVERSE={}", i32::from(self.reverse)),
            format!("DUAL={}", i32::from(self.dual)),
            format!("INTRA={}", i32::from(!self.late)),
            format!("DOTS={}", i32::from(self.dots)),
            format!("LOOK_BACK={}", i32::from(self.looks_back)),
            format!("K_BLOCKS={}", blocks(self.dk)),
            format!("V_BLOCKS={}", blocks(self.dv)),
            format!("STAGES={}", self.stages()),
            format!("SUM_STAGES={SUM_STAGES}"),
        ]
    }

    /// Shared memory of `run` and of `summarize`, in bytes; tiles begin at multiples of 1024.
    fn shared(&self) -> (u32, u32) {
        let (k, v) = (blocks(self.dk), blocks(self.dv));
        let x = k.max(v);
        let stage = match self {
            Self { late: true, .. } => x,
            Self { dual: true, .. } => 2 * x + k + v,
            Self { dots: true, .. } => x + k + 2 * v,
            _ => x + k + v,
        };
        let exchange = if self.dual && self.dots { 2 } else { 0 };
        let run = (self.stages() * stage + 2 * k * v + exchange) * BLOCK + 1024;
        let summarize = SUM_STAGES * (k + v) * BLOCK + 1024;
        (run as u32, summarize as u32)
    }

    fn kernel(&self, device: Device, name: &str) -> Result<Kernel> {
        let kernel = kernel(device, &LINEAR, &self.defines(), name)?;
        let (run, summarize) = self.shared();
        kernel.allow_shared(if name == "run" { run } else { summarize })?;
        Ok(kernel)
    }
}

/// Whether TMA can read a `[B, T, H, D]` tensor where it lies.
pub fn tileable(x: &Tensor) -> bool {
    aligned(x) && x.size().iter().zip(x.stride()).all(|(&size, stride)| size == 1 || stride > 0)
}

fn tile_map(x: &Tensor) -> Result<TileMap> {
    let (sizes, strides) = (x.size(), x.stride());
    // The stride of a dimension of one is never used, but has to be a valid one.
    let stride = |i: usize| if sizes[i] == 1 { 16 } else { 2 * strides[i] as u64 };
    let size = |i: usize| sizes[i] as u64;
    driver()?.tile_map(x.data_ptr() as u64, [size(3), size(1), size(2), size(0)], [stride(1), stride(2), stride(0)])
}

/// A pass over all tokens, in the names of linear.cu.
pub struct Run<'a> {
    /// `entries`, `enters` and `scale` count, the tensors are those below.
    pub pass: &'a Pass<'a>,
    pub x: &'a Tensor,
    pub y: &'a Tensor,
    pub z: &'a Tensor,
    pub out: Out<'a>,
    /// `dual`: the second x and output. `dots`: what the output is multiplied with, and no output.
    pub x2: Option<&'a Tensor>,
    pub out2: Option<Out<'a>>,
    /// Entries are `[slots, V, K]` of y and z that have changed places.
    pub transposed: bool,
    /// Of entries, and of the sums of which they are made.
    pub entry_scale: f64,
    pub sum_scale: f64,
    pub dots: Option<&'a Tensor>,
    /// With `dots` and `dual`.
    pub pairs: Option<&'a Tensor>,
}

impl Call<Hopper> {
    fn decay(&self) -> bool {
        self.log_decay.is_some()
    }

    fn forward_variant(&self, dk: i64, dv: i64) -> Variant {
        Variant { decay: self.decay(), dk, dv, ..Variant::default() }
    }

    /// `key` is y, `value` z.
    pub fn summarize(&self, x: &Summing) -> Result<()> {
        let (dk, dv, reverse) = (x.key.size()[3], x.value.size()[3], x.reverse);
        let variant = Variant { decay: self.decay(), reverse, dual: reverse, dk, dv, ..Variant::default() };
        let kernel = variant.kernel(self.device, "summarize")?;
        let params = Params::default()
            .map(&tile_map(&x.key)?)
            .map(&tile_map(&x.value)?)
            .pointer(Some(&self.plan.all.segments))
            .pointer(Some(&self.plan.all.first))
            .pointer(Some(&x.to.sums))
            .pointer(x.to.decays.as_ref())
            .strided(x.log_decay.as_ref())
            .f32(x.scale)
            .i32(dk)
            .i32(dv)
            .i32(i64::from(x.which))
            .words();
        let launch = Launch { grid: [self.plan.all.blocks, 1, 1], block: 256, shared: variant.shared().1 };
        // SAFETY: SummarizeParams of linear.cu; tensors of this call's shape on its device.
        unsafe { kernel.launch(launch, &[Arg::Bytes(&params)]) }
    }

    /// Every variant has `combine`; this one is needed anyway.
    pub fn combine_kernel(&self, dk: i64, dv: i64) -> Result<Kernel> {
        kernel(self.device, &LINEAR, &self.forward_variant(dk, dv).defines(), "combine")
    }

    /// `late`: only what entering states add, to the tokens of pieces that one enters.
    pub fn run(&self, reverse: bool, late: bool, run: &Run) -> Result<()> {
        let work = if late { &self.plan.entered } else { &self.plan.all };
        let (dk, dv) = (run.y.size()[3], run.z.size()[3]);
        let (dual, looks_back) = (run.out2.is_some(), run.pass.enters == Enters::Unknown);
        let variant =
            Variant { decay: self.decay(), reverse, dual, late, dots: run.dots.is_some(), looks_back, dk, dv };
        let kernel = variant.kernel(self.device, "run")?;
        if looks_back {
            // Its flags are the plan's, and its entries and sums lie as y and z do.
            assert!(!late && !run.transposed, "a pass that cannot look back");
            let stream = stream(kernel.gpu())? as usize;
            if stream != self.plan.stream {
                return Err(Error::Unsupported("a call's passes on several streams".to_owned()));
            }
        }
        let room = |numbers: i64| looks_back.then(|| self.empty(&[self.plan.slots, numbers])).transpose();
        let (sums, decays) = (room(64 * 64 * blocks(dk) * blocks(dv))?, room(1)?);
        let signals = |start| looks_back.then(|| self.plan.signals.f_narrow(0, start, 1)).transpose();
        let (out, out2) = (&run.out, run.out2.as_ref().unwrap_or(&run.out));
        let (row, column) = if run.transposed { (1, dk) } else { (dv, 1) };
        let params = Params::default()
            .map(&tile_map(run.x)?)
            .map(&tile_map(run.y)?)
            .map(&tile_map(run.z)?)
            .map(&tile_map(run.x2.unwrap_or(run.x))?)
            .map(&tile_map(out.to)?)
            .map(&tile_map(out2.to)?)
            .strided(Some(out.to))
            .strided(Some(out2.to))
            .pointer(run.dots)
            .pointer(run.pairs)
            .pointer(Some(&work.segments))
            .pointer(Some(&work.first))
            .pointer(Some(run.pass.entries))
            .i32(row)
            .i32(column)
            .pointer(looks_back.then_some(&self.plan.chains))
            .pointer(sums.as_ref())
            .pointer(decays.as_ref())
            .pointer(signals(2)?.as_ref())
            .pointer(signals(0)?.as_ref())
            .strided(self.log_decay.as_ref())
            .f32(run.pass.scale)
            .f32(run.entry_scale)
            .f32(run.sum_scale)
            .i32(self.t)
            .i32(dk)
            .i32(dv)
            .i32(out.to.size()[3])
            .i32(out2.to.size()[3])
            .i32(self.h)
            .i32(i64::from(out.add) + 2 * i64::from(out2.add))
            .i32(i64::from(plan::entered(reverse, (true, run.pass.enters == Enters::FromOutside))))
            .i32(i64::from(plan::entered(!reverse, (true, false))))
            .words();
        let launch = Launch { grid: [work.blocks, 1, 1], block: 512, shared: variant.shared().0 };
        // SAFETY: RunParams of linear.cu; tensors of this call's shape on its device.
        unsafe { kernel.launch(launch, &[Arg::Bytes(&params)]) }
    }

    /// dlog_decay, from what the passes have left and the gradients `exits` `[slots, K, V]` of the states at the segments' ends.
    pub fn decay_gradient(&self, grad: &DecayGrad, keys: &Tensor, pairs: &Tensor, exits: &Tensor) -> Result<()> {
        let (dk, dv) = (exits.size()[1], exits.size()[2]);
        let kernel = kernel(self.device, &LINEAR, &self.forward_variant(dk, dv).defines(), "decay_gradient")?;
        let params = Params::default()
            .pointer(Some(&self.plan.all.segments))
            .pointer(Some(grad.dots))
            .pointer(Some(keys))
            .pointer(Some(pairs))
            .pointer(Some(grad.states))
            .pointer(grad.finals)
            .pointer(Some(exits))
            .pointer(Some(grad.out.to))
            .strided(self.log_decay.as_ref())
            .i32(dk * dv)
            .i32(self.t)
            .i32(self.h)
            .i32(i64::from(plan::entered(true, (true, grad.finals.is_some()))))
            .i32(i64::from(grad.out.add))
            .words();
        let launch = Launch { grid: [self.plan.all.count, 1, 1], block: 256, shared: 0 };
        // SAFETY: DecayGradientParams of linear.cu.
        unsafe { kernel.launch(launch, &[Arg::Bytes(&params)]) }
    }
}
