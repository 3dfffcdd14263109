//! The launches of `kernels/cuda/linear_mma.cu`: one function a kernel, with its shapes.

use tch::{Device, Kind, Tensor};

use super::super::linear::plan::{Cut, FIRST, FOLLOWED, FOLLOWS, LAST, Plan};
use super::super::{Arg, Gpu, Kernel, Launch, NUMBERS, Program, gpu, kernel};
use crate::linear::Piece;
use crate::{Error, Result};

/// Linear attention with any diagonal decay, on compute capability 8.0 and later.
pub const LINEAR_MMA: Program = Program {
    name: "linear_mma",
    source: include_str!("../../../cuda/linear_mma.cu"),
    headers: &[
        NUMBERS,
        ("mma.cuh", include_str!("../../../cuda/mma.cuh")),
        ("fragments.cuh", include_str!("../../../cuda/fragments.cuh")),
        ("groups.cuh", include_str!("../../../cuda/groups.cuh")),
    ],
};

/// The largest key or value size of one launch: a head wider than that is several, whose outputs add up.
const WIDEST: i64 = 128;
/// Channels of K whose shares of a scalar decay's gradient come summed up.
pub const SLICE: i64 = 16;

/// Tokens of a chunk of the plan, and of a tile of the kernels.
const CHUNK: i64 = 64;
const TILE: i64 = 32;
/// More than what any variant has beside its tiles, in bytes.
const OTHER_SHARED: i64 = 8 << 10;

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
    /// o, or in reverse dv; and dq, or in reverse dk.
    pub inner: bool,
    pub outer: bool,
    /// Only what an entering state adds.
    pub late: bool,
    pub dots: bool,
    pub dk: i64,
    pub dv: i64,
}

fn blocks(channels: i64) -> i64 {
    (channels + 63) / 64
}

