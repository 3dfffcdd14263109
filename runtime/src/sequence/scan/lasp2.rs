//! LASP-2 (arXiv 2502.07563), Algorithm 2: one AllGather of every segment's state, then each rank folds what it needs.
//! W - 1 states received, one dependent step, in forward and in backward.

use collectives::{Group, Pending};
use kernels::linear::{Summary, Transition};
use tch::Tensor;

use super::{Chain, Entries, Known, Result, Scan, Scanned, Transitions};

#[derive(Clone, Copy, Debug, Default)]
pub struct Lasp2;

impl Scan for Lasp2 {
    fn forward(
        &self,
        group: &Group,
        chain: &Chain,
        mine: Vec<Summary>,
        known: Known,
    ) -> Result<Scanned<(Entries, Transitions)>> {
        let shape = Shape::of(&mine);
        let rows = match &known {
            Known::All(_) => {
                mine.iter().map(|s| s.state.f_flatten(0, -1)).collect::<std::result::Result<Vec<_>, _>>()?
            }
            Known::Nothing => mine.iter().map(pack).collect::<Result<Vec<_>>>()?,
        };
        let chain = chain.clone();
        let fold = move |gathered: Tensor| -> Result<(Entries, Transitions)> {
            let states = chain.owners.iter().map(|&at| shape.state(&gathered, at)).collect::<Result<Vec<_>>>()?;
            let transitions = match known {
                Known::All(transitions) => transitions,
                Known::Nothing => {
                    chain.owners.iter().map(|&at| shape.transition(&gathered, at)).collect::<Result<Vec<_>>>()?
                }
            };
            Ok((prefixes(&chain, &states, &transitions)?, transitions))
        };
        gather(group, &rows, fold)
    }

    fn backward(
        &self,
        group: &Group,
        chain: &Chain,
        mine: Vec<Tensor>,
        transitions: Transitions,
    ) -> Result<Scanned<Entries>> {
        let shape = Shape { state: mine.first().map(Tensor::size).unwrap_or_default(), transition: None };
        let rows = mine.iter().map(|g| g.f_flatten(0, -1)).collect::<std::result::Result<Vec<_>, _>>()?;
        let chain = chain.clone();
        let fold = move |gathered: Tensor| -> Result<Entries> {
            let grads = chain.owners.iter().map(|&at| shape.state(&gathered, at)).collect::<Result<Vec<_>>>()?;
            suffixes(&chain, &grads, &transitions)
        };
        gather(group, &rows, fold)
    }
}

/// One AllGather of this rank's rows, `[slots, ..]` -> `[W, slots, ..]`, folded once it is there.
fn gather<T: 'static>(
    group: &Group,
    rows: &[Tensor],
    fold: impl FnOnce(Tensor) -> Result<T> + Send + 'static,
) -> Result<Scanned<T>> {
    let mine = Tensor::f_stack(rows, 0)?;
    if group.size() == 1 {
        return Ok(Pending::ready(fold(mine.f_unsqueeze(0)?)));
    }
    Ok(group.all_gather(&mine)?.map(move |gathered| Ok(fold(gathered))))
}

/// How a row of the message is laid out: the state, then the transition's log-decays if they travel.
struct Shape {
    state: Vec<i64>,
    transition: Option<Vec<i64>>,
}

impl Shape {
    fn of(mine: &[Summary]) -> Self {
        let Some(first) = mine.first() else { return Self { state: vec![], transition: None } };
        let transition = match &first.transition {
            Transition::Identity => None,
            Transition::Scalar(sum) | Transition::Channel(sum) => Some(sum.size()),
        };
        Self { state: first.state.size(), transition }
    }

    fn row(&self, gathered: &Tensor, (rank, slot): (usize, usize)) -> Result<Tensor> {
        Ok(gathered.f_select(0, rank as i64)?.f_select(0, slot as i64)?)
    }

    fn state(&self, gathered: &Tensor, at: (usize, usize)) -> Result<Tensor> {
        let numbers = self.state.iter().product();
        Ok(self.row(gathered, at)?.f_narrow(0, 0, numbers)?.f_view(self.state.as_slice())?)
    }

    fn transition(&self, gathered: &Tensor, at: (usize, usize)) -> Result<Transition> {
        let Some(shape) = &self.transition else { return Ok(Transition::Identity) };
        let start: i64 = self.state.iter().product();
        let sum = self.row(gathered, at)?.f_narrow(0, start, shape.iter().product())?.f_view(shape.as_slice())?;
        Ok(if shape.len() == 2 { Transition::Scalar(sum) } else { Transition::Channel(sum) })
    }
}

fn pack(summary: &Summary) -> Result<Tensor> {
    let state = summary.state.f_flatten(0, -1)?;
    Ok(match &summary.transition {
        Transition::Identity => state,
        Transition::Scalar(sum) | Transition::Channel(sum) => {
            Tensor::f_cat(&[state, sum.f_to_kind(summary.state.kind())?.f_flatten(0, -1)?], 0)?
        }
    })
}

/// The state at the entry of each segment that this rank holds: `P_{g+1} = A_g P_g + S_g` along each document.
fn prefixes(chain: &Chain, states: &[Tensor], transitions: &[Transition]) -> Result<Entries> {
    let mut entries: Entries = chain.held.iter().map(|_| None).collect();
    let mut running: Option<Tensor> = None;
    let last = chain.held.iter().max().copied().unwrap_or(0);
    for (segment, link) in chain.links.iter().enumerate().take(last + 1) {
        if let Some(slot) = chain.held.iter().position(|&held| held == segment)
            && link.enters
        {
            entries[slot] = running.as_ref().map(Tensor::shallow_clone);
        }
        if !link.empty {
            running = step(running, link.leaves, link.through, &states[segment], &transitions[segment])?;
        }
    }
    Ok(entries)
}

/// The gradient at the exit of each segment that this rank holds: `R_g = A_{g+1} R_{g+1} + G_{g+1}` along each document.
fn suffixes(chain: &Chain, grads: &[Tensor], transitions: &[Transition]) -> Result<Entries> {
    let mut exits: Entries = chain.held.iter().map(|_| None).collect();
    let mut running: Option<Tensor> = None;
    let first = chain.held.iter().min().copied().unwrap_or(0);
    for (segment, link) in chain.links.iter().enumerate().skip(first).rev() {
        if let Some(slot) = chain.held.iter().position(|&held| held == segment)
            && link.leaves
        {
            exits[slot] = running.as_ref().map(Tensor::shallow_clone);
        }
        if !link.empty {
            running = step(running, link.enters, link.through, &grads[segment], &transitions[segment])?;
        }
    }
    Ok(exits)
}

/// What is carried past one segment: nothing where its document ends, all of it where it lies inside one document.
fn step(
    running: Option<Tensor>,
    goes_on: bool,
    through: bool,
    own: &Tensor,
    transition: &Transition,
) -> Result<Option<Tensor>> {
    if !goes_on {
        return Ok(None);
    }
    Ok(Some(match running {
        Some(running) if through => transition.apply(&running)?.f_add(own)?,
        _ => own.shallow_clone(),
    }))
}
