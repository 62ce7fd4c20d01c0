//! What the library costs, beside what others use: `scripts/bench [--quick] [--out FOLDER] [row ..]`.
//!
//! One redis-server (for the rows of Redlock several), one load after the other, ours and the others' in turn; each load comes from
//! processes of its own. What each row measures is written at the top of its file in `rows/`. What becomes of the
//! figures is the business of `figures/`, a package that needs none of the libraries compared.

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

use std::{
    env,
    path::{Path, PathBuf},
    process::ExitCode,
    time::SystemTime,
};

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
    let mut plan = Plan::FULL;
    let mut out = None;
    let mut rows = Vec::new();
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => plan = Plan::QUICK,
            "--out" => {
                out = Some(PathBuf::from(
                    arguments.next().ok_or_else(|| usage(known()))?,
                ))
            }
            row if known().any(|known| *known == row) => rows.push(argument),
            _ => return Err(usage(known())),
        }
    }
    if rows.is_empty() {
        rows = known().map(|row| (*row).to_owned()).collect();
        // A run of less does not take the place of one of all.
        if plan == Plan::FULL && out.is_none() {
            out = Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs"));
        }
    }

    let began = SystemTime::now();
    let mut server = Server::start()?;
    let machine = report::machine(server.version()?);
    report::print_machine(&machine, &plan);
    let mut bench = Bench {
        servers: vec![server],
        plan,
        report: Report::of(rows),
    };
    for group in &GROUPS {
        if group.rows.iter().any(|row| bench.report.wants(row)) {
            (group.measure)(&mut bench)?;
        }
    }
    println!("# {} s in all", began.elapsed()?.as_secs());
    match out {
        Some(folder) => {
            let results = bench.report.into_results(began, machine, &plan);
            report::write(&results, &folder)
        }
        None => Ok(()),
    }
}

fn usage<'a>(rows: impl Iterator<Item = &'a &'a str>) -> Error {
    let rows: Vec<&str> = rows.copied().collect();
    format!(
        "usage: scripts/bench [--quick] [--out FOLDER] [row ..]\n       scripts/bench --charts FILE.json\nrows: {}",
        rows.join(" ")
    )
    .into()
}
