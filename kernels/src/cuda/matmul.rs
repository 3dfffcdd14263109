//! Products of large matrices on a GPU by cuBLASLt, opened at run time.
//!
//! cuBLASLt proposes several algorithms for a product and puts first what its model takes for the quickest; among products of a
//! training step others were up to 9 % quicker. So they are timed when a product of some size and layout is first asked
//! for, and the choice is kept on disk beside the compiled kernels: later runs begin with it, and have the same bits. Beyond what
//! libtorch offers, the sum `out = a b + plus` has a summand of its own, which libtorch would first copy to `out`.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::hash::Hash;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock};

use tch::{Kind, Tensor};

use super::library::{self, functions};
use super::{Gpu, Stopwatch, cache, driver, gpu, lock, message, stream};
use crate::{Error, Result};

type Status = c_int;
type Handle = *mut c_void;

functions! {
    /// Functions of libcublasLt.so.
    Lt {
        version = b"cublasLtGetVersion" () -> usize;
        create = b"cublasLtCreate" (*mut Handle) -> Status;
        layout = b"cublasLtMatrixLayoutCreate" (*mut Handle, c_int, u64, u64, i64) -> Status;
        desc = b"cublasLtMatmulDescCreate" (*mut Handle, c_int, c_int) -> Status;
        desc_set = b"cublasLtMatmulDescSetAttribute" (Handle, c_int, *const c_void, usize) -> Status;
        preference = b"cublasLtMatmulPreferenceCreate" (*mut Handle) -> Status;
        preference_set = b"cublasLtMatmulPreferenceSetAttribute" (Handle, c_int, *const c_void, usize) -> Status;
        preference_destroy = b"cublasLtMatmulPreferenceDestroy" (Handle) -> Status;
        heuristic = b"cublasLtMatmulAlgoGetHeuristic" (
            Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Proposal, *mut c_int
        ) -> Status;
        algorithm_check = b"cublasLtMatmulAlgoCheck" (
            Handle, Handle, Handle, Handle, Handle, Handle, *const Algorithm, *mut Proposal
        ) -> Status;
        matmul = b"cublasLtMatmul" (
            Handle, Handle, *const f32, *const c_void, Handle, *const c_void, Handle, *const f32, *const c_void, Handle,
            *mut c_void, Handle, *const Algorithm, *mut c_void, usize, *mut c_void
        ) -> Status;
    }
}

/// `cublasLtMatmulAlgo_t`: opaque, and meant to be kept for the same version of the library.
type Algorithm = [u64; 8];

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Proposal {
    algorithm: Algorithm,
    workspace: usize,
    status: Status,
    waves: f32,
    reserved: [c_int; 4],
}

/// Proposals that are timed.
const PROPOSALS: usize = 8;
/// Bytes that an algorithm may use beside its matrices: what NVIDIA recommends on Hopper.
const WORKSPACE: u64 = 32 << 20;
/// Multiplications of a product from which on it is worth the choice.
const LEAST: i64 = 1 << 33;
/// Rounds of timing; less where a product takes this many milliseconds.
const ROUNDS: usize = 3;
const LONG_MS: f64 = 20.0;
/// Partial sums of an algorithm that splits K are added up in f32 only.
const REDUCTION: u32 = 2;
/// What a choice must save over cuBLASLt's own.
const LEAST_GAIN: f64 = 0.03;

/// A matrix as cuBLASLt takes it, by columns: whether it lies by rows instead, and the distance of two rows or columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Layout {
    transposed: bool,
    leading: i64,
}

/// Of a matrix `[rows, columns]` with these strides, which by columns is its transpose; `None` if neither its rows nor its columns
/// lie together, or they lie over each other, as those of an expanded one do.
fn layout_of(size: &[i64], strides: &[i64]) -> Option<Layout> {
    let (&[rows, columns], &[down, across]) = (size, strides) else { return None };
    // The stride of a dimension of size 1 may be any number: nothing is ever that far away.
    let by = |transposed, inner: i64, step, outer, leading: i64| {
        let leading = if outer > 1 { leading } else { leading.max(inner) };
        ((step == 1 || inner == 1) && leading >= inner).then_some(Layout { transposed, leading })
    };
    by(false, columns, across, rows, down).or_else(|| by(true, rows, down, columns, across))
}

