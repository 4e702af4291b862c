//! Models in GGUF files against the same models in folders: the same spec, the same bits.

use std::path::{Path, PathBuf};

use cairn_artifacts::gguf::{Format, GgufFile, OutTensor};
use cairn_artifacts::safetensors::WeightFolder;
use cairn_kernels::{Cpu, Encoding, Isa, Layout, Weight};
use cairn_model::{
    BuildOptions, Head, TensorSource, Widening, build_program, build_stored_program, gguf,
    load_weights, stored_weights,
};
use cairn_program::{
    Class, Feed, KvPlacement, MemoryPlan, Program, ProgramId, Run, Session, SessionProgram, Sizes,
};
use cairn_spec::model::ModelFields;
use cairn_spec::{Hint, ModelSpec};

use crate::goldens::{positions, slots};

const FAMILIES: [&str; 14] = [
    "bert",
    // The keys' and values' parts of `kv_b_proj` in one tensor.
    "deepseek_v2_old",
    "deepseek_v2",
    "deepseek_v3",
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
const TOKENS: usize = 12;

fn golden(name: &str) -> PathBuf {
    crate::goldens::folder("gguf").join(name)
}

fn file(name: &str) -> GgufFile {
    GgufFile::open(&golden(&format!("{name}.gguf"))).unwrap()
}

fn folder_spec(config: &str) -> ModelSpec {
    ModelSpec::from_hf_json(&std::fs::read_to_string(golden(config)).unwrap()).unwrap()
}

fn session(spec: &ModelSpec, source: &dyn TensorSource, options: &BuildOptions) -> Session {
    session_of(build_program(spec, options).unwrap(), spec, source)
}

fn session_of(program: Program, spec: &ModelSpec, source: &dyn TensorSource) -> Session {
    let sizes = Sizes::dense(TOKENS, 1);
    let program = SessionProgram { program, sizes, kv: KvPlacement::Arena };
    let plan = MemoryPlan::new(vec![program], None).unwrap();
    let mut session = Session::new(plan, Cpu::new(Isa::best(), 1)).unwrap();
    load_weights(&mut session, spec, source).unwrap();
    session
}

/// The bits of the logits, or of the final hidden states of a body.
fn logits(spec: &ModelSpec, source: &dyn TensorSource) -> Vec<u32> {
    let head = if spec.head.is_some() { Head::Logits } else { Head::Hidden };
    logits_with(spec, source, &BuildOptions::new(head))
}

fn logits_with(spec: &ModelSpec, source: &dyn TensorSource, options: &BuildOptions) -> Vec<u32> {
    let output = match spec.head {
        Some(_) => "logits".to_owned(),
        None => format!("hidden_{}", spec.num_hidden_layers),
    };
    output_of(session(spec, source, options), &output)
}

fn logits_of(session: Session) -> Vec<u32> {
    output_of(session, "logits")
}

fn output_of(mut session: Session, output: &str) -> Vec<u32> {
    let ids: Vec<u32> = (3..).take(TOKENS).collect();
    let positions = positions(1, TOKENS);
    let feeds = [Feed::u32("ids", &ids), Feed::u32("positions", &positions)];
    session.run(ProgramId(0), &Run::forward(&feeds, &slots(1, TOKENS))).unwrap();
    session.output(ProgramId(0), output).iter().map(|number| number.to_bits()).collect()
}

/// What decides the numbers.
fn computed(spec: &ModelSpec) -> ModelFields {
    ModelFields {
        dtype: cairn_spec::DType::F32,
        initializer_range: 0.0,
        dropout: Default::default(),
        tokens: Default::default(),
        ..spec.clone().into_fields()
    }
}

#[test]
fn a_gguf_file_and_a_folder_are_the_same_model_bit_for_bit() {
    for family in FAMILIES {
        let file = file(family);
        let spec = gguf::spec(&file).unwrap();
        let expected = folder_spec(&format!("{family}/config.json"));
        // The attention factor that the long rule gives is a key of the file.
        if family != "phi3_long" {
            assert_eq!(computed(&spec), computed(&expected), "{family}");
        }
        if spec.head.is_some() {
            assert_eq!((spec.tokens.bos, &spec.tokens.eos), (Some(1), &vec![2]), "{family}");
        }
        // The weights are whole numbers times 2^-9: the folder's bf16 and the file's Q8_0 hold them.
        let folder = WeightFolder::open(&golden(family)).unwrap();
        assert!(logits(&spec, &file) == logits(&expected, &folder), "{family}");
    }
}

#[test]
fn q8_keeps_the_bytes_and_scales_of_the_file() {
    for family in FAMILIES {
        let file = file(family);
        let spec = gguf::spec(&file).unwrap();
        for layout in Layout::ALL {
            let head = if spec.head.is_some() { Head::Logits } else { Head::Hidden };
            let plain = BuildOptions::new(head);
            let mut decoded = session(&spec, &file, &plain);
            let options = BuildOptions { encoding: Encoding::Q8, layout, ..plain };
            let mut kept = session(&spec, &file, &options);
            let weights: Vec<(String, Option<Encoding>)> = kept
                .persistent()
                .filter(|(_, class, ..)| *class == Class::Weight)
                .map(|(name, _, value_type, _)| (name.to_owned(), value_type.encoding()))
                .collect();
            let has = |tensor: &str| file.shape(tensor).is_some();
            let map = cairn_model::TensorMap::gguf_of_tensors(&spec, has).unwrap();
            for (name, _) in weights.iter().filter(|(_, e)| *e == Some(Encoding::Q8)) {
                let slices = map.slices_of(name);
                let (n, k) = (slices.iter().map(|s| s.rows).sum(), slices[0].columns);
                let bytes = kept.stored_mut(name).unwrap().to_vec();
                let mut values = vec![0.0; n * k];
                let (encoding, layout) = (Encoding::Q8, Layout::Panel);
                Weight { encoding, layout, n, k, bytes: &bytes }.decode(&mut values);
                let expected = decoded.stored_mut(name).unwrap();
                let (expected, _) = expected.as_chunks::<4>();
                for (value, bytes) in values.iter().zip(expected) {
                    let expected = f32::from_le_bytes(*bytes);
                    // Positions and kinds of tokens are stored as f32, so they are rounded.
                    if !["positions", "token_types"].iter().any(|what| name.contains(what)) {
                        assert_eq!(value.to_bits(), expected.to_bits(), "{family} {name}");
                    }
                }
            }
            assert!(weights.iter().any(|(_, encoding)| *encoding == Some(Encoding::Q8)));
        }
    }
}

/// Writes a golden file again with its matrices in `Q4_0`, made up, where rows have whole blocks.
fn with_nibbles(name: &str, path: &Path) {
    let file = file(name);
    let metadata = gguf::metadata(&gguf::spec(&file).unwrap()).unwrap();
    let is_matrix = |shape: &[usize]| shape.len() > 1 && shape[shape.len() - 1].is_multiple_of(32);
    let tensors: Vec<OutTensor> = file
        .tensors()
        .map(|tensor| {
            let format = if is_matrix(&tensor.shape) { Format::Q4_0 } else { Format::F32 };
            OutTensor { name: tensor.name.to_string(), shape: tensor.shape.clone(), format }
        })
        .collect();
    let mut state = 7_u32;
    let mut out = std::fs::File::create(path).unwrap();
    cairn_artifacts::gguf::write(&mut out, &metadata, &tensors, &mut |index, out| {
        let tensor = &tensors[index];
        if tensor.format == Format::F32 {
            let mut values = vec![0.0; tensor.shape.iter().product()];
            file.read_f32(&tensor.name, 0..values.len(), &mut values).unwrap();
            return values.iter().try_for_each(|value| out.write_all(&value.to_le_bytes()));
        }
        for block in (0..u16::MAX).take(tensor.bytes() / 18) {
            // Scales of both signs; one in nine is zero, one subnormal.
            let scale: u16 = match block % 9 {
                0 => 0x8000,
                1 => 0x0003,
                _ => 0x1c00 | (block & 1) << 15 | block.wrapping_mul(37) & 0x3ff,
            };
            out.write_all(&scale.to_le_bytes())?;
            for _ in 0..16 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                out.write_all(&[(state >> 24) as u8])?;
            }
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn q4_keeps_the_nibbles_and_scales_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    // Plain, all three of attention in one tensor, and experts stacked in one.
    for name in ["llama", "gpt2", "phi3", "mixtral"] {
        let path = folder.path().join(format!("{name}.gguf"));
        with_nibbles(name, &path);
        let file = GgufFile::open(&path).unwrap();
        let spec = gguf::spec(&file).unwrap();
        let plain = BuildOptions::new(Head::Logits);
        let layout = Layout::Panel;
        let decoded = session(&spec, &file, &plain);
        let kept = session(&spec, &file, &BuildOptions { encoding: Encoding::Q4, layout, ..plain });
        let has = |tensor: &str| file.shape(tensor).is_some();
        let map = cairn_model::TensorMap::gguf_of_tensors(&spec, has).unwrap();
        let mut compared = 0;
        for (weight, _, value_type, _) in kept.persistent() {
            let slices = map.slices_of(weight);
            let all_stored = slices.iter().all(|s| file.encoding(&s.tensor) == Some(Encoding::Q4));
            if value_type.encoding() != Some(Encoding::Q4) || slices.is_empty() || !all_stored {
                continue;
            }
            let (n, k) = (slices.iter().map(|s| s.rows).sum(), slices[0].columns);
            let bytes = kept.stored(weight).unwrap();
            let mut values = vec![0.0; n * k];
            Weight { encoding: Encoding::Q4, layout, n, k, bytes }.decode(&mut values);
            let (expected, _) = decoded.stored(weight).unwrap().as_chunks::<4>();
            let same = values.iter().zip(expected).all(|(a, b)| a.to_le_bytes() == *b);
            assert!(same && expected.len() == n * k, "{name} {weight}");
            compared += 1;
        }
        assert!(compared >= 5, "{name}: {compared} weights compared");
        let options = BuildOptions { encoding: Encoding::Q4, ..plain };
        assert!(
            logits_with(&spec, &file, &options) == logits_with(&spec, &file, &plain),
            "{name}: the same numbers, the same sums"
        );
    }
    // What says so of a whole file is what `auto` goes by.
    let file = GgufFile::open(&folder.path().join("llama.gguf")).unwrap();
    let spec = gguf::spec(&file).unwrap();
    assert_eq!(stored_weights(&spec, &file).unwrap().most(), Encoding::Q4);
}

/// A LLaMA whose rows are long enough for every format.
fn wide_llama() -> ModelSpec {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 40, "hidden_size": 256, "num_hidden_layers": 1,
        "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": false,
    });
    ModelSpec::from_hf_config(&config).unwrap()
}

/// Writes a model with made-up weights, each tensor in the format that `format` says.
fn made_up(spec: &ModelSpec, path: &Path, format: &dyn Fn(&str, usize) -> Format) {
    let map = cairn_model::TensorMap::gguf_of_tensors(spec, |_| true).unwrap();
    let tensors: Vec<OutTensor> = map
        .tensors()
        .into_iter()
        .map(|(name, shape)| OutTensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            format: format(name, shape.len()),
        })
        .collect();
    let mut state = 11_u32;
    let mut out = std::fs::File::create(path).unwrap();
    let metadata = gguf::metadata(spec).unwrap();
    cairn_artifacts::gguf::write(&mut out, &metadata, &tensors, &mut |index, out| {
        let (tensor, mut bytes) = (&tensors[index], Vec::new());
        for _ in 0..tensor.bytes() / tensor.format.block_bytes() {
            let mut block = vec![0_u8; tensor.format.block_bytes()];
            for byte in &mut block {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = (state >> 24) as u8;
            }
            // A small scale, where the format has it.
            let scale = 0x1000_u16.to_le_bytes();
            match tensor.format {
                Format::Q6K => block[208..].copy_from_slice(&scale),
                Format::F32 => block.copy_from_slice(&1.0_f32.to_le_bytes()),
                _ => block[..2].copy_from_slice(&scale),
            }
            bytes.extend(block);
        }
        out.write_all(&bytes)
    })
    .unwrap();
}

