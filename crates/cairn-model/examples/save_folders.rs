//! Saves model folders as Cairn does, for readers that are not ours:
//!
//!     cargo run --release -p cairn-model --example save_folders -- tests/goldens/llama … TARGET
//!
//! Each folder is loaded and written below TARGET under its own name, in the Hugging Face layout; of a
//! model that reads both ways its body alone too, as `NAME.body`.
//! `tests/interop/transformers_loads_ours.py TARGET` then loads them with transformers.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use cairn_artifacts::safetensors::{WeightFolder, write};
use cairn_kernels::Cpu;
use cairn_model::{BuildOptions, Head, build_program, load_weights, out_tensors};
use cairn_program::{KvPlacement, MemoryPlan, Session, SessionProgram, Sizes};
use cairn_spec::model::MaskKind;
use cairn_spec::{ModelFields, ModelSpec};

fn main() -> Result<(), Box<dyn Error>> {
    let folders: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let Some((target, sources)) = folders.split_last().filter(|(_, sources)| !sources.is_empty())
    else {
        return Err("usage: save_folders FOLDER… TARGET".into());
    };
    for source in sources {
        let name = source.file_name().ok_or("a folder has no name")?;
        save(source, &target.join(name))?;
    }
    Ok(())
}

fn save(source: &Path, target: &Path) -> Result<(), Box<dyn Error>> {
    let spec = ModelSpec::from_hf_json(&fs::read_to_string(source.join("config.json"))?)?;
    let program = build_program(&spec, &BuildOptions::new(Head::Logits))?;
    let program = SessionProgram { program, sizes: Sizes::dense(1, 1), kv: KvPlacement::Arena };
    let mut session = Session::new(MemoryPlan::new(vec![program], None)?, Cpu::detect(1))?;
    load_weights(&mut session, &spec, &WeightFolder::open(source)?)?;
    write_folder(&session, &spec, target)?;
    if spec.attention.mask == MaskKind::Bidirectional {
        let body = ModelSpec::new(ModelFields { head: None, ..ModelFields::clone(&spec) })?;
        write_folder(&session, &body, &target.with_extension("body"))?;
    }
    Ok(())
}

fn write_folder(session: &Session, spec: &ModelSpec, target: &Path) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(target)?;
    let mut file = File::create(target.join("model.safetensors"))?;
    write(&mut file, out_tensors(session, spec, ""), &BTreeMap::new())?;
    fs::write(target.join("config.json"), spec.to_hf_config()?.to_string())?;
    Ok(())
}
