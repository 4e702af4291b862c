//! Models in one file: packed, looked at, run, checked and unpacked by the command.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use cairn_artifacts::leanpack::{self, Contents, OutWeight, PackFile};
use cairn_artifacts::safetensors::{self, OutTensor, SafetensorsFile};
use cairn_kernels::{Encoding, Layout, Weight};
use cairn_spec::ModelSpec;
use cairn_spec::model::{Mlp, ModelFields};
use serde_json::{Value, json};

use crate::{cairn, golden, shown, succeed};

/// Packs a golden folder and returns what the command says of it.
fn pack(model: &str, path: &Path, more: &[&str]) -> Value {
    let mut command = cairn(["pack", "--quiet", "--json"]);
    command.arg(golden(model)).arg("-o").arg(path).args(more);
    serde_json::from_str(&succeed(&mut command)).unwrap()
}

/// A refused command's output.
fn refused(arguments: &[&str], path: &Path) -> String {
    let output = cairn(arguments).arg("--model").arg(path).output().unwrap();
    let text = shown(&output, path.parent());
    assert!(text.starts_with("exit 1\n"), "{text}");
    text
}

fn generated(model: &Path, more: &[&str]) -> Value {
    let mut command = cairn(["generate", "--json", "--temperature", "0", "--prompt-ids", "5,6,7"]);
    command.args(["--max-new-tokens", "12"]).args(more).arg("--model").arg(model);
    serde_json::from_str::<Value>(&succeed(&mut command)).unwrap()["token_ids"].clone()
}

/// Turns a byte of a file over.
fn flip(path: &Path, at: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn a_pack_generates_and_computes_what_its_folder_does() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.leanpack");
    let input = folder.path().join("ids.safetensors");
    let ids: Vec<u8> = (3_i64..19).flat_map(i64::to_le_bytes).collect();
    let tensor = OutTensor::bytes("input_ids", cairn_spec::DType::I64, &[2, 8], &ids);
    let mut file = fs::File::create(&input).unwrap();
    safetensors::write(&mut file, vec![tensor], &Default::default()).unwrap();
    for family in ["llama", "gpt2", "deepseek_v3"] {
        pack(family, &path, &["--profile", "host"]);
        assert_eq!(generated(&path, &["--strict"]), generated(&golden(family), &[]), "{family}");
        let logits = |model: &Path| {
            let output = folder.path().join("logits.safetensors");
            let mut command = cairn(["logits", "--input"]);
            command.arg(&input).arg("--output").arg(&output).arg("--model").arg(model);
            succeed(&mut command);
            let file = SafetensorsFile::open(&output).unwrap();
            ["hidden_1", "logits"].map(|name| file.tensor(name).unwrap().bytes.to_vec())
        };
        assert!(logits(&path) == logits(&golden(family)), "{family}");
    }
    // In another form than it is stored in, a weight is what the folder's would be.
    pack("llama", &path, &[]);
    let q8 = ["--weights", "q8"];
    assert_eq!(generated(&path, &q8), generated(&golden("llama"), &q8));
    pack("llama", &path, &["--encoding", "q8"]);
    assert_eq!(generated(&path, &["--verify"]), generated(&golden("llama"), &q8));
}

#[test]
fn a_pack_holds_tokenizer_and_template() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    fs::create_dir(&model).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden("llama").join(name), model.join(name)).unwrap();
    }
    let trained = cairn_data::tokenizer::train_bpe(
        &cairn_data::tokenizer::BpeSettings { vocab_size: 260, ..Default::default() },
        ["a cairn is a stack of stones"; 8].map(|text| Ok(text.to_owned())),
    )
    .unwrap();
    fs::write(model.join("tokenizer.json"), trained.json()).unwrap();
    let path = folder.path().join("model.leanpack");
    succeed(cairn(["pack", "--quiet"]).arg(&model).arg("-o").arg(&path));
    let said = |model: &Path| {
        let mut command = cairn(["generate", "--quiet", "--prompt", "a cairn", "--seed", "3"]);
        command.args(["--max-new-tokens", "8", "--model"]).arg(model).output().unwrap()
    };
    let (packed, plain) = (said(&path), said(&model));
    assert_eq!(shown(&packed, None), shown(&plain, None));
    assert!(packed.stdout.starts_with(b"a cairn"), "the prompt was tokenized");
    flip_file(&path, "tokenizer.json");
    let text = refused(&["generate", "--prompt", "a"], &path);
    assert!(text.contains("because: tokenizer.json (MiB 0) was altered"), "{text}");
}

/// Alters a small file of a pack.
fn flip_file(path: &Path, name: &str) {
    let pack = PackFile::open(path).unwrap();
    flip(path, pack.preamble().data_start + pack.file(name).unwrap().offset);
}