#[test]
fn a_file_of_several_types_is_kept_matrix_by_matrix() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mixed.gguf");
    made_up(&wide_llama(), &path, &|name, dims| match name {
        "output.weight" => Format::Q6K,
        "token_embd.weight" => Format::Q8_0,
        _ if dims > 1 => Format::Q4_0,
        _ => Format::F32,
    });
    let file = GgufFile::open(&path).unwrap();
    let spec = gguf::spec(&file).unwrap();
    let stored = stored_weights(&spec, &file).unwrap();
    assert_eq!(stored.most(), Encoding::Q4);
    let expected = [("model.embed_tokens", Encoding::Q8), ("lm_head", Encoding::F32)];
    let expected = expected.map(|(module, encoding)| (format!("{module}.weight"), encoding));
    assert_eq!(stored.others(), expected.into_iter().collect());
    assert_eq!(stored.encodings(), [Some(Encoding::Q8), Some(Encoding::Q4), None]);
    assert_eq!(stored.widened(), [("lm_head.weight", Widening::Decoded)]);
    // No value changes: the bits are those of the whole file in f32.
    let plain = BuildOptions::new(Head::Logits);
    let exact = logits_of(session(&spec, &file, &plain));
    let held = |encoding, others| {
        let options = BuildOptions { encoding, ..plain };
        let adapters = cairn_model::AdapterMap::default();
        let program = build_stored_program(&spec, &options, &adapters, others).unwrap();
        session_of(program, &spec, &file)
    };
    let others = stored.others();
    let kept = held(stored.most(), &others);
    let (kept_bytes, wide_bytes) =
        (kept.bytes().weights, session(&spec, &file, &plain).bytes().weights);
    assert!(kept_bytes * 5 < wide_bytes * 2, "{kept_bytes} of {wide_bytes} bytes");
    assert!(logits_of(kept) == exact);
    // The same head in four bits is another one.
    assert!(logits_of(held(Encoding::Q4, &std::collections::BTreeMap::new())) != exact);
}