/// All that a choice depends on. cuBLASLt's names: by columns `out^T [m, n] = b^T a^T`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Problem {
    gpu: usize,
    m: i64,
    n: i64,
    k: i64,
    first: Layout,
    second: Layout,
    out: i64,
    kind: c_int,
    out_kind: c_int,
    /// Of b, a and out: the largest power of two up to 256 that divides their addresses.
    alignments: [u32; 3],
}

/// A chosen algorithm with its descriptors, which live as long as the process.
#[derive(Clone, Copy)]
struct Plan {
    desc: Handle,
    first: Handle,
    second: Handle,
    out: Handle,
    algorithm: Algorithm,
    workspace: usize,
}

// SAFETY: descriptors are not changed after they are made, and cuBLASLt may be called from several threads at once.
unsafe impl Send for Plan {}

/// The library and its handle for one device.
#[derive(Clone, Copy)]
struct On {
    lt: &'static Lt,
    gpu: Gpu,
    handle: Handle,
}

// SAFETY: as for `Plan`.
unsafe impl Send for On {}

fn lt() -> Result<&'static Lt> {
    static LT: OnceLock<std::result::Result<Lt, String>> = OnceLock::new();
    let open = || {
        let beside = library::beside_libtorch();
        let mut names: Vec<PathBuf> =
            beside.iter().flat_map(|folder| library::matching(folder, "libcublasLt.so")).collect();
        names.extend(["libcublasLt.so.13", "libcublasLt.so.12"].map(PathBuf::from));
        // SAFETY: the signatures are those of cublasLt.h.
        unsafe { Lt::of(library::open_any(&names, "cuBLASLt")?) }
    };
    LT.get_or_init(|| open().map_err(message)).as_ref().map_err(|message| Error::Cuda(message.clone()))
}

fn check(call: &str, status: Status) -> Result<()> {
    if status == 0 { Ok(()) } else { Err(Error::Cuda(format!("{call}: status {status} of cuBLAS"))) }
}

fn data_type(kind: Kind) -> Option<c_int> {
    match kind {
        Kind::Float => Some(0),
        Kind::Half => Some(2),
        Kind::BFloat16 => Some(14),
        _ => None,
    }
}

fn alignment(x: &Tensor) -> u32 {
    1 << (x.data_ptr() as usize).trailing_zeros().min(8)
}

/// Leaves all products to libtorch: for comparisons, and for whom a choice by timing is not determined enough.
fn switched_off() -> bool {
    static OFF: OnceLock<bool> = OnceLock::new();
    *OFF.get_or_init(|| std::env::var_os("LASP_MATMUL").is_some_and(|by| by == "libtorch"))
}

/// The product as cuBLASLt takes it; `None` if it is small, or not on a GPU, or not of bf16 or f16, or lies scattered.
fn problem(out: &Tensor, a: &Tensor, b: &Tensor, plus: Option<&Tensor>) -> Option<Problem> {
    let device = a.device();
    if !device.is_cuda()
        || [out, b].into_iter().chain(plus).any(|x| x.device() != device)
        || !matches!(a.kind(), Kind::BFloat16 | Kind::Half)
        || b.kind() != a.kind()
        || switched_off()
    {
        return None;
    }
    let ([rows, inner], [of_b, columns]) = (a.size()[..].try_into().ok()?, b.size()[..].try_into().ok()?);
    let [rows, inner, of_b, columns]: [i64; 4] = [rows, inner, of_b, columns];
    let kinds = out.kind() == a.kind() || out.kind() == Kind::Float;
    let fits = |x: &Tensor| x.size() == [rows, columns] && x.is_contiguous() && x.kind() == out.kind();
    if of_b != inner || !kinds || !fits(out) || !plus.is_none_or(fits) || rows * columns < LEAST / inner.max(1) {
        return None;
    }
    let gpu = gpu(device).ok()?.index;
    Some(Problem {
        gpu,
        m: columns,
        n: rows,
        k: inner,
        first: layout_of(&b.size(), &b.stride())?,
        second: layout_of(&a.size(), &a.stride())?,
        out: columns,
        kind: data_type(a.kind())?,
        out_kind: data_type(out.kind())?,
        alignments: [alignment(b), alignment(a), plus.map_or(alignment(out), |c| alignment(c).min(alignment(out)))],
    })
}

