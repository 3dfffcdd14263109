//! NCCL: a group's tensors on GPUs travel by it, while those on the CPU stay with the back end that started the ranks.
//!
//! [`open`] makes such a group from any other. NCCL is opened at run time, as are the CUDA driver and libtorch's CUDA part;
//! nothing links to them.
//!
//! - **Streams.** An operation starts when the work is done that the issuing thread has enqueued so far on libtorch's current
//!   stream, and runs on a stream of the group's own, of high priority. [`Pending::wait`] makes the waiting thread's current
//!   stream wait, and not the host. The host waits for GPUs nowhere but in [`Group::connect`]; it waits for other hosts where a
//!   communicator is made.
//! - **Memory.** Inputs and results are held until a stream of libtorch waits for the operation, or it has ended; then libtorch's
//!   allocator may use them again.
//! - **Order.** All collectives of a group follow each other on its stream. Messages from one rank to another have a communicator
//!   and a stream of their own: so a send waits for nobody, whatever the order of sends and receives. [`Group::connect`] makes them,
//!   or the first message does. Made while other operations are under way they can end in ranks that wait for each other: ranks
//!   meet where one is made, and the CUDA driver may make its caller wait for the GPU.
//!   Where kernels of several groups would fill a GPU, NCCL_LAUNCH_ORDER_IMPLICIT=1 keeps their order the same on all ranks.
//! - **Short gathers** among processes of one machine go by the copy engines where that is quicker: [`PeerCopies`].
//! - **Reductions** are NCCL's: in an order that depends on the number of ranks, the size and the machine, but not on the
//!   values or the run, and bit-identical on all ranks. bf16 is summed in f32 and rounded once, as on the CPU.
//! - **Agreement.** NCCL does not compare what ranks bring. [`Check`] says for which operations the ranks do so over the CPU's
//!   back end; disagreement later is a time-out.
//! - **Failures** that nobody waits for (a time-out, NCCL's own asynchronous errors, disagreement) are reported once through
//!   [`Options::on_failure`], with the rank, the operation, its number and its size, and end the communicators.

mod api;
mod cuda;
mod gpu;
mod lane;
mod library;
mod peers;

pub use api::{Library, Version};
pub(crate) use cuda::Event;
pub(crate) use gpu::Gpu;
pub use peers::{CopiesFound, PeerCopyTime};

use crate::{
    Error, Group, Kind, Pending, Reduce, Result, Tensor,
    flight::{Awaited, awaited_in_flight, noting_waits},
    op::{Call, Op},
    pending::lock,
    progress::nothing,
};
use api::{Comm, ID_WORDS};
use cuda::Context;
use gpu::{About, Flight};
use lane::{Item, Lane, Part};
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex},
    time::Duration,
};
use tch::Device;

/// The first NCCL whose communicators may have several ranks on one GPU.
pub const SHARES_GPUS: Version = Version { major: 2, minor: 30, patch: 0 };

/// Whether several ranks may share a GPU: NCCL's version allows it, and the environment tells NCCL so.
pub fn may_share_gpus(version: Version) -> bool {
    version >= SHARES_GPUS && std::env::var("NCCL_MULTI_RANK_GPU_ENABLE").is_ok_and(|value| value.trim() == "1")
}

/// What a machine with so many GPUs lacks for so many ranks on it.
pub fn missing(ranks: usize, gpus: usize) -> Option<String> {
    if gpus == 0 {
        return Some("no CUDA device".into());
    }
    let version = match Library::open(None) {
        Ok(library) => library.version(),
        Err(error) => return Some(error.to_string()),
    };
    (ranks > gpus && !may_share_gpus(version)).then(|| {
        format!(
            "{ranks} ranks need as many GPUs, or NCCL {SHARES_GPUS} and NCCL_MULTI_RANK_GPU_ENABLE=1; here: {gpus}, NCCL {version}"
        )
    })
}

/// For which operations ranks compare what they bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// For all, before anything moves: disagreement is the operation's error on every rank, and the group works on. A round of
    /// messages between hosts for each.
    Before,
    /// For so many collectives of each group and messages of each pair, beside their work, which does not wait; disagreement
    /// ends the job.
    First(u64),
    Never,
}

/// Whether short gathers among the processes of one machine go by copies between their memories: see `peers.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerCopies {
    /// Up to the size to which they are quicker than NCCL beside other work, measured when a group's communicator is made; not where
    /// any ranks share a GPU.
    Measured,
    /// Up to 1 MiB a rank, wherever the driver allows them.
    Always,
    Never,
}