impl Variant {
    /// That makes o, of heads of 128.
    pub fn forward(kind: Kind, decay: Form) -> Self {
        let [half_decay, reverse, outer, late, dots] = [false; 5];
        Self { kind, decay, half_decay, reverse, inner: true, outer, late, dots, dk: WIDEST, dv: WIDEST }
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

    fn threads(&self) -> i64 {
        let (dk, dv) = self.padded();
        2 * (i64::from(self.inner) * dv + i64::from(self.outer) * dk)
    }

    /// Bytes of the tiles of one stage, and of q' and k' behind them, as `Layout` of groups.cuh has them. `[q, k]`: whether
    /// they are there, and whether q' and k' are; `dots`, `factors`: whether there is a tile of them.
    fn tiles(&self, keys: [bool; 2], values: [bool; 2], primed: [bool; 2], dots: bool, factors: bool) -> (i64, i64) {
        let (dk, dv) = self.padded();
        let count = |of: [bool; 2]| i64::from(of[0]) + i64::from(of[1]);
        let bytes = if self.kind == Kind::Float { 4 } else { 2 };
        let logs = if self.decay == Form::Channel { dk * self.log_bytes() } else { 0 };
        let numbers = logs + 4 * dk * i64::from(dots);
        let primed = if self.decay != Form::None && self.kind == Kind::Half { 4 * dk * count(primed) } else { 0 };
        let factors = 4 * dk * i64::from(factors);
        (TILE * (bytes * (count(keys) * dk + count(values) * dv) + numbers), TILE * (primed + factors))
    }

    fn run_tiles(&self) -> (i64, i64) {
        let Self { reverse, inner, outer, late, dots, .. } = *self;
        let keys = [inner || reverse || dots, !late && (inner || !reverse || dots)];
        let values = [!late && (outer || !reverse), outer || reverse];
        let primed = [inner || reverse, !late && (inner || !reverse)];
        let channels = self.decay == Form::Channel;
        let factors = channels && outer && (inner || self.half_decay);
        self.tiles(keys, values, primed, channels && dots && reverse, factors)
    }

    fn sum_tiles(&self) -> (i64, i64) {
        let one = [self.reverse, !self.reverse];
        self.tiles(one, one, one, false, false)
    }

    /// Stages that fit `together` blocks of a multiprocessor, or if none do one block; and their bytes.
    fn stages((stage, rest): (i64, i64), together: i64, gpu_shared: i64) -> (i64, i64) {
        let bytes = |stages| stages * stage + rest;
        let fits = |stages, together| together * (bytes(stages) + OTHER_SHARED) <= gpu_shared;
        let stages = if fits(2, together) || (!fits(1, together) && fits(2, 1)) { 2 } else { 1 };
        (stages, bytes(stages))
    }

    /// Blocks of `threads` that a multiprocessor's registers are to hold, as `AT_ONCE` and `SUM_AT_ONCE` of linear_mma.cu.
    fn at_once(&self, threads: i64) -> i64 {
        if self.kind() == 0 || threads > 256 { 512 / threads } else { 256 / threads }
    }

    fn sum_threads(&self) -> i64 {
        2 * self.padded().1
    }

    /// Stages of `run` and of `summarize`, with the bytes of dynamic shared memory of both.
    fn shared(&self, gpu_shared: i64) -> [(i64, i64); 2] {
        let stages = |tiles, threads| Self::stages(tiles, self.at_once(threads), gpu_shared);
        [stages(self.run_tiles(), self.threads()), stages(self.sum_tiles(), self.sum_threads())]
    }

    /// Whether a block's shared memory holds what this variant needs at least.
    fn fits(&self, gpu_shared: i64) -> bool {
        [self.run_tiles(), self.sum_tiles()].iter().all(|(stage, rest)| stage + rest + OTHER_SHARED <= gpu_shared)
    }

    /// `gpu_shared`: most shared memory of a block, in bytes.
    pub fn defines(&self, gpu_shared: i64) -> Vec<String> {
        let [run, summarize] = self.shared(gpu_shared);
        vec![
            format!("KIND={}", self.kind()),
            format!("DECAY={}", self.decay as i32),
            format!("LOG_BYTES={}", self.log_bytes()),
            format!("REVERSE={}", i32::from(self.reverse)),
            format!("INNER={}", i32::from(self.inner)),
            format!("OUTER={}", i32::from(self.outer)),
            format!("INTRA={}", i32::from(!self.late)),
            format!("DOTS={}", i32::from(self.dots)),
            format!("K_BLOCKS={}", blocks(self.dk)),
            format!("V_BLOCKS={}", blocks(self.dv)),
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

/// A kernel's parameters, laid out as C++ does.
#[derive(Default)]
struct Params(Vec<u8>);

impl Params {
    fn bytes<const N: usize>(mut self, bytes: [u8; N]) -> Self {
        self.0.resize(self.0.len().next_multiple_of(N), 0);
        self.0.extend(bytes);
        self
    }
    fn i32(self, x: i64) -> Self {
        self.bytes((x as i32).to_le_bytes())
    }
    fn f32(self, x: f64) -> Self {
        self.bytes((x as f32).to_le_bytes())
    }
    fn pointer(self, x: Option<&Tensor>) -> Self {
        self.bytes(x.map_or(0, |x| x.data_ptr() as u64).to_le_bytes())
    }
    /// `struct Input`, `struct Decays`, `struct Output`: an address and three strides.
    fn strided(self, x: Option<&Tensor>) -> Self {
        let strides = x.map_or(vec![0; 3], Tensor::stride);
        strides[..3].iter().fold(self.pointer(x), |params, stride| params.bytes(stride.to_le_bytes()))
    }
    fn words(mut self) -> Vec<u64> {
        self.0.resize(self.0.len().next_multiple_of(8), 0);
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        self.0.chunks_exact(8).map(word).collect()
    }
}

/// The largest key and value sizes of one launch where a block has `gpu_shared` bytes of shared memory: K is halved where the
/// pass that needs most, that of dk and dlog_decay, would not fit.
pub fn widest(kind: Kind, gpu_shared: i64) -> (i64, i64) {
    let of = |dk| {
        let (reverse, inner, outer, dots) = (true, dual(kind), true, true);
        Variant { reverse, inner, outer, dots, dk, ..Variant::forward(kind, Form::Channel) }
    };
    (if of(WIDEST).fits(gpu_shared) { WIDEST } else { WIDEST / 2 }, WIDEST)
}

/// Whether one pass makes dv and dk, but for f32, which would need more registers than there are.
fn dual(kind: Kind) -> bool {
    kind != Kind::Float
}

/// Whether the kernels can read a `[B, T, H, D]` tensor where it lies, 16 bytes at a time.
pub fn tileable(x: &Tensor) -> bool {
    let (sizes, strides) = (x.size(), x.stride());
    let numbers = 16 / x.kind().elt_size_in_bytes() as i64;
    let row = strides[3] == 1 || sizes[3] == 1;
    row && (x.data_ptr() as usize).is_multiple_of(16) && (0..3).all(|i| sizes[i] == 1 || strides[i] % numbers == 0)
}

/// What all launches of one call share.
pub struct Call {
    pub plan: Plan,
    gpu: Gpu,
    pub device: Device,
    /// Of q, k, v, do and the outputs.
    pub kind: Kind,
    pub form: Form,
    /// `[B, T, H]` of any strides, f32; or `[B, T, H, K]` that is [`tileable`], f32 or in the inputs' kind.
    pub log_decay: Option<Tensor>,
    pub b: i64,
    pub t: i64,
    pub h: i64,
    pieces: Vec<Piece>,
}

/// One output of [`Call::run`].
pub struct Out<'a> {
    pub to: &'a Tensor,
    /// To what `to` has, rather than in its place.
    pub add: bool,
}

/// dlog_decay of one part of a head, f32 `[B, T, H, K]`, or for a scalar decay `[B, T, H, K / 16]`, to be summed.
pub struct DecayGrad<'a> {
    /// What dq's pass leaves for dk's; may be `out`, if that adds nothing to what is there.
    pub dots: &'a Tensor,
    /// Only dk's pass: where it goes, and the states at the segments' starts `[slots, K, V]` and, where a gradient comes in at
    /// chains' ends, at those `[rows, K, V]`.
    pub out: Option<Out<'a>>,
    pub states: Option<&'a Tensor>,
    pub finals: Option<&'a Tensor>,
}

/// A pass over all tokens; which tensors it reads, linear_mma.cu says.
pub struct Run<'a> {
    pub q: &'a Tensor,
    pub k: &'a Tensor,
    pub v: &'a Tensor,
    pub d_o: Option<&'a Tensor>,
    /// This part's decay.
    pub log_decay: Option<&'a Tensor>,
    pub inner: Option<Out<'a>>,
    pub outer: Option<Out<'a>>,
    /// `[slots, K, V]`.
    pub entries: &'a Tensor,
    /// Whether a state enters from outside too.
    pub ends: bool,
    pub scale: f64,
    pub entry_scale: f64,
    pub decay_grad: Option<DecayGrad<'a>>,
}

impl Call {
    pub fn new(k: &Tensor, v: &Tensor, pieces: &[Piece], form: Form, log_decay: Option<Tensor>) -> Result<Self> {
        let (b, t, h, _) = k.size4()?;
        let (device, kind) = (k.device(), k.kind());
        let gpu = gpu(device)?;
        let (dk, dv) = (k.size()[3].min(WIDEST), v.size()[3].min(WIDEST));
        let forward = Variant { dk, dv, ..Variant::forward(kind, form) };
        let at_once = forward.at_once(forward.threads());
        let cut = Cut { sequences: b, heads: h, chunk: CHUNK, blocks: at_once * i64::from(gpu.multiprocessors) };
        let plan = Plan::of(device, cut, pieces)?;
        Ok(Self { plan, gpu, device, kind, form, log_decay, b, t, h, pieces: pieces.to_vec() })
    }

