//! What the library costs, beside what others use: `scripts/bench [--quick] [row ..]`.
//!
//! One redis-server (for the rows of Redlock several), one load after the other, ours and the others' in turn; each load comes from
//! processes of its own. What each row measures is written at the top of its file in `rows/`.

mod clock;
mod load;
mod peers;
mod report;
mod rows;
mod run;
mod server;
mod stats;
mod team;
mod worker;

use std::{env, process::ExitCode};

use crate::{
    report::Report,
    rows::GROUPS,
    run::{Bench, Plan},
    server::Server,
};

type Error = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let result = match arguments.split_first() {
        Some((word, rest)) if word == "worker" => worker::main(rest),
        _ => bench(arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench(arguments: Vec<String>) -> Result<(), Error> {
    let known = || GROUPS.iter().flat_map(|group| group.rows);
    let (options, mut rows): (Vec<_>, Vec<_>) = arguments
        .into_iter()
        .partition(|argument| argument.starts_with('-'));
    let plan = match options.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => Plan::FULL,
        ["--quick"] => Plan::QUICK,
        _ => return Err(usage(known())),
    };
    if rows.is_empty() {
        rows = known().map(|row| (*row).to_owned()).collect();
    } else if rows.iter().any(|row| known().all(|known| known != row)) {
        return Err(usage(known()));
    }

    let mut server = Server::start()?;
    report::print_machine(&server.version()?, &plan);
    let mut bench = Bench {
        servers: vec![server],
        plan,
        report: Report { rows },
    };
    for group in &GROUPS {
        if group.rows.iter().any(|row| bench.report.wants(row)) {
            (group.measure)(&mut bench)?;
        }
    }
    Ok(())
}

fn usage<'a>(rows: impl Iterator<Item = &'a &'a str>) -> Error {
    let rows: Vec<&str> = rows.copied().collect();
    format!(
        "usage: scripts/bench [--quick] [row ..]\nrows: {}",
        rows.join(" ")
    )
    .into()
}