/// Called once, on a thread of this library, when something failed that nobody waits for. What it does not end goes on with
/// errors.
pub type OnFailure = Arc<dyn Fn(Error) + Send + Sync>;

#[derive(Clone)]
pub struct Options {
    pub check: Check,
    /// From when an operation could start, until it must have ended.
    pub timeout: Duration,
    pub peer_copies: PeerCopies,
    pub on_failure: OnFailure,
}

impl Options {
    /// Checks the first thousand, which a training loop only repeats; ten minutes; peer copies where they are quicker.
    pub fn new(on_failure: OnFailure) -> Options {
        let timeout = Duration::from_secs(600);
        Options { check: Check::First(1000), timeout, peer_copies: PeerCopies::Measured, on_failure }
    }
}

/// The same ranks as `world`, this one on GPU `gpu`, whose tensors travel by NCCL; so do those of all groups split from it.
/// Collective over `world`, which should be the group of all ranks: ranks are counted in it in messages.
///
/// An error where ranks have different versions, or share a GPU and the version does not allow that.
pub fn open(world: &Group, gpu: usize, library: &'static Library, mut options: Options) -> Result<Group> {
    let context = Context::new(gpu)?;
    let host = world.plain();
    let halves = |uuid: [u8; 16]| {
        let (a, b) = uuid.split_at(8);
        [a, b].map(|half| half.iter().fold(0i64, |word, &byte| word << 8 | i64::from(byte)))
    };
    let [a, b] = halves(context.uuid()?);
    let Version { major, minor, patch } = library.version();
    let mine = [a, b, (i64::from(major) << 32) + (i64::from(minor) << 16) + i64::from(patch)];
    let gathered = host.all_gather(&Tensor::f_from_slice(&mine)?)?.wait()?;
    let mut all = vec![0i64; 3 * host.size()];
    gathered.f_copy_data(&mut all, 3 * host.size())?;
    let all: Vec<&[i64]> = all.chunks(3).collect();
    let ranks = |same: &dyn Fn(&[i64]) -> bool| -> Vec<usize> { (0..all.len()).filter(|&r| same(all[r])).collect() };
    let others = ranks(&|other| other[2] != mine[2]);
    if !others.is_empty() {
        let problem = format!("ranks {others:?} have another version than {} here", library.version());
        return Err(Error::NoNccl { problem });
    }
    let sharing = ranks(&|other| other[..2] == mine[..2]);
    if sharing.len() > 1 && library.version() < SHARES_GPUS {
        return Err(Error::SharedGpu { ranks: sharing, found: library.version() });
    }
    if options.peer_copies == PeerCopies::Measured && (0..all.len()).any(|a| (0..a).any(|b| all[a][..2] == all[b][..2]))
    {
        // Ranks that take turns on a GPU would measure how long the turns are.
        options.peer_copies = PeerCopies::Never;
    }
    let gpu = Gpu::new(host.rank(), context, library, options, host.recorder().clone())?;
    host.recorder().attach(&gpu);
    Ok(world.with_lanes(Lanes::new(gpu, host)))
}

/// A group's communicators.
pub(crate) struct Lanes {
    gpu: Arc<Gpu>,
    /// The same ranks, for tensors on the CPU, unrecorded.
    host: Group,
    /// Held while an operation is issued: ranks must agree on the order of all that belongs to it.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    collective: Option<Arc<Lane>>,
    collectives: u64,
    /// By peer.
    to: HashMap<usize, Direction>,
    from: HashMap<usize, Direction>,
    /// What this rank has sent to itself.
    own: HashMap<u64, Tensor>,
}

/// Messages from one rank to another.
#[derive(Default)]
struct Direction {
    lane: Option<Arc<Lane>>,
    messages: u64,
}

fn count(counter: &mut u64) -> u64 {
    *counter += 1;
    *counter - 1
}

impl Lanes {
    fn new(gpu: Arc<Gpu>, host: Group) -> Arc<Lanes> {
        Arc::new(Lanes { gpu, host, state: Mutex::default() })
    }

    /// For a group split from this one.
    pub(crate) fn of(&self, group: &Group) -> Arc<Lanes> {
        Lanes::new(self.gpu.clone(), group.plain())
    }

    /// `input`: detached, on the GPU; absent for `recv`.
    pub(crate) fn issue(self: &Arc<Lanes>, call: Call, input: Option<Tensor>) -> Result<Pending<Tensor>> {
        self.issue_into(call, input, None)
    }

