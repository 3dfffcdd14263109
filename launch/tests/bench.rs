//! `lasp bench`: what it prints on an emulated network is what that network gives; it runs under mpirun too.

use std::process::{Command, Output};

use serde_json::Value;

const LASP: &str = env!("CARGO_BIN_EXE_lasp");

fn run(command: &mut Command) -> Output {
    command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"), ("OMP_NUM_THREADS", "1")]);
    command.output().unwrap()
}

fn bench(arguments: &str) -> Output {
    run(Command::new(LASP).args(["bench", "collectives"]).args(arguments.split(' ')))
}

fn mpirun(ranks: usize, arguments: &str) -> Option<Output> {
    if Command::new("mpirun").arg("--version").output().is_err() {
        println!("not tested: no mpirun");
        return None;
    }
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "--bind-to", "none", "-n", &ranks.to_string(), LASP, "bench", "collectives"]);
    Some(run(command.args(arguments.split(' '))))
}

#[track_caller]
fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[track_caller]
fn fails(output: &Output, expected: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && stderr.contains(expected), "{stderr}");
}

#[test]
fn the_table_shows_the_bandwidth_of_an_emulated_network() {
    let text = stdout(&bench(
        "--ranks 4 --min 4M --max 4M --iterations 5 --network node=2,intra=50us/1GB/s,inter=100us/50MB/s",
    ));
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("4 ranks, back end local, network node=2,intra=50µs/1GB/s,inter=100µs/50MB/s"));
    let columns = |line: &str| line.split_whitespace().map(String::from).collect::<Vec<_>>();
    let heading = "operation bytes time us p10 p90 algbw GB/s busbw GB/s times";
    assert_eq!(lines.next().map(columns), Some(columns(heading)));
    // What W-1 of W parts, or twice as much, or a whole message take at 50 MB/s.
    let factors =
        [("all_gather", 0.75), ("reduce_scatter", 0.75), ("all_reduce", 1.5), ("all_to_all", 0.75), ("send_recv", 1.0)];
    for (op, factor) in factors {
        let row = columns(lines.next().unwrap());
        let number = |column: usize| row[column].parse::<f64>().unwrap();
        assert_eq!((row.len(), row[0].as_str(), row[1].as_str()), (8, op, "4194304"));
        let ideal_us = factor * 4194304.0 / 50.0;
        // A rank's clock starts when it leaves the barrier: a sender may have left it a little earlier than its receiver.
        assert!(number(2) > 0.99 * ideal_us && number(2) < 1.25 * ideal_us, "{row:?}, expected about {ideal_us} us");
        assert!(number(6) > 0.8 * 0.050 && number(6) < 1.01 * 0.050, "{row:?}");
        assert!((number(6) - factor * number(5)).abs() < 0.0015, "{row:?}");
    }
    assert_eq!(lines.next(), None);
}

#[test]
fn json_is_a_line_for_each_row() {
    let text = stdout(&bench("--json --ops send_recv,all_reduce --min 1K --max 64K --factor 8 --iterations 5"));
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let seen: Vec<_> = rows.iter().map(|row| (row["op"].as_str().unwrap(), row["bytes"].as_u64().unwrap())).collect();
    let sizes = [1 << 10, 8 << 10, 64 << 10];
    let expected: Vec<_> = ["all_reduce", "send_recv"].iter().flat_map(|op| sizes.map(|size| (*op, size))).collect();
    assert_eq!(seen, expected);
    for row in &rows {
        assert_eq!((&row["ranks"], &row["backend"], &row["network"]), (&2.into(), &"local".into(), &Value::Null));
        assert!(row["time_us"].as_f64().unwrap() > 0.0 && row["busbw"].as_f64().unwrap() > 0.0, "{row}");
    }
}

#[test]
fn processes_are_timed_and_have_no_emulated_network() {
    let arguments = "--json --max 1K --iterations 5";
    let Some(output) = mpirun(2, arguments) else { return };
    let text = stdout(&output);
    assert_eq!(text.lines().filter(|line| line.contains("\"backend\":\"mpi\"")).count(), 5, "{text}");
    let network = "--network node=4,intra=2us/100GB/s,inter=20us/10GB/s";
    let output = mpirun(2, network).unwrap();
    fails(&output, "under a launcher, whose processes have a network of their own");
}

#[test]
fn a_wrong_command_line_says_what_is_known() {
    fails(&bench("--ops gather"), "all_gather, reduce_scatter, all_reduce, all_to_all, send_recv");
    fails(&bench("--network node=4"), "intra= is missing");
    fails(&bench("--min 1T"), "expected a number of bytes above 0, as in 512, 64K, 16M or 1G");
    fails(&bench("--min 32M"), "--min: found 33554432, expected at most the 16777216 of --max");
    fails(&bench("--factor 1"), "1 is not in 2..");
}