    /// The pieces that a state enters from outside or, in `reverse`, a gradient, at their ends. What comes out at the other
    /// side is that of the opposite direction.
    pub fn entered(&self, reverse: bool) -> impl Iterator<Item = usize> {
        let is = move |piece: &Piece| if reverse { piece.leaves } else { piece.enters };
        self.pieces.iter().enumerate().filter(move |(_, piece)| is(piece)).map(|(i, _)| i)
    }

    /// Rows of [`Call::entered`], `B H` a piece.
    pub fn rows(&self, reverse: bool) -> i64 {
        self.entered(reverse).count() as i64 * self.b * self.h
    }

    /// The row with which a piece's own begin.
    pub fn row(&self, reverse: bool, piece: usize) -> Result<i64> {
        let place = self.entered(reverse).position(|entered| entered == piece);
        place.map(|place| place as i64 * self.b * self.h).ok_or_else(|| {
            let mark = if reverse { "leaves" } else { "enters" };
            Error::Unsupported(format!(
                "piece {piece}: its state was asked for, or came; expected a piece with `{mark}` set"
            ))
        })
    }

    /// The first token of a piece, and their number.
    pub fn range(&self, piece: usize) -> (i64, i64) {
        (self.pieces[..piece].iter().map(|piece| piece.tokens).sum(), self.pieces[piece].tokens)
    }

