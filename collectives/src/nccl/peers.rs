//! Short gathers among the ranks of one machine: each rank's copy engine puts its part into all others' memory, which they have
//! opened to each other (CUDA IPC), and then a number; every stream waits for the numbers of all. Nothing runs on a
//! multiprocessor, and no host waits.
//!
//! Each rank has a box of two halves, for even and odd gathers. A rank writes into the half of gather n only after it has seen
//! all numbers n-1; who has written n-1 has taken everything of n-2 out of its half.

use super::{
    PeerCopies,
    api::{Buffers, Comm},
    cuda::{Context, Event, Memory, SHARED_WORDS, Stream},
};
use crate::{Kind, Reduce, Result, Tensor};
use std::{
    fmt, fs, process,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};
use tch::Device;

/// The longest part of a rank, in bytes: that of a state of 16 heads of 128 x 128 in f32.
const LONGEST: usize = 1 << 20;
/// Boxes grow with the number of ranks, and so do the copies of a gather.
const MOST_RANKS: usize = 16;
/// For the numbers, before the halves.
const NUMBERS: usize = 4096;
/// Sizes of a rank's part that are measured.
const MEASURED: [usize; 3] = [16 << 10, 128 << 10, LONGEST];
const ROUNDS: usize = 10;
/// Beside products of such matrices, in bf16: 0.2 ms each on an H100, and as many as outlast the gathers that are timed.
const BUSY: [i64; 2] = [4096, 4096];
const BUSY_PRODUCTS: usize = 24;

/// What decided whether short gathers of a group go by copies between its GPUs.
#[derive(Debug, Clone, Default)]
pub struct CopiesFound {
    /// The longest part of a rank that does, in bytes; 0: none.
    pub up_to: usize,
    /// Why they could not even be measured.
    pub refused: Option<&'static str>,
    pub measured: Vec<PeerCopyTime>,
}

impl fmt::Display for CopiesFound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.refused, self.up_to) {
            (Some(why), _) => write!(f, "by NCCL: {why}")?,
            (None, 0) if self.measured.is_empty() => write!(f, "by NCCL")?,
            (None, 0) => write!(f, "by NCCL, which is quicker")?,
            (None, longest) => write!(f, "of at most {longest} bytes a rank by copies between GPUs")?,
        }
        for PeerCopyTime { bytes, copies_us, nccl_us } in &self.measured {
            write!(f, "; {bytes} bytes beside other work: copies {copies_us:.0} us, NCCL {nccl_us:.0} us")?;
        }
        Ok(())
    }
}

/// A gather beside matrix products, on the slowest rank.
#[derive(Debug, Clone, Copy)]
pub struct PeerCopyTime {
    /// Of a rank's part.
    pub bytes: usize,
    pub copies_us: f64,
    pub nccl_us: f64,
}

pub(super) struct Peers {
    rank: usize,
    /// By rank, its own in its place.
    boxes: Vec<Memory>,
    gathers: AtomicU32,
    /// Up to so many bytes of a rank they are quicker than NCCL.
    longest: usize,
}

/// What a rank brings to the first meeting: whether it can, its process, its machine, and the name of its box.
const INTRODUCTION: usize = 4 + SHARED_WORDS;