#[test]
fn altered_bytes_are_named_and_strict_refuses_what_is_not_as_it_was_made() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.leanpack");
    pack("llama", &path, &[]);
    let start = PackFile::open(&path).unwrap().preamble().data_start;
    let text = succeed(cairn(["verify"]).arg(&path));
    assert!(text.contains(": every hash is right\nblake3 "), "{text}");
    flip(&path, start + 77);
    let output = cairn(["verify"]).arg(&path).output().unwrap();
    let text = shown(&output, Some(folder.path()));
    let altered = "model.embed_tokens.weight (MiB 0) was altered";
    assert!(text.contains("error: DIR/model.leanpack cannot be used"), "{text}");
    assert!(text.contains(altered), "{text}");
    for flag in ["--verify", "--strict"] {
        let text = refused(&["generate", "--prompt-ids", "1", flag], &path);
        assert!(text.contains(altered), "{text}");
    }
    let mut command = cairn(["unpack", "-o"]);
    let output = command.arg(folder.path().join("back")).arg(&path).output().unwrap();
    assert!(!output.status.success() && !folder.path().join("back").exists());
    flip(&path, start + 77);
    let text = refused(&["generate", "--prompt-ids", "1", "--strict", "--weights", "q8"], &path);
    assert!(text.contains("would be converted, which a strict source refuses"), "{text}");
    let text = refused(&["generate", "--prompt-ids", "1", "--strict", "--isa", "scalar"], &path);
    assert!(text.contains("error: embed.f32.scalar would be run by its plain fallback"), "{text}");
    pack("llama", &path, &["--profile", "host"]);
    let text = refused(&["generate", "--prompt-ids", "1", "--strict", "--isa", "scalar"], &path);
    assert!(text.contains("error: DIR/model.leanpack is packed for "), "{text}");
    flip(&path, 9);
    let text = refused(&["generate", "--prompt-ids", "1"], &path);
    assert!(text.contains("because: it is of version 257; this reader knows version 1"), "{text}");
    let text = refused(&["generate", "--prompt-ids", "1", "--strict"], &golden("llama"));
    assert!(text.contains("error: --strict asks for a leanpack"), "{text}");
}