    /// An AllReduce whose result is `x`, detached and contiguous; or, where its sums need a wider kind, one of that kind.
    pub(crate) fn issue_in_place(self: &Arc<Lanes>, call: Call, x: &Tensor) -> Result<Pending<Tensor>> {
        self.issue_into(call, Some(x.shallow_clone()), Some(x.shallow_clone()))
    }

    /// `place`: where the result may go.
    fn issue_into(
        self: &Arc<Lanes>,
        call: Call,
        input: Option<Tensor>,
        place: Option<Tensor>,
    ) -> Result<Pending<Tensor>> {
        if let Some(error) = self.gpu.failure() {
            return Err(error);
        }
        let device = self.device();
        if let Some(found) = input.as_ref().map(Tensor::device).filter(|found| *found != device) {
            let message = format!("found a tensor on {found:?}, but this rank's GPU is {device:?}");
            return Err(Error::Cuda { call: call.op.name(), code: 0, message });
        }
        let rank = self.host.rank();
        let mut state = lock(&self.state);
        let number = match call.op {
            Op::Send { to } => count(&mut state.to.entry(to).or_default().messages),
            Op::Recv { from } => count(&mut state.from.entry(from).or_default().messages),
            _ => count(&mut state.collectives),
        };
        let call = Call { number, ..call };
        let about = self.about(&call);
        match (call.op, &input) {
            (Op::Send { to }, Some(x)) if to == rank => {
                state.own.insert(number, copy(x)?);
                drop(state);
                return self.at_once(about, nothing()?);
            }
            (Op::Recv { from }, _) if from == rank => {
                drop(state);
                return Ok(self.from_itself(call, about));
            }
            _ => {}
        }

        let placed = place.is_some();
        let (flight, out) = self.fly(&mut state, &call, input, place, &about).inspect_err(|_| {
            self.gpu.recorder.ended(about.seq, about.group.clone(), about.op, about.bytes, false);
        })?;
        drop(state);
        if matches!(call.op, Op::Send { .. }) {
            return Ok(Pending::ready(nothing()?));
        }
        let gpu = self.gpu.clone();
        Ok(Pending::coming(flight.arrived(), move || {
            let (before, after) = {
                let _entered = gpu.context.enter()?;
                flight.join(&gpu, &gpu.context.current_stream()?)?
            };
            let awaited = || Awaited { seq: about.seq, group: about.group.clone(), op: about.op };
            if !awaited_in_flight(&awaited) {
                gpu.waited(about, before, after);
            }
            // Who has a place for it rounds it there.
            Ok(if placed { out } else { out.f_to_kind(call.kind)? })
        }))
    }

    /// The operation on its way, and where its result will be: in `place` if sums need no wider kind.
    fn fly(
        &self,
        state: &mut State,
        call: &Call,
        input: Option<Tensor>,
        place: Option<Tensor>,
        about: &About,
    ) -> Result<(Arc<Flight>, Tensor)> {
        let (rank, size, device) = (self.host.rank(), self.host.size(), self.device());
        // bf16 sums are rounded once, as are NCCL's of two.
        let sums = matches!(call.op, Op::ReduceScatter | Op::ReduceScatterV | Op::AllReduce(Reduce::Sum));
        let wide = if sums && size > 2 && call.kind == Kind::BFloat16 { Kind::Float } else { call.kind };
        let x = match (input, call.op) {
            // Its sender may write to it at once.
            (Some(x), Op::Send { .. }) => Some(copy(&x)?),
            (Some(x), _) => Some(x.f_to_kind(wide)?.f_contiguous()?),
            (None, _) => None,
        };
        let out = match (place, &x, call.op) {
            (Some(place), ..) if wide == call.kind => place,
            // A wider copy is nobody else's.
            (_, Some(x), Op::AllReduce(_)) if wide != call.kind => x.shallow_clone(),
            _ => Tensor::f_empty(shape(call, rank, size), (wide, device))?,
        };
        let x = x.unwrap_or_else(|| out.shallow_clone());
        let ready = {
            let _entered = self.gpu.context.enter()?;
            self.gpu.context.current_stream()?.record()?
        };
        let check = self.check(call, about)?;
        let lane = self.lane(state, call.op)?;
        let held = vec![x.shallow_clone(), out.shallow_clone()];
        let flight = Flight::new(about.clone(), ready, lane.clone(), held);
        lane.issue(Item { call: call.clone(), x, out: out.shallow_clone(), rank, check, flight: flight.clone() })?;
        Ok((flight, out))
    }