/// `out = a b`, with `plus` added if there is one, which may be `out` itself; sums in f32. a `[M, K]` and b `[K, N]` bf16 or
/// f16, by rows or by columns, out and `plus` `[M, N]` of their kind or f32, by rows. `false`: nothing was done, as the
/// product is not one for this module, or there is no memory for it; the caller has libtorch.
pub fn product(out: &Tensor, a: &Tensor, b: &Tensor, plus: Option<&Tensor>) -> Result<bool> {
    static ON: OnceLock<Mutex<HashMap<usize, On>>> = OnceLock::new();
    static PLANS: OnceLock<Mutex<HashMap<Problem, Option<Plan>>>> = OnceLock::new();
    let Some(problem) = problem(out, a, b, plus) else { return Ok(false) };
    let given = Given { out, a, b, plus };
    let on = made_once(ON.get_or_init(Mutex::default), problem.gpu, || On::new(gpu(a.device())?))?;
    let plan = made_once(PLANS.get_or_init(Mutex::default), problem, || on.plan(&problem, &given))?;
    let Some(plan) = plan else { return Ok(false) };
    on.enqueue(&plan, &given)
}

/// A table's entry, made if it is not there. Not under the lock: what is timed waits for its GPU, which may wait for other ranks,
/// and these may be threads that want products too. Of two made at once the first stays.
fn made_once<K: Eq + Hash, V: Copy>(
    table: &Mutex<HashMap<K, V>>,
    key: K,
    make: impl FnOnce() -> Result<V>,
) -> Result<V> {
    let there = lock(table).get(&key).copied();
    match there {
        Some(value) => Ok(value),
        None => {
            let made = make()?;
            Ok(*lock(table).entry(key).or_insert(made))
        }
    }
}

/// What [`product`] is given.
#[derive(Clone, Copy)]
struct Given<'a> {
    out: &'a Tensor,
    a: &'a Tensor,
    b: &'a Tensor,
    plus: Option<&'a Tensor>,
}

impl On {
    fn new(gpu: Gpu) -> Result<Self> {
        let (lt, mut handle) = (lt()?, std::ptr::null_mut());
        // SAFETY: writes one pointer, to a handle for the current context's device.
        driver()?.within(gpu.context, || check("cublasLtCreate", unsafe { (lt.create)(&mut handle) }))?;
        Ok(Self { lt, gpu, handle })
    }

    /// Descriptors and the algorithm for a problem: the one on disk, or the quickest for what is given. `None` if cuBLASLt has
    /// none.
    fn plan(&self, problem: &Problem, given: &Given) -> Result<Option<Plan>> {
        let mut plan = self.described(problem)?;
        let name = self.file(problem)?;
        let kept = || self.kept(&plan, &cache::read(cache::folder()?, &name)?);
        let chosen = match kept() {
            Some(chosen) => chosen,
            None => {
                let proposals = self.proposals(problem, &plan)?;
                let Some((best, of_all)) = self.quickest(&plan, &proposals, given)? else { return Ok(None) };
                // A choice made in want of memory is not for later runs.
                if let Some(folder) = cache::folder().filter(|_| of_all) {
                    let bytes: Vec<u8> = best.algorithm.iter().flat_map(|word| word.to_le_bytes()).collect();
                    // A cache that cannot be written to is slower, not wrong.
                    let _ = cache::write(folder, &name, &bytes);
                }
                // Another rank may have been quicker: its choice is that of later runs.
                kept().unwrap_or(best)
            }
        };
        (plan.algorithm, plan.workspace) = (chosen.algorithm, chosen.workspace);
        Ok(Some(plan))
    }

