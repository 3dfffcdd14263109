//! What scans put into messages: a state as a flat row, behind it the log-decays of its transition where they must travel;
//! slices of both; the AllGather of rows, and what to do when messages between two ranks have come.

use std::ops::Range;

use collectives::{Group, Pending};
use kernels::linear::Transition;
use tch::Tensor;

use super::fold::copy;
use super::{Messages, Result, Scanned, StateSize};

/// For messages both ways between ranks of `group` up to `far` apart.
pub(super) fn connect_near(group: &Group, far: usize) -> Result<()> {
    let rank = group.rank();
    let near: Vec<_> = (rank.saturating_sub(far)..group.size().min(rank + far + 1)).collect();
    Ok(group.connect(&near, &near)?)
}

/// How a row is laid out.
pub(super) struct Row {
    state: Vec<i64>,
    /// `[B, H]` or `[B, H, K]`; none if no log-decays travel.
    decays: Option<Vec<i64>>,
}

impl Row {
    /// `travelling`: a transition of the form of those that are sent along.
    pub fn new(state: &Tensor, travelling: Option<&Transition>) -> Self {
        let decays = match travelling {
            None | Some(Transition::Identity) => None,
            Some(Transition::Scalar(sum) | Transition::Channel(sum)) => Some(sum.size()),
        };
        Self { state: state.size(), decays }
    }

    /// Numbers in a row.
    pub fn numel(&self) -> i64 {
        let decays = self.decays.as_ref().map_or(0, |shape| shape.iter().product());
        self.state.iter().product::<i64>() + decays
    }

    pub fn pack(&self, state: &Tensor, transition: Option<&Transition>) -> Result<Tensor> {
        let state = state.f_flatten(0, -1)?;
        Ok(match transition {
            Some(Transition::Scalar(sum) | Transition::Channel(sum)) if self.decays.is_some() => {
                Tensor::f_cat(&[state, sum.f_flatten(0, -1)?], 0)?
            }
            _ => state,
        })
    }

    pub fn state(&self, row: &Tensor) -> Result<Tensor> {
        Ok(row.f_narrow(0, 0, self.state.iter().product())?.f_view(self.state.as_slice())?)
    }

    /// The transition that travelled; none if none does.
    pub fn transition(&self, row: &Tensor) -> Result<Option<Transition>> {
        let Some(shape) = &self.decays else { return Ok(None) };
        let sum = row.f_narrow(0, self.state.iter().product(), shape.iter().product())?.f_view(shape.as_slice())?;
        Ok(Some(if shape.len() == 2 { Transition::Scalar(sum) } else { Transition::Channel(sum) }))
    }
}

/// Cuts `length` into at most `parts` (at least one) ranges that differ by at most one.
pub(super) fn cut(length: i64, parts: i64) -> Vec<Range<i64>> {
    let parts = parts.min(length).max(1);
    (0..parts).map(|i| i * length / parts..(i + 1) * length / parts).collect()
}

/// Some rows of a state's key dimension, as a view.
pub(super) fn narrow(state: &Tensor, rows: &Range<i64>) -> Result<Tensor> {
    Ok(state.f_narrow(2, rows.start, rows.end - rows.start)?)
}

/// The transition of such rows.
pub(super) fn slice(transition: &Transition, rows: &Range<i64>) -> Result<Transition> {
    Ok(match transition {
        Transition::Channel(sum) => Transition::Channel(sum.f_narrow(2, rows.start, rows.end - rows.start)?),
        other => copy(other),
    })
}

/// AllGather of each rank's rows, `[slots, ..]` -> `[W, slots, ..]`, in at most `splits` messages.
pub(super) fn gather(group: &Group, rows: &[Tensor], splits: usize) -> Result<Pending<Tensor>> {
    let mine = match rows {
        [row] => row.f_unsqueeze(0)?,
        rows => Tensor::f_stack(rows, 0)?,
    };
    if group.size() == 1 {
        return Ok(Pending::ready(mine.f_unsqueeze(0)?));
    }
    let mut parts = Vec::with_capacity(splits);
    for range in cut(mine.size()[1], splits as i64) {
        parts.push(group.all_gather(&mine.f_narrow(1, range.start, range.end - range.start)?)?);
    }
    // Collectives end in order: when the last is there, all are.
    let Some(last) = parts.pop() else { return Ok(Pending::ready(mine.f_unsqueeze(0)?)) };
    if parts.is_empty() {
        return Ok(last);
    }
    Ok(last.map(move |last| {
        let mut gathered = parts.into_iter().map(Pending::wait).collect::<collectives::Result<Vec<_>>>()?;
        gathered.push(last);
        Ok(Tensor::f_cat(&gathered, 2)?)
    }))
}

/// What each rank moves in such a gather between `ranks` ranks of the group called `group`; `row`: bytes of one row.
pub(super) fn gather_messages(
    group: &'static str,
    ranks: usize,
    slots: usize,
    row: u64,
    size: &StateSize,
    splits: usize,
) -> Messages {
    let mut messages = Messages::default();
    if ranks > 1 {
        let (parts, mine) = (cut((row / size.width.max(1)) as i64, splits as i64).len(), slots as u64 * row);
        messages.count_on(group, "all_gather", parts as u64, mine, (ranks as u64 - 1) * mine);
    }
    messages
}

/// What is awaited of some messages between two ranks.
pub(super) type Coming<'a> = &'a mut dyn Iterator<Item = collectives::Result<Tensor>>;

/// Pending: what `then` makes of the messages that come, in the order of their receives, when all of `sent` has gone too.
pub(super) fn when_they_come<T: 'static>(
    coming: Vec<Pending<Tensor>>,
    mut sent: Vec<Pending<()>>,
    then: impl FnOnce(Coming) -> Result<T> + Send + 'static,
) -> Scanned<T> {
    let mut coming = coming.into_iter();
    let (first, last) = (coming.next(), sent.pop());
    let finish = move |coming: Coming, sent: Vec<Pending<()>>| {
        let result = then(coming)?;
        sent.into_iter().try_for_each(Pending::wait)?;
        Ok(result)
    };
    match (first, last) {
        (Some(first), last) => first.map(move |first| {
            sent.extend(last);
            Ok(finish(&mut std::iter::once(Ok(first)).chain(coming.map(Pending::wait)), sent))
        }),
        (None, Some(last)) => last.map(move |()| Ok(finish(&mut std::iter::empty(), sent))),
        (None, None) => Pending::ready(finish(&mut std::iter::empty(), sent)),
    }
}

#[cfg(test)]
mod tests {
    use super::cut;

    #[test]
    fn parts_tile_the_length() {
        assert_eq!(cut(7, 3), [0..2, 2..4, 4..7]);
        assert_eq!(cut(2, 5), [0..1, 1..2]);
        assert_eq!(cut(3, 1), vec![0..3]);
        assert_eq!(cut(0, 4), vec![0..0]);
    }
}
