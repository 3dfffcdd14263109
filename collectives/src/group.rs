//! A communicator over some ranks: checks what one rank can check alone, then hands the operation to the progress thread.
//!
//! Whether all ranks brought the same is checked by the back end (`op::agree`) before any data moves.

use crate::{
    Error, Pending, Recorder, Reduce, Result,
    flight::{Awaited, Flight, awaited_in_flight},
    nccl::{CopiesFound, Lanes},
    op::{Call, KINDS, MAX_DIMS, Op},
    pending::promise,
    progress::{Face, Job, Outcome, Queue, stopped},
};
use std::{fmt, sync::Arc, time::Instant};
use tch::{Device, Kind, Tensor};

/// Some ranks that communicate. Cheap to clone; clones are the same communicator.
///
/// Every operation is asynchronous: it is enqueued, runs while the rank computes, and ends in [`Pending::wait`]. All ranks
/// of a group must issue the same collectives in the same order, each rank from one thread; they check that they do
/// ([`Error::Mismatch`]). Sends and receives may be issued at any point between.
///
/// Tensors may be Double, Float, BFloat16 or Int64, of up to 8 dimensions, also without elements; they are taken detached
/// and made contiguous, and results need no gradient and share no memory with any input. The input may be dropped at any
/// time, but must not be written to before `wait` has returned. Tensors on a GPU travel by NCCL where the group has it
/// ([`crate::nccl`]); else they go through copies on the CPU. Either way the result is on the device of the input. W is the size of the group in the comments below.
#[derive(Clone)]
pub struct Group {
    face: Arc<Face>,
    line: Line,
    /// For tensors on the GPU; without, they go through the CPU.
    lanes: Option<Arc<Lanes>>,
    recorded: bool,
}

/// A rank's connection to its progress thread.
#[derive(Clone)]
pub(crate) struct Line {
    pub queue: Arc<Queue>,
    pub recorder: Recorder,
    pub backend: &'static str,
    pub flight: Flight,
}

impl Group {
    pub(crate) fn new(face: Face, line: Line) -> Group {
        Group { face: Arc::new(face), line, lanes: None, recorded: true }
    }

    /// The same ranks, with all tensors on the CPU, and nothing recorded.
    pub(crate) fn plain(&self) -> Group {
        Group { lanes: None, recorded: false, ..self.clone() }
    }

    /// The same ranks, with tensors on the GPU on these lanes.
    pub(crate) fn with_lanes(&self, lanes: Arc<Lanes>) -> Group {
        Group { lanes: Some(lanes), ..self.clone() }
    }

    pub(crate) fn shared_name(&self) -> Arc<str> {
        self.face.name.clone()
    }

    /// This rank's place in the group, from 0.
    pub fn rank(&self) -> usize {
        self.face.rank
    }

    /// W, the number of ranks.
    pub fn size(&self) -> usize {
        self.face.size
    }

    /// `world`, or the name given to [`Group::split`].
    pub fn name(&self) -> &str {
        &self.face.name
    }

