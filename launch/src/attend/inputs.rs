//! The input file, checked: which tensors there are, that their shapes agree, and that every number can be computed with.
//! After this nothing is wrong with them, so that no rank fails later.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail, ensure};
use runtime::sequence::{Layout, Plan, method};
use runtime::tensor_file;
use tch::{Device, Kind, Tensor};

use super::{Mixer, Task};

/// The sizes of all tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub batch: i64,
    pub tokens: i64,
    pub heads: i64,
    pub kv_heads: i64,
    pub key: i64,
    pub value: i64,
}

/// The tensors of the whole sequence, or of one rank's tokens. Kinds: `task.kind`, but `log_decay` and `initial_state`, rounded
/// to it, are in the accumulation kind, so that their gradients are rounded once, at the end.
#[derive(Debug)]
pub struct Inputs {
    pub sizes: Sizes,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub log_decay: Option<Tensor>,
    pub cu_seqlens: Option<Vec<i64>>,
    pub initial_state: Option<Tensor>,
    pub d_o: Option<Tensor>,
}

const KNOWN: [&str; 7] = ["q", "k", "v", "log_decay", "cu_seqlens", "initial_state", "do"];

/// Reads and checks the whole sequence.
pub fn read(path: &Path, task: &Task) -> Result<Inputs> {
    let mut tensors = tensor_file::read(path, Device::Cpu)?;
    let names: Vec<String> = tensors.keys().cloned().collect();
    for name in names.iter().filter(|name| !KNOWN.contains(&name.as_str())) {
        tracing::warn!("tensor {name} of {} is not used; known are {}", path.display(), KNOWN.join(", "));
    }
    for name in ["q", "k", "v"] {
        ensure!(
            tensors.contains_key(name),
            "tensor {name} is missing: found {}, expected at least q, k and v",
            if names.is_empty() { "no tensors".to_owned() } else { names.join(", ") }
        );
    }
    let sizes = sizes(&tensors, task)?;
    let cu_seqlens = tensors.remove("cu_seqlens").map(|cu| cu_seqlens(&cu, sizes, task)).transpose()?;
    check_optional(&tensors, sizes, cu_seqlens.as_deref(), task)?;
    let mut take = |name: &str| tensors.remove(name).map(|x| numbers(name, &x, task)).transpose();
    let (Some(q), Some(k), Some(v)) = (take("q")?, take("k")?, take("v")?) else { bail!("q, k or v is missing") };
    let log_decay = take("log_decay")?;
    if let Some(g) = &log_decay {
        at_most_zero(g)?;
    }
    let wide = |x: Option<Tensor>| x.map(|x| x.f_to_kind(accumulation(task.kind))).transpose();
    Ok(Inputs {
        sizes,
        q,
        k,
        v,
        log_decay: wide(log_decay)?,
        cu_seqlens,
        initial_state: wide(take("initial_state")?)?,
        d_o: take("do")?,
    })
}

/// The kind in which states and decays are kept.
pub fn accumulation(kind: Kind) -> Kind {
    kernels::linear::accumulation_kind(kind)
}

fn sizes(tensors: &BTreeMap<String, Tensor>, task: &Task) -> Result<Sizes> {
    let shape = |name: &str| tensors.get(name).map(Tensor::size).unwrap_or_default();
    let (q, k, v) = (shape("q"), shape("k"), shape("v"));
    let &[batch, tokens, heads, key] = q.as_slice() else {
        bail!("tensor q: found shape {q:?}, expected [B, T, H, K]");
    };
    ensure!(q.iter().all(|&size| size > 0), "tensor q: found shape {q:?}, expected at least one of everything");
    let same_heads = task.mixer == Mixer::Linear;
    let heads_rule = if same_heads {
        format!("Hkv = {heads}, as linear attention has as many k and v heads as q heads")
    } else {
        format!("where Hkv divides the {heads} heads of q")
    };
    let fits = |kv: i64| kv > 0 && heads % kv == 0 && (!same_heads || kv == heads);
    let kv_heads = match k.as_slice() {
        &[b, t, kv, dk] if (b, t, dk) == (batch, tokens, key) && fits(kv) => kv,
        _ => bail!("tensor k: found shape {k:?}, expected [{batch}, {tokens}, Hkv, {key}], {heads_rule}"),
    };
    let value = match v.as_slice() {
        &[b, t, kv, dv] if (b, t, kv) == (batch, tokens, kv_heads) && dv > 0 => dv,
        _ => bail!("tensor v: found shape {v:?}, expected [{batch}, {tokens}, {kv_heads}, V], as q and k have"),
    };
    Ok(Sizes { batch, tokens, heads, kv_heads, key, value })
}

fn cu_seqlens(cu: &Tensor, sizes: Sizes, task: &Task) -> Result<Vec<i64>> {
    let kind = cu.f_kind()?;
    ensure!(
        matches!(kind, Kind::Int64 | Kind::Int),
        "tensor cu_seqlens: found elements of kind {}, expected i64 or i32",
        name_of(kind)
    );
    ensure!(cu.dim() == 1, "tensor cu_seqlens: found shape {:?}, expected [N + 1]", cu.size());
    ensure!(
        sizes.batch == 1,
        "tensor cu_seqlens: found B = {} (the shape of q), expected B = 1, since packed documents lie in one sequence",
        sizes.batch
    );
    let mut list = vec![0i64; cu.numel()];
    let count = list.len();
    cu.f_to_kind(Kind::Int64)?.f_contiguous()?.f_copy_data(&mut list, count)?;
    // The boundaries are the same whatever the number of ranks.
    Plan::new(Layout::new(task.layout, sizes.tokens, 1)?, Some(&list), 0)?;
    Ok(list)
}