    /// The name of a problem's file: another GPU or version of the library has others.
    fn file(&self, problem: &Problem) -> Result<String> {
        let Problem { m, n, k, first, second, out, kind, out_kind, alignments, .. } = *problem;
        let of = |x: Layout| format!("{}{}", if x.transposed { "t" } else { "n" }, x.leading);
        // SAFETY: takes nothing.
        let (gpu, version) = (driver()?.name(self.gpu.index)?, unsafe { (self.lt.version)() });
        let text = format!(
            "{version} {m} {n} {k} {} {} {out} {kind} {out_kind} {alignments:?} {WORKSPACE} {REDUCTION}",
            of(first),
            of(second)
        );
        Ok(cache::name("matmul", &self.gpu.arch(), "algorithm", &[&gpu, &text]))
    }

    fn described(&self, problem: &Problem) -> Result<Plan> {
        const COMPUTE_F32: c_int = 68;
        const F32: c_int = 0;
        const TRANSPOSE_A: c_int = 3;
        const TRANSPOSE_B: c_int = 4;
        let Problem { m, n, k, first, second, out, kind, out_kind, .. } = *problem;
        let lt = self.lt;
        let layout = |kind, rows: i64, columns: i64, leading| {
            let mut layout = std::ptr::null_mut();
            // SAFETY: writes one pointer.
            let status = unsafe { (lt.layout)(&mut layout, kind, rows as u64, columns as u64, leading) };
            check("cublasLtMatrixLayoutCreate", status).map(|()| layout)
        };
        let of = |x: Layout, rows, columns| {
            let (rows, columns) = if x.transposed { (columns, rows) } else { (rows, columns) };
            layout(kind, rows, columns, x.leading)
        };
        let mut desc = std::ptr::null_mut();
        // SAFETY: writes one pointer.
        check("cublasLtMatmulDescCreate", unsafe { (lt.desc)(&mut desc, COMPUTE_F32, F32) })?;
        for (attribute, x) in [(TRANSPOSE_A, first), (TRANSPOSE_B, second)] {
            let value = c_int::from(x.transposed);
            // SAFETY: reads one int.
            let status =
                unsafe { (lt.desc_set)(desc, attribute, std::ptr::from_ref(&value).cast(), size_of::<c_int>()) };
            check("cublasLtMatmulDescSetAttribute", status)?;
        }
        Ok(Plan {
            desc,
            first: of(first, m, k)?,
            second: of(second, k, n)?,
            out: layout(out_kind, m, n, out)?,
            algorithm: Algorithm::default(),
            workspace: 0,
        })
    }

