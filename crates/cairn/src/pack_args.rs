//! How carefully a leanpack is loaded, as flags; and what `--strict` refuses.

use std::path::Path;

use cairn_artifacts::leanpack::{PackFile, Profile};
use cairn_artifacts::machine::Machine;
use cairn_kernels::Isa;
use cairn_model::{PackCheck, PackSource};
use clap::Args;

use crate::context::Context;
use crate::coverage::Coverage;
use crate::failure::UserError;
use crate::model_folder::ModelFolder;
use crate::storage::Storage;

/// A cache line, in bytes, of every processor that these kernels are made for.
const CACHE_LINE_BYTES: u64 = 64;

/// How a leanpack is loaded.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Leanpack")]
pub(crate) struct PackArgs {
    /// Compare every chunk of a leanpack with its hash while it is loaded
    #[arg(long)]
    verify: bool,
    /// Refuse a leanpack that was altered or is made for another machine, and every fallback
    #[arg(long)]
    strict: bool,
}

impl PackArgs {
    /// Opens a model; a pack is checked as the flags say.
    pub(crate) fn open(self, path: &Path, context: &Context) -> anyhow::Result<ModelFolder> {
        if !PackFile::is_pack(path) {
            let flag = if self.strict { "--strict" } else { "--verify" };
            if self.strict || self.verify {
                let message = format!("{flag} asks for a leanpack; {} is none", path.display());
                return Err(UserError::new(message)
                    .hint("make one: cairn pack MODEL -o FILE.leanpack")
                    .into());
            }
            return ModelFolder::open(path, context.terminal);
        }
        let check = PackCheck { verify: self.verify || self.strict, strict: self.strict };
        let model = ModelFolder::open_pack(path, check, context.terminal)?;
        let pack = model.pack().expect("it was opened as one");
        let foreign = foreign_machine(&pack.pack().header().profile, context.isa);
        if self.strict {
            return match foreign {
                Some(what) => {
                    let message = format!("{} is packed for {what}", path.display());
                    Err(UserError::new(message)
                        .hint("pack the model on this machine, or with --profile portable")
                        .into())
                }
                None => check_strictly(pack, context.isa).map(|()| model),
            };
        }
        if let Some(what) = foreign {
            context.terminal.warn(format_args!("{} is packed for {what}", path.display()));
        }
        Ok(model)
    }
}

/// This machine, as packs state it.
pub(crate) fn host_profile(isa: Isa) -> Profile {
    Profile::host(isa.name(), CACHE_LINE_BYTES, Machine::read().cpu_model)
}

/// What of a profile is not this machine's.
fn foreign_machine(profile: &Profile, isa: Isa) -> Option<String> {
    if profile.kind != "host" {
        return None;
    }
    let here = host_profile(isa);
    let unknown = || "an unknown processor".to_owned();
    if profile.isa != here.isa {
        let found = profile.isa.clone().unwrap_or_else(unknown);
        return Some(format!("{found}, and {isa} is computed with"));
    }
    if profile.cache_line_bytes != here.cache_line_bytes {
        return Some("another cache line".to_owned());
    }
    let (theirs, ours) = (profile.cpu_model.clone(), here.cpu_model);
    let [found, own] = [&theirs, &ours].map(|model| model.clone().unwrap_or_else(unknown));
    (theirs != ours).then(|| format!("{found}, and this is {own}"))
}

/// Checks what loading does not look at: padding, files that are not needed, and the kernels.
fn check_strictly(pack: &PackSource, isa: Isa) -> anyhow::Result<()> {
    let file = pack.pack();
    file.verify_padding()?;
    for entry in &file.header().files {
        file.read_file(&entry.name)?;
    }
    let program = storage_of(pack).program(&file.header().spec, pack.storage().1)?;
    let coverage = Coverage::of(&program, isa);
    let Some(kernel) = coverage.missing.first() else { return Ok(()) };
    Err(UserError::new(format!("{kernel} would be run by its plain fallback"))
        .hint("leave out --strict to run it so, or choose another --isa")
        .into())
}

/// The weights of a pack as they are stored.
pub(crate) fn storage_of(pack: &PackSource) -> Storage {
    Storage { encoding: pack.storage().0, own: pack.encodings() }
}
