//! Linear attention over a sharded sequence in LASP-2's order of work (arXiv 2502.07563, Algorithm 2, with decay), for any
//! scan and any mixer: sum up what leaves this rank, let it travel, meanwhile compute all that needs nothing from
//! elsewhere, then add what came. Backward is its mirror.

use collectives::Pending;
use kernels::linear::{
    BackwardSegment, Decay, ForwardSegment, Grads, Inputs, StateMixer, Summary, Transition, accumulation_kind,
};
use tch::Tensor;

use super::scan::{Entries, Known, Transitions};
use super::{Chain, Error, Piece, Plan, Result, Shard};

/// o `[B, T, H, V]`, the final states that this rank knows, and what backward needs.
pub struct Forward {
    pub o: Tensor,
    /// `(document, [B, H, K, V])` for each document that ends on this rank.
    pub final_states: Vec<(usize, Tensor)>,
    pub saved: Saved,
}

/// Kept from forward: the inputs, the state at the entry of each piece, every segment's transition, and what the mixer has
/// saved of each piece. On Hopper GPUs that is a state `[K, V]` in f32 for each multiprocessor and chain of tokens that it
/// begins: 8 MiB with 16 heads of 128 by 128, on 132 multiprocessors.
pub struct Saved {
    x: Inputs,
    entries: Entries,
    transitions: Transitions,
    inside: Vec<Option<Vec<Tensor>>>,
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
    /// `(document, [B, H, K, V])` for each document that begins on this rank.
    pub initial_state_grads: Vec<(usize, Tensor)>,
}

/// Algorithm 2. `initial_state`: `[B, H, K, V]`, or `[N, H, K, V]` for N packed documents, the same on every rank.
pub fn forward(shard: &Shard, mixer: &dyn StateMixer, x: Inputs, initial_state: Option<&Tensor>) -> Result<Forward> {
    let _guard = tch::no_grad_guard();
    let plan = &shard.plan;
    check(plan, &x)?;
    // What is known at the start of each piece: the initial state of a document that begins there.
    let mut entries = plan.pieces.iter().map(|p| initial(plan, p, initial_state)).collect::<Result<Entries>>()?;
    let mut pieces = Vec::with_capacity(plan.pieces.len());
    for (piece, entry) in plan.pieces.iter().zip(&entries) {
        pieces.push(mixer.forward(&x.narrow(piece.local.start, piece.tokens())?, entry.as_ref())?);
    }

    let mut mine = Vec::new();
    for slot in 0..plan.chain.held.len() {
        mine.push(match plan.leaving(slot) {
            Some(piece) => pieces[piece].summarize()?,
            None => nothing(&x)?,
        });
    }

    let intra_rank = shard.group.recorder().span("intra_rank");
    let scanned = if plan.chain.flows() {
        shard.scan()?.forward(&shard.group, &plan.chain, mine, known(&plan.chain, &x)?)?
    } else {
        Pending::ready(Ok((plan.chain.held.iter().map(|_| None).collect(), Vec::new())))
    };
    for piece in &mut pieces {
        piece.run()?;
    }
    drop(intra_rank);

    let (entering, transitions) = scanned.wait()??;
    for (slot, state) in entering.into_iter().enumerate() {
        if let (Some(piece), Some(state)) = (plan.entered(slot), state) {
            pieces[piece].add_entry(&state)?;
            entries[piece] = Some(state);
        }
    }
    let inside = pieces.iter_mut().map(|piece| piece.take_saved()).collect::<kernels::Result<_>>()?;
    let final_states = final_states(plan, &mut pieces, &entries)?;
    let o = join(pieces.into_iter().map(|piece| piece.finish()), &x.v)?;
    Ok(Forward { o, final_states, saved: Saved { x, entries, transitions, inside } })
}

