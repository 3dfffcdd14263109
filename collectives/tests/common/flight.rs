//! Operations in flight: order, overlap, and what may be done to inputs meanwhile.

use super::{assert_same, device, numbers, ranks_numbers, sum};
use anyhow::{Result, ensure};
use collectives::{Group, Kind, Pending, Reduce, Tensor};
use std::{
    hint::black_box,
    time::{Duration, Instant},
};

pub fn many_in_flight(world: &Group) -> Result<()> {
    let (rank, w) = (world.rank(), world.size());
    let halves = world.split("half", rank % 2, 0)?;
    let (next, previous) = ((rank + 1) % w, (rank + w - 1) % w);
    let mut pending: Vec<(Pending<Tensor>, Tensor)> = Vec::new();
    let mut sent = Vec::new();
    for i in 0..40 {
        let shape = [1 + i % 5, 3];
        let x = numbers(rank, &shape, Kind::Float) + i;
        let all: Vec<Tensor> = ranks_numbers(w, &shape, Kind::Float).into_iter().map(|x| x + i).collect();
        pending.push((world.all_gather(&x)?, Tensor::stack(&all, 0)));
        pending.push((world.recv_on(device(), &shape, Kind::Float, previous)?, all[previous].shallow_clone()));
        let mine: Vec<Tensor> = all.iter().skip(rank % 2).step_by(2).map(Tensor::shallow_clone).collect();
        pending.push((halves.all_reduce(&x, Reduce::Sum)?, sum(&mine)));
        sent.push(world.send(&x, next)?);
        pending.push((world.broadcast(&x, i as usize % w)?, all[i as usize % w].shallow_clone()));
    }
    // In an order of the rank's own.
    if rank % 2 == 0 {
        pending.reverse();
    }
    for (pending, expected) in pending {
        assert_same(&pending.wait()?, &expected);
    }
    sent.into_iter().try_for_each(Pending::wait)?;
    Ok(())
}

/// A sum goes down the ranks while each computes, over and over; memory is used again as soon as it is free.
pub fn messages_that_depend_on_each_other(world: &Group) -> Result<()> {
    let (rank, w) = (world.rank(), world.size());
    let shape = [16, 250];
    let all = ranks_numbers(w, &shape, Kind::Float);
    let expected = all[..rank].iter().fold(all[0].zeros_like(), |sum, x| sum + x);
    for i in 0..20 {
        let own = &all[rank] + i;
        let (group, x) = (world.clone(), own.shallow_clone());
        let before = world.in_flight(vec![own.shallow_clone()], move || {
            let before = match rank {
                0 => x.zeros_like(),
                _ => group.recv_on(device(), &x.size(), Kind::Float, rank - 1)?.wait()?,
            };
            if rank + 1 < w {
                // A copy and a sum that are forgotten before they are through.
                group.send(&(&before + &x), rank + 1)?.wait()?;
            }
            Ok(before)
        })?;
        drop(own);
        let busy: Vec<Tensor> = (0..4).map(|_| Tensor::full([16, 250], f64::NAN, (Kind::Float, device()))).collect();
        assert_same(&before.wait()?, &(&expected + i * rank as i64));
        drop(busy);
    }
    Ok(())
}

pub fn rings_in_both_orders(world: &Group) -> Result<()> {
    let (rank, w) = (world.rank(), world.size());
    let (next, previous) = ((rank + 1) % w, (rank + w - 1) % w);
    // Longer than what MPI sends before the receiver is there.
    for shape in [[1, 3], [300, 1000], [0, 4]] {
        let x = numbers(rank, &shape, Kind::Float);
        let expected = numbers(previous, &shape, Kind::Float);
        let sent = world.send(&x, next)?;
        assert_same(&world.recv_on(device(), &shape, Kind::Float, previous)?.wait()?, &expected);
        sent.wait()?;

        let received = world.recv_on(device(), &shape, Kind::Float, previous)?;
        world.send(&x, next)?.wait()?;
        assert_same(&received.wait()?, &expected);

        // A send waits for nobody.
        world.send(&x, next)?.wait()?;
        assert_same(&world.recv_on(device(), &shape, Kind::Float, previous)?.wait()?, &expected);
    }
    Ok(())
}

/// Rank 0 is in a collective that rank 1 joins only after a message that rank 0 sent later.
pub fn messages_pass_collectives(world: &Group) -> Result<()> {
    if world.size() == 1 {
        return Ok(());
    }
    let x = numbers(world.rank(), &[4], Kind::Double);
    let gathered = match world.rank() {
        0 => {
            let gathered = world.all_gather(&x)?;
            world.send(&x, 1)?.wait()?;
            gathered
        }
        1 => {
            let message = world.recv_on(device(), &[4], Kind::Double, 0)?.wait()?;
            assert_same(&message, &numbers(0, &[4], Kind::Double));
            world.all_gather(&x)?
        }
        _ => world.all_gather(&x)?,
    };
    assert_same(&gathered.wait()?, &Tensor::stack(&ranks_numbers(world.size(), &[4], Kind::Double), 0));
    Ok(())
}