    /// Issues everything at once, on the calling thread: `dependent` computes on a stream of its own, which begins when what was
    /// enqueued so far has ended, and waits for messages in place of the stream on which the rank computes. `reads` are kept
    /// until that one waits for the whole.
    pub(crate) fn in_flight<T: Send + 'static>(
        &self,
        reads: Vec<Tensor>,
        dependent: impl FnOnce() -> Result<T>,
    ) -> Result<Pending<T>> {
        let gpu = self.gpu.clone();
        let side = gpu.side()?;
        let _entered = gpu.context.enter()?;
        // Memory of the side stream that has been freed may still be read by what was enqueued before.
        side.wait(&gpu.context.current_stream()?.record()?)?;
        let (value, last) = {
            let _elsewhere = gpu.context.compute_on(side)?;
            noting_waits(dependent)
        };
        let (value, landed) = (value?, side.record()?);
        let gpu = gpu.clone();
        Ok(Pending::coming(Arc::new(true.into()), move || {
            let _entered = gpu.context.enter()?;
            let compute = gpu.context.current_stream()?;
            let before = compute.record()?;
            compute.wait(&landed)?;
            if let Some(Awaited { seq, group, op }) = last {
                let about = About { op, number: 0, group, bytes: (0, 0), seq };
                gpu.waited(about, before, compute.record()?);
            }
            drop(reads);
            Ok(value)
        }))
    }

    /// See [`Group::connect`].
    pub(crate) fn connect(&self, to: &[usize], from: &[usize]) -> Result<()> {
        let rank = self.host.rank();
        if self.host.size() == 1 {
            return Ok(());
        }
        let sends = to.iter().map(|&to| ((rank, to), Op::Send { to }));
        let receives = from.iter().map(|&from| ((from, rank), Op::Recv { from }));
        // By sender and receiver, the same order on all ranks.
        let messages: BTreeMap<_, _> = sends.chain(receives).filter(|((from, to), _)| from != to).collect();
        let mut state = lock(&self.state);
        let operations = std::iter::once(Op::AllGather).chain(messages.into_values());
        let lanes = operations.map(|op| self.lane(&mut state, op)).collect::<Result<Vec<_>>>()?;
        drop(state);
        let group = self.host.shared_name();
        let about = About { op: "connect", number: 0, group, bytes: (0, 0), seq: u64::MAX };
        // Communicators are made side by side, with nothing under way on any GPU. Then their ranks meet, on one after another: two
        // that wait for each other's next meeting there cannot be.
        let begun = lanes.iter().map(|lane| lane.begin(&about)).collect::<Result<Vec<_>>>()?;
        for (lane, &begun) in lanes.iter().zip(&begun) {
            lane.until_made(&about, !begun)?;
        }
        self.host.barrier()?.wait()?;
        for (lane, _) in lanes.iter().zip(begun).filter(|(_, begun)| *begun) {
            lane.meet().inspect_err(|error| self.gpu.fail(&about, self.gpu.error(&about, error.to_string())))?;
        }
        self.host.barrier()?.wait()
    }

    pub(crate) fn device(&self) -> Device {
        Device::Cuda(self.gpu.context.index)
    }

    pub(crate) fn peer_copies(&self) -> CopiesFound {
        lock(&self.state).collective.as_ref().map(|lane| lane.peer_copies()).unwrap_or_default()
    }

    fn about(&self, call: &Call) -> About {
        let (op, group) = (call.op.name(), self.host.shared_name());
        let bytes = call.bytes(self.host.rank(), self.host.size());
        let seq = self.gpu.recorder.issued(group.clone(), op, bytes);
        About { op, number: call.number, group, bytes, seq }
    }

    fn at_once(&self, about: About, result: Tensor) -> Result<Pending<Tensor>> {
        let About { op, group, bytes, seq, .. } = about;
        self.gpu.recorder.started(seq);
        self.gpu.recorder.ended(seq, group, op, bytes, true);
        Ok(Pending::ready(result))
    }

    /// Looked for when it is waited for: it may be sent after the receive was issued.
    fn from_itself(self: &Arc<Lanes>, call: Call, about: About) -> Pending<Tensor> {
        let (lanes, rank) = (self.clone(), self.host.rank());
        Pending::coming(Arc::new(true.into()), move || {
            let Some(x) = lock(&lanes.state).own.remove(&call.number) else {
                return Err(lanes.gpu.error(&about, "waited for, but this rank has not sent it to itself".into()));
            };
            let sent = Call { kind: x.f_kind()?, shape: x.size(), ..call.clone() };
            sent.check_received(&about.group, rank, rank, &call)?;
            lanes.at_once(about, x)?.wait()
        })
    }

    /// Sends what this rank brings to whom it concerns, over the host's back end; gives what the others bring where the
    /// operation must await it.
    fn check(&self, call: &Call, about: &About) -> Result<Option<Pending<Tensor>>> {
        let wanted = match self.gpu.options.check {
            Check::Before => true,
            Check::First(first) => call.number < first,
            Check::Never => false,
        };
        if !wanted {
            return Ok(None);
        }
        let (rank, size) = (self.host.rank(), self.host.size());
        let own = Tensor::f_from_slice(&call.encode(size))?;
        let brought = match call.op {
            Op::Send { to } => {
                drop(self.host.send(&own, to)?);
                return Ok(None);
            }
            Op::Recv { from } => self.host.recv(&own.size(), Kind::Int64, from)?,
            _ => self.host.all_gather(&own)?,
        };
        if self.gpu.options.check == Check::Before {
            return Ok(Some(brought));
        }
        let (call, group) = (call.clone(), about.group.clone());
        let compared = brought.map(move |words| {
            lane::compare(&words, &call, &group, rank, size)?;
            Ok(words)
        });
        self.gpu.watch_check(about.clone(), compared);
        Ok(None)
    }

    /// The operation's communicator, made at its first use.
    fn lane(&self, state: &mut State, op: Op) -> Result<Arc<Lane>> {
        let (host, gpu) = (&self.host, &self.gpu);
        let place = match op {
            Op::Send { to } => &mut state.to.entry(to).or_default().lane,
            Op::Recv { from } => &mut state.from.entry(from).or_default().lane,
            _ => &mut state.collective,
        };
        if let Some(lane) = place {
            return Ok(lane.clone());
        }
        let library = gpu.library;
        let empty = || Ok::<_, Error>(Tensor::f_from_slice(&[0i64; ID_WORDS])?);
        let new_id = || Ok::<_, Error>(Tensor::f_from_slice(&library.unique_id()?)?);
        let (part, id, rank, size) = match op {
            Op::Send { to } => {
                let id = new_id()?;
                drop(host.send(&id, to)?);
                (Part::Sender, Pending::ready(id), 0, 2)
            }
            Op::Recv { from } => (Part::Receiver, host.recv(&[ID_WORDS as i64], Kind::Int64, from)?, 1, 2),
            _ => {
                let id = if host.rank() == 0 { new_id()? } else { empty()? };
                (Part::Collectives(host.rank()), host.broadcast(&id, 0)?, host.rank(), host.size())
            }
        };
        let make = move || {
            let mut words = [0; ID_WORDS];
            id.wait()?.f_copy_data(&mut words, ID_WORDS)?;
            Comm::new(library, words, rank, size)
        };
        Ok(place.insert(Lane::new(gpu, host.size(), part, Box::new(make))?).clone())
    }
}