/// Algorithm 4 with decay: G travels while dq and the rank's own dk, dv are computed. do: `[B, T, H, V]`.
pub fn backward(shard: &Shard, mixer: &dyn StateMixer, saved: Saved, d_o: &Tensor) -> Result<Backward> {
    let _guard = tch::no_grad_guard();
    let (plan, Saved { x, entries, transitions, inside }) = (&shard.plan, saved);
    let mut pieces = Vec::with_capacity(plan.pieces.len());
    for ((piece, entry), inside) in plan.pieces.iter().zip(&entries).zip(inside) {
        let (start, length) = (piece.local.start, piece.tokens());
        let (x, d_o) = (x.narrow(start, length)?, d_o.f_narrow(1, start, length)?);
        pieces.push(mixer.backward_with(&x, entry.as_ref(), &d_o, inside)?);
    }

    let mut mine = Vec::new();
    for slot in 0..plan.chain.held.len() {
        mine.push(match plan.entered(slot) {
            Some(piece) => pieces[piece].summarize_grad()?.state,
            None => nothing(&x)?.state,
        });
    }

    let intra_rank = shard.group.recorder().span("intra_rank_grad");
    let scanned = if plan.chain.flows() {
        shard.scan()?.backward(&shard.group, &plan.chain, mine, transitions)?
    } else {
        Pending::ready(Ok(plan.chain.held.iter().map(|_| None).collect()))
    };
    for piece in &mut pieces {
        piece.run_grad()?;
    }
    drop(intra_rank);

    let mut exits: Entries = plan.pieces.iter().map(|_| None).collect();
    for (slot, grad) in scanned.wait()??.into_iter().enumerate() {
        if let (Some(piece), Some(grad)) = (plan.leaving(slot), grad) {
            pieces[piece].add_exit(&grad)?;
            exits[piece] = Some(grad);
        }
    }
    let initial_state_grads = initial_state_grads(plan, &mut pieces, &exits)?;
    let grads = pieces.into_iter().map(|piece| piece.finish()).collect::<kernels::Result<Vec<_>>>()?;
    Ok(Backward { grads: join_grads(grads, &x)?, initial_state_grads })
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

/// The initial state of the document that begins with this piece, `[B, H, K, V]`.
fn initial(plan: &Plan, piece: &Piece, initial_state: Option<&Tensor>) -> Result<Option<Tensor>> {
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
fn final_states(
    plan: &Plan,
    pieces: &mut [Box<dyn ForwardSegment>],
    entries: &Entries,
) -> Result<Vec<(usize, Tensor)>> {
    let mut states = Vec::new();
    for ((piece, segment), entry) in plan.pieces.iter().zip(pieces).zip(entries) {
        if piece.leaves {
            continue;
        }
        let summary = segment.summarize()?;
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
    pieces: &mut [Box<dyn BackwardSegment>],
    exits: &Entries,
) -> Result<Vec<(usize, Tensor)>> {
    let mut grads = Vec::new();
    for ((piece, segment), exit) in plan.pieces.iter().zip(pieces).zip(exits) {
        if piece.enters {
            continue;
        }
        let summary = segment.summarize_grad()?;
        let grad = match exit {
            Some(exit) => summary.after(exit)?,
            None => summary.state,
        };
        grads.push((piece.document, grad));
    }
    Ok(grads)
}

/// The pieces' outputs in local order; of the shape of `like` where this rank has no tokens.
fn join(parts: impl Iterator<Item = kernels::Result<Tensor>>, like: &Tensor) -> Result<Tensor> {
    let mut parts = parts.collect::<kernels::Result<Vec<_>>>()?;
    Ok(match parts.len() {
        0 => like.f_zeros_like()?,
        1 => parts.swap_remove(0),
        _ => Tensor::f_cat(&parts, 1)?,
    })
}

fn join_grads(grads: Vec<Grads>, x: &Inputs) -> Result<Grads> {
    let kind = accumulation_kind(x.q.kind());
    let (mut dq, mut dk, mut dv, mut dg) = (vec![], vec![], vec![], vec![]);
    for grad in grads {
        dq.push(Ok(grad.dq));
        dk.push(Ok(grad.dk));
        dv.push(Ok(grad.dv));
        dg.extend(grad.dlog_decay.map(Ok));
    }
    let dlog_decay = match &x.decay {
        _ if !x.decay_grad => None,
        Decay::None => None,
        Decay::Head(_) => {
            let like = x.q.f_select(-1, 0)?.f_to_kind(kind)?;
            Some(join(dg.into_iter(), &like)?.f_sum_dim_intlist([0, 1].as_slice(), false, kind)?)
        }
        Decay::Token(g) | Decay::Channel(g) => Some(join(dg.into_iter(), &g.f_to_kind(kind)?)?),
    };
    let dlog_decay = match (dlog_decay, x.decay.tensor()) {
        (Some(dg), Some(g)) => Some(dg.f_to_kind(g.kind())?),
        (dg, _) => dg,
    };
    Ok(Grads {
        dq: join(dq.into_iter(), &x.q)?,
        dk: join(dk.into_iter(), &x.k)?,
        dv: join(dv.into_iter(), &x.v)?,
        dlog_decay,
    })
}
