//! Linear attention over a sharded sequence in LASP-2's order of work (arXiv 2502.07563, Algorithm 2, with decay), for any
//! scan and any mixer: sum up what leaves this rank, let it travel, meanwhile compute all that needs nothing from
//! elsewhere, then add what came. Backward is its mirror.

use collectives::Pending;
use kernels::linear::{
    self, BackwardSegment, Decay, ForwardSegment, Grads, Inputs, StateMixer, Summary, Transition, accumulation_kind,
};
use tch::Tensor;

use super::scan::{Entries, Known, Transitions};
use super::{Chain, Error, Piece, Plan, Result, Shard};

/// That the documents' final states are wanted and, in backward, the gradients of their initial ones.
#[derive(Clone, Copy, Default)]
pub struct States<'a> {
    /// `[B, H, K, V]`, or `[N, H, K, V]` for N packed documents, the same on every rank; zero if `None`.
    pub initial: Option<&'a Tensor>,
}

/// o `[B, T, H, V]`, the final states that this rank knows, and what backward needs.
pub struct Forward {
    pub o: Tensor,
    /// `(document, [B, H, K, V])` for each document that ends on this rank, if wanted.
    pub final_states: Vec<(usize, Tensor)>,
    pub saved: Saved,
}

/// Kept from forward: the inputs, the state at the entry of each piece, every segment's transition, and what the mixer has
/// saved. On Hopper GPUs that is a state `[K, V]` in f32 for each multiprocessor and chain of tokens that it begins: 9 MiB with
/// 16 heads of 128 by 128, on 132 multiprocessors. Packed documents make it at most about twice that, however many they are.
pub struct Saved {
    x: Inputs,
    pieces: Vec<linear::Piece>,
    entries: Entries,
    transitions: Transitions,
    inside: Option<Vec<Tensor>>,
    /// Whether those of documents are wanted.
    states: bool,
}

impl Saved {
    /// The inputs, which who computes them again need not keep until [`backward`].
    pub(crate) fn inputs(&mut self) -> &mut Inputs {
        &mut self.x
    }
}

/// Gradients of this rank's tokens; `dlog_decay` in the shape of the decay (`[H]`: summed over this rank's tokens).
pub struct Backward {
    pub grads: Grads,
    /// `(document, [B, H, K, V])` for each document that begins on this rank, if wanted.
    pub initial_state_grads: Vec<(usize, Tensor)>,
}

/// Algorithm 2. `states`: of documents, as far as the caller has to do with them.
pub fn forward(shard: &Shard, mixer: &dyn StateMixer, x: Inputs, states: Option<States>) -> Result<Forward> {
    let _guard = tch::no_grad_guard();
    let plan = &shard.plan;
    check(plan, &x)?;
    let (pieces, initial) = (pieces(plan, states.is_some()), states.and_then(|states| states.initial));
    // What is known at the start of each piece: the initial state of a document that begins there.
    let mut entries = plan.pieces.iter().map(|p| document_state(plan, p, initial)).collect::<Result<Entries>>()?;
    let mut segment = mixer.forward_pieces(&x, &pieces, &entries)?;

    let mut mine = Vec::new();
    for slot in 0..plan.chain.held.len() {
        mine.push(match plan.leaving(slot) {
            Some(piece) => segment.summarize(piece)?,
            None => nothing(&x)?,
        });
    }

    let intra_rank = shard.group.recorder().span("intra_rank");
    let scanned = if plan.chain.flows() {
        shard.scan()?.forward(&shard.group, &plan.chain, mine, known(&plan.chain, &x)?)?
    } else {
        Pending::ready(Ok((plan.chain.held.iter().map(|_| None).collect(), Vec::new())))
    };
    segment.run()?;
    drop(intra_rank);

    let (entering, transitions) = scanned.wait()??;
    for (slot, state) in entering.into_iter().enumerate() {
        if let (Some(piece), Some(state)) = (plan.entered(slot), state) {
            segment.add_entry(piece, &state)?;
            entries[piece] = Some(state);
        }
    }
    let inside = segment.take_saved()?;
    let final_states = match states {
        Some(_) => final_states(plan, segment.as_mut(), &entries)?,
        None => Vec::new(),
    };
    let o = segment.finish()?;
    Ok(Forward { o, final_states, saved: Saved { x, pieces, entries, transitions, inside, states: states.is_some() } })
}

/// Algorithm 4 with decay: G travels while dq and the rank's own dk, dv are computed. do: `[B, T, H, V]`.
pub fn backward(shard: &Shard, mixer: &dyn StateMixer, saved: Saved, d_o: &Tensor) -> Result<Backward> {
    let _guard = tch::no_grad_guard();
    let (plan, Saved { x, pieces, entries, transitions, inside, states }) = (&shard.plan, saved);
    let mut segment = mixer.backward_pieces(&x, &pieces, &entries, d_o, inside)?;

    let mut mine = Vec::new();
    for slot in 0..plan.chain.held.len() {
        mine.push(match plan.entered(slot) {
            Some(piece) => segment.summarize_grad(piece)?.state,
            None => nothing(&x)?.state,
        });
    }

    let intra_rank = shard.group.recorder().span("intra_rank_grad");
    let scanned = if plan.chain.flows() {
        shard.scan()?.backward(&shard.group, &plan.chain, mine, transitions)?
    } else {
        Pending::ready(Ok(plan.chain.held.iter().map(|_| None).collect()))
    };
    segment.run_grad()?;
    drop(intra_rank);

    let mut exits: Entries = plan.pieces.iter().map(|_| None).collect();
    for (slot, grad) in scanned.wait()??.into_iter().enumerate() {
        if let (Some(piece), Some(grad)) = (plan.leaving(slot), grad) {
            segment.add_exit(piece, &grad)?;
            exits[piece] = Some(grad);
        }
    }
    let initial_state_grads = match states {
        true => initial_state_grads(plan, segment.as_mut(), &exits)?,
        false => Vec::new(),
    };
    let mut grads = segment.finish()?;
    grads.dlog_decay = grads.dlog_decay.map(|dg| as_decay(dg, &x.decay)).transpose()?;
    Ok(Backward { grads, initial_state_grads })
}