/// All communicators of a group at once, as other ranks free theirs in another order, and who frees one waits for all its ranks.
impl Drop for Lanes {
    fn drop(&mut self) {
        // What is under way holds its communicator.
        self.gpu.settle_for_a_while();
        drop(std::mem::take(&mut *lock(&self.state)));
        self.gpu.until_ended();
    }
}

/// Contiguous, and nobody else's.
fn copy(x: &Tensor) -> Result<Tensor> {
    let mut copy = Tensor::f_empty(x.size(), (x.f_kind()?, x.device()))?;
    copy.f_copy_(x)?;
    Ok(copy)
}

/// Of the operation's result on this rank.
fn shape(call: &Call, rank: usize, size: usize) -> Vec<i64> {
    let rows = |count: i64| [&[count], call.shape.get(1..).unwrap_or_default()].concat();
    match call.op {
        Op::AllGather => [&[size as i64], call.shape.as_slice()].concat(),
        Op::AllGatherV => rows(call.send_rows.iter().sum()),
        Op::ReduceScatter => call.shape[1..].to_vec(),
        Op::ReduceScatterV => rows(call.send_rows[rank]),
        Op::AllToAllV => rows(call.recv_rows.iter().sum()),
        Op::Send { .. } => vec![0],
        _ => call.shape.clone(),
    }
}