    pub fn empty(&self, sizes: &[i64]) -> Result<Tensor> {
        Ok(Tensor::f_empty(sizes, (Kind::Float, self.device))?)
    }

    fn variant(&self, dk: i64, dv: i64) -> Variant {
        let short = |g: &Tensor| self.form == Form::Channel && g.kind() != Kind::Float;
        let half_decay = self.log_decay.as_ref().is_some_and(short);
        Variant { half_decay, dk, dv, ..Variant::forward(self.kind, self.form) }
    }

    /// Key and value sizes of one launch.
    pub fn widest(&self) -> (i64, i64) {
        widest(self.kind, i64::from(self.gpu.shared))
    }

    /// The flags of segments with a neighbour on the side that the state comes from, and of those at that end of their chain.
    fn sides(reverse: bool) -> [i32; 2] {
        if reverse { [FOLLOWED, LAST] } else { [FOLLOWS, FIRST] }
    }

    /// Whether one pass makes dv and dk.
    pub fn dual(&self) -> bool {
        dual(self.kind)
    }

    /// Sums of `scale key^T value` (k and v, or in `reverse` q and do) into `sums` `[slots, K, V]` and of the log-decays into
    /// `decays` `[slots, K]`, for the segments that another one `follows` in the direction of time, for those at the `ends`, or
    /// both.
    #[allow(clippy::too_many_arguments)]
    pub fn summarize(
        &self,
        reverse: bool,
        (follows, ends): (bool, bool),
        (key, value): (&Tensor, &Tensor),
        log_decay: Option<&Tensor>,
        scale: f64,
        sums: &Tensor,
        decays: Option<&Tensor>,
    ) -> Result<()> {
        let (dk, dv) = (key.size()[3], value.size()[3]);
        let [inner, end] = Self::sides(!reverse);
        let which = if follows { inner } else { 0 } | if ends { end } else { 0 };
        if self.plan.flags & which == 0 {
            return Ok(());
        }
        let dual = reverse && self.dual();
        let variant = Variant { reverse, outer: dual, ..self.variant(dk, dv) };
        let (kernel, shared) = variant.kernel(&self.gpu, self.device, "summarize")?;
        let params = Params::default()
            .strided(Some(key))
            .strided(Some(value))
            .strided(log_decay)
            .pointer(Some(&self.plan.all.segments))
            .pointer(Some(&self.plan.all.first))
            .pointer(Some(sums))
            .pointer(decays)
            .f32(scale)
            .i32(dk)
            .i32(dv)
            .i32(i64::from(which))
            .words();
        let launch = Launch { grid: [self.plan.all.blocks, 1, 1], block: variant.sum_threads() as u32, shared };
        // SAFETY: SummarizeParams of linear_mma.cu; tensors of this call's shape on its device.
        unsafe { kernel.launch(launch, &[Arg::Bytes(&params)]) }
    }

