//! Several documents in one call of the Hopper kernels: at most twice the error of a naive implementation in bf16 that takes
//! them one by one, and the bits of a call for each where no document is cut among blocks of threads. On a GPU or, with few
//! tokens, on the emulator.

mod common;
mod emulator;

use common::{SCALE, joined, milliseconds, poison};
use kernels::cuda::linear::{Fused, supports};
use kernels::linear::chunkwise::Chunkwise;
use kernels::linear::{Grads, Inputs, Piece, StateMixer};
use kernels::testing::{self, assert_close, rand, relative_rms};
use tch::{Device, Kind, Tensor};

/// The state at a document's start: none, zero (but its gradient is asked for), with the call, after the rest has run.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Start {
    Nothing,
    Zero,
    Given,
    Late,
}

/// At a document's end: nothing, the state is asked for, and in backward a gradient comes in.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Nothing,
    Asked,
    Gradient,
}

#[derive(Clone, Copy, Debug)]
struct Document(i64, Start, End);

#[derive(Clone, Copy, Debug)]
struct Heads {
    b: i64,
    h: i64,
    dk: i64,
    dv: i64,
}

fn hopper() -> Option<Device> {
    common::device(90, supports)
}

/// One sequence of documents with what enters and leaves them.
struct Packed {
    x: Inputs,
    d_o: Tensor,
    documents: Vec<Document>,
    /// `[B, H, K, V]` where they are; `entries` as if none were late.
    entries: Vec<Option<Tensor>>,
    exits: Vec<Option<Tensor>>,
}

impl Packed {
    fn new(documents: &[Document], heads: Heads, decay: &str, device: Device) -> Self {
        let (Heads { b, h, dk, dv }, t) = (heads, documents.iter().map(|d| d.0).sum::<i64>());
        let numbers = |seed, shape: &[i64]| testing::randn(seed, shape).to_kind(Kind::BFloat16).to_device(device);
        let strength = if decay.ends_with("strong") { 20.0 } else { 0.1 };
        let shape = match decay.split(' ').next() {
            Some("head") => vec![h],
            Some("token") => vec![b, t, h],
            _ => vec![],
        };
        let g = (!shape.is_empty()).then(|| (rand(4, &shape) * -strength).to_kind(Kind::Float).to_device(device));
        let (q, k, v) = (numbers(1, &[b, t, h, dk]), numbers(2, &[b, t, h, dk]), numbers(3, &[b, t, h, dv]));
        let states = |seed: u64, is: &dyn Fn(&Document) -> bool| {
            let state = |i| testing::randn(seed + i, &[b, h, dk, dv]).to_kind(Kind::Float).to_device(device);
            documents.iter().zip(0..).map(|(document, i)| is(document).then(|| state(i))).collect()
        };
        Self {
            x: Inputs::new(&q, &k, &v, g.as_ref()).unwrap(),
            d_o: numbers(5, &[b, t, h, dv]),
            documents: documents.to_vec(),
            entries: states(1000, &|d| matches!(d.1, Start::Given | Start::Late)),
            exits: states(2000, &|d| d.2 == End::Gradient),
        }
    }

    fn in_kind(&self, kind: Kind, device: Device) -> Self {
        let to = |x: &Tensor| x.to_kind(kind).to_device(device);
        let all = |x: &[Option<Tensor>]| x.iter().map(|x| x.as_ref().map(to)).collect();
        let x = &self.x;
        Self {
            x: Inputs::new(&to(&x.q), &to(&x.k), &to(&x.v), x.decay.tensor().map(to).as_ref()).unwrap(),
            d_o: to(&self.d_o),
            documents: self.documents.clone(),
            entries: all(&self.entries),
            exits: all(&self.exits),
        }
    }

    /// Where a document's first token is, and their number.
    fn range(&self, document: usize) -> (i64, i64) {
        (self.documents[..document].iter().map(|d| d.0).sum(), self.documents[document].0)
    }

