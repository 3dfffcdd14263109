//! The launches of `kernels/cuda/linear_mma.cu`: one function a kernel, with its shapes.

use tch::{Device, Kind, Tensor};

use super::super::segments::{Call, DecayGrad, Enters, Out, Params, Pass, SEGMENTS, Summing, blocks, plan};
use super::super::{Arg, Gpu, Kernel, Launch, NUMBERS, Program, kernel};
use super::Mma;
use crate::Result;

/// Linear attention with any diagonal decay, on compute capability 8.0 and later.
pub const LINEAR_MMA: Program = Program {
    name: "linear_mma",
    source: include_str!("../../../cuda/linear_mma.cu"),
    headers: &[
        NUMBERS,
        SEGMENTS,
        ("mma.cuh", include_str!("../../../cuda/mma.cuh")),
        ("hopper.cuh", include_str!("../../../cuda/hopper.cuh")),
        ("wgmma.cuh", include_str!("../../../cuda/wgmma.cuh")),
        ("fragments.cuh", include_str!("../../../cuda/fragments.cuh")),
        ("groups.cuh", include_str!("../../../cuda/groups.cuh")),
        ("pairs.cuh", include_str!("../../../cuda/pairs.cuh")),
    ],
};

/// The largest key or value size of one launch: a head wider than that is several, whose outputs add up.
pub const WIDEST: i64 = 128;
/// Channels of K whose shares of a scalar decay's gradient come summed up.
pub const SLICE: i64 = 16;

/// Tokens of a tile of the kernels.
const TILE: i64 = 32;
/// What tiles begin at a multiple of on Hopper, in bytes.
const ALIGNED: i64 = 1024;
/// At least what a variant has beside its tiles, in bytes.
const OTHER_SHARED: i64 = 8 << 10;
/// The same of f16 and f32 where eight warps share the scores.
const OTHER_SHARED_WIDE: i64 = 9 << 10;

/// The form of the decay, as `DECAY` of linear_mma.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    None = 0,
    Scalar = 1,
    Channel = 2,
}

/// What `linear_mma.cu` is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    /// Of the inputs: bf16, f16 or f32.
    pub kind: Kind,
    pub decay: Form,
    /// Whether a decay per channel comes in the inputs' kind, bf16 or f16, rather than in f32.
    pub half_decay: bool,
    pub reverse: bool,
    /// dq, or in reverse dk; otherwise o, or in reverse dv.
    pub outer: bool,
    /// Only what an entering state adds.
    pub late: bool,
    pub dots: bool,
    /// Whether four warps multiply together, as they can on compute capability 9.0, in bf16.
    pub hopper: bool,
    pub dk: i64,
    pub dv: i64,
}

impl Variant {
    /// That makes o, of heads of 128. `major`: of the compute capability.
    pub fn forward(kind: Kind, decay: Form, major: i32) -> Self {
        let [half_decay, reverse, outer, late, dots] = [false; 5];
        let hopper = major == 9 && kind == Kind::BFloat16;
        Self { kind, decay, half_decay, reverse, outer, late, dots, hopper, dk: WIDEST, dv: WIDEST }
    }

    fn kind(&self) -> i64 {
        match self.kind {
            Kind::Half => 1,
            Kind::Float => 2,
            _ => 0,
        }
    }

    fn log_bytes(&self) -> i64 {
        if self.half_decay { 2 } else { 4 }
    }

    fn padded(&self) -> (i64, i64) {
        (64 * blocks(self.dk), 64 * blocks(self.dv))
    }

    pub fn threads(&self) -> i64 {
        let (dk, dv) = self.padded();
        2 * if self.outer { dk } else { dv }
    }

    /// Bytes of the tiles of one stage, as `Layout` of groups.cuh has them; and of what is there once: q' and k' behind all
    /// stages, and what is lost before them. `[q, k]`: whether they are there, and whether q' and k' are; `dots`, `factors`:
    /// whether there is a tile of them.
    fn tiles(&self, keys: [bool; 2], values: [bool; 2], primed: [bool; 2], dots: bool, factors: bool) -> (i64, i64) {
        let (dk, dv) = self.padded();
        let count = |of: [bool; 2]| i64::from(of[0]) + i64::from(of[1]);
        let bytes = if self.kind == Kind::Float { 4 } else { 2 };
        let logs = if self.decay == Form::Channel { dk * self.log_bytes() } else { 0 };
        let numbers = logs + 4 * dk * i64::from(dots);
        let primed = if self.decay != Form::None && self.kind == Kind::Half { 4 * dk * count(primed) } else { 0 };
        let factors = 4 * dk * i64::from(factors);
        let aligned = if self.hopper { ALIGNED } else { 0 };
        (TILE * (bytes * (count(keys) * dk + count(values) * dv) + numbers), TILE * (primed + factors) + aligned)
    }