    /// The state that enters every segment, into `entries` `[slots, K, V]`, from their `sums` (`None`: zero), and those that
    /// leave chains. `external`, `finals`: `[rows, K, V]`, contiguous; see [`Call::rows`].
    pub fn combine(
        &self,
        reverse: bool,
        sums: Option<&Tensor>,
        decays: Option<&Tensor>,
        external: Option<&Tensor>,
        entries: &Tensor,
        finals: Option<&Tensor>,
    ) -> Result<()> {
        let (dk, dv) = (entries.size()[1], entries.size()[2]);
        if external.is_none() && finals.is_none() && self.plan.flags & FOLLOWS == 0 {
            return Ok(());
        }
        // Every variant has it; this one is needed anyway.
        let defines = self.variant(dk, dv).defines(i64::from(self.gpu.shared));
        let kernel = kernel(self.device, &LINEAR_MMA, &defines, "combine")?;
        let params = Params::default()
            .pointer(Some(&self.plan.chains))
            .pointer(sums)
            .pointer(decays)
            .pointer(external)
            .pointer(Some(entries))
            .pointer(finals)
            .i32(dk)
            .i32(dv)
            .i32(i64::from(reverse))
            .words();
        let blocks = (dk * dv + 511) / 512;
        let launch = Launch { grid: [self.plan.chain_count, blocks as u32, 1], block: 128, shared: 0 };
        // SAFETY: CombineParams of linear_mma.cu; states of this plan's slots and chains.
        unsafe { kernel.launch(launch, &[Arg::Bytes(&params)]) }
    }

    /// `late`: only what entering states add to o, for the tokens of pieces that one enters.
    pub fn run(&self, reverse: bool, late: bool, run: &Run) -> Result<()> {
        let work = if late { &self.plan.entered } else { &self.plan.all };
        let (dk, dv) = (run.k.size()[3], run.v.size()[3]);
        let variant = Variant {
            reverse,
            inner: run.inner.is_some(),
            outer: run.outer.is_some(),
            late,
            dots: run.decay_grad.is_some(),
            ..self.variant(dk, dv)
        };
        let (kernel, shared) = variant.kernel(&self.gpu, self.device, "run")?;
        let [inner, end] = Self::sides(reverse);
        let grad = run.decay_grad.as_ref();
        let d_log = grad.and_then(|grad| grad.out.as_ref());
        let to = |out: Option<&Out>| out.map(|out| out.to.shallow_clone());
        let adds = |out: Option<&Out>| i64::from(out.is_some_and(|out| out.add));
        let (inner_out, outer_out) = (run.inner.as_ref(), run.outer.as_ref());
        let params = Params::default()
            .strided(Some(run.q))
            .strided(Some(run.k))
            .strided(Some(run.v))
            .strided(run.d_o)
            .strided(run.log_decay)
            .strided(to(inner_out).as_ref())
            .strided(to(outer_out).as_ref())
            .strided(grad.map(|grad| grad.dots))
            .strided(to(d_log).as_ref())
            .pointer(Some(&work.segments))
            .pointer(Some(&work.first))
            .pointer(Some(run.entries))
            .pointer(grad.and_then(|grad| grad.states))
            .pointer(grad.and_then(|grad| grad.finals))
            .f32(run.scale)
            .f32(run.entry_scale)
            .i32(dk)
            .i32(dv)
            .i32(adds(inner_out) + 2 * adds(outer_out) + 4 * adds(d_log))
            .i32(i64::from(inner | if run.ends { end } else { 0 }))
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
        for gpu_shared in [163 << 10, 99 << 10, 227 << 10] {
            for kind in [Kind::BFloat16, Kind::Half, Kind::Float] {
                let (dk, dv) = widest(kind, gpu_shared);
                assert!(dk == 128 || (gpu_shared < 100 << 10 && kind != Kind::BFloat16));
                let decays =
                    [(Form::None, false), (Form::Scalar, false), (Form::Channel, false), (Form::Channel, true)];
                for (decay, half_decay) in decays.into_iter().filter(|(_, half)| !half || kind != Kind::Float) {
                    let o = Variant { half_decay, dk, dv, ..Variant::forward(kind, decay) };
                    let dots = decay != Form::None;
                    let dq = Variant { inner: false, outer: true, dots, ..o };
                    let dk = Variant { reverse: true, inner: dual(kind), ..dq };
                    for variant in [o, Variant { late: true, ..o }, dq, dk, Variant { reverse: true, ..o }] {
                        for (stages, bytes) in variant.shared(gpu_shared) {
                            assert!(
                                bytes + OTHER_SHARED <= gpu_shared,
                                "{variant:?}: {stages} stages, {bytes} of {gpu_shared}"
                            );
                        }
                    }
                }
            }
        }
    }
}