impl Peers {
    /// Collective over the communicator, of which this rank has the use alone. `None` where the ranks are not all processes of
    /// one machine, where the driver refuses, or where NCCL is quicker; and what was found. The caller has entered the context.
    pub(super) fn connect(
        context: &Arc<Context>,
        comm: &Comm,
        stream: &Stream,
        (rank, size): (usize, usize),
        wanted: PeerCopies,
    ) -> Result<(Option<Peers>, CopiesFound)> {
        let refused = |why| Ok((None, CopiesFound { refused: Some(why), ..CopiesFound::default() }));
        if wanted == PeerCopies::Never {
            return refused("copies are not wanted, or ranks share a GPU");
        }
        if !(2..=MOST_RANKS).contains(&size) {
            return refused("they are for 2 to 16 ranks");
        }
        let meeting = Meeting { context, comm, stream };
        let bytes = NUMBERS + 2 * size * LONGEST;
        let own = context.allocate(bytes);
        let mut mine = vec![own.is_ok().into(), i64::from(process::id())];
        mine.extend(machine());
        mine.extend(own.as_ref().map_or([0; SHARED_WORDS], |(_, name)| *name));
        let met = meeting.gather(&mine, size)?;
        let met: Vec<&[i64]> = met.chunks(INTRODUCTION).collect();
        let together = met.iter().all(|other| other[0] == 1 && other[2..4] == met[0][2..4]);
        let apart = (0..size).all(|a| (0..a).all(|b| met[a][1] != met[b][1]));
        let Ok((own, _)) = own else { return refused("the driver gives no memory to share") };
        if !together {
            return refused("not all ranks are on one machine, with memory to share");
        }
        if !apart {
            return refused("some ranks are threads of one process");
        }
        let mut own = Some(own);
        let open = |peer: usize| match peer == rank {
            true => own.take(),
            false => {
                let name = met[peer][4..].try_into().ok()?;
                context.import(name, bytes).ok()
            }
        };
        let boxes: Option<Vec<Memory>> = (0..size).map(open).collect();
        let all = meeting.all(boxes.is_some())?;
        let Some(boxes) = boxes.filter(|_| all) else {
            return refused("the driver lets processes open no memory of each other");
        };
        let mut peers = Peers { rank, boxes, gathers: AtomicU32::new(0), longest: LONGEST };
        let mut measured = Vec::new();
        if wanted == PeerCopies::Measured {
            let matrices = Busy::new(context);
            let all = meeting.all(matrices.is_ok())?;
            let Some(busy) = matrices.ok().filter(|_| all) else { return refused("no memory to measure them") };
            measured = peers.measure(&meeting, &busy)?;
            let quicker = measured.iter().take_while(|time| time.copies_us <= time.nccl_us);
            peers.longest = quicker.last().map_or(0, |time| time.bytes);
        }
        let found = CopiesFound { up_to: peers.longest, refused: None, measured };
        Ok(((peers.longest > 0).then_some(peers), found))
    }

    pub(super) fn can(&self, x: &Tensor) -> bool {
        x.numel() * x.kind().elt_size_in_bytes() <= self.longest
    }

    /// `x` of all ranks into `out`, in rank order.
    pub(super) fn all_gather(&self, on: &Buffers) -> Result<()> {
        let number = self.gathers.fetch_add(1, Ordering::SeqCst).wrapping_add(1);
        let size = self.boxes.len();
        let half = NUMBERS + (number % 2) as usize * size * LONGEST;
        let bytes = on.x.numel() * on.x.f_kind()?.elt_size_in_bytes();
        // The next neighbour first, so that not all write to the same.
        let others = (1..size).map(|away| (self.rank + away) % size);
        for peer in others.clone() {
            on.stream.copy_out(on.x, &self.boxes[peer], half + self.rank * LONGEST)?;
            on.stream.write(&self.boxes[peer], 4 * self.rank, number)?;
        }
        let own = &self.boxes[self.rank];
        on.stream.copy_out(on.x, own, half + self.rank * LONGEST)?;
        on.stream.copy_in(on.out, self.rank * bytes, bytes, own, half + self.rank * LONGEST)?;
        for peer in others {
            on.stream.wait_for(own, 4 * peer, number)?;
            on.stream.copy_in(on.out, peer * bytes, bytes, own, half + peer * LONGEST)?;
        }
        Ok(())
    }

