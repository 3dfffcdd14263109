//! `lasp train --trace`: some steps of one rank in the format of Chrome's and Perfetto's trace viewers. What libtorch and the
//! GPUs did comes from libtorch's profiler, what was sent from the flight recorder, on one clock; and how much of the
//! communication no computation hid, for each kind of layer.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use collectives::{CommSpan, Recorder};
use serde_json::{Value, json};

use super::{Error, Result, Trainer, sum};
use crate::config::LayerKind;
use crate::sequence::Place;

/// Process numbers of the recorder's lanes are these and the rank; the profiler's are those of processes and devices.
const LANES: usize = 10_000_000;

/// A trace being recorded.
pub(super) struct Trace {
    path: PathBuf,
    rank: usize,
    recorder: Recorder,
    /// Whether the profiler records this thread: of the ranks of one process it can record one.
    profiled: bool,
    /// Unix time of the recorder's zero, in nanoseconds.
    epoch: i64,
    /// Number, start and end of each step, on the recorder's clock.
    steps: Vec<(u64, u64, u64)>,
    step_from: u64,
}

/// Microseconds for which a rank waited for communication in one layer of one forward or backward pass: the mean over ranks,
/// layers, passes and the traced steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Exposed {
    pub kind: LayerKind,
    pub forward_us: f64,
    pub backward_us: f64,
}

impl Trace {
    pub fn begin(path: PathBuf, trainer: &Trainer) -> Result<Self> {
        let world = &trainer.mesh.world;
        let recorder = world.recorder().clone();
        recorder.settle();
        let profiled = kernels::bridge::profile_begin(trainer.device().is_cuda())?;
        let (epoch, step_from) = (epoch(&recorder), recorder.now());
        Ok(Self { path, rank: world.rank(), recorder, profiled, epoch, steps: Vec::new(), step_from })
    }

    /// A step has ended, and the next one begins.
    pub fn step(&mut self, number: u64) {
        let now = self.recorder.now();
        self.steps.push((number, self.step_from, now));
        self.step_from = now;
    }

    /// Writes the trace. Gives what was exposed of the layers' communication, and of the sum of the gradient in a step, in
    /// microseconds, mean over ranks. Collective over the world.
    pub fn end(self, trainer: &Trainer) -> Result<(Vec<Exposed>, f64)> {
        self.recorder.settle();
        let mut trace = if self.profiled {
            kernels::bridge::profile_end(&self.path)?;
            let io = |source| Error::Io { action: "read", path: self.path.clone(), source };
            let text = std::fs::read_to_string(&self.path).map_err(io)?;
            serde_json::from_str(&text).map_err(|source| io(source.into()))?
        } else {
            json!({ "displayTimeUnit": "ms", "traceEvents": [] })
        };
        let base = trace["baseTimeNanoseconds"].as_i64().unwrap_or(0);
        match trace["traceEvents"].as_array_mut() {
            Some(events) => events.extend(self.events(base)),
            None => trace["traceEvents"] = self.events(base).into(),
        }
        std::fs::write(&self.path, trace.to_string()).map_err(|source| Error::Io {
            action: "write",
            path: self.path.clone(),
            source,
        })?;
        self.exposed(trainer)
    }

    fn covers(&self, from: u64, to: u64) -> bool {
        let (first, last) = (self.steps.first().map_or(0, |s| s.1), self.steps.last().map_or(0, |s| s.2));
        from >= first && to <= last
    }

    fn messages(&self) -> Vec<CommSpan> {
        let spans = self.recorder.comm_spans().into_iter();
        spans.filter(|span| self.covers(span.issued_ns, span.ended_ns)).collect()
    }

    /// The recorder's spans in the trace format, with times in microseconds since `base`, nanoseconds of Unix time.
    fn events(&self, base: i64) -> Vec<Value> {
        let mut lanes =
            Lanes { pid: LANES + self.rank, shift: self.epoch - base, lanes: Vec::new(), events: Vec::new() };
        lanes.name("process_name", 0, &format!("rank {}", self.rank));
        for &(number, from, to) in &self.steps {
            lanes.add("steps", &format!("step {number}"), (from, to), json!({}));
        }
        for span in self.recorder.compute_spans() {
            if self.covers(span.started_ns, span.ended_ns) {
                lanes.add("compute", span.name, (span.started_ns, span.ended_ns), json!({}));
            }
        }
        let mut messages = self.messages();
        messages.sort_by_key(|span| span.started_ns);
        for span in messages {
            let args = json!({
                "group": &*span.group,
                "place": span.place,
                "bytes_sent": span.bytes_sent,
                "bytes_received": span.bytes_received,
                "issued_us": lanes.us(span.issued_ns),
                "exposed_us": span.exposed_ns as f64 / 1e3,
                "number": span.seq,
            });
            lanes.add("communication", span.op, (span.started_ns, span.ended_ns), args);
        }
        for wait in self.recorder.waits() {
            if self.covers(wait.0, wait.1) {
                lanes.add("waiting", "waiting", wait, json!({}));
            }
        }
        lanes.events
    }

