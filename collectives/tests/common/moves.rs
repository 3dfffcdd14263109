//! What each operation delivers.

use super::{KINDS, assert_same, device, numbers, ranks_numbers, sum};
use anyhow::Result;
use collectives::{Group, Kind, Mesh, Reduce, Tensor};

pub fn equal_shapes(world: &Group) -> Result<()> {
    let (rank, w) = (world.rank(), world.size());
    // Scalars, empty tensors, and enough elements for an all_reduce in two steps.
    let shapes: [&[i64]; 5] = [&[], &[0], &[3, 0, 2], &[3, 2], &[7, 1001]];
    for kind in KINDS {
        for shape in shapes {
            let x = numbers(rank, shape, kind);
            let all = ranks_numbers(w, shape, kind);
            let stacked = Tensor::stack(&all, 0);
            assert_same(&world.all_gather(&x)?.wait()?, &stacked);
            assert_same(&world.all_reduce(&x, Reduce::Sum)?.wait()?, &sum(&all));
            assert_same(&world.all_reduce(&x, Reduce::Max)?.wait()?, &stacked.amax(0, false));
            assert_same(&world.all_reduce(&x, Reduce::Min)?.wait()?, &stacked.amin(0, false));
            for (root, expected) in all.iter().enumerate() {
                assert_same(&world.broadcast(&x, root)?.wait()?, expected);
            }

            let with_w = [&[w as i64], shape].concat();
            let x = numbers(rank, &with_w, kind);
            let all = ranks_numbers(w, &with_w, kind);
            let mine: Vec<Tensor> = all.iter().map(|x| x.get(rank as i64)).collect();
            assert_same(&world.reduce_scatter(&x)?.wait()?, &sum(&mine));
            assert_same(&world.all_to_all(&x)?.wait()?, &Tensor::stack(&mine, 0));
        }
    }
    world.barrier()?.wait()?;
    Ok(())
}

pub fn uneven_rows(world: &Group) -> Result<()> {
    let (rank, w) = (world.rank(), world.size());
    let rows_of: [&dyn Fn(usize) -> i64; 4] =
        [&|_| 0, &|r| (2 * r as i64) % 3, &|r| 1 + r as i64, &|r| if r == 0 { 5 } else { 0 }];
    for kind in KINDS {
        for tail in [&[][..], &[3], &[2, 0]] {
            for rows_of in rows_of {
                let rows: Vec<i64> = (0..w).map(rows_of).collect();
                let shape = |rows: i64| [&[rows], tail].concat();

                let all: Vec<Tensor> = (0..w).map(|r| numbers(r, &shape(rows[r]), kind)).collect();
                assert_same(&world.all_gather_v(&all[rank], &rows)?.wait()?, &Tensor::cat(&all, 0));

                let total: i64 = rows.iter().sum();
                let before: i64 = rows[..rank].iter().sum();
                let all = ranks_numbers(w, &shape(total), kind);
                let mine: Vec<Tensor> = all.iter().map(|x| x.narrow(0, before, rows[rank])).collect();
                assert_same(&world.reduce_scatter_v(&all[rank], &rows)?.wait()?, &sum(&mine));

                let count = |from: usize, to: usize| (rows_of(from) + 2 * to as i64) % 4;
                let sends = |from: usize| -> Vec<i64> { (0..w).map(|to| count(from, to)).collect() };
                let recvs: Vec<i64> = (0..w).map(|from| count(from, rank)).collect();
                let all: Vec<Tensor> = (0..w).map(|r| numbers(r, &shape(sends(r).iter().sum()), kind)).collect();
                let run = |from: usize| {
                    let before: i64 = sends(from)[..rank].iter().sum();
                    all[from].narrow(0, before, count(from, rank))
                };
                let expected = Tensor::cat(&(0..w).map(run).collect::<Vec<_>>(), 0);
                assert_same(&world.all_to_all_v(&all[rank], &sends(rank), &recvs)?.wait()?, &expected);
            }
        }
    }
    Ok(())
}

/// Numbers that round, in sizes below and above the limit of the one-step all_reduce.
pub fn reductions_add_in_rank_order(world: &Group) -> Result<()> {
    let (rank, w) = (world.rank(), world.size());
    for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
        for n in [5i64, 30_011] {
            let noise = |r: usize| {
                let i = Tensor::arange(w as i64 * n, (Kind::Double, device()));
                ((i + 1.0 + 3.7 * r as f64) * 12.9898).sin().reshape([w as i64, n]).to_kind(kind)
            };
            let all: Vec<Tensor> = (0..w).map(noise).collect();
            if device().is_cuda() {
                in_an_order_of_its_own(world, &all)?;
                continue;
            }
            assert_same(&world.all_reduce(&all[rank], Reduce::Sum)?.wait()?, &sum(&all));
            let mine: Vec<Tensor> = all.iter().map(|x| x.get(rank as i64)).collect();
            assert_same(&world.reduce_scatter(&all[rank])?.wait()?, &sum(&mine));
        }
    }
    Ok(())
}

