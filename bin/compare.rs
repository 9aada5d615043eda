//! `compare`: runs beside each other.

use limbeck::Result;
use limbeck::eval::compare::{ComparedRun, csv, html, table, write};

use crate::cli::CompareArgs;
use crate::output::{print, width};

pub fn run(args: &CompareArgs) -> Result<()> {
    let runs = args.runs.iter().map(|dir| ComparedRun::read(dir)).collect::<Result<Vec<_>>>()?;
    let mut text = table(&runs, width());
    for (path, what) in [(&args.html, html(&runs)), (&args.csv, csv(&runs))] {
        if let Some(path) = path {
            write(path, &what)?;
            text.push_str(&format!("written: {}\n", path.display()));
        }
    }
    print(&text)
}
