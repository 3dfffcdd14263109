//! The connections of one rank: what is to be sent goes to a writer's channel, what has been read lies in the inbox until the
//! progress thread asks for it.
//!
//! A frame is seven little-endian words of 64 bits (group, sort, number, part, words, bytes, and a mark), so many words of
//! header, and so many bytes of payload.

use super::OnFailure;
use crate::{Error, Result, pending::lock, progress::Queue};
use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    ops::Range,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::Duration,
};

const HEAD: usize = 7;
const MARK: u64 = 0x6c61_7370_0000_0001;
/// No frame has more words than a header for a group of half a million ranks.
const MOST_WORDS: u64 = 1 << 20;
/// Up to here head and payload go out in one piece.
const JOINED: usize = 64 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Sort {
    Collective = 0,
    Message = 1,
    Leave = 2,
    /// The sender has failed; the payload says why.
    Abort = 3,
}

/// Which frame: `number` counts collectives of the group, or messages between two of its ranks; `part` the steps of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub group: u64,
    pub sort: Sort,
    pub number: u64,
    pub part: u64,
}

/// Bytes that several frames may share.
#[derive(Clone)]
pub(super) struct Payload {
    pub bytes: Arc<Vec<u8>>,
    pub range: Range<usize>,
}

impl Payload {
    pub(super) fn none() -> Payload {
        Payload { bytes: Arc::default(), range: 0..0 }
    }

    pub(super) fn whole(bytes: Vec<u8>) -> Payload {
        let range = 0..bytes.len();
        Payload { bytes: Arc::new(bytes), range }
    }

    fn as_slice(&self) -> &[u8] {
        &self.bytes[self.range.clone()]
    }
}

pub(super) struct Frame {
    pub words: Vec<i64>,
    pub payload: Vec<u8>,
}

struct Outgoing {
    key: Key,
    words: Vec<i64>,
    payload: Payload,
}

pub(super) struct Links {
    rank: usize,
    /// By rank; none for this one.
    writers: Vec<Option<Sender<Outgoing>>>,
    inbox: Mutex<Inbox>,
    changed: Condvar,
    queue: Arc<Queue>,
    on_failure: OnFailure,
}

#[derive(Default)]
struct Inbox {
    frames: HashMap<(usize, Key), Frame>,
    left: Vec<bool>,
    failed: Option<Failure>,
    /// Writers that have sent all they ever will.
    flushed: usize,
}

#[derive(Clone)]
struct Failure {
    peer: usize,
    message: String,
    /// By the peer itself.
    told: bool,
}

impl Failure {
    fn error(&self) -> Error {
        let Failure { peer: rank, message, told } = self.clone();
        if told { Error::RankFailed { rank, message } } else { Error::RankLost { rank, message } }
    }
}

/// Those of this process.
static LINKS: Mutex<Option<Arc<Links>>> = Mutex::new(None);
/// For what is said last to be sent.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Tells all other ranks that this one has failed, and why, if it is in a job over TCP. The process should end then.
pub fn abort(message: &str) {
    let Some(links) = lock(&LINKS).clone() else { return };
    let key = Key { group: 0, sort: Sort::Abort, number: 0, part: 0 };
    let payload = Payload::whole(message.as_bytes().to_vec());
    links.writers.iter().flatten().for_each(|writer| {
        let _ = writer.send(Outgoing { key, words: vec![], payload: payload.clone() });
    });
    let others = links.writers.iter().flatten().count();
    let unsaid = |inbox: &mut Inbox| inbox.flushed < others;
    drop(links.changed.wait_timeout_while(lock(&links.inbox), LAST_WORDS, unsaid));
}

