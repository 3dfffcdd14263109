//! From rank 0 to all ranks and back: each rank receives its tokens of the inputs, and rank 0 those of all ranks of a result.

use anyhow::{Context, Result};
use collectives::Group;
use runtime::sequence::Layout;
use tch::{Device, Kind, Tensor};

use super::Task;
use super::inputs::{Inputs, Sizes, accumulation};

/// What every rank must know before tensors can travel, as the words of one message.
struct Header {
    sizes: Sizes,
    /// Dimensions of log_decay; 0: none.
    decay_dims: i64,
    /// N + 1; 0: no cu_seqlens.
    boundaries: i64,
    has_initial_state: bool,
    has_d_o: bool,
}

const WORDS: usize = 10;

impl Header {
    fn of(x: &Inputs) -> Header {
        Header {
            sizes: x.sizes,
            decay_dims: x.log_decay.as_ref().map_or(0, |g| g.dim() as i64),
            boundaries: x.cu_seqlens.as_ref().map_or(0, |cu| cu.len() as i64),
            has_initial_state: x.initial_state.is_some(),
            has_d_o: x.d_o.is_some(),
        }
    }

    fn encode(&self) -> [i64; WORDS] {
        let Sizes { batch, tokens, heads, kv_heads, key, value } = self.sizes;
        let (initial, d_o) = (i64::from(self.has_initial_state), i64::from(self.has_d_o));
        [batch, tokens, heads, kv_heads, key, value, self.decay_dims, self.boundaries, initial, d_o]
    }

    fn decode(
        [batch, tokens, heads, kv_heads, key, value, decay_dims, boundaries, initial, d_o]: [i64; WORDS],
    ) -> Header {
        let sizes = Sizes { batch, tokens, heads, kv_heads, key, value };
        Header { sizes, decay_dims, boundaries, has_initial_state: initial != 0, has_d_o: d_o != 0 }
    }
}

/// Gives every rank its tokens, in local order, on its device. `whole`: all of them, on rank 0.
pub fn distribute(task: &Task, world: &Group, whole: Option<Inputs>) -> Result<(Layout, Inputs)> {
    let words = broadcast(world, whole.as_ref().map(|x| Header::of(x).encode().to_vec()), WORDS)?;
    let header = Header::decode(words.try_into().ok().context("a header of the wrong length")?);
    let Sizes { batch, tokens, heads, kv_heads, key, value } = header.sizes;
    let layout = Layout::new(task.layout, tokens, world.size())?;
    let device = task.device(world.rank())?;
    let of = |get: fn(&Inputs) -> Option<&Tensor>| whole.as_ref().and_then(get);
    let scatter = |x: Option<&Tensor>, rest: &[i64], kind| -> Result<Tensor> {
        let rows: Vec<i64> = [&[batch], rest].concat();
        Ok(scatter(world, &layout, x, &rows, kind)?.f_to_device(device)?)
    };
    let same = |x: Option<&Tensor>, shape: &[i64]| -> Result<Tensor> {
        let kind = accumulation(task.kind);
        let x = x.map_or_else(|| Tensor::f_empty(shape, (kind, Device::Cpu)), |x| Ok(x.shallow_clone()))?;
        Ok(world.broadcast(&x, 0)?.wait()?.f_to_device(device)?)
    };

    let q = scatter(of(|x| Some(&x.q)), &[heads, key], task.kind)?;
    let k = scatter(of(|x| Some(&x.k)), &[kv_heads, key], task.kind)?;
    let v = scatter(of(|x| Some(&x.v)), &[kv_heads, value], task.kind)?;
    let decay = of(|x| x.log_decay.as_ref());
    let log_decay = match header.decay_dims {
        0 => None,
        1 => Some(same(decay, &[heads])?),
        3 => Some(scatter(decay, &[heads], accumulation(task.kind))?),
        _ => Some(scatter(decay, &[heads, key], accumulation(task.kind))?),
    };
    let cu_seqlens = match header.boundaries {
        0 => None,
        n => Some(broadcast(world, whole.as_ref().and_then(|x| x.cu_seqlens.clone()), n as usize)?),
    };
    let states = if header.boundaries > 0 { header.boundaries - 1 } else { batch };
    let initial = of(|x| x.initial_state.as_ref());
    let initial_state = header.has_initial_state.then(|| same(initial, &[states, heads, key, value])).transpose()?;
    let d_o = of(|x| x.d_o.as_ref());
    let d_o = header.has_d_o.then(|| scatter(d_o, &[heads, value], task.kind)).transpose()?;
    Ok((layout, Inputs { sizes: header.sizes, q, k, v, log_decay, cu_seqlens, initial_state, d_o }))
}

/// Rank 0's `numbers`, of which there are `count`, on every rank.
fn broadcast(world: &Group, numbers: Option<Vec<i64>>, count: usize) -> Result<Vec<i64>> {
    let mut numbers = numbers.unwrap_or_else(|| vec![0; count]);
    let sent = world.broadcast(&Tensor::f_from_slice(&numbers)?, 0)?.wait()?;
    sent.f_copy_data(&mut numbers, count)?;
    Ok(numbers)
}

/// `whole`: `[B, L, ..]`, on rank 0. Gives each rank its `[B, T, ..]`. `rows`: the shape without the tokens, `[B, ..]`.
fn scatter(world: &Group, layout: &Layout, whole: Option<&Tensor>, rows: &[i64], kind: Kind) -> Result<Tensor> {
    let tokens = layout.tokens_per_rank();
    let (x, send) = match whole {
        Some(whole) => (layout.in_rank_order(&whole.f_transpose(0, 1)?, 0)?, tokens.clone()),
        None => (Tensor::f_empty([&[0], rows].concat(), (kind, Device::Cpu))?, vec![0; world.size()]),
    };
    let mut receive = vec![0; world.size()];
    receive[0] = tokens[world.rank()];
    Ok(world.all_to_all_v(&x, &send, &receive)?.wait()?.f_transpose(0, 1)?.f_contiguous()?)
}

/// `mine`: `[B, T, ..]`. Gives `[B, L, ..]`, in the order of the sequence, to rank 0.
pub fn gather(world: &Group, layout: &Layout, mine: &Tensor) -> Result<Option<Tensor>> {
    let tokens = layout.tokens_per_rank();
    let mut send = vec![0; world.size()];
    send[0] = tokens[world.rank()];
    let receive = if world.rank() == 0 { tokens } else { vec![0; world.size()] };
    let gathered = world.all_to_all_v(&mine.f_transpose(0, 1)?.f_contiguous()?, &send, &receive)?.wait()?;
    if world.rank() > 0 {
        return Ok(None);
    }
    Ok(Some(layout.in_sequence_order(&gathered, 0)?.f_transpose(0, 1)?))
}
