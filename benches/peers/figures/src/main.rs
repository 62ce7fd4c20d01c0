//! Makes the charts, and the part of `benchmarks.md` beside the file, from the JSON file of a run.

use std::{env, path::Path, process::ExitCode};

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [file] = &arguments[..] else {
        eprintln!("usage: scripts/bench --charts FILE.json");
        return ExitCode::FAILURE;
    };
    match figures::remake(Path::new(file)) {
        Ok(written) => {
            for file in written {
                println!("# wrote {}", file.display());
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("bench: {file}: {error}");
            ExitCode::FAILURE
        }
    }
}