pub(super) fn check(plan: &Plan, x: &Inputs) -> Result<()> {
    let (batch, tokens) = (x.q.size()[0], x.q.size()[1]);
    if tokens != plan.tokens() {
        let expected = format!("[B, {}, H, K]: this rank's tokens of {}", plan.tokens(), plan.layout.tokens());
        return Err(Error::Shape { tensor: "q", found: x.q.size(), expected });
    }
    if plan.documents() > 1 && batch != 1 {
        let expected = format!("B = 1, as cu_seqlens packs {} documents into one sequence", plan.documents());
        return Err(Error::Shape { tensor: "q", found: x.q.size(), expected });
    }
    Ok(())
}

/// The pieces as a mixer takes them. States that cross ranks come and go; those of documents if they are `wanted`.
fn pieces(plan: &Plan, wanted: bool) -> Vec<linear::Piece> {
    let of = |p: &Piece| linear::Piece { tokens: p.tokens(), enters: p.enters || wanted, leaves: p.leaves || wanted };
    plan.pieces.iter().map(of).collect()
}

/// The initial state of the document that begins with this piece, `[B, H, K, V]`.
fn document_state(plan: &Plan, piece: &Piece, initial_state: Option<&Tensor>) -> Result<Option<Tensor>> {
    Ok(match initial_state {
        Some(state) if !piece.enters && plan.documents() > 1 => Some(state.f_narrow(0, piece.document as i64, 1)?),
        Some(state) if !piece.enters => Some(state.shallow_clone()),
        _ => None,
    })
}

/// The summary of a segment that nothing leaves.
fn nothing(x: &Inputs) -> Result<Summary> {
    let ((b, _, h, dk), dv) = (x.q.size4()?, x.v.size()[3]);
    let options = (accumulation_kind(x.q.kind()), x.q.device());
    let transition = match &x.decay {
        Decay::None => Transition::Identity,
        Decay::Head(_) | Decay::Token(_) => Transition::Scalar(Tensor::f_zeros([b, h], options)?),
        Decay::Channel(_) => Transition::Channel(Tensor::f_zeros([b, h, dk], options)?),
    };
    Ok(Summary { transition, state: Tensor::f_zeros([b, h, dk, dv], options)? })
}

/// Without decay, or with a constant one, a transition follows from a segment's length: nothing needs to travel.
fn known(chain: &Chain, x: &Inputs) -> Result<Known> {
    let of = |tail: i64| -> Result<Transition> {
        Ok(match &x.decay {
            Decay::Head(g) => {
                let sum = g.f_to_kind(accumulation_kind(x.q.kind()))?.f_mul_scalar(tail)?;
                Transition::Scalar(sum.f_unsqueeze(0)?.f_expand([x.q.size()[0], -1], false)?)
            }
            _ => Transition::Identity,
        })
    };
    match &x.decay {
        Decay::None | Decay::Head(_) => {
            Ok(Known::All(chain.links.iter().map(|link| of(link.tail)).collect::<Result<_>>()?))
        }
        Decay::Token(_) | Decay::Channel(_) => Ok(Known::Nothing),
    }
}

/// For each document that ends on this rank, its state there.
fn final_states(plan: &Plan, segment: &mut dyn ForwardSegment, entries: &Entries) -> Result<Vec<(usize, Tensor)>> {
    let mut states = Vec::new();
    for (i, (piece, entry)) in plan.pieces.iter().zip(entries).enumerate().filter(|(_, (piece, _))| !piece.leaves) {
        let summary = segment.summarize(i)?;
        // A piece that began its document was given the entry from the start.
        let state = match entry {
            Some(entry) if piece.enters => summary.after(entry)?,
            _ => summary.state,
        };
        states.push((piece.document, state));
    }
    Ok(states)
}

/// For each document that begins on this rank, the gradient of its state there.
fn initial_state_grads(
    plan: &Plan,
    segment: &mut dyn BackwardSegment,
    exits: &Entries,
) -> Result<Vec<(usize, Tensor)>> {
    let mut grads = Vec::new();
    for (i, (piece, exit)) in plan.pieces.iter().zip(exits).enumerate().filter(|(_, (piece, _))| !piece.enters) {
        let summary = segment.summarize_grad(i)?;
        let grad = match exit {
            Some(exit) => summary.after(exit)?,
            None => summary.state,
        };
        grads.push((piece.document, grad));
    }
    Ok(grads)
}

/// dlog_decay as a mixer gives it, in the shape and kind of the decay.
fn as_decay(dg: Tensor, decay: &Decay) -> Result<Tensor> {
    let dg = match decay {
        Decay::Head(_) => dg.f_sum_dim_intlist([0, 1].as_slice(), false, dg.kind())?,
        _ => dg,
    };
    Ok(match decay.tensor() {
        Some(g) => dg.f_to_kind(g.kind())?,
        None => dg,
    })
}
