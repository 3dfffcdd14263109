//! The launches of `kernels/cuda/linear.cu`: one function a kernel, with its shapes.

use tch::{Device, Kind, Tensor};

use super::super::driver::{TileMap, driver};
use super::super::{Arg, Kernel, Launch, NUMBERS, Program, gpu, kernel};
use super::plan::{Cut, FIRST, FOLLOWED, FOLLOWS, LAST, Plan};
use crate::linear::Piece;
use crate::{Error, Result};

/// Linear attention with a scalar decay, on Hopper.
pub const LINEAR: Program = Program {
    name: "linear",
    source: include_str!("../../../cuda/linear.cu"),
    headers: &[
        NUMBERS,
        ("hopper.cuh", include_str!("../../../cuda/hopper.cuh")),
        ("wgmma.cuh", include_str!("../../../cuda/wgmma.cuh")),
    ],
};

/// The largest key or value size of one launch: a head wider than that is several, whose outputs add up.
pub const WIDEST: i64 = 128;

/// Tokens of a chunk.
const CHUNK: i64 = 64;
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
    /// Sizes of y and of z.
    pub dk: i64,
    pub dv: i64,
}

fn blocks(channels: i64) -> i64 {
    (channels + 63) / 64
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

/// A kernel's parameters, laid out as C++ does.
#[derive(Default)]
struct Params(Vec<u8>);

impl Params {
    fn bytes<const N: usize>(mut self, bytes: [u8; N]) -> Self {
        self.0.resize(self.0.len().next_multiple_of(N.min(8)), 0);
        self.0.extend(bytes);
        self
    }
    fn i32(self, x: i64) -> Self {
        self.bytes((x as i32).to_le_bytes())
    }
    fn f32(self, x: f64) -> Self {
        self.bytes((x as f32).to_le_bytes())
    }
    fn i64(self, x: i64) -> Self {
        self.bytes(x.to_le_bytes())
    }
    fn pointer(self, x: Option<&Tensor>) -> Self {
        self.bytes(x.map_or(0, |x| x.data_ptr() as u64).to_le_bytes())
    }
    /// First in their struct, which is then aligned to 64 bytes.
    fn map(mut self, map: &TileMap) -> Self {
        for word in map.0 {
            self.0.extend(word.to_le_bytes());
        }
        self
    }
    /// `struct Decays`.
    fn decay(self, g: Option<&Tensor>) -> Self {
        let strides = g.map_or(vec![0; 3], Tensor::stride);
        self.pointer(g).i64(strides[0]).i64(strides[1]).i64(strides[2])
    }
    /// `struct Output`.
    fn output(self, x: &Tensor) -> Self {
        let strides = x.stride();
        self.pointer(Some(x)).i64(strides[0]).i64(strides[1]).i64(strides[2])
    }
    fn words(mut self) -> Vec<u64> {
        self.0.resize(self.0.len().next_multiple_of(64), 0);
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        self.0.chunks_exact(8).map(word).collect()
    }
}

/// Whether TMA can read a `[B, T, H, D]` tensor where it lies.
pub fn tileable(x: &Tensor) -> bool {
    let (sizes, strides) = (x.size(), x.stride());
    let row = strides[3] == 1 || sizes[3] == 1;
    row && (x.data_ptr() as usize).is_multiple_of(16)
        && (0..3).all(|i| sizes[i] == 1 || (strides[i] > 0 && strides[i] % 8 == 0))
}

fn tile_map(x: &Tensor) -> Result<TileMap> {
    let (sizes, strides) = (x.size(), x.stride());
    // The stride of a dimension of one is never used, but has to be a valid one.
    let stride = |i: usize| if sizes[i] == 1 { 16 } else { 2 * strides[i] as u64 };
    let size = |i: usize| sizes[i] as u64;
    driver()?.tile_map(x.data_ptr() as u64, [size(3), size(1), size(2), size(0)], [stride(1), stride(2), stride(0)])
}

/// What all launches of one call share.
pub struct Call {
    pub plan: Plan,
    pub device: Device,
    /// f32 `[B, T, H]`, of any strides.
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

/// A pass over all tokens, in the names of linear.cu.
pub struct Run<'a> {
    pub x: &'a Tensor,
    pub y: &'a Tensor,
    pub z: &'a Tensor,
    pub out: Out<'a>,
    /// `dual`: the second x and output. `dots`: what the output is multiplied with, and no output.
    pub x2: Option<&'a Tensor>,
    pub out2: Option<Out<'a>>,
    /// `[slots, K, V]`; `transposed`: `[slots, V, K]` of y and z that have changed places.
    pub entries: &'a Tensor,
    pub transposed: bool,
    /// Whether a state enters from outside too.
    pub ends: bool,
    pub scale: f64,
    pub entry_scale: f64,
    pub dots: Option<&'a Tensor>,
    /// With `dots` and `dual`.
    pub pairs: Option<&'a Tensor>,
}

/// What the passes leave of the decay's gradient, `[B, H, T]` f32 each: RunParams of linear.cu.
pub struct Dots<'a> {
    pub queries: &'a Tensor,
    pub keys: &'a Tensor,
    pub pairs: &'a Tensor,
}