    /// In one call each way.
    fn at_once(&self, mixer: &dyn StateMixer, saves: bool) -> Results {
        let of = |d: &Document| Piece { tokens: d.0, enters: d.1 != Start::Nothing, leaves: d.2 != End::Nothing };
        let pieces: Vec<_> = self.documents.iter().map(of).collect();
        let leaving = || (0..pieces.len()).filter(|&i| pieces[i].leaves);
        let given = |start: &[Start]| -> Vec<_> {
            let entry = |(d, entry): (&Document, &Option<Tensor>)| {
                entry.as_ref().filter(|_| start.contains(&d.1)).map(Tensor::shallow_clone)
            };
            self.documents.iter().zip(&self.entries).map(entry).collect()
        };
        let device = self.x.q.device();
        poison(device);
        let mut segment = mixer.forward_pieces(&self.x, &pieces, &given(&[Start::Given])).unwrap();
        let mut ends: Vec<_> = leaving().map(|i| (i, segment.summarize(i).unwrap())).collect();
        segment.run().unwrap();
        for (i, entry) in given(&[Start::Late]).iter().enumerate() {
            if let Some(entry) = entry {
                segment.add_entry(i, entry).unwrap();
            }
        }
        let saved = segment.take_saved().unwrap();
        assert!(saved.is_some());
        let o = segment.finish().unwrap();
        let late = given(&[Start::Late]);
        let ends = ends.drain(..).map(|(i, summary)| match &late[i] {
            Some(entry) => summary.after(entry).unwrap(),
            None => summary.state,
        });
        let ends = ends.collect();

        poison(device);
        let all = given(&[Start::Given, Start::Late]);
        let saved = saved.filter(|_| saves);
        let mut segment = mixer.backward_pieces(&self.x, &pieces, &all, &self.d_o, saved).unwrap();
        let entering = || (0..pieces.len()).filter(|&i| pieces[i].enters);
        let starts: Vec<_> = entering().map(|i| (i, segment.summarize_grad(i).unwrap())).collect();
        segment.run_grad().unwrap();
        for (i, exit) in self.exits.iter().enumerate() {
            if let Some(exit) = exit {
                segment.add_exit(i, exit).unwrap();
            }
        }
        let starts = starts.into_iter().map(|(i, summary)| match &self.exits[i] {
            Some(exit) => summary.after(exit).unwrap(),
            None => summary.state,
        });
        let starts = starts.collect();
        Results { o, ends, starts, grads: segment.finish().unwrap() }
    }

    /// In a call for each document.
    fn one_by_one(&self, mixer: &dyn StateMixer) -> Results {
        let (mut o, mut ends, mut starts, mut grads) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (i, document) in self.documents.iter().enumerate() {
            let (start, length) = self.range(i);
            let (x, d_o) = (self.x.narrow(start, length).unwrap(), self.d_o.narrow(1, start, length));
            poison(x.q.device());
            let late = document.1 == Start::Late;
            let entry = self.entries[i].as_ref();
            let mut segment = mixer.forward(&x, entry.filter(|_| !late)).unwrap();
            let end = segment.summarize(0).unwrap();
            segment.run().unwrap();
            if let Some(entry) = entry.filter(|_| late) {
                segment.add_entry(0, entry).unwrap();
            }
            if document.2 != End::Nothing {
                ends.push(match entry.filter(|_| late) {
                    Some(entry) => end.after(entry).unwrap(),
                    None => end.state,
                });
            }
            o.push(segment.finish().unwrap());
            poison(x.q.device());
            let mut segment = mixer.backward(&x, entry, &d_o).unwrap();
            let at_start = segment.summarize_grad(0).unwrap();
            segment.run_grad().unwrap();
            if let Some(exit) = &self.exits[i] {
                segment.add_exit(0, exit).unwrap();
            }
            if document.1 != Start::Nothing {
                starts.push(match &self.exits[i] {
                    Some(exit) => at_start.after(exit).unwrap(),
                    None => at_start.state,
                });
            }
            grads.push(segment.finish().unwrap());
        }
        Results { o: Tensor::cat(&o, 1), ends, starts, grads: joined(&grads) }
    }
}

struct Results {
    o: Tensor,
    /// Of documents that ask for them.
    ends: Vec<Tensor>,
    starts: Vec<Tensor>,
    grads: Grads,
}

impl Results {
    fn named(&self) -> Vec<(String, &Tensor)> {
        let grads = &self.grads;
        let mut all = vec![("o", &self.o), ("dq", &grads.dq), ("dk", &grads.dk), ("dv", &grads.dv)];
        all.extend(grads.dlog_decay.as_ref().map(|dg| ("dlog_decay", dg)));
        let mut all: Vec<_> = all.into_iter().map(|(name, x)| (name.to_owned(), x)).collect();
        all.extend(self.ends.iter().enumerate().map(|(i, x)| (format!("end {i}"), x)));
        all.extend(self.starts.iter().enumerate().map(|(i, x)| (format!("start {i}"), x)));
        all
    }
}