    fn run_tiles(&self) -> (i64, i64) {
        let Self { reverse, outer, late, dots, .. } = *self;
        let inner = !outer;
        let keys = [inner || reverse || dots, !late && (inner || !reverse || dots)];
        let values = [!late && (outer || !reverse), outer || reverse];
        let primed = [inner || reverse, !late && (inner || !reverse)];
        let channels = self.decay == Form::Channel;
        let factors = channels && outer && self.half_decay;
        self.tiles(keys, values, primed, channels && dots && reverse, factors)
    }

    fn sum_tiles(&self) -> (i64, i64) {
        let one = [self.reverse, !self.reverse];
        self.tiles(one, one, one, false, false)
    }

    /// Stages that fit `together` blocks of a multiprocessor, or if none do one block; and their bytes.
    fn stages(&self, (stage, rest): (i64, i64), together: i64, gpu_shared: i64) -> (i64, i64) {
        let bytes = |stages| stages * stage + rest;
        let fits = |stages, together| together * (bytes(stages) + self.other_shared()) <= gpu_shared;
        let stages = if fits(2, together) || (!fits(1, together) && fits(2, 1)) { 2 } else { 1 };
        (stages, bytes(stages))
    }

    /// Blocks of `threads` that a multiprocessor's registers are to hold, as `AT_ONCE` and `SUM_AT_ONCE` of linear_mma.cu.
    pub fn at_once(&self, threads: i64) -> i64 {
        if self.kind() == 0 { 512 / threads } else { 256 / threads }
    }

    fn sum_threads(&self) -> i64 {
        2 * self.padded().1
    }

    /// Stages of `run` and of `summarize`, with the bytes of dynamic shared memory of both.
    fn shared(&self, gpu_shared: i64) -> [(i64, i64); 2] {
        let stages = |tiles, threads| self.stages(tiles, self.at_once(threads), gpu_shared);
        [stages(self.run_tiles(), self.threads()), stages(self.sum_tiles(), self.sum_threads())]
    }

    fn other_shared(&self) -> i64 {
        if self.kind != Kind::BFloat16 && self.threads() > 128 { OTHER_SHARED_WIDE } else { OTHER_SHARED }
    }

    /// Whether a block's shared memory holds what this variant needs at least.
    fn fits(&self, gpu_shared: i64) -> bool {
        [self.run_tiles(), self.sum_tiles()]
            .iter()
            .all(|(stage, rest)| stage + rest + self.other_shared() <= gpu_shared)
    }

    /// `gpu_shared`: most shared memory of a block, in bytes.
    pub fn defines(&self, gpu_shared: i64) -> Vec<String> {
        let [run, summarize] = self.shared(gpu_shared);
        vec![
            format!("KIND={}", self.kind()),
            format!("DECAY={}", self.decay as i32),
            format!("LOG_BYTES={}", self.log_bytes()),
            format!("REVERSE={}", i32::from(self.reverse)),
            format!("OUTER={}", i32::from(self.outer)),
            format!("INTRA={}", i32::from(!self.late)),
            format!("DOTS={}", i32::from(self.dots)),
            format!("K_BLOCKS={}", blocks(self.dk)),
            format!("V_BLOCKS={}", blocks(self.dv)),
            format!("HOPPER={}", i32::from(self.hopper)),
            format!("STAGES={}", run.0),
            format!("SUM_STAGES={}", summarize.0),
        ]
    }

    fn kernel(&self, gpu: &Gpu, device: Device, name: &str) -> Result<(Kernel, u32)> {
        let shared = i64::from(gpu.shared);
        let kernel = kernel(device, &LINEAR_MMA, &self.defines(shared), name)?;
        let [run, summarize] = self.shared(shared).map(|(_, bytes)| bytes as u32);
        let bytes = if name == "run" { run } else { summarize };
        kernel.allow_shared(bytes)?;
        Ok((kernel, bytes))
    }
}

/// The largest key and value sizes of one launch where a block has `gpu_shared` bytes of shared memory: K is halved where the
/// pass that needs most, that of dk and dlog_decay, would not fit. `major`: of the compute capability.
pub fn widest(kind: Kind, major: i32, gpu_shared: i64) -> (i64, i64) {
    let of =
        |dk| Variant { reverse: true, outer: true, dots: true, dk, ..Variant::forward(kind, Form::Channel, major) };
    (if of(WIDEST).fits(gpu_shared) { WIDEST } else { WIDEST / 2 }, WIDEST)
}

/// A pass over all tokens; which tensors it reads, linear_mma.cu says.
pub struct Run<'a> {
    pub x: &'a Pass<'a>,
    pub d_o: Option<&'a Tensor>,
    /// Whether the output is dq or dk, rather than o or dv.
    pub outer: bool,
    pub out: Out<'a>,
    pub entry_scale: f64,
    /// f32 `[B, T, H, K]`, or for a scalar decay `[B, T, H, K / 16]`: what dq's pass leaves for dk's; may be where that writes,
    /// if it adds nothing to what is there.
    pub dots: Option<&'a Tensor>,
    /// Only dk's pass: to this part's dlog_decay, of the sizes of `dots`.
    pub decay_grad: Option<&'a DecayGrad<'a>>,
}