/// NCCL's: near the sum in f64, with bf16 rounded once, the same on all ranks, and the same again.
fn in_an_order_of_its_own(world: &Group, all: &[Tensor]) -> Result<()> {
    let (rank, kind) = (world.rank(), all[0].kind());
    let exact = all.iter().fold(all[0].zeros_like().to_kind(Kind::Double), |total, x| total + x.to_kind(Kind::Double));
    let close = |ours: &Tensor, exact: &Tensor| {
        let epsilon = match kind {
            Kind::Double => 1e-15,
            Kind::Float => 1e-6,
            _ => 0.0040,
        };
        let scale = exact.abs().clamp_min(1.0);
        let error = ((ours.to_kind(Kind::Double) - exact) / scale).abs().max().double_value(&[]);
        assert!(error <= epsilon * all.len() as f64, "{kind:?}: relative error {error}");
    };
    let reduced = world.all_reduce(&all[rank], Reduce::Sum)?.wait()?;
    close(&reduced, &exact);
    assert_same(&world.all_reduce(&all[rank], Reduce::Sum)?.wait()?, &reduced);
    for root in 0..world.size() {
        assert_same(&world.broadcast(&reduced, root)?.wait()?, &reduced);
    }
    let scattered = world.reduce_scatter(&all[rank])?.wait()?;
    close(&scattered, &exact.get(rank as i64));
    assert_same(&world.reduce_scatter(&all[rank])?.wait()?, &scattered);
    Ok(())
}

/// The numbers of an AllReduce that has a place of its own, for parts of a tensor, of which the others stay as they are.
pub fn reductions_in_place(world: &Group) -> Result<()> {
    for kind in KINDS {
        for (from, n) in [(0i64, 7i64), (5, 30_011), (3, 0)] {
            let x = numbers(world.rank(), &[n + 9], kind);
            let expected = x.copy();
            expected.narrow(0, from, n).copy_(&world.all_reduce(&x.narrow(0, from, n), Reduce::Sum)?.wait()?);
            world.all_reduce_in_place(&x.narrow(0, from, n), Reduce::Sum)?.wait()?;
            assert_same(&x, &expected);
        }
        let scattered = numbers(world.rank(), &[4, 6], kind).transpose(0, 1);
        let expected = world.all_reduce(&scattered, Reduce::Max)?.wait()?;
        world.all_reduce_in_place(&scattered, Reduce::Max)?.wait()?;
        assert_same(&scattered, &expected);
    }
    Ok(())
}

pub fn views_and_tracked_inputs(world: &Group) -> Result<()> {
    let (rank, w) = (world.rank(), world.size());
    let of = |r: usize| numbers(r, &[6, 4], Kind::Float);
    let expected = Tensor::stack(&(0..w).map(|r| of(r).transpose(0, 1).narrow(0, 1, 2)).collect::<Vec<_>>(), 0);
    let x = of(rank).set_requires_grad(true);
    let gathered = world.all_gather(&x.transpose(0, 1).narrow(0, 1, 2))?.wait()?;
    assert!(!gathered.requires_grad());
    assert_same(&gathered, &expected);
    Ok(())
}

pub fn splits(world: &Group) -> Result<()> {
    let (rank, w) = (world.rank(), world.size());
    // Even and odd ranks, in reverse order.
    let half = world.split("half", rank % 2, w - rank)?;
    let members: Vec<usize> = (0..w).rev().filter(|r| r % 2 == rank % 2).collect();
    assert_eq!((half.name(), half.size(), half.backend()), ("half", members.len(), world.backend()));
    assert_eq!(members[half.rank()], rank);
    let x = Tensor::from_slice(&[rank as i64]).to_device(device());
    let expected: Vec<i64> = members.iter().map(|&r| r as i64).collect();
    assert_same(&half.all_gather(&x)?.wait()?.reshape([-1]), &Tensor::from_slice(&expected).to_device(device()));
    // A split of a split, one rank in each; and the same name and color again.
    let alone = half.split("alone", half.rank(), 0)?;
    assert_same(&alone.all_reduce(&x, Reduce::Sum)?.wait()?, &x);
    let again = world.split("half", 0, 0)?;
    assert_eq!((again.rank(), again.size()), (rank, w));
    again.barrier()?.wait()?;
    Ok(())
}

pub fn meshes(world: &Group) -> Result<()> {
    let (rank, w) = (world.rank(), world.size());
    for sp in (1..=w).filter(|sp| w % sp == 0) {
        let mesh = Mesh::new(world.clone(), w / sp, sp)?;
        assert_eq!((mesh.sp.name(), mesh.sp.size(), mesh.sp.rank()), ("sp", sp, rank % sp));
        assert_eq!((mesh.dp.name(), mesh.dp.size(), mesh.dp.rank()), ("dp", w / sp, rank / sp));
        let x = Tensor::from_slice(&[rank as i64]).to_device(device());
        // Both axes at once.
        let (sp_sum, dp_sum) = (mesh.sp.all_reduce(&x, Reduce::Sum)?, mesh.dp.all_reduce(&x, Reduce::Sum)?);
        let sum_where = |belongs: &dyn Fn(usize) -> bool| (0..w).filter(|&r| belongs(r)).sum::<usize>() as i64;
        assert_eq!(sp_sum.wait()?.int64_value(&[0]), sum_where(&|r| r / sp == rank / sp));
        assert_eq!(dp_sum.wait()?.int64_value(&[0]), sum_where(&|r| r % sp == rank % sp));
    }
    let error = Mesh::new(world.clone(), w, 2).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(error.contains("parallel.dp") && error.contains(&format!("needs {} ranks, found {w}", 2 * w)), "{error}");
    Ok(())
}