/// [`common::naive`] of one document after another.
fn naive(packed: &Packed, kind: Kind) -> Results {
    let Packed { x, d_o, documents, entries, exits } = packed.in_kind(kind, Device::Cpu);
    let (b, _, h, dk) = x.q.size4().unwrap();
    let zeros = Tensor::zeros([b, h, dk, x.v.size()[3]], (kind, Device::Cpu));
    let (mut all_o, mut ends, mut starts, mut grads) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (i, document) in documents.iter().enumerate() {
        let (start, length) = packed.range(i);
        let (x, d_o) = (x.narrow(start, length).unwrap(), d_o.narrow(1, start, length));
        let [entry, exit] = [&entries[i], &exits[i]].map(|state| state.as_ref().unwrap_or(&zeros));
        let all = common::naive(&x, &d_o, entry, exit, kind);
        all_o.push(all.o);
        ends.extend((document.2 != End::Nothing).then_some(all.end));
        starts.extend((document.1 != Start::Nothing).then_some(all.d_initial));
        grads.push(all.grads);
    }
    Results { o: Tensor::cat(&all_o, 1), ends, starts, grads: joined(&grads) }
}

/// The largest relative error of a number rounded to bf16.
const ROUNDING: f64 = 1.0 / 512.0;

/// `alone`: whether every document must give the bits that it gives in a call of its own.
fn check(documents: &[Document], heads: Heads, decay: &str, device: Device, alone: bool) {
    let packed = Packed::new(documents, heads, decay, device);
    let mixer = Fused::new(Chunkwise::new(64, SCALE).unwrap());
    let [ours, with_saved] = [false, true].map(|saves| packed.at_once(&mixer, saves));
    let (truth, naive) = (naive(&packed, Kind::Double), naive(&packed, Kind::BFloat16));
    let others = [with_saved.named(), truth.named(), naive.named()];
    assert!(others.iter().all(|other| other.len() == ours.named().len()));
    for (i, (what, ours)) in ours.named().into_iter().enumerate() {
        let [with_saved, truth, naive] = [0, 1, 2].map(|other| others[other][i].1);
        let name = format!("{what}, {decay}, {heads:?}, {documents:?}");
        let luck = if truth.numel() < 16 { ROUNDING } else { 0.0 };
        assert_close(&name, ours, truth, 2.0 * relative_rms(naive, truth).max(luck) + 1e-6);
        assert!(ours.equal(with_saved), "{name}: other bits the second time, with what forward has saved");
    }
    if alone {
        let alone = packed.one_by_one(&mixer);
        assert_eq!(alone.named().len(), ours.named().len());
        for ((what, ours), (_, alone)) in ours.named().into_iter().zip(alone.named()) {
            assert!(ours.equal(alone), "{what}, {decay}, {heads:?}, {documents:?}: other bits than by itself");
        }
    }
}

#[test]
fn documents_within_a_chunk_give_the_bits_of_a_call_of_their_own() {
    let Some(device) = hopper() else { return };
    use {End as E, Start as S};
    let documents = [
        Document(1, S::Nothing, E::Nothing),
        Document(1, S::Late, E::Nothing),
        Document(63, S::Nothing, E::Gradient),
        Document(64, S::Given, E::Asked),
        Document(2, S::Zero, E::Gradient),
        Document(64, S::Late, E::Gradient),
        Document(5, S::Nothing, E::Nothing),
    ];
    for decay in ["none", "head", "token strong"] {
        check(&documents, Heads { b: 1, h: 3, dk: 64, dv: 128 }, decay, device, true);
    }
    // Nothing to sum up, nor to enter; and several sequences.
    let closed = [1, 64, 7, 30, 1].map(|tokens| Document(tokens, S::Nothing, E::Nothing));
    for decay in ["none", "token"] {
        check(&closed, Heads { b: 2, h: 2, dk: 16, dv: 8 }, decay, device, true);
    }
}