#[test]
fn the_rule_behind_llama_3_divisors_is_found() {
    let expected = folder_spec("llama3.config.json");
    assert_eq!(computed(&gguf::spec(&file("llama3")).unwrap()), computed(&expected));
}

/// The LLaMA file with changed bytes.
fn changed(change: impl FnOnce(&mut Vec<u8>)) -> gguf::GgufSpecError {
    changed_file("llama", change)
}

fn changed_file(name: &str, change: impl FnOnce(&mut Vec<u8>)) -> gguf::GgufSpecError {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut bytes = std::fs::read(golden(&format!("{name}.gguf"))).unwrap();
    change(&mut bytes);
    std::fs::write(&path, bytes).unwrap();
    gguf::spec(&GgufFile::open(Path::new(&path)).unwrap()).unwrap_err()
}

fn find(bytes: &[u8], key: &str) -> usize {
    bytes.windows(key.len()).position(|window| window == key.as_bytes()).unwrap()
}

fn renamed(key: &str, to: &str) -> String {
    assert_eq!(key.len(), to.len());
    let error = changed(|bytes| {
        let at = find(bytes, key);
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    });
    error.to_string()
}

/// The error with the four bytes of a key's value replaced.
fn set(key: &str, value: [u8; 4]) -> gguf::GgufSpecError {
    set_in("llama", key, value)
}

