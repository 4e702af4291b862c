//! Models written as GGUF: what the gguf package writes of the same folder, and what our reader makes
//! of it.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use cairn_artifacts::gguf::{Format, GgufFile};
use cairn_artifacts::safetensors::WeightFolder;
use cairn_convert::{ConvertError, GgufJob, GgufReport, export_gguf};
use cairn_kernels::Cpu;
use cairn_model::gguf::{GgufExportError, divisors, spec as gguf_spec};
use cairn_model::{PackCheck, TensorSource};
use cairn_spec::ModelSpec;

use crate::packs::{PLAIN, logits, packed, source, spec};

/// Folders that the gguf package made a `Q8_0` file of, beside them.
const FAMILIES: [&str; 10] = [
    "llama",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "phi3",
    "phi3_long",
    "gpt2",
];

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens")
}

fn exported(
    spec: &ModelSpec,
    source: &dyn TensorSource,
    format: Format,
    path: &Path,
) -> Result<GgufReport, ConvertError> {
    let cpu = Cpu::detect(2);
    let job = GgufJob { spec, source, tokenizer: &[], cpu: &cpu };
    export_gguf(job, format, path, &mut |_, _| ControlFlow::Continue(()))
}

#[test]
fn tensors_are_those_that_the_gguf_package_writes() {
    for family in FAMILIES {
        let target = tempfile::tempdir().unwrap();
        let path = target.path().join("model.gguf");
        let folder = goldens().join("gguf").join(family);
        let weights = WeightFolder::open(&folder).unwrap();
        let report = exported(&spec(&folder), &weights, Format::Q8_0, &path).unwrap();
        assert_eq!(report.bytes, fs::metadata(&path).unwrap().len());
        let found = GgufFile::open(&path).unwrap();
        let expected =
            GgufFile::open(&goldens().join("gguf").join(format!("{family}.gguf"))).unwrap();
        assert_eq!(report.tensors, expected.tensors().len(), "{family}");
        for tensor in expected.tensors() {
            let name = &tensor.name;
            let ours = found.header().tensor(name).unwrap_or_else(|| panic!("{family}: {name}"));
            assert_eq!(ours.shape, tensor.shape, "{family}: {name}");
            assert!(found.stored(name) == expected.stored(name), "{family}: {name}");
        }
        let sets = [&found, &expected].map(|file| gguf_spec(file).unwrap());
        cairn_model::gguf::same_model(&sets[1], &sets[0]).unwrap();
    }
}

#[test]
fn folders_and_packs_become_the_same_file_that_computes_the_same() {
    for family in
        ["llama", "qwen3", "qwen2", "gpt2", "mixtral", "qwen3_moe", "phi3", "gguf/gemma3_text"]
    {
        let target = tempfile::tempdir().unwrap();
        let folder = goldens().join(family);
        let (spec, weights) = (spec(&folder), WeightFolder::open(&folder).unwrap());
        let path = target.path().join("model.gguf");
        exported(&spec, &weights, Format::F32, &path).unwrap();
        let file = GgufFile::open(&path).unwrap();
        let read = gguf_spec(&file).unwrap();
        let expected = logits(&spec, PLAIN, &weights).unwrap();
        let found = logits(&read, PLAIN, &file).unwrap();
        if spec.norm.plus_one {
            // Norms are counted from one in the file: within 2^-24 of what they are here.
            let is_near = |(a, b): (&u32, &u32)| {
                let [a, b] = [*a, *b].map(f32::from_bits);
                (a - b).abs() <= 1e-4 * (1.0 + a.abs())
            };
            assert!(found.iter().zip(&expected).all(is_near), "{family}");
        } else {
            assert!(found == expected, "{family}");
        }
        let pack = target.path().join("model.leanpack");
        packed(&folder, None, &pack);
        let again = target.path().join("again.gguf");
        exported(&spec, &source(&pack, PackCheck::default()), Format::F32, &again).unwrap();
        assert!(fs::read(&again).unwrap() == fs::read(&path).unwrap(), "{family}");
    }
}

#[test]
fn divisors_of_the_llama3_rule_are_those_of_the_converter() {
    let goldens = goldens().join("gguf");
    let config = fs::read_to_string(goldens.join("llama3.config.json")).unwrap();
    let spec = ModelSpec::from_hf_json(&config).unwrap();
    let file = GgufFile::open(&goldens.join("llama3.gguf")).unwrap();
    let [(name, divisors)] = <[_; 1]>::try_from(divisors(&spec)).unwrap();
    let mut expected = vec![0.0; divisors.len()];
    file.read_f32(&name, 0..divisors.len(), &mut expected).unwrap();
    for (found, expected) in divisors.iter().zip(expected) {
        assert!((found - expected).abs() <= 1e-5 * expected, "{found} {expected}");
    }
}

#[test]
fn what_such_files_cannot_say_is_refused_and_leaves_nothing() {
    let check = |family: &str, expected: &dyn Fn(&GgufExportError) -> bool| {
        let target = tempfile::tempdir().unwrap();
        let folder = goldens().join(family);
        let weights = WeightFolder::open(&folder).unwrap();
        let path = target.path().join("model.gguf");
        match exported(&spec(&folder), &weights, Format::F32, &path) {
            Err(ConvertError::GgufExport(error)) => assert!(expected(&error), "{error}"),
            other => panic!("{family}: {other:?}"),
        }
        assert_eq!(fs::read_dir(target.path()).unwrap().count(), 0, "{family}");
    };
    let is_family = |error: &GgufExportError| matches!(error, GgufExportError::Family { .. });
    for family in ["olmo2", "gpt_neox", "deepseek_v2", "mistral"] {
        check(family, &is_family);
    }
    // A rule that its divisors do not tell.
    let target = tempfile::tempdir().unwrap();
    let folder = goldens().join("llama3");
    let weights = WeightFolder::open(&folder).unwrap();
    let path = target.path().join("model.gguf");
    let error = exported(&spec(&folder), &weights, Format::F32, &path).unwrap_err();
    assert!(matches!(error, ConvertError::GgufSpec(_)), "{error}");
    assert_eq!(fs::read_dir(target.path()).unwrap().count(), 0);
    check("llama_dynamic", &|error| matches!(error, GgufExportError::Lost { .. }));
    check("qwen2_windows", &|error| matches!(error, GgufExportError::Lost { .. }));
}

#[test]
fn rows_that_are_no_whole_blocks_stay_plain_and_are_named() {
    let target = tempfile::tempdir().unwrap();
    let folder = goldens().join("llama");
    let (spec, weights) = (spec(&folder), WeightFolder::open(&folder).unwrap());
    let path = target.path().join("model.gguf");
    let report = exported(&spec, &weights, Format::Q8_0, &path).unwrap();
    let file = GgufFile::open(&path).unwrap();
    for tensor in file.tensors() {
        let is_plain = file.stored(&tensor.name).unwrap().0 == Format::F32;
        let is_kept = report.kept.iter().any(|name| *name == *tensor.name);
        assert_eq!(is_plain, is_kept || tensor.shape.len() == 1, "{}", tensor.name);
    }
}