#[test]
fn documents_of_any_length_are_as_good_as_naive_bf16() {
    let Some(device) = hopper() else { return };
    use {End as E, Start as S};
    // How a rank in the middle meets them: the first began elsewhere, the last goes on elsewhere.
    let rank = |lengths: &[i64]| -> Vec<_> {
        let last = lengths.len() - 1;
        let of = |(i, &tokens): (usize, &i64)| {
            let start = if i == 0 { S::Late } else { S::Nothing };
            Document(tokens, start, if i == last { E::Gradient } else { E::Nothing })
        };
        lengths.iter().enumerate().map(of).collect()
    };
    let one = Heads { b: 1, h: 2, dk: 64, dv: 64 };
    for decay in ["none", "head strong", "token"] {
        check(&rank(&[130, 1, 1, 1, 65, 200]), one, decay, device, false);
    }
    let mixed = [
        Document(300, S::Nothing, E::Nothing),
        Document(129, S::Given, E::Asked),
        Document(1, S::Zero, E::Gradient),
        Document(200, S::Late, E::Gradient),
        Document(70, S::Nothing, E::Asked),
    ];
    for decay in ["none", "token"] {
        check(&mixed, one, decay, device, false);
        check(&mixed, Heads { b: 2, h: 1, dk: 32, dv: 128 }, decay, device, false);
    }
    // Heads of several launches.
    check(&rank(&[100, 3, 90]), Heads { b: 1, h: 1, dk: 192, dv: 136 }, "token", device, false);
    if !emulator::few(device) {
        let lengths: Vec<_> = (0..300).map(|i| if i == 200 { 5000 } else { 1 + i * i % 97 }).collect();
        for decay in ["none", "head", "token", "token strong"] {
            check(&rank(&lengths), Heads { b: 1, h: 16, dk: 128, dv: 128 }, decay, device, false);
        }
    }
}

#[test]
fn what_no_piece_has_said_is_an_error() {
    let Some(device) = hopper() else { return };
    let x = Tensor::ones([1, 10, 1, 8], (Kind::BFloat16, device));
    let (x, state) = (Inputs::new(&x, &x, &x, None).unwrap(), Tensor::ones([1, 1, 8, 8], (Kind::Float, device)));
    let mixer = Fused::new(Chunkwise::new(64, SCALE).unwrap());
    let pieces = [4, 6].map(|tokens| Piece { tokens, enters: tokens == 4, leaves: tokens == 6 });
    let mut segment = mixer.forward_pieces(&x, &pieces, &[None, None]).unwrap();
    let error = segment.summarize(0).unwrap_err().to_string();
    assert!(error.contains("piece 0") && error.contains("leaves"), "{error}");
    let error = segment.add_entry(1, &state).unwrap_err().to_string();
    assert!(error.contains("piece 1") && error.contains("enters"), "{error}");
    let mut segment = mixer.backward_pieces(&x, &pieces, &[None, None], &x.v, None).unwrap();
    assert!(segment.summarize_grad(1).is_err() && segment.add_exit(0, &state).is_err());
    assert!(segment.summarize_grad(0).is_ok() && segment.add_exit(1, &state).is_ok());
}

/// Milliseconds of 16,384 tokens of 16 heads in documents of a length each, forward and with backward, in one call and, where
/// they are few, in a call for each.
#[test]
#[ignore = "a measurement"]
fn time() {
    let Some(device) = hopper().filter(|&device| !emulator::slow(device)) else { return };
    let mixer = Fused::new(Chunkwise::new(64, SCALE).unwrap());
    for decay in ["none", "token"] {
        for length in [16384, 4096, 1000, 256, 64, 16, 1] {
            let documents = vec![Document(length, Start::Nothing, End::Nothing); 16384 / length as usize];
            let packed = Packed::new(&documents, Heads { b: 1, h: 16, dk: 128, dv: 128 }, decay, device);
            let pieces = vec![Piece { tokens: length, enters: false, leaves: false }; documents.len()];
            let none: Vec<Option<Tensor>> = pieces.iter().map(|_| None).collect();
            let forward = || {
                let mut segment = mixer.forward_pieces(&packed.x, &pieces, &none).unwrap();
                segment.run().unwrap();
                (segment.take_saved().unwrap(), segment.finish().unwrap())
            };
            let both = || {
                let saved = forward().0;
                let mut segment = mixer.backward_pieces(&packed.x, &pieces, &none, &packed.d_o, saved).unwrap();
                segment.run_grad().unwrap();
                segment.finish().unwrap()
            };
            let (f, fb) = (milliseconds(20, &|| drop(forward())), milliseconds(20, &|| drop(both())));
            print!("{decay}, {} documents of {length}: forward {f:.3} ms, with backward {fb:.3} ms", documents.len());
            if documents.len() <= 64 {
                print!(
                    "; in a call for each, with states at both ends, {:.3} ms",
                    milliseconds(20, &|| drop(packed.one_by_one(&mixer)))
                );
            }
            println!();
        }
    }
}