fn set_in(name: &str, key: &str, value: [u8; 4]) -> gguf::GgufSpecError {
    changed_file(name, |bytes| {
        let at = find(bytes, key) + key.len() + 4;
        bytes[at..at + 4].copy_from_slice(&value);
    })
}

#[test]
fn what_would_change_the_numbers_is_refused_by_name() {
    assert_eq!(
        renamed("llama.attention.head_count_kv", "llama.attention.clamp_kqv_xyz"),
        "llama.attention.clamp_kqv_xyz = 2 is not supported for llama models"
    );
    assert_eq!(
        renamed("llama.block_count", "llama.block_counx"),
        "the key llama.block_count is missing"
    );
    let at_the_value = changed(|bytes| {
        let at = find(bytes, "general.architecture") + 20 + 4 + 8;
        bytes[at..at + 5].copy_from_slice(b"mamba");
    });
    assert_eq!(
        at_the_value.to_string(),
        "models of architecture 'mamba' are not read from GGUF files"
    );
    assert_eq!(
        at_the_value.hints(),
        [format!("architectures that are read: {}", gguf::ARCHITECTURES.join(", "))]
    );
}

#[test]
fn absurd_and_contradictory_values_are_refused() {
    assert_eq!(
        set("llama.attention.value_length", 8_u32.to_le_bytes()).to_string(),
        "llama.attention.key_length is 16, but llama.attention.value_length is 8"
    );
    assert_eq!(
        set("llama.vocab_size", 47_u32.to_le_bytes()).to_string(),
        "rows of token_embd.weight is 48, but llama.vocab_size is 47"
    );
    for nan in [f32::NAN, f32::INFINITY] {
        let error = set("llama.rope.freq_base", nan.to_le_bytes());
        assert!(error.to_string().ends_with(", not a finite number"), "{error}");
    }
    for (key, value) in [
        ("llama.block_count", 1_000_000_000_u32),
        ("llama.block_count", u32::MAX),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count_kv", 3),
        ("llama.context_length", 0),
    ] {
        let error = set(key, value.to_le_bytes());
        assert!(matches!(error, gguf::GgufSpecError::Spec(_)), "{key} {value}: {error}");
    }
}