    /// This against NCCL, while all multiprocessors are at work: a gather is there to run beside a layer, and NCCL's kernel waits
    /// until blocks of the layer's have ended.
    fn measure(&self, meeting: &Meeting, busy: &Busy) -> Result<Vec<PeerCopyTime>> {
        let device = Device::Cuda(meeting.context.index);
        let mut times = Vec::new();
        for bytes in MEASURED {
            let x = Tensor::f_zeros([bytes as i64 / 4], (Kind::Float, device))?;
            let out = Tensor::f_empty([self.boxes.len() as i64, bytes as i64 / 4], (Kind::Float, device))?;
            let on = Buffers { x: &x, out: &out, stream: meeting.stream };
            let ours = meeting.time(busy, &|| self.all_gather(&on))?;
            let theirs = meeting.time(busy, &|| meeting.comm.all_gather(&on))?;
            times.push(PeerCopyTime { bytes, copies_us: ours / 1e3, nccl_us: theirs / 1e3 });
        }
        Ok(times)
    }
}

/// What a GPU multiplies meanwhile, and where the product goes.
struct Busy {
    matrix: Tensor,
    product: Tensor,
}

impl Busy {
    fn new(context: &Context) -> Result<Self> {
        let zeros = || Tensor::f_zeros(BUSY, (Kind::BFloat16, Device::Cuda(context.index)));
        Ok(Self { matrix: zeros()?, product: zeros()? })
    }
}

/// The ranks of a communicator while it is being made.
struct Meeting<'a> {
    context: &'a Arc<Context>,
    comm: &'a Comm,
    stream: &'a Stream,
}

impl Meeting<'_> {
    /// The stream goes on after what this thread has enqueued on libtorch's.
    fn follow(&self) -> Result<()> {
        self.stream.wait(&self.context.current_stream()?.record()?)
    }

    fn gather(&self, mine: &[i64], size: usize) -> Result<Vec<i64>> {
        let device = Device::Cuda(self.context.index);
        let x = Tensor::f_from_slice(mine)?.f_to_device(device)?;
        let out = Tensor::f_empty([(size * mine.len()) as i64], (Kind::Int64, device))?;
        self.follow()?;
        self.comm.all_gather(&Buffers { x: &x, out: &out, stream: self.stream })?;
        self.stream.record()?.synchronize()?;
        let mut all = vec![0; size * mine.len()];
        let count = all.len();
        out.f_to_device(Device::Cpu)?.f_copy_data(&mut all, count)?;
        Ok(all)
    }

    /// Whether it is so on all ranks.
    fn all(&self, mine: bool) -> Result<bool> {
        Ok(self.smallest(f64::from(u8::from(mine)))? == 1.0)
    }

    /// Of all ranks.
    fn smallest(&self, mine: f64) -> Result<f64> {
        let x = Tensor::f_from_slice(&[mine])?.f_to_device(Device::Cuda(self.context.index))?;
        let out = x.f_empty_like()?;
        self.follow()?;
        self.comm.all_reduce(&Buffers { x: &x, out: &out, stream: self.stream }, Reduce::Min)?;
        self.stream.record()?.synchronize()?;
        Ok(out.f_to_device(Device::Cpu)?.f_double_value(&[0])?)
    }

    /// Nanoseconds of one of several in a row, beside products, on the slowest rank.
    fn time(&self, Busy { matrix, product }: &Busy, once: &dyn Fn() -> Result<()>) -> Result<f64> {
        self.follow()?;
        for _ in 0..BUSY_PRODUCTS {
            let _product = matrix.f_matmul_out(product, matrix)?;
        }
        for _ in 0..3 {
            once()?;
        }
        let from: Event = self.stream.record()?;
        for _ in 0..ROUNDS {
            once()?;
        }
        let to = self.stream.record()?;
        to.synchronize()?;
        Ok(-self.smallest(-from.until(&to)? / ROUNDS as f64)?)
    }
}

/// Tells this machine from others: the kernel's name for the time since it was started.
fn machine() -> [i64; 2] {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let half = |from: usize| digits.get(from..from + 16).and_then(|half| u64::from_str_radix(half, 16).ok());
    // Without one, no two ranks are on one machine.
    let unknown = || i64::from(process::id()) << 20;
    [half(0).map_or_else(unknown, |half| half as i64), half(16).unwrap_or(0) as i64]
}
