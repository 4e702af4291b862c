//! The runs of the current folder, and the model that a path or the last run stands for.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Context as _;
use cairn_artifacts::checkpoint::SavedCheckpoint;
use cairn_artifacts::run::RunFolder;

use crate::failure::UserError;
use crate::model_folder::CONFIG_FILE;

/// Where runs are kept, below the current folder.
pub(crate) const RUNS_FOLDER: &str = "runs";

/// The folder of the run called `name`.
pub(crate) fn folder_of(name: &str) -> PathBuf {
    Path::new(RUNS_FOLDER).join(name)
}

/// The run that was worked on last, if there is one.
fn last() -> Option<RunFolder> {
    last_in(Path::new(RUNS_FOLDER))
}

/// The run in a folder that was worked on last, if there is one.
pub(crate) fn last_in(folder: &Path) -> Option<RunFolder> {
    let entries = std::fs::read_dir(folder).ok()?;
    let runs = entries.filter_map(|entry| {
        let run = RunFolder::new(entry.ok()?.path());
        Some((changed(&run)?, run))
    });
    // Names decide between runs of one moment, so that the answer does not depend on the order of
    // the folder's list.
    runs.max_by(|(a, run), (b, other)| a.cmp(b).then_with(|| run.root().cmp(other.root())))
        .map(|(_, run)| run)
}

/// When the record or the checkpoints of a run last changed; `None` if the folder is no run.
fn changed(run: &RunFolder) -> Option<SystemTime> {
    let time = |path: &Path| std::fs::metadata(path).and_then(|data| data.modified()).ok();
    let record = time(&run.record())?;
    Some(time(run.checkpoints().folder()).map_or(record, |saved| saved.max(record)))
}

/// The model folder that `path` stands for: itself, or the best checkpoint of a run, or the latest
/// of a run that was never validated. Without a path it is the last run's.
pub(crate) fn model_folder(path: Option<&Path>) -> anyhow::Result<PathBuf> {
    let Some(path) = path else {
        let run = last().ok_or_else(|| {
            UserError::new(format!("there is no run in {RUNS_FOLDER}/ to take the model from"))
                .hint("pass --model DIR, or train one: cairn quickstart")
        })?;
        return checkpoint_of(&run);
    };
    let run = RunFolder::new(path);
    if !path.join(CONFIG_FILE).exists() && run.checkpoints().folder().is_dir() {
        return checkpoint_of(&run);
    }
    Ok(path.to_owned())
}

fn checkpoint_of(run: &RunFolder) -> anyhow::Result<PathBuf> {
    if let Some(saved) = checkpoint(run)? {
        return Ok(saved.folder);
    }
    let root = run.root().display();
    if let Some(problem) = run.checkpoints().problem()? {
        return Err(problem).with_context(|| format!("no checkpoint of {root} can be used"));
    }
    Err(UserError::new(format!("{root} has no complete checkpoint"))
        .hint("let it train to its first checkpoint")
        .into())
}

/// The best checkpoint of a run, or the latest if none was validated.
pub(crate) fn checkpoint(run: &RunFolder) -> anyhow::Result<Option<SavedCheckpoint>> {
    let series = run.checkpoints();
    let what = || format!("cannot look at {}", run.root().display());
    Ok(match series.best().with_context(what)? {
        Some(best) => Some(best),
        None => series.latest().with_context(what)?,
    })
}