#[test]
fn what_deepseek_and_bert_cannot_mean_is_refused_by_name() {
    let refuse = |name: &str, key: &str, value: u32, expected: &str| {
        assert_eq!(set_in(name, key, value.to_le_bytes()).to_string(), expected);
    };
    refuse(
        "deepseek_v3",
        "deepseek2.expert_gating_func",
        4,
        "deepseek2.expert_gating_func = 4 is not supported for deepseek2 models",
    );
    refuse(
        "deepseek_v3",
        "deepseek2.attention.key_length",
        41,
        "deepseek2.attention.key_length = 41 is not supported for deepseek2 models",
    );
    refuse(
        "deepseek_v2_old",
        "deepseek2.attention.key_length",
        7,
        "deepseek2.attention.key_length is 7, but deepseek2.rope.dimension_count is 8",
    );
    refuse(
        "deepseek_v3",
        "deepseek2.rope.scaling.yarn_log_multiplier",
        0,
        "deepseek2.rope.scaling.yarn_log_multiplier = 0 is not supported for deepseek2 models",
    );
    let causal = changed_file("bert", |bytes| {
        let at = find(bytes, "bert.attention.causal") + "bert.attention.causal".len() + 4;
        bytes[at] = 1;
    });
    assert_eq!(causal.to_string(), "bert.attention.causal = true is not supported for bert models");
    let untyped = changed_file("bert", |bytes| {
        let at = find(bytes, "tokenizer.ggml.token_type_count");
        bytes[at] = b'T';
    });
    assert_eq!(untyped.to_string(), "the key tokenizer.ggml.token_type_count is missing");
}