impl Call<Mma> {
    fn variant(&self, dk: i64, dv: i64) -> Variant {
        let short = |g: &Tensor| self.family.form == Form::Channel && g.kind() != Kind::Float;
        let half_decay = self.log_decay.as_ref().is_some_and(short);
        Variant { half_decay, dk, dv, ..Variant::forward(self.kind, self.family.form, self.family.gpu.major) }
    }

    pub fn summarize(&self, x: &Summing) -> Result<()> {
        let (dk, dv) = (x.key.size()[3], x.value.size()[3]);
        let variant = Variant { reverse: x.reverse, ..self.variant(dk, dv) };
        let (kernel, shared) = variant.kernel(&self.family.gpu, self.device, "summarize")?;
        let params = Params::default()
            .strided(Some(&x.key))
            .strided(Some(&x.value))
            .strided(x.log_decay.as_ref())
            .pointer(Some(&self.plan.all.segments))
            .pointer(Some(&self.plan.all.first))
            .pointer(Some(&x.to.sums))
            .pointer(x.to.decays.as_ref())
            .f32(x.scale)
            .i32(dk)
            .i32(dv)
            .i32(i64::from(x.which))
            .words();
        let launch = Launch { grid: [self.plan.all.blocks, 1, 1], block: variant.sum_threads() as u32, shared };
        // SAFETY: SummarizeParams of linear_mma.cu; tensors of this call's shape on its device.
        unsafe { kernel.launch(launch, &[Arg::Bytes(&params)]) }
    }

    /// Every variant has `combine`; this one is needed anyway.
    pub fn combine_kernel(&self, dk: i64, dv: i64) -> Result<Kernel> {
        let defines = self.variant(dk, dv).defines(i64::from(self.family.gpu.shared));
        kernel(self.device, &LINEAR_MMA, &defines, "combine")
    }

    /// `late`: only what entering states add to o, for the tokens of pieces that one enters.
    pub fn run<'a>(&self, reverse: bool, late: bool, run: &Run<'a>) -> Result<()> {
        let work = if late { &self.plan.entered } else { &self.plan.all };
        let Run { x, d_o, outer, out, entry_scale, dots, decay_grad } = run;
        let ((_, dk), (_, dv)) = (x.part.k, x.part.v);
        let variant = Variant { reverse, outer: *outer, late, dots: dots.is_some(), ..self.variant(dk, dv) };
        let (kernel, shared) = variant.kernel(&self.family.gpu, self.device, "run")?;
        let d_log = decay_grad.map(|grad| &grad.out);
        let adds = |out: Option<&Out>| i64::from(out.is_some_and(|out| out.add));
        let params = Params::default()
            .strided(Some(&x.q))
            .strided(Some(&x.k))
            .strided(Some(&x.v))
            .strided(*d_o)
            .strided(x.log_decay.as_ref())
            .strided(Some(out.to))
            .strided(*dots)
            .strided(d_log.map(|out| out.to))
            .pointer(Some(&work.segments))
            .pointer(Some(&work.first))
            .pointer(Some(x.entries))
            .pointer(decay_grad.map(|grad| grad.states))
            .pointer(decay_grad.and_then(|grad| grad.finals))
            .f32(x.scale)
            .f32(*entry_scale)
            .i32(dk)
            .i32(dv)
            .i32(adds(Some(out)) + 2 * adds(d_log))
            .i32(i64::from(plan::entered(reverse, (true, x.enters == Enters::FromOutside))))
            .words();
        let launch = Launch { grid: [work.blocks, 1, 1], block: variant.threads() as u32, shared };
        // SAFETY: RunParams of linear_mma.cu; tensors of this call's shape on its device.
        unsafe { kernel.launch(launch, &[Arg::Bytes(&params)]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_memory_holds_every_variant() {
        // Of compute capabilities 8.0, 8.6 and 8.9, 9.0.
        for (major, gpu_shared) in [(8, 163 << 10), (8, 99 << 10), (9, 227 << 10)] {
            for kind in [Kind::BFloat16, Kind::Half, Kind::Float] {
                let (dk, dv) = widest(kind, major, gpu_shared);
                assert!(dk == 128 || (gpu_shared < 100 << 10 && kind != Kind::BFloat16));
                let decays =
                    [(Form::None, false), (Form::Scalar, false), (Form::Channel, false), (Form::Channel, true)];
                for (decay, half_decay) in decays.into_iter().filter(|(_, half)| !half || kind != Kind::Float) {
                    let o = Variant { half_decay, dk, dv, ..Variant::forward(kind, decay, major) };
                    let dots = decay != Form::None;
                    let dq = Variant { outer: true, dots, ..o };
                    let dk = Variant { reverse: true, ..dq };
                    for variant in [o, Variant { late: true, ..o }, dq, dk, Variant { reverse: true, ..o }] {
                        for (stages, bytes) in variant.shared(gpu_shared) {
                            assert!(
                                bytes + variant.other_shared() <= gpu_shared,
                                "{variant:?}: {stages} stages, {bytes} of {gpu_shared}"
                            );
                        }
                    }
                }
            }
        }
    }
}