impl Links {
    /// `sockets`: by rank, none for this one.
    pub(super) fn start(
        rank: usize,
        sockets: Vec<Option<TcpStream>>,
        queue: Arc<Queue>,
        on_failure: OnFailure,
    ) -> Result<Arc<Links>> {
        let spawn = |name: String, run: Box<dyn FnOnce() + Send>| {
            let named = thread::Builder::new().name(name).stack_size(256 << 10);
            named.spawn(run).map_err(|source| Error::Spawn { rank, source })
        };
        let mut channels: Vec<Option<Receiver<Outgoing>>> = Vec::new();
        let mut writers = Vec::new();
        for socket in &sockets {
            let (sender, receiver) = socket.as_ref().map(|_| mpsc::channel()).unzip();
            writers.push(sender);
            channels.push(receiver);
        }
        let inbox = Inbox { left: vec![false; sockets.len()], ..Inbox::default() };
        let links =
            Arc::new(Links { rank, writers, inbox: Mutex::new(inbox), changed: Condvar::new(), queue, on_failure });
        *lock(&LINKS) = Some(links.clone());
        for (peer, (socket, receiver)) in sockets.into_iter().zip(channels).enumerate() {
            let (Some(socket), Some(receiver)) = (socket, receiver) else { continue };
            let writing = socket.try_clone().map_err(|source| Error::Spawn { rank, source })?;
            let (reads, writes) = (links.clone(), links.clone());
            spawn(format!("rank {rank} from {peer}"), Box::new(move || reads.read(peer, socket)))?;
            spawn(format!("rank {rank} to {peer}"), Box::new(move || writes.write(peer, writing, &receiver)))?;
        }
        Ok(links)
    }

    /// Sends a frame; to this rank itself, it is there at once. One for a rank that has failed is lost.
    pub(super) fn send(&self, to: usize, key: Key, words: Vec<i64>, payload: Payload) {
        match &self.writers[to] {
            Some(writer) => drop(writer.send(Outgoing { key, words, payload })),
            None => {
                let payload = payload.as_slice().to_vec();
                lock(&self.inbox).frames.insert((self.rank, key), Frame { words, payload });
            }
        }
    }

    /// Takes the frames `key` from all of `peers`, once all are there. `what`: the operation, for the error if one of them
    /// never comes.
    pub(super) fn take(&self, peers: &[usize], key: Key, what: &dyn Fn() -> String) -> Result<Option<Vec<Frame>>> {
        let mut inbox = lock(&self.inbox);
        if let Some(failure) = &inbox.failed {
            return Err(failure.error());
        }
        let mut all = true;
        for &peer in peers {
            if inbox.frames.contains_key(&(peer, key)) {
                continue;
            }
            all = false;
            if inbox.left[peer] {
                let message = format!(
                    "it has returned, while others wait for it in {}; all ranks must issue the same calls",
                    what()
                );
                return Err(Error::RankFailed { rank: peer, message });
            }
        }
        if !all {
            return Ok(None);
        }
        Ok(Some(peers.iter().filter_map(|&peer| inbox.frames.remove(&(peer, key))).collect()))
    }

    /// Tells all that this rank will send nothing more.
    pub(super) fn leave(&self) {
        let key = Key { group: 0, sort: Sort::Leave, number: 0, part: 0 };
        self.writers.iter().flatten().for_each(|writer| {
            let _ = writer.send(Outgoing { key, words: vec![], payload: Payload::none() });
        });
    }