impl Call {
    pub fn new(x: &Tensor, pieces: &[Piece], log_decay: Option<Tensor>) -> Result<Self> {
        let (b, t, h, _) = x.size4()?;
        let device = x.device();
        let cut = Cut { sequences: b, heads: h, chunk: CHUNK, blocks: i64::from(gpu(device)?.multiprocessors) };
        let plan = Plan::of(device, cut, pieces)?;
        Ok(Self { plan, device, log_decay, b, t, h, pieces: pieces.to_vec() })
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
        let place =
            self.entered(reverse).position(|entered| entered == piece).map(|place| place as i64 * self.b * self.h);
        place.ok_or_else(|| {
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

    fn decay(&self) -> bool {
        self.log_decay.is_some()
    }

    fn forward_variant(&self, entries: &Tensor) -> Variant {
        let sizes = entries.size();
        Variant { decay: self.decay(), dk: sizes[1], dv: sizes[2], ..Variant::default() }
    }

    /// The flags of segments with a neighbour on the side that the state comes from, and of those at that end of their chain.
    fn sides(reverse: bool) -> [i32; 2] {
        if reverse { [FOLLOWED, LAST] } else { [FOLLOWS, FIRST] }
    }

    /// Sums of `scale y^T z` into `sums` `[slots, K, V]` and of the log-decays into `decays` `[slots]`, for the segments that
    /// another one `follows` in the direction of time, for those at the `ends`, or both.
    #[allow(clippy::too_many_arguments)]
    pub fn summarize(
        &self,
        reverse: bool,
        (follows, ends): (bool, bool),
        y: &Tensor,
        z: &Tensor,
        scale: f64,
        sums: &Tensor,
        decays: &Tensor,
    ) -> Result<()> {
        let (dk, dv) = (y.size()[3], z.size()[3]);
        let variant = Variant { decay: self.decay(), reverse, dual: reverse, dk, dv, ..Variant::default() };
        let kernel = variant.kernel(self.device, "summarize")?;
        let [inner, end] = Self::sides(!reverse);
        let which = if follows { inner } else { 0 } | if ends { end } else { 0 };
        if self.plan.flags & which == 0 {
            return Ok(());
        }
        let params = Params::default()
            .map(&tile_map(y)?)
            .map(&tile_map(z)?)
            .pointer(Some(&self.plan.all.segments))
            .pointer(Some(&self.plan.all.first))
            .pointer(Some(sums))
            .pointer(Some(decays))
            .decay(self.log_decay.as_ref())
            .f32(scale)
            .i32(dk)
            .i32(dv)
            .i32(i64::from(which))
            .words();
        let launch = Launch { grid: [self.plan.all.blocks, 1, 1], block: 256, shared: variant.shared().1 };
        // SAFETY: SummarizeParams of linear.cu; tensors of this call's shape on its device.
        unsafe { kernel.launch(launch, &[Arg::Bytes(&params)]) }
    }

    /// The state that enters every segment, into `entries` `[slots, K, V]`, from their `sums` (`None`: zero), and those that
    /// leave chains. `external`, `finals`: `[rows, K, V]`, contiguous; see [`Call::rows`].
    pub fn combine(
        &self,
        reverse: bool,
        sums: Option<&Tensor>,
        decays: &Tensor,
        external: Option<&Tensor>,
        entries: &Tensor,
        finals: Option<&Tensor>,
    ) -> Result<()> {
        let elements = entries.size()[1] * entries.size()[2];
        if external.is_none() && finals.is_none() && self.plan.flags & FOLLOWS == 0 {
            return Ok(());
        }
        // Every variant has it; this one is needed anyway.
        let variant = self.forward_variant(entries);
        let kernel = kernel(self.device, &LINEAR, &variant.defines(), "combine")?;
        let params = Params::default()
            .pointer(Some(&self.plan.chains))
            .pointer(sums)
            .pointer(Some(decays))
            .pointer(external)
            .pointer(Some(entries))
            .pointer(finals)
            .i32(elements)
            .i32(i64::from(reverse))
            .words();
        let blocks = (elements + 511) / 512;
        let launch = Launch { grid: [self.plan.chain_count, blocks as u32, 1], block: 128, shared: 0 };
        // SAFETY: CombineParams of linear.cu; states of this plan's slots and chains.
        unsafe { kernel.launch(launch, &[Arg::Bytes(&params)]) }
    }

    /// `late`: only what entering states add, to the tokens of pieces that one enters.
    pub fn run(&self, reverse: bool, late: bool, run: &Run) -> Result<()> {
        let work = if late { &self.plan.entered } else { &self.plan.all };
        let (dk, dv) = (run.y.size()[3], run.z.size()[3]);
        let dual = run.out2.is_some();
        let variant = Variant { decay: self.decay(), reverse, dual, late, dots: run.dots.is_some(), dk, dv };
        let kernel = variant.kernel(self.device, "run")?;
        let [inner, end] = Self::sides(reverse);
        let (out, out2) = (&run.out, run.out2.as_ref().unwrap_or(&run.out));
        let (row, column) = if run.transposed { (1, dk) } else { (dv, 1) };
        let params = Params::default()
            .map(&tile_map(run.x)?)
            .map(&tile_map(run.y)?)
            .map(&tile_map(run.z)?)
            .map(&tile_map(run.x2.unwrap_or(run.x))?)
            .map(&tile_map(out.to)?)
            .map(&tile_map(out2.to)?)
            .output(out.to)
            .output(out2.to)
            .pointer(run.dots)
            .pointer(run.pairs)
            .pointer(Some(&work.segments))
            .pointer(Some(&work.first))
            .pointer(Some(run.entries))
            .i32(row)
            .i32(column)
            .decay(self.log_decay.as_ref())
            .f32(run.scale)
            .f32(run.entry_scale)
            .i32(self.t)
            .i32(dk)
            .i32(dv)
            .i32(out.to.size()[3])
            .i32(out2.to.size()[3])
            .i32(self.h)
            .i32(i64::from(out.add) + 2 * i64::from(out2.add))
            .i32(i64::from(inner | if run.ends { end } else { 0 }))
            .words();
        let launch = Launch { grid: [work.blocks, 1, 1], block: 512, shared: variant.shared().0 };
        // SAFETY: RunParams of linear.cu; tensors of this call's shape on its device.
        unsafe { kernel.launch(launch, &[Arg::Bytes(&params)]) }
    }

    /// dlog_decay `[B, T, H]` f32 into `out`, or added to it. `entries`, `exits`: `[slots, K, V]`; `finals`: `[rows, K, V]`,
    /// where a gradient comes in at chains' ends.
    pub fn decay_gradient(
        &self,
        dots: &Dots,
        (entries, finals): (&Tensor, Option<&Tensor>),
        exits: &Tensor,
        out: &Tensor,
        add: bool,
    ) -> Result<()> {
        let variant = self.forward_variant(entries);
        let kernel = kernel(self.device, &LINEAR, &variant.defines(), "decay_gradient")?;
        let [inner, end] = Self::sides(true);
        let params = Params::default()
            .pointer(Some(&self.plan.all.segments))
            .pointer(Some(dots.queries))
            .pointer(Some(dots.keys))
            .pointer(Some(dots.pairs))
            .pointer(Some(entries))
            .pointer(finals)
            .pointer(Some(exits))
            .pointer(Some(out))
            .decay(self.log_decay.as_ref())
            .i32(entries.size()[1] * entries.size()[2])
            .i32(self.t)
            .i32(self.h)
            .i32(i64::from(inner | if finals.is_some() { end } else { 0 }))
            .i32(i64::from(add))
            .words();
        let launch = Launch { grid: [self.plan.all.count, 1, 1], block: 256, shared: 0 };
        // SAFETY: DecayGradientParams of linear.cu.
        unsafe { kernel.launch(launch, &[Arg::Bytes(&params)]) }
    }
}