    /// The same on every rank.
    fn exposed(&self, trainer: &Trainer) -> Result<(Vec<Exposed>, f64)> {
        let mut ns: BTreeMap<&str, u64> = BTreeMap::new();
        for span in self.messages() {
            *ns.entry(span.place).or_default() += span.exposed_ns;
        }
        let layers = [LayerKind::Linear, LayerKind::Softmax].map(|kind| [Place::Forward(kind), Place::Backward(kind)]);
        let places = layers.into_iter().flatten().chain([Place::Gradient]);
        let us = |place: Place| ns.get(place.name()).copied().unwrap_or(0) as f64 / 1e3;
        let world = &trainer.mesh.world;
        let all = sum(world, &places.map(us).collect::<Vec<_>>())?;
        let kinds = trainer.config.model.layer_kinds();
        let train = &trainer.config.train;
        let passes = (train.batch / trainer.mesh.dp.size()).div_ceil(train.micro_batch.max(1)) * self.steps.len();
        let of = |(at, kind): (usize, LayerKind)| {
            let layers = kinds.iter().filter(|&&k| k == kind).count();
            let times = (layers * passes * world.size()) as f64;
            (layers > 0).then(|| Exposed { kind, forward_us: all[at] / times, backward_us: all[at + 1] / times })
        };
        let layers = [(0, LayerKind::Linear), (2, LayerKind::Softmax)].into_iter().filter_map(of).collect();
        Ok((layers, all[4] / (self.steps.len() * world.size()) as f64))
    }
}

/// Unix time of the recorder's zero, by the closest of a few looks at both clocks.
fn epoch(recorder: &Recorder) -> i64 {
    let look = |_| {
        let before = recorder.now();
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as i64);
        let after = recorder.now();
        (after - before, unix - ((before + after) / 2) as i64)
    };
    (0..5).map(look).min().map_or(0, |(_, epoch)| epoch)
}

/// Events in lanes: where two of one sort overlap, the later one has a lane of its own.
struct Lanes {
    pid: usize,
    /// Nanoseconds from the recorder's zero to the trace's.
    shift: i64,
    /// Sort, and when its last event ends.
    lanes: Vec<(&'static str, u64)>,
    events: Vec<Value>,
}

impl Lanes {
    fn us(&self, ns: u64) -> f64 {
        (ns as i64 + self.shift) as f64 / 1e3
    }

    fn name(&mut self, what: &str, tid: usize, name: &str) {
        self.events.push(json!({ "ph": "M", "name": what, "pid": self.pid, "tid": tid, "args": { "name": name } }));
    }

    fn add(&mut self, sort: &'static str, name: &str, (from, to): (u64, u64), args: Value) {
        let tid = match self.lanes.iter().position(|&(of, until)| of == sort && until <= from) {
            Some(tid) => tid,
            None => {
                self.lanes.push((sort, 0));
                self.name("thread_name", self.lanes.len() - 1, sort);
                self.lanes.len() - 1
            }
        };
        self.lanes[tid].1 = to;
        let (ts, dur) = (self.us(from), to.saturating_sub(from) as f64 / 1e3);
        self.events.push(json!({
            "ph": "X", "cat": sort, "name": name, "pid": self.pid, "tid": tid, "ts": ts, "dur": dur, "args": args,
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_overlaps_lies_in_lanes_of_its_own() {
        let mut lanes = Lanes { pid: 1, shift: 1000, lanes: Vec::new(), events: Vec::new() };
        for times in [(0, 10), (5, 20), (10, 12), (21, 22)] {
            lanes.add("communication", "send", times, json!({}));
        }
        lanes.add("compute", "intra_rank", (0, 5), json!({}));
        let spans: Vec<&Value> = lanes.events.iter().filter(|event| event["ph"] == "X").collect();
        let tids: Vec<u64> = spans.iter().filter_map(|event| event["tid"].as_u64()).collect();
        assert_eq!(tids, [0, 1, 0, 0, 2]);
        assert_eq!((spans[1]["ts"].as_f64(), spans[1]["dur"].as_f64()), (Some(1.005), Some(0.015)));
    }
}