    /// Waits until everything is sent and all others have left, or one has failed. Closing earlier could destroy what the
    /// others have yet to read.
    pub(super) fn finish(&self) {
        let mut inbox = lock(&self.inbox);
        let others = self.writers.iter().flatten().count();
        let ended = |inbox: &Inbox| {
            inbox.failed.is_some()
                || (inbox.flushed == others && inbox.left.iter().filter(|&&left| left).count() == others)
        };
        while !ended(&inbox) {
            inbox = self.changed.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn fail(&self, failure: Failure) {
        {
            let mut inbox = lock(&self.inbox);
            if inbox.failed.is_some() {
                return;
            }
            inbox.failed = Some(failure.clone());
        }
        self.changed.notify_all();
        self.queue.ring();
        (self.on_failure)(failure.error());
    }

    fn lose(&self, peer: usize, message: String) {
        self.fail(Failure { peer, message, told: false });
    }

    fn read(&self, peer: usize, mut socket: TcpStream) {
        loop {
            match read_frame(&mut socket) {
                Ok(Some((key, _))) if key.sort == Sort::Leave => {
                    lock(&self.inbox).left[peer] = true;
                    self.changed.notify_all();
                    self.queue.ring();
                    return;
                }
                Ok(Some((key, frame))) if key.sort == Sort::Abort => {
                    let message = String::from_utf8_lossy(&frame.payload).into_owned();
                    return self.fail(Failure { peer, message, told: true });
                }
                Ok(Some((key, frame))) => {
                    lock(&self.inbox).frames.insert((peer, key), frame);
                    self.queue.ring();
                }
                Ok(None) => return self.lose(peer, "it ended without a word".into()),
                Err(error) => return self.lose(peer, format!("its connection is lost: {error}")),
            }
        }
    }

    fn write(&self, peer: usize, mut socket: TcpStream, outgoing: &Receiver<Outgoing>) {
        for frame in outgoing {
            let last = matches!(frame.key.sort, Sort::Leave | Sort::Abort);
            let written = write_frame(&mut socket, &frame);
            let gone = written.is_err() && lock(&self.inbox).left[peer];
            if last || gone {
                let _ = socket.shutdown(Shutdown::Write);
                lock(&self.inbox).flushed += 1;
                self.changed.notify_all();
                return;
            }
            if let Err(error) = written {
                return self.lose(peer, format!("its connection is lost: {error}"));
            }
        }
    }
}

fn write_frame(socket: &mut impl Write, frame: &Outgoing) -> io::Result<()> {
    let payload = frame.payload.as_slice();
    let Key { group, sort, number, part } = frame.key;
    let head = [group, sort as u64, number, part, frame.words.len() as u64, payload.len() as u64, MARK];
    let mut bytes: Vec<u8> = head.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend(frame.words.iter().flat_map(|word| word.to_le_bytes()));
    if payload.len() <= JOINED {
        bytes.extend(payload);
        return socket.write_all(&bytes);
    }
    socket.write_all(&bytes)?;
    socket.write_all(payload)
}

/// `None` at the end of the stream.
fn read_frame(socket: &mut impl Read) -> io::Result<Option<(Key, Frame)>> {
    let mut head = [0; 8 * HEAD];
    if !read_or_end(socket, &mut head)? {
        return Ok(None);
    }
    let [group, sort, number, part, words, bytes, mark] = numbers::<HEAD>(&head);
    let sort = match sort {
        0 => Sort::Collective,
        1 => Sort::Message,
        2 => Sort::Leave,
        _ => Sort::Abort,
    };
    if mark != MARK || words > MOST_WORDS {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a frame of this build"));
    }
    let mut header = vec![0; 8 * words as usize];
    socket.read_exact(&mut header)?;
    let words = header.chunks_exact(8).map(|word| numbers::<1>(word)[0] as i64).collect();
    let mut payload = Vec::new();
    // As it comes: a length that is wrong must not take all memory.
    let read = socket.take(bytes).read_to_end(&mut payload)?;
    if (read as u64) < bytes {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some((Key { group, sort, number, part }, Frame { words, payload })))
}

fn read_or_end(socket: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    let mut read = 0;
    while read < buffer.len() {
        match socket.read(&mut buffer[read..]) {
            Ok(0) if read == 0 => return Ok(false),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => read += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

fn numbers<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_frame_survives_the_stream(
            group: u64, message: bool, number: u64, part: u64,
            words in prop::collection::vec(any::<i64>(), 0..20), payload in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let sort = if message { Sort::Message } else { Sort::Collective };
            let key = Key { group, sort, number, part };
            let frame = Outgoing { key, words: words.clone(), payload: Payload::whole(payload.clone()) };
            let mut stream = Vec::new();
            write_frame(&mut stream, &frame).unwrap();
            let mut stream = stream.as_slice();
            let (found, frame) = read_frame(&mut stream).unwrap().unwrap();
            prop_assert_eq!((found, frame.words, frame.payload), (key, words, payload));
            prop_assert!(read_frame(&mut stream).unwrap().is_none());
        }
    }

    #[test]
    fn broken_streams_are_errors() {
        let key = Key { group: 1, sort: Sort::Message, number: 2, part: 3 };
        let frame = Outgoing { key, words: vec![4], payload: Payload::whole(vec![5; 9]) };
        let mut stream = Vec::new();
        write_frame(&mut stream, &frame).unwrap();
        for length in 1..stream.len() {
            assert!(read_frame(&mut &stream[..length]).is_err(), "{length} of {} bytes", stream.len());
        }
        stream[8 * 6] ^= 1;
        assert!(read_frame(&mut stream.as_slice()).is_err());
    }
}
