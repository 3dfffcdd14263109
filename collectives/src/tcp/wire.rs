//! How steps become frames: the first step's call travels with its data, one round in all. The receiver looks at the data only
//! once the calls of all ranks agree.

use super::link::{Frame, Key, Links, Payload, Sort};
use crate::{
    Error, Result,
    op::{Call, Op, agree},
    program::Step,
    progress::{Face, Place, Sent, Transfer, Wire, fresh, nothing},
};
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tch::{Kind, Tensor};

pub(super) struct TcpWire {
    links: Arc<Links>,
    /// By `Face::id`.
    groups: Vec<Membership>,
}

struct Membership {
    /// What its frames say.
    id: u64,
    /// Ranks of the world.
    members: Arc<[usize]>,
    collectives: u64,
    parts: u64,
    sent: HashMap<usize, u64>,
    received: HashMap<usize, u64>,
}

impl Membership {
    fn new(id: u64, members: Arc<[usize]>) -> Membership {
        Membership { id, members, collectives: 0, parts: 0, sent: HashMap::new(), received: HashMap::new() }
    }
}

fn count(counter: &mut u64) -> u64 {
    *counter += 1;
    *counter - 1
}

/// A name for the group that a split makes; all its members know what it is made of.
fn name(parent: u64, number: u64, color: i64) -> u64 {
    // The finalizer of splitmix64 (Steele et al., 2014), once for each part.
    [number, color as u64].iter().fold(parent, |mixed, part| {
        let z = mixed.wrapping_mul(31).wrapping_add(*part).wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

impl TcpWire {
    pub(super) fn new(links: Arc<Links>, size: usize) -> TcpWire {
        TcpWire { links, groups: vec![Membership::new(0, (0..size).collect())] }
    }
}

impl Wire for TcpWire {
    fn begin(
        &mut self,
        face: &Arc<Face>,
        call: Option<Call>,
        step: Step,
        _issued: Instant,
    ) -> Result<Box<dyn Transfer>> {
        let group = &mut self.groups[face.id];
        let (links, members, rank) = (self.links.clone(), group.members.clone(), face.rank);
        let (x, runs, reading) = match step {
            Step::Send { x, to } => {
                let number = count(group.sent.entry(to).or_default());
                let key = Key { group: group.id, sort: Sort::Message, number, part: 0 };
                let words = call.map(|call| Call { number, ..call }.encode(0)).unwrap_or_default();
                links.send(members[to], key, words, Payload::whole(bytes(&x)?));
                return Ok(Box::new(Sent));
            }
            Step::Recv { from } => {
                let number = count(group.received.entry(from).or_default());
                let key = Key { group: group.id, sort: Sort::Message, number, part: 0 };
                let expected = call.map(|call| Call { number, ..call });
                return Ok(Box::new(Receiving { face: face.clone(), links, peer: members[from], from, key, expected }));
            }
            Step::Gather { x, counts } => (x, None, Reading::Runs(counts)),
            Step::Exchange { x, send, recv } => (x, Some(send), Reading::Runs(recv)),
            Step::Broadcast { x, root } if root == rank => (x, None, Reading::Root { root }),
            Step::Broadcast { root, .. } => (nothing()?, None, Reading::Root { root }),
            Step::Meet => (nothing()?, None, Reading::Nothing),
        };
        if call.is_some() {
            group.collectives += 1;
            group.parts = 0;
        }
        let number = group.collectives - 1;
        let key = Key { group: group.id, sort: Sort::Collective, number, part: count(&mut group.parts) };
        let call = call.map(|call| Call { number, ..call });
        let words = call.as_ref().map(|call| call.encode(face.size)).unwrap_or_default();

        let whole = Payload::whole(if members.len() == 1 { vec![] } else { bytes(&x)? });
        let width = x.f_kind()?.elt_size_in_bytes();
        let mut start = 0;
        for to in 0..members.len() {
            let payload = match &runs {
                Some(runs) => {
                    let length = runs[to] as usize * width;
                    start += length;
                    Payload { range: start - length..start, ..whole.clone() }
                }
                None => whole.clone(),
            };
            if to != rank {
                links.send(members[to], key, words.clone(), payload);
            }
        }
        let own = match &runs {
            Some(runs) => fresh(&x.f_narrow(0, runs[..rank].iter().sum(), runs[rank])?)?,
            None => fresh(&x)?,
        };
        Ok(Box::new(Collective { face: face.clone(), links, members, key, call, own, reading }))
    }

    fn split(&mut self, parent: &Arc<Face>, name_: &Arc<str>, color: i64, _key: i64, place: Place) -> Result<Face> {
        let group = &self.groups[parent.id];
        let members: Arc<[usize]> = place.members.iter().map(|&rank| group.members[rank]).collect();
        let id = name(group.id, group.collectives, color);
        self.groups.push(Membership::new(id, members));
        Ok(Face { id: self.groups.len() - 1, name: name_.clone(), rank: place.rank, size: place.members.len() })
    }

    fn patience(&self, _polls: u32) -> Option<Duration> {
        None
    }

    fn leave(&mut self) {
        self.links.leave();
    }
}

/// What a rank takes from the frames of a step.
enum Reading {
    /// From each rank so many elements.
    Runs(Vec<i64>),
    Root {
        root: usize,
    },
    Nothing,
}

struct Collective {
    face: Arc<Face>,
    links: Arc<Links>,
    members: Arc<[usize]>,
    key: Key,
    /// Absent in the later steps of an operation.
    call: Option<Call>,
    /// This rank's part of the result.
    own: Tensor,
    reading: Reading,
}

impl Transfer for Collective {
    fn poll(&mut self) -> Result<Option<Tensor>> {
        let rank = self.face.rank;
        let others: Vec<usize> = (0..self.members.len()).filter(|&r| r != rank).map(|r| self.members[r]).collect();
        let what = || {
            let op = self.call.as_ref().map_or("a collective", |call| call.op.name());
            format!("{op} #{} on group {}", self.key.number, self.face.name)
        };
        let Some(frames) = self.links.take(&others, self.key, &what)? else { return Ok(None) };
        // In rank order, with none in this rank's place.
        let mut frames: Vec<Option<Frame>> = frames.into_iter().map(Some).collect();
        frames.insert(rank, None);
        if let Some(call) = &self.call {
            let of_rank = |frame: &Option<Frame>| match frame {
                Some(frame) => decode(&frame.words),
                None => Ok(call.clone()),
            };
            agree(&self.face.name, &frames.iter().map(of_rank).collect::<Result<Vec<_>>>()?)?;
        }
        let kind = self.own.f_kind()?;
        let run = |from: usize, count: Option<i64>| match &frames[from] {
            Some(frame) => tensor(&frame.payload, count, kind),
            None => Ok(self.own.shallow_clone()),
        };
        Ok(Some(match &self.reading {
            Reading::Runs(_) if self.members.len() == 1 => self.own.shallow_clone(),
            Reading::Runs(counts) => {
                let runs = counts.iter().enumerate().map(|(from, &count)| run(from, Some(count)));
                Tensor::f_cat(&runs.collect::<Result<Vec<_>>>()?, 0)?
            }
            Reading::Root { root } => match (&frames[*root], &self.call) {
                (Some(frame), Some(call)) => tensor(&frame.payload, Some(call.numel()), call.kind)?,
                _ => self.own.shallow_clone(),
            },
            Reading::Nothing => nothing()?,
        }))
    }
}

struct Receiving {
    face: Arc<Face>,
    links: Arc<Links>,
    /// Of the world.
    peer: usize,
    /// Of the group.
    from: usize,
    key: Key,
    expected: Option<Call>,
}

impl Transfer for Receiving {
    fn poll(&mut self) -> Result<Option<Tensor>> {
        let what = || {
            let Face { name, .. } = &*self.face;
            format!("{} #{} from rank {} on group {name}", Op::Recv { from: 0 }.name(), self.key.number, self.from)
        };
        let Some(mut frames) = self.links.take(&[self.peer], self.key, &what)? else { return Ok(None) };
        let Some(frame) = frames.pop() else { return Ok(None) };
        let sent = decode(&frame.words)?;
        if let Some(expected) = &self.expected {
            sent.check_received(&self.face.name, self.from, self.face.rank, expected)?;
        }
        tensor(&frame.payload, Some(sent.numel()), sent.kind).map(Some)
    }
}

fn decode(words: &[i64]) -> Result<Call> {
    Call::decode(words).ok_or_else(|| Error::Foreign { found: format!("the header {words:?}") })
}

/// Of a flat tensor on the CPU.
fn bytes(x: &Tensor) -> Result<Vec<u8>> {
    let mut bytes = vec![0; x.numel() * x.f_kind()?.elt_size_in_bytes()];
    x.f_copy_data_u8(&mut bytes, x.numel())?;
    Ok(bytes)
}

fn tensor(bytes: &[u8], count: Option<i64>, kind: Kind) -> Result<Tensor> {
    let width = kind.elt_size_in_bytes();
    let count = count.unwrap_or((bytes.len() / width) as i64);
    if bytes.len() != count as usize * width {
        return Err(Error::Foreign { found: format!("{} bytes for {count} elements of {width}", bytes.len()) });
    }
    Ok(Tensor::f_from_data_size(bytes, &[count], kind)?)
}
