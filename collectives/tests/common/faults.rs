//! Calls that cannot work: each gives an error with what was found and expected, and the group works on afterwards.

use super::{device, numbers};
use anyhow::Result;
use collectives::{Error, Group, Kind, Pending, Reduce, Tensor};

#[track_caller]
fn message<T>(result: collectives::Result<T>) -> String {
    result.err().map(|error| error.to_string()).expect("an error")
}

pub fn a_rank_checks_its_own_arguments(world: &Group) -> Result<()> {
    let (rank, w) = (world.rank(), world.size());
    let x = numbers(rank, &[w as i64 + 1, 2], Kind::Float);
    assert!(matches!(
        world.all_gather(&x.to_kind(Kind::Half)).err(),
        Some(Error::UnsupportedKind { op: "all_gather", kind: Kind::Half, .. })
    ));
    assert!(matches!(world.broadcast(&x, w).err(), Some(Error::BadRoot { .. })));
    assert!(matches!(world.send(&x, w).err(), Some(Error::BadPeer { op: "send", .. })));
    assert!(matches!(world.recv_on(device(), &[2], Kind::Float, w + 3).err(), Some(Error::BadPeer { op: "recv", .. })));
    let deep = numbers(rank, &[1; 9], Kind::Float);
    assert!(matches!(world.all_gather(&deep).err(), Some(Error::TooManyDims { .. })));
    let found = message(world.reduce_scatter(&x));
    assert!(found.contains(&format!("dimension 0 must be the size of the group, {w}")), "{found}");
    let rows = vec![1; w];
    let found = message(world.reduce_scatter_v(&x, &rows));
    assert!(found.contains(&format!("dimension 0 is {}, expected {w}, the sum of the rows", w + 1)), "{found}");
    assert!(matches!(world.all_gather_v(&x, &rows).err(), Some(Error::Rows { .. })));
    assert!(message(world.all_gather_v(&x, &[])).contains("0 numbers of rows"));
    let negative = vec![-1; w];
    assert!(message(world.all_to_all_v(&x, &negative, &rows)).contains("-1 rows"));
    Ok(())
}

pub fn mismatches_are_named_on_every_rank(world: &Group) -> Result<()> {
    let (rank, w) = (world.rank(), world.size());
    if w == 1 {
        return Ok(());
    }
    let odd = (rank % 2) as i64;
    let differ = |what: &str, pending: Pending<Tensor>| {
        let found = message(pending.wait());
        assert!(found.contains(what) && found.contains("rank 0") && found.contains("rank 1"), "{found}");
        found
    };
    let x = numbers(rank, &[2, 3 + odd], Kind::Float);
    let found = differ("shapes differ", world.all_gather(&x)?);
    assert!(found.contains("rank 0 [2, 3] f32, rank 1 [2, 4] f32"), "{found}");
    let kind = if odd == 0 { Kind::Float } else { Kind::Double };
    differ("kinds differ", world.all_reduce(&numbers(rank, &[3], kind), Reduce::Sum)?);
    let reduce = if odd == 0 { Reduce::Sum } else { Reduce::Max };
    differ("operations differ", world.all_reduce(&numbers(rank, &[3], Kind::Float), reduce)?);
    let x = numbers(rank, &[3], Kind::Float);
    differ("operations differ", if odd == 0 { world.all_gather(&x)? } else { world.broadcast(&x, 0)? });
    differ("operations differ", world.broadcast(&x, rank)?);
    let mut rows = vec![2; w];
    rows[0] += odd;
    differ("rows differ", world.all_gather_v(&numbers(rank, &[rows[rank]], Kind::Float), &rows)?);
    let to_me: i64 = if rank == 1 { 2 } else { 1 };
    let x = numbers(rank, &[w as i64], Kind::Float);
    differ("rows differ", world.all_to_all_v(&x, &vec![1; w], &vec![to_me; w])?);
    // The group works on.
    world.barrier()?.wait()?;
    Ok(())
}

pub fn a_message_must_be_as_expected(world: &Group) -> Result<()> {
    let (rank, w) = (world.rank(), world.size());
    let (next, previous) = ((rank + 1) % w, (rank + w - 1) % w);
    let x = numbers(rank, &[2, 3], Kind::Float);
    let sent = [world.send(&x, next)?, world.send(&x, next)?, world.send(&x, next)?];
    let found = message(world.recv_on(device(), &[3, 2], Kind::Float, previous)?.wait());
    assert!(found.contains("shapes differ") && found.contains("sent [2, 3] f32"), "{found}");
    let found = message(world.recv_on(device(), &[2, 3], Kind::BFloat16, previous)?.wait());
    assert!(found.contains("kinds differ") && found.contains("expected [2, 3] bf16"), "{found}");
    super::assert_same(
        &world.recv_on(device(), &[2, 3], Kind::Float, previous)?.wait()?,
        &numbers(previous, &[2, 3], Kind::Float),
    );
    sent.into_iter().try_for_each(Pending::wait)?;
    Ok(())
}