pub fn inputs_may_be_overwritten_after_wait(world: &Group) -> Result<()> {
    let (rank, w) = (world.rank(), world.size());
    let shape = [w as i64, 5000];
    let mut x = numbers(rank, &shape, Kind::Float);
    for i in 0..20 {
        let all: Vec<Tensor> = ranks_numbers(w, &shape, Kind::Float).into_iter().map(|x| x + i).collect();
        let mine: Vec<Tensor> = all.iter().map(|x| x.get(rank as i64)).collect();
        let refill = |x: &mut Tensor| {
            let _ = x.fill_(f64::NAN);
            x.copy_(&all[rank]);
        };
        refill(&mut x);
        let gathered = world.all_gather(&x)?.wait()?;
        refill(&mut x);
        let reduced = world.all_reduce(&x, Reduce::Sum)?.wait()?;
        refill(&mut x);
        let scattered = world.reduce_scatter(&x)?.wait()?;
        refill(&mut x);
        let exchanged = world.all_to_all(&x)?.wait()?;
        refill(&mut x);
        let root = i as usize % w;
        let mut broadcast = world.broadcast(&x, root)?.wait()?;
        refill(&mut x);
        world.send(&x, (rank + 1) % w)?.wait()?;
        let _ = x.fill_(f64::NAN);
        let received = world.recv_on(device(), &shape, Kind::Float, (rank + w - 1) % w)?.wait()?;
        assert_same(&gathered, &Tensor::stack(&all, 0));
        assert_same(&reduced, &sum(&all));
        assert_same(&scattered, &sum(&mine));
        assert_same(&exchanged, &Tensor::stack(&mine, 0));
        assert_same(&broadcast, &all[root]);
        assert_same(&received, &all[(rank + w - 1) % w]);
        // A result is the rank's own.
        let _ = broadcast.fill_(f64::NAN);
    }
    Ok(())
}

pub fn inputs_may_be_dropped_at_once(world: &Group) -> Result<()> {
    let (rank, w) = (world.rank(), world.size());
    let shape = [100, 100];
    let pending: Vec<_> =
        (0..5).map(|_| world.all_gather(&numbers(rank, &shape, Kind::Float))).collect::<collectives::Result<_>>()?;
    let expected = Tensor::stack(&ranks_numbers(w, &shape, Kind::Float), 0);
    for pending in pending {
        assert_same(&pending.wait()?, &expected);
    }
    // Nobody waits for this one; it runs all the same.
    drop(world.barrier()?);
    Ok(())
}

/// The result arrives while every rank computes and none waits.
pub fn progress_while_computing(world: &Group) -> Result<()> {
    if device().is_cuda() {
        // There a rank that computes does not keep the host; see the NCCL back end's own test.
        return Ok(());
    }
    let w = world.size();
    let x = numbers(world.rank(), &[w as i64, 50_000], Kind::Float);
    let pending = [world.all_gather(&x)?, world.all_reduce(&x, Reduce::Sum)?, world.all_to_all(&x)?];
    let ready = || pending.iter().all(Pending::is_ready);
    let span = world.recorder().span("busy");
    // It takes milliseconds, in tiny parts seconds; the limit is for machines that do other things too.
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut value = 1.0f64;
    while !ready() && Instant::now() < deadline {
        for _ in 0..10_000 {
            value = black_box(value * 1.000001);
        }
    }
    drop(span);
    ensure!(ready(), "nothing arrived in 120 s of computing");
    let busy = world.recorder().compute_spans().pop().expect("a span has just ended");
    for pending in pending {
        let _result = pending.wait()?;
    }
    let spans = world.recorder().comm_spans();
    for span in &spans[spans.len() - 3..] {
        assert!(span.issued_ns <= span.started_ns && span.started_ns <= span.ended_ns);
        assert!(span.ended_ns <= busy.ended_ns, "{span:?} ended after {busy:?}");
    }
    Ok(())
}

pub fn the_recorder_counts(world: &Group) -> Result<()> {
    let w = world.size() as u64;
    // Others may still be in the case before, but this rank's operations of it are over.
    let recorder = world.recorder();
    world.barrier()?.wait()?;
    recorder.settle();
    recorder.clear();
    let x = numbers(world.rank(), &[w as i64, 10], Kind::Float);
    let bytes = 40 * w;
    let _gathered = world.all_gather(&x)?.wait()?;
    let _reduced = world.all_reduce(&x, Reduce::Sum)?.wait()?;
    recorder.settle();
    let others = w - 1;
    let spans = recorder.comm_spans();
    let seen: Vec<_> = spans.iter().map(|s| (&*s.group, s.op, s.bytes_sent, s.bytes_received)).collect();
    let gathered = if w == 1 { 0 } else { bytes };
    assert_eq!(
        seen,
        [("world", "all_gather", gathered, others * bytes), ("world", "all_reduce", 2 * 40 * others, 2 * 40 * others)]
    );
    let totals = recorder.totals();
    assert_eq!((totals.messages, totals.bytes_received), (2, others * bytes + 2 * 40 * others));
    assert_eq!(totals.exposed_ns, spans.iter().map(|s| s.exposed_ns).sum::<u64>());
    assert_eq!(recorder.totals_by_op()[&("world".into(), "all_gather")].messages, 1);
    assert!(recorder.tail(1).contains("all_reduce on world"), "{}", recorder.tail(1));
    Ok(())
}