    /// An algorithm that an earlier run has chosen, if the library still takes it.
    fn kept(&self, plan: &Plan, bytes: &[u8]) -> Option<Proposal> {
        let mut words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()));
        let algorithm: Algorithm = std::array::from_fn(|_| words.next().unwrap_or_default());
        let mut found = Proposal::default();
        // SAFETY: reads an algorithm and writes a proposal; descriptors are live.
        let status = unsafe {
            let out = plan.out;
            (self.lt.algorithm_check)(self.handle, plan.desc, plan.first, plan.second, out, out, &algorithm, &mut found)
        };
        // The check says what the algorithm needs, not which it is.
        found.algorithm = algorithm;
        (bytes.len() == size_of::<Algorithm>() && status == 0 && found.workspace as u64 <= WORKSPACE).then_some(found)
    }

    /// What cuBLASLt's heuristic has for a problem, its own favourite first.
    fn proposals(&self, problem: &Problem, plan: &Plan) -> Result<Vec<Proposal>> {
        const MAX_WORKSPACE: c_int = 1;
        const REDUCTION_MASK: c_int = 3;
        const MIN_ALIGNMENT_A: c_int = 5;
        const STATUS_NOT_SUPPORTED: Status = 15;
        let (lt, mut preference) = (self.lt, std::ptr::null_mut());
        // SAFETY: writes one pointer.
        check("cublasLtMatmulPreferenceCreate", unsafe { (lt.preference)(&mut preference) })?;
        // SAFETY: reads `size` bytes of the value.
        let set = |attribute, value: *const c_void, size| unsafe {
            check("cublasLtMatmulPreferenceSetAttribute", (lt.preference_set)(preference, attribute, value, size))
        };
        set(MAX_WORKSPACE, std::ptr::from_ref(&WORKSPACE).cast(), size_of::<u64>())?;
        set(REDUCTION_MASK, std::ptr::from_ref(&REDUCTION).cast(), size_of::<u32>())?;
        let [first, second, out] = problem.alignments;
        for (i, bytes) in [first, second, out, out].iter().enumerate() {
            set(MIN_ALIGNMENT_A + i as c_int, std::ptr::from_ref(bytes).cast(), size_of::<u32>())?;
        }
        let (mut proposals, mut count) = ([Proposal::default(); PROPOSALS], 0);
        // SAFETY: writes at most PROPOSALS proposals and their number; descriptors are live.
        let status = unsafe {
            let (all, most) = (proposals.as_mut_ptr(), PROPOSALS as c_int);
            let (first, second, out) = (plan.first, plan.second, plan.out);
            (lt.heuristic)(self.handle, plan.desc, first, second, out, out, preference, most, all, &mut count)
        };
        // SAFETY: made above, not used any more.
        check("cublasLtMatmulPreferenceDestroy", unsafe { (lt.preference_destroy)(preference) })?;
        if status == STATUS_NOT_SUPPORTED {
            return Ok(Vec::new());
        }
        check("cublasLtMatmulAlgoGetHeuristic", status)?;
        Ok(proposals[..usize::try_from(count).unwrap_or(0)].iter().filter(|p| p.status == 0).copied().collect())
    }

    /// The proposal that takes the least time, taking turns, so that a GPU that slows down slows all of them; and whether there was
    /// memory to time all. A product that adds to its output does so elsewhere: the sum in `out` stays.
    fn quickest(&self, plan: &Plan, proposals: &[Proposal], given: &Given) -> Result<Option<(Proposal, bool)>> {
        let in_place = given.plus.is_some_and(|plus| plus.data_ptr() == given.out.data_ptr());
        let aside = match in_place.then(|| given.out.f_zeros_like()).transpose() {
            Ok(aside) => aside,
            // No memory for it: cuBLASLt's own choice.
            Err(_) => return Ok(proposals.first().map(|&favourite| (favourite, false))),
        };
        let given = match &aside {
            Some(aside) => Given { out: aside, plus: Some(aside), ..*given },
            None => *given,
        };
        let watch = Stopwatch::new(given.a.device())?;
        let (mut times, mut of_all) = (Vec::new(), true);
        for proposal in proposals {
            let plan = Plan { algorithm: proposal.algorithm, workspace: proposal.workspace, ..*plan };
            // The first time it is loaded. One that fails is none.
            match self.enqueue(&plan, &given) {
                Ok(true) => times.push((0.0, plan, *proposal)),
                Ok(false) => of_all = false,
                Err(_) => {}
            }
        }
        let mut time = |ms: &mut f64, plan: &Plan, times: usize| -> Result<()> {
            let mut ran = true;
            *ms += watch.time::<Error>(|| {
                for _ in 0..times {
                    ran &= self.enqueue(plan, &given)?;
                }
                Ok(())
            })?;
            if !ran {
                (*ms, of_all) = (f64::INFINITY, false);
            }
            Ok(())
        };
        for (ms, plan, _) in &mut times {
            time(ms, plan, 1)?;
        }
        let rounds = if times.iter().any(|(ms, ..)| *ms > LONG_MS) { 0 } else { ROUNDS };
        for _ in 0..rounds {
            for (ms, plan, _) in &mut times {
                time(ms, plan, 2)?;
            }
        }
        let Some(&(own, _, favourite)) = times.first() else {
            // None is possible, or there was no memory for one: then it may be next time.
            return Ok(proposals.first().filter(|_| !of_all).map(|&favourite| (favourite, false)));
        };
        let best = times.iter().min_by(|a, b| a.0.total_cmp(&b.0)).map(|&(ms, _, proposal)| (ms, proposal));
        let best = best.filter(|(ms, _)| *ms < own * (1.0 - LEAST_GAIN)).map_or(favourite, |(_, proposal)| proposal);
        Ok(Some((best, of_all)))
    }

    /// `false`: there is no memory for its workspace, and nothing was done.
    fn enqueue(&self, plan: &Plan, given: &Given) -> Result<bool> {
        let (one, beta) = (1f32, if given.plus.is_some() { 1f32 } else { 0.0 });
        let workspace = match plan.workspace {
            0 => None,
            // Handed out again in the stream's order, like all of libtorch's memory.
            bytes => match Tensor::f_empty([bytes as i64], (Kind::Uint8, given.a.device())) {
                Ok(workspace) => Some(workspace),
                Err(_) => return Ok(false),
            },
        };
        let stream = stream(self.gpu)?;
        // SAFETY: the tensors have the layouts of the plan's descriptors, which `problem` has read off them.
        let status = driver()?.within(self.gpu.context, || unsafe {
            Ok((self.lt.matmul)(
                self.handle,
                plan.desc,
                &one,
                given.b.data_ptr(),
                plan.first,
                given.a.data_ptr(),
                plan.second,
                &beta,
                given.plus.unwrap_or(given.out).data_ptr(),
                plan.out,
                given.out.data_ptr(),
                plan.out,
                &plan.algorithm,
                workspace.as_ref().map_or(std::ptr::null_mut(), |bytes| bytes.data_ptr()),
                plan.workspace,
                stream,
            ))
        })?;
        check("cublasLtMatmul", status).map(|()| true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_of_matrices() {
        let by_rows = |leading| Some(Layout { transposed: false, leading });
        let by_columns = |leading| Some(Layout { transposed: true, leading });
        for (size, strides, expected) in [
            ([5, 3], [3, 1], by_rows(3)),
            ([5, 3], [9, 1], by_rows(9)),
            ([5, 3], [1, 5], by_columns(5)),
            ([5, 3], [1, 8], by_columns(8)),
            // Any stride of a single row or column.
            ([1, 3], [0, 1], by_rows(3)),
            ([1, 3], [1, 1], by_rows(3)),
            ([5, 1], [1, 1], by_rows(1)),
            ([5, 1], [7, 0], by_rows(7)),
            ([5, 1], [1, 0], by_rows(1)),
            ([1, 3], [2, 8], by_columns(8)),
            // Expanded, overlapping, scattered.
            ([5, 3], [0, 1], None),
            ([5, 3], [1, 0], None),
            ([5, 3], [0, 0], None),
            ([5, 3], [2, 1], None),
            ([5, 3], [1, 4], None),
            ([5, 3], [6, 2], None),
        ] {
            assert_eq!(layout_of(&size, &strides), expected, "{size:?} {strides:?}");
        }
        assert_eq!(layout_of(&[5], &[1]), None);
    }

    #[test]
    fn entries_are_made_once_and_not_under_the_lock() {
        let table = Mutex::default();
        let made = made_once(&table, 1, || {
            assert_eq!(made_once(&table, 1, || Ok("within"))?, "within");
            Ok("outside")
        });
        assert_eq!(made.unwrap(), "within");
        assert_eq!(made_once(&table, 1, || Ok("again")).unwrap(), "within");
        assert!(made_once(&table, 2, || Err(Error::Cuda("no".to_owned()))).is_err());
        assert_eq!(made_once(&table, 2, || Ok("later")).unwrap(), "later");
    }
}