    /// What carries tensors on the CPU: `local`, `mpi` or `tcp`.
    pub fn backend(&self) -> &'static str {
        self.line.backend
    }

    /// The GPU of this rank where the group has NCCL, else the CPU.
    pub fn device(&self) -> Device {
        self.lanes.as_ref().map_or(Device::Cpu, |lanes| lanes.device())
    }

    /// What carries tensors on `device`: `nccl`, or [`Group::backend`].
    pub fn backend_on(&self, device: Device) -> &'static str {
        if device.is_cuda() && self.lanes.is_some() { "nccl" } else { self.backend() }
    }

    /// Whether short all_gathers on GPUs go by copies between the ranks' memories instead of NCCL ([`crate::nccl::PeerCopies`]), and
    /// why. Known once the group is connected, or has done a collective on GPUs.
    pub fn peer_copies(&self) -> CopiesFound {
        self.lanes.as_ref().map(|lanes| lanes.peer_copies()).unwrap_or_default()
    }

    /// Makes ready what collectives on GPUs, and messages to ranks `to` and from ranks `from`, travel by, and waits until it is there;
    /// without GPUs there is nothing to do. Collective: who is to be sent to names the sender. Nothing may be under way on the GPUs:
    /// whoever makes a communicator may wait for that, and that for ranks which wait for the communicator. What is not made here is made
    /// when it is first used.
    pub fn connect(&self, to: &[usize], from: &[usize]) -> Result<()> {
        self.lanes.as_ref().map_or(Ok(()), |lanes| lanes.connect(to, from))
    }

    /// This rank's flight recorder, shared by all its groups.
    pub fn recorder(&self) -> &Recorder {
        &self.line.recorder
    }

    pub(crate) fn lanes(&self) -> Option<&Arc<Lanes>> {
        self.lanes.as_ref()
    }

    pub(crate) fn flight(&self) -> &Flight {
        &self.line.flight
    }

    /// The group of the ranks that pass the same `color`, ordered by `key` and then by rank (MPI 4.0, 7.4.2,
    /// MPI_Comm_split). Collective; blocks until all ranks have come.
    pub fn split(&self, name: &str, color: usize, key: usize) -> Result<Group> {
        let pair = Tensor::f_from_slice(&[color as i64, key as i64])?;
        let call = self.call(Op::Split, &pair)?;
        let outcome = self.issue(call, Some(&pair), Some(name.into()))?.wait()?;
        match outcome {
            Outcome::Group(face) => {
                let group = Group { recorded: self.recorded, ..Group::new(face, self.line.clone()) };
                let lanes = self.lanes.as_ref().map(|lanes| lanes.of(&group));
                Ok(Group { lanes, ..group })
            }
            Outcome::Tensor(_) => Err(stopped(Op::Split, &self.face)),
        }
    }

    /// `x`: `[..]`, the same shape on each rank. Gives `[W, ..]`, in rank order.
    pub fn all_gather(&self, x: &Tensor) -> Result<Pending<Tensor>> {
        self.tensor(self.call(Op::AllGather, x)?, Some(x))
    }

    /// `x`: `[rows[rank], ..]`. Gives `[sum(rows), ..]`, in rank order. `rows` must be the same on each rank.
    pub fn all_gather_v(&self, x: &Tensor, rows: &[i64]) -> Result<Pending<Tensor>> {
        let call = Call { send_rows: rows.into(), ..self.call(Op::AllGatherV, x)? };
        self.check_rows(&call, rows, rows.get(self.rank()).copied(), "this rank's number of rows")?;
        self.tensor(call, Some(x))
    }

    /// `x`: `[W, ..]`. Gives `[..]`: the sum over all ranks of their slice `x[rank]`.
    pub fn reduce_scatter(&self, x: &Tensor) -> Result<Pending<Tensor>> {
        let call = self.call(Op::ReduceScatter, x)?;
        self.check_leading(&call)?;
        self.tensor(call, Some(x))
    }

    /// `x`: `[sum(rows), ..]`. Gives `[rows[rank], ..]`, summed over all ranks. `rows` must be the same on each rank.
    pub fn reduce_scatter_v(&self, x: &Tensor, rows: &[i64]) -> Result<Pending<Tensor>> {
        let call = Call { send_rows: rows.into(), ..self.call(Op::ReduceScatterV, x)? };
        self.check_rows(&call, rows, checked_sum(rows), "the sum of the rows")?;
        self.tensor(call, Some(x))
    }

    /// `x`: `[..]`, the same shape on each rank. Gives `[..]`, combined over all ranks, bit-identical on each.
    pub fn all_reduce(&self, x: &Tensor, op: Reduce) -> Result<Pending<Tensor>> {
        self.tensor(self.call(Op::AllReduce(op), x)?, Some(x))
    }

    /// [`Group::all_reduce`] into `x` itself, contiguous, which must be neither read nor written to before `wait` has returned.
    /// On GPUs without other memory, but for bf16 of more than two ranks, whose sums travel in f32 and are rounded once.
    pub fn all_reduce_in_place(&self, x: &Tensor, op: Reduce) -> Result<Pending<()>> {
        let call = self.call(Op::AllReduce(op), x)?;
        let mut x = x.f_detach()?;
        let reduced = match &self.lanes {
            Some(lanes) if x.device().is_cuda() && x.is_contiguous() => lanes.issue_in_place(call, &x)?,
            _ => self.tensor(call, Some(&x))?,
        };
        Ok(reduced.map(move |reduced| {
            if reduced.data_ptr() != x.data_ptr() {
                x.f_copy_(&reduced)?;
            }
            Ok(())
        }))
    }

    /// `x`: `[W, ..]`. Gives `[W, ..]`: slice r came from rank r, where it was slice `rank`.
    pub fn all_to_all(&self, x: &Tensor) -> Result<Pending<Tensor>> {
        let call = self.call(Op::AllToAll, x)?;
        self.check_leading(&call)?;
        self.tensor(call, Some(x))
    }

    /// `x`: `[sum(send_rows), ..]`, the rows for rank 0 first. Gives `[sum(recv_rows), ..]`, those from rank 0 first.
    pub fn all_to_all_v(&self, x: &Tensor, send_rows: &[i64], recv_rows: &[i64]) -> Result<Pending<Tensor>> {
        let call = Call { send_rows: send_rows.into(), recv_rows: recv_rows.into(), ..self.call(Op::AllToAllV, x)? };
        self.check_rows(&call, send_rows, checked_sum(send_rows), "the sum of the rows sent")?;
        self.check_rows(&call, recv_rows, call.shape.first().copied(), "")?;
        self.tensor(call, Some(x))
    }

    /// `x`: on the root what is sent; on the others it only gives the shape and the kind. Gives a copy of the root's.
    pub fn broadcast(&self, x: &Tensor, root: usize) -> Result<Pending<Tensor>> {
        if root >= self.size() {
            return Err(Error::BadRoot { group: self.name().into(), root, size: self.size() });
        }
        self.tensor(self.call(Op::Broadcast { root }, x)?, Some(x))
    }

    /// Sends `x` to a rank of this group, which may be this one. It is copied first, and so ends without waiting for the
    /// receiver: ranks in a ring may all wait for their send before they receive.
    pub fn send(&self, x: &Tensor, to: usize) -> Result<Pending<()>> {
        self.check_peer("send", to)?;
        Ok(self.tensor(self.call(Op::Send { to }, x)?, Some(x))?.map(|_| Ok(())))
    }

    /// [`Group::recv_on`] [`Group::device`].
    pub fn recv(&self, shape: &[i64], kind: Kind, from: usize) -> Result<Pending<Tensor>> {
        self.recv_on(self.device(), shape, kind, from)
    }

    /// Receives, on `device`, the next tensor that `from` sends here; its shape and kind must be as given. With NCCL, messages
    /// between GPUs and those between CPUs are counted apart: `from` must send from the same sort of device.
    pub fn recv_on(&self, device: Device, shape: &[i64], kind: Kind, from: usize) -> Result<Pending<Tensor>> {
        self.check_peer("recv", from)?;
        let call = self.call_of(Op::Recv { from }, shape.into(), kind)?;
        match (&self.lanes, device) {
            (Some(lanes), Device::Cuda(_)) => lanes.issue(call, None),
            (_, Device::Cpu) => self.tensor(call, None),
            _ => Ok(self.tensor(call, None)?.map(move |x| Ok(x.f_to_device(device)?))),
        }
    }

    /// Ends when all ranks have come.
    pub fn barrier(&self) -> Result<Pending<()>> {
        let call = self.call_of(Op::Barrier, vec![0], Kind::Float)?;
        Ok(self.tensor(call, None)?.map(|_| Ok(())))
    }

    fn call(&self, op: Op, x: &Tensor) -> Result<Call> {
        self.call_of(op, x.size(), x.f_kind()?)
    }

    fn call_of(&self, op: Op, shape: Vec<i64>, kind: Kind) -> Result<Call> {
        let (name, group) = (op.name(), self.name());
        if !KINDS.contains(&kind) {
            return Err(Error::UnsupportedKind { op: name, group: group.into(), kind });
        }
        if shape.len() > MAX_DIMS {
            return Err(Error::TooManyDims { op: name, group: group.into(), shape: shape.into(), most: MAX_DIMS });
        }
        Ok(Call { op, number: 0, kind, shape, send_rows: vec![], recv_rows: vec![] })
    }

    fn rows_error(&self, call: &Call, rows: &[i64], problem: String) -> Error {
        Error::Rows {
            op: call.op.name(),
            group: self.name().into(),
            rank: self.rank(),
            shape: call.shape.as_slice().into(),
            rows: rows.into(),
            problem,
        }
    }

    /// Dimension 0 must have one slice for each rank.
    fn check_leading(&self, call: &Call) -> Result<()> {
        let w = self.size() as i64;
        if call.shape.first() == Some(&w) {
            return Ok(());
        }
        Err(self.rows_error(call, &[], format!("dimension 0 must be the size of the group, {w}")))
    }

    /// There must be a number for each rank, none negative, and dimension 0 must be `expected`, which is `what`.
    fn check_rows(&self, call: &Call, rows: &[i64], expected: Option<i64>, what: &str) -> Result<()> {
        let problem = if rows.len() != self.size() {
            format!("{} numbers of rows, expected one for each of the {} ranks", rows.len(), self.size())
        } else if let Some(negative) = rows.iter().find(|&&r| r < 0) {
            format!("{negative} rows, expected none or more")
        } else {
            match (call.shape.first(), expected) {
                (Some(found), Some(expected)) if *found == expected => return Ok(()),
                (Some(found), Some(expected)) => format!("dimension 0 is {found}, expected {expected}, {what}"),
                (None, _) => "a tensor without dimensions has no rows".to_string(),
                (_, None) => "the sum of the rows does not fit 64 bits".to_string(),
            }
        };
        Err(self.rows_error(call, rows, problem))
    }

    fn check_peer(&self, op: &'static str, peer: usize) -> Result<()> {
        if peer < self.size() {
            return Ok(());
        }
        Err(Error::BadPeer { op, group: self.name().into(), peer, size: self.size() })
    }

    fn tensor(&self, call: Call, input: Option<&Tensor>) -> Result<Pending<Tensor>> {
        if let (Some(lanes), Some(x)) = (&self.lanes, input)
            && x.device().is_cuda()
        {
            return lanes.issue(call, Some(x.f_detach()?));
        }
        self.on_host(call, input)
    }

    fn on_host(&self, call: Call, input: Option<&Tensor>) -> Result<Pending<Tensor>> {
        let (op, face) = (call.op, self.face.clone());
        Ok(self.issue(call, input, None)?.map(move |outcome| match outcome {
            Outcome::Tensor(result) => Ok(result),
            Outcome::Group(_) => Err(stopped(op, &face)),
        }))
    }

    fn issue(&self, call: Call, input: Option<&Tensor>, name: Option<Arc<str>>) -> Result<Pending<Outcome>> {
        let issued = Instant::now();
        let input = input.map(Tensor::f_detach).transpose()?;
        let op = call.op.name();
        let group = self.face.name.clone();
        let recorder = self.line.recorder.clone();
        let issued_now = || recorder.issued(group.clone(), op, call.bytes(self.rank(), self.size()));
        let seq = self.recorded.then(issued_now);
        let (promise, receipt) = promise(op, group.clone());
        self.line.queue.push(Job { face: self.face.clone(), call, input, name, promise, seq, issued });
        Ok(Pending::coming(receipt.arrived(), move || {
            let from = recorder.now();
            let result = receipt.take();
            if let Some(seq) = seq
                && !awaited_in_flight(&|| Awaited { seq, group: group.clone(), op })
            {
                recorder.exposed(seq, group, op, (from, recorder.now()));
            }
            result
        }))
    }
}

fn checked_sum(rows: &[i64]) -> Option<i64> {
    rows.iter().try_fold(0i64, |sum, &r| sum.checked_add(r))
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {} on group {} ({})", self.rank(), self.size(), self.name(), self.backend())
    }
}