fn check_optional(
    tensors: &BTreeMap<String, Tensor>,
    sizes: Sizes,
    cu_seqlens: Option<&[i64]>,
    task: &Task,
) -> Result<()> {
    let Sizes { batch, tokens, heads, key, value, .. } = sizes;
    if let Some(found) = tensors.get("log_decay").map(Tensor::size) {
        ensure!(
            task.mixer == Mixer::Linear,
            "tensor log_decay: found one, expected none with --mixer softmax, which has no decay; leave it out, or use \
             --mixer linear"
        );
        ensure!(
            task.causal,
            "tensor log_decay: found one, expected none with --mask full, since a decay is causal by nature; leave it \
             out, or use --mask causal"
        );
        ensure!(
            !task.is_left_product() || found.len() == 1,
            "tensor log_decay: found shape {found:?}, expected [H] = [{heads}] or none with --method {}, which knows no other \
             decay; use --method {}",
            task.method,
            method::SCANS[0]
        );
        let forms = [vec![heads], vec![batch, tokens, heads], vec![batch, tokens, heads, key]];
        ensure!(
            forms.contains(&found),
            "tensor log_decay: found shape {found:?}, expected [H] = {:?}, [B, T, H] = {:?} or [B, T, H, K] = {:?}",
            forms[0],
            forms[1],
            forms[2]
        );
    }
    if let Some(found) = tensors.get("initial_state").map(Tensor::size) {
        ensure!(
            task.mixer == Mixer::Linear,
            "tensor initial_state: found one, expected none with --mixer softmax, which has no state; leave it out, or \
             use --mixer linear"
        );
        ensure!(
            !task.is_left_product(),
            "tensor initial_state: found one, expected none with --method {}, which has no state; leave it out, or use \
             --method {}",
            task.method,
            method::SCANS[0]
        );
        let (letter, rows) = match cu_seqlens {
            Some(cu) => ("N", cu.len() as i64 - 1),
            None => ("B", batch),
        };
        let expected = vec![rows, heads, key, value];
        ensure!(
            found == expected,
            "tensor initial_state: found shape {found:?}, expected [{letter}, H, K, V] = {expected:?}"
        );
    }
    if let Some(found) = tensors.get("do").map(Tensor::size) {
        let expected = vec![batch, tokens, heads, value];
        ensure!(found == expected, "tensor do: found shape {found:?}, expected [B, T, H, V] = {expected:?}, that of o");
    }
    Ok(())
}

/// Brings a tensor of finite numbers to the kind of the task.
fn numbers(name: &str, x: &Tensor, task: &Task) -> Result<Tensor> {
    let kind = x.f_kind()?;
    ensure!(
        matches!(kind, Kind::Double | Kind::Float | Kind::BFloat16 | Kind::Half),
        "tensor {name}: found elements of kind {}, expected f64, f32, bf16 or f16",
        name_of(kind)
    );
    if let Some(index) = first(&x.f_isfinite()?.f_logical_not()?)? {
        bail!("tensor {name}: found {} at index {index:?}, expected finite numbers", x.f_double_value(&index)?);
    }
    let converted = x.f_to_kind(task.kind)?;
    if let Some(index) = first(&converted.f_isfinite()?.f_logical_not()?)? {
        let value = x.f_double_value(&index)?;
        bail!(
            "tensor {name}: found {value:e} at index {index:?}, expected a number that --dtype {} can hold",
            name_of(task.kind)
        );
    }
    Ok(converted)
}

fn at_most_zero(log_decay: &Tensor) -> Result<()> {
    if let Some(index) = first(&log_decay.f_gt(0.0)?)? {
        let value = log_decay.f_double_value(&index)?;
        bail!("tensor log_decay: found {value} at index {index:?}, expected at most 0: the logarithm of a decay");
    }
    Ok(())
}

/// Where the first true of a tensor of truth values is.
fn first(found: &Tensor) -> Result<Option<Vec<i64>>> {
    if found.f_any()?.f_int64_value(&[])? == 0 {
        return Ok(None);
    }
    let index = found.f_nonzero()?.f_select(0, 0)?;
    let mut list = vec![0i64; index.numel()];
    let count = list.len();
    index.f_copy_data(&mut list, count)?;
    Ok(Some(list))
}

fn name_of(kind: Kind) -> String {
    let known = [
        (Kind::Double, "f64"),
        (Kind::Float, "f32"),
        (Kind::BFloat16, "bf16"),
        (Kind::Half, "f16"),
        (Kind::Int64, "i64"),
        (Kind::Int, "i32"),
    ];
    known.iter().find(|(k, _)| *k == kind).map_or_else(|| format!("{kind:?}"), |(_, name)| (*name).to_owned())
}