#[test]
fn a_pack_unpacks_to_the_folder_it_was_made_from() {
    let folder = tempfile::tempdir().unwrap();
    let (path, back) = (folder.path().join("model.leanpack"), folder.path().join("back"));
    let said = pack("gpt2", &path, &[]);
    assert_eq!((&said["rounded"], &said["license"]), (&json!(0), &Value::Null));
    succeed(cairn(["unpack", "--quiet", "-o"]).arg(&back).arg(&path));
    assert_eq!(generated(&back, &[]), generated(&golden("gpt2"), &[]));
    let output = cairn(["unpack", "-o"]).arg(&back).arg(&path).output().unwrap();
    let text = shown(&output, Some(folder.path()));
    assert!(text.contains("error: DIR/back is there already"), "{text}");
    let text = succeed(cairn(["inspect", "--tensors"]).arg(&path));
    for part in [
        "pages",
        "leanpack/1",
        "every one as the source has it",
        "model.embed_tokens.weight",
        "kernels of their own",
        "resident",
        "loading  ",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let header: Value =
        serde_json::from_str(&succeed(cairn(["inspect", "--json"]).arg(&path))).unwrap();
    assert_eq!(header["license"]["id"], Value::Null);
    assert_eq!(header["source"]["files"][0]["name"], "config.json");
    let output = cairn(["pack", "-o", "x.leanpack", "--encoding", "q3"]).output().unwrap();
    assert!(shown(&output, None).contains("[possible values: auto, f32, bf16, bf16z, "));
}

/// Writes a pack again with some weights in another form. Their bytes are zeros, those of the others are
/// what they were.
fn rewritten(from: &Path, to: &Path, spec: Option<ModelSpec>, change: &dyn Fn(&mut OutWeight)) {
    let old = PackFile::open(from).unwrap();
    let header = old.header().clone();
    let mut weights = Vec::new();
    for tensor in &header.tensors {
        let (name, dims) = (tensor.name.clone(), tensor.dims.clone());
        let (encoding, layout) = (tensor.encoding.clone(), tensor.layout.clone());
        let mut weight = OutWeight { name, dims, encoding, layout };
        change(&mut weight);
        weights.push(weight);
    }
    let content = |name: &str| old.read_file(name).unwrap().unwrap();
    let files = header.files.iter().map(|file| (file.name.clone(), content(&file.name)));
    let contents = Contents {
        spec: spec.unwrap_or_else(|| header.spec.clone()),
        policy: header.policy.clone(),
        profile: header.profile.clone(),
        plan: None,
        weights: weights.clone(),
        files: files.collect(),
        source: header.source.clone(),
        license: header.license.clone(),
        lineage: None,
        assignment: None,
    };
    leanpack::write(to, contents, &mut |index, out| {
        let (weight, tensor) = (&weights[index], &header.tensors[index]);
        let encoding = Encoding::ALL.into_iter().find(|e| e.name() == weight.encoding).unwrap();
        let layout = Layout::ALL.into_iter().find(|l| l.name() == weight.layout).unwrap();
        let size = |at: usize| usize::try_from(weight.dims.get(at).copied().unwrap_or(1)).unwrap();
        let bytes = Weight::stored_bytes(encoding, layout, size(0), size(1));
        let mut stored = vec![0; bytes];
        if bytes as u64 == tensor.bytes {
            old.read_at(tensor, 0, &mut stored).unwrap();
        }
        out.write_all(&stored)?;
        Ok(false)
    })
    .unwrap();
}

#[test]
fn a_header_that_no_kernel_can_follow_is_refused_by_the_weights_name() {
    let folder = tempfile::tempdir().unwrap();
    let (path, hostile) = (folder.path().join("a.leanpack"), folder.path().join("b.leanpack"));
    pack("mixtral", &path, &["--encoding", "bf16"]);
    // Experts of forty rows, which fill no panels, in an encoding that lies in panels only.
    let mut fields = ModelFields::clone(&PackFile::open(&path).unwrap().header().spec);
    if let Mlp::Moe(moe) = &mut fields.mlp {
        (moe.intermediate_size, moe.moe_intermediate_size) = (40, 40);
    }
    let experts = 4;
    rewritten(&path, &hostile, Some(ModelSpec::new(fields).unwrap()), &|weight| {
        match () {
            () if weight.name.contains("experts.down_proj") => weight.dims[1] = 40,
            () if weight.name.contains(".experts.") => weight.dims[0] = experts * 40,
            () => return,
        }
        (weight.encoding, weight.layout) = ("q8".to_owned(), "panel".to_owned());
    });
    let ids = folder.path().join("ids.safetensors");
    let tensor = [1_i64, 2].map(i64::to_le_bytes).concat();
    let tensor = OutTensor::bytes("input_ids", cairn_spec::DType::I64, &[1, 2], &tensor);
    safetensors::write(&mut fs::File::create(&ids).unwrap(), vec![tensor], &Default::default())
        .unwrap();
    let (ids, out) = (ids.to_str().unwrap(), folder.path().join("out"));
    let logits = ["logits", "--input", ids, "--output", out.to_str().unwrap()];
    for arguments in [&["generate", "--prompt-ids", "1,2"][..], &logits] {
        let text = refused(arguments, &hostile);
        let named = "experts.gate_proj.weight cannot be stored as q8";
        assert!(text.contains(named) && text.contains("model.layers.0"), "{text}");
    }
    let text = shown(&cairn(["inspect"]).arg(&hostile).output().unwrap(), None);
    assert!(text.starts_with("exit 1\n") && text.contains("cannot be stored as q8"), "{text}");
    // Decoded as it is loaded, it has a program.
    let mut command = cairn(["generate", "--prompt-ids", "1,2", "--max-new-tokens", "1"]);
    succeed(command.args(["--dtype", "f32", "--model"]).arg(&hostile));
}

#[test]
fn what_is_asked_for_counts_for_every_weight_of_a_mixed_pack() {
    let folder = tempfile::tempdir().unwrap();
    let (path, mixed) = (folder.path().join("a.leanpack"), folder.path().join("b.leanpack"));
    pack("llama", &path, &["--encoding", "q8"]);
    let one = "model.layers.1.mlp.up_proj.weight";
    rewritten(&path, &mixed, None, &|weight| {
        if weight.name == one {
            weight.encoding = "bf16".to_owned();
        }
    });
    let ran = |flags: &[&str]| {
        let mut command = cairn(["generate", "--json", "--prompt-ids", "5,6", "--max-new-tokens"]);
        command.args(["2", "--strict"]).args(flags).arg("--model").arg(&mixed);
        shown(&command.output().unwrap(), Some(folder.path()))
    };
    // Each as it is stored, and nothing is converted.
    let text = ran(&[]);
    assert!(text.starts_with("exit 0\n"), "{text}");
    // In one encoding, that one matrix is converted, which is refused by its name.
    let text = ran(&["--dtype", "q8"]);
    assert!(text.starts_with("exit 1\n") && text.contains(one), "{text}");
    assert!(text.contains("is stored as bf16 panel and would be converted"), "{text}");
    assert!(generated(&mixed, &["--dtype", "q8"]).is_array());
}
