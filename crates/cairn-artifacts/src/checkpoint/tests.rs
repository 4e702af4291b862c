//! Checkpoints written, read, damaged, killed and thinned out.

use super::*;
use crate::atomic;
use cairn_spec::{Hint, ModelSpec};
use proptest::prelude::*;
use serde_json::json;

/// A checkpoint of the golden LLaMA with `step` noted in it.
fn write_golden(folder: &Path, step: u64, loss: Option<f64>) -> Result<Manifest, CheckpointError> {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens/llama");
    let golden = Path::new(golden);
    let config = fs::read_to_string(golden.join(CONFIG_FILE)).unwrap();
    let spec = ModelSpec::from_hf_json(&config).unwrap();
    let weights = WeightFolder::open(golden).unwrap();
    let tensors = || weights.tensors().map(|t| OutTensor::bytes(t.name, t.dtype, t.shape, t.bytes));
    let moments: Vec<_> = weights
        .tensors()
        .map(|t| OutTensor::bytes(format!("m.{}", t.name), t.dtype, t.shape, t.bytes))
        .collect();
    let state = json!({"loader": {"epoch": 1, "step": step}});
    write(
        folder,
        Contents {
            kind: Kind::Model,
            step,
            validation_loss: loss,
            recipe_hash: Some(Hash::of_bytes(b"recipe")),
            data_hash: None,
            state: state.as_object().unwrap().clone(),
            config: spec.to_hf_config().unwrap(),
            generation_config: spec.to_hf_generation_config(),
            weights: tensors().collect(),
            optimizer: moments,
            files: vec![(TOKENIZER_FILE.to_owned(), b"{}".to_vec())],
        },
    )
}

fn steps(series: &CheckpointSeries) -> Vec<u64> {
    series.list().unwrap().iter().map(|saved| saved.manifest.step).collect()
}

#[test]
fn a_checkpoint_reads_back_as_it_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint");
    let manifest = write_golden(&path, 7, Some(2.5)).unwrap();
    let checkpoint = Checkpoint::open(&path, Verify::Hashes).unwrap();
    assert_eq!(checkpoint.manifest(), &manifest);
    assert_eq!(manifest.state["loader"]["step"], 7);
    assert_eq!(
        manifest.files.keys().collect::<Vec<_>>(),
        [CONFIG_FILE, GENERATION_CONFIG_FILE, SINGLE_FILE, OPTIMIZER_FILE, TOKENIZER_FILE]
    );
    let moments = checkpoint.optimizer().unwrap();
    for tensor in checkpoint.weights().tensors() {
        let moment = moments.tensor(&format!("m.{}", tensor.name)).unwrap();
        assert_eq!(moment.bytes, tensor.bytes);
    }
    let config = String::from_utf8(checkpoint.read_file(CONFIG_FILE).unwrap()).unwrap();
    assert!(ModelSpec::from_hf_json(&config).is_ok());
}

#[test]
fn equal_states_are_equal_folders() {
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["a", "b"].map(|name| folder.path().join(name));
    write_golden(&first, 7, None).unwrap();
    write_golden(&second, 7, None).unwrap();
    let manifest = |path: &Path| fs::read(path.join(MANIFEST_FILE)).unwrap();
    assert_eq!(manifest(&first), manifest(&second));
}

#[test]
fn an_altered_file_is_named_with_both_hashes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint");
    let manifest = write_golden(&path, 7, None).unwrap();
    for (name, record) in manifest.files {
        let file = path.join(&name);
        let original = fs::read(&file).unwrap();
        let mut altered = original.clone();
        altered[original.len() / 2] ^= 1;
        fs::write(&file, &altered).unwrap();
        let error = Checkpoint::open(&path, Verify::Hashes).unwrap_err();
        let actual = Hash::of_bytes(&altered);
        let expected = format!(
            "{} was altered: its hash is {actual} instead of {}",
            file.display(),
            record.hash
        );
        assert_eq!(error.to_string(), expected);

        fs::write(&file, &original[1..]).unwrap();
        let error = Checkpoint::open(&path, Verify::Sizes).unwrap_err();
        let expected = format!(
            "{} has {} bytes instead of {}",
            file.display(),
            record.bytes - 1,
            record.bytes
        );
        assert_eq!(error.to_string(), expected);

        fs::remove_file(&file).unwrap();
        let error = Checkpoint::open(&path, Verify::Sizes).unwrap_err();
        assert_eq!(error.to_string(), format!("cannot read the size of {}", file.display()));
        fs::write(&file, &original).unwrap();
    }
    Checkpoint::open(&path, Verify::Hashes).unwrap();
}

#[test]
fn other_schemas_and_broken_manifests_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint");
    write_golden(&path, 7, None).unwrap();
    let file = path.join(MANIFEST_FILE);
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace("checkpoint/1", "checkpoint/9")).unwrap();
    let error = Checkpoint::open(&path, Verify::Sizes).unwrap_err();
    let expected =
        format!("{} has schema 'checkpoint/9'; this version reads 'checkpoint/1'", file.display());
    assert_eq!(error.to_string(), expected);
    assert_eq!(error.hints(), ["use the version of cairn that wrote it"]);
    for broken in
        ["{", "[]", "{\"schema\": \"checkpoint/1\"}", &text.replace(TOKENIZER_FILE, "../x")]
    {
        fs::write(&file, broken).unwrap();
        let error = Checkpoint::open(&path, Verify::Sizes).unwrap_err();
        assert!(matches!(error, CheckpointError::Malformed { .. }), "{error}");
    }
}

#[test]
fn a_failed_save_leaves_the_one_before() {
    let folder = tempfile::tempdir().unwrap();
    let series = CheckpointSeries::new(folder.path());
    write_golden(&series.path_of(5), 5, None).unwrap();
    let full = |_: &mut dyn Write| Err(io::Error::from(io::ErrorKind::StorageFull));
    let tensor = OutTensor::stream("a", cairn_spec::DType::F32, &[1], full);
    let contents = Contents { step: 6, weights: vec![tensor], ..Contents::default() };
    let error = write(&series.path_of(6), contents).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("cannot write {}", series.path_of(6).join(SINGLE_FILE).display())
    );
    assert!(error.hints()[0].contains("unchanged"));
    assert_eq!(steps(&series), [5]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn further_files_have_plain_and_own_names() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["../x", "a/b", "", MANIFEST_FILE, SINGLE_FILE, CONFIG_FILE] {
        let files = vec![(name.to_owned(), Vec::new())];
        let error = write(&folder.path().join("c"), Contents { files, ..Contents::default() });
        let error = error.unwrap_err();
        assert!(matches!(error, CheckpointError::BadName { .. }), "{name}: {error}");
    }
}

#[test]
fn latest_and_best_ignore_what_is_not_complete() {
    let folder = tempfile::tempdir().unwrap();
    let series = CheckpointSeries::new(folder.path().join("checkpoints"));
    assert!(series.latest().unwrap().is_none());
    for (step, loss) in [(10, Some(3.0)), (20, Some(2.0)), (30, Some(2.0)), (40, None)] {
        write_golden(&series.path_of(step), step, loss).unwrap();
    }
    // Step 50 lacks its weights, step 60 its manifest; the others only look like checkpoints.
    write_golden(&series.path_of(50), 50, Some(1.0)).unwrap();
    fs::remove_file(series.path_of(50).join(SINGLE_FILE)).unwrap();
    write_golden(&series.path_of(60), 60, Some(1.0)).unwrap();
    fs::remove_file(series.path_of(60).join(MANIFEST_FILE)).unwrap();
    fs::rename(series.path_of(30), series.folder().join("step-00000030.tmp-1-1")).unwrap();
    fs::create_dir(series.folder().join("step-x")).unwrap();
    assert_eq!(steps(&series), [10, 20, 40]);
    assert_eq!(series.latest().unwrap().unwrap().manifest.step, 40);
    assert_eq!(series.best().unwrap().unwrap().manifest.step, 20);
    assert_eq!(series.clean().unwrap(), ["step-00000030.tmp-1-1"]);
}

#[test]
fn the_last_ones_and_the_best_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let series = CheckpointSeries::new(folder.path());
    for step in 1..=5u32 {
        let loss = f64::from(step.abs_diff(2));
        write_golden(&series.path_of(step.into()), step.into(), Some(loss)).unwrap();
    }
    assert_eq!(series.retain(2, true).unwrap(), [1, 3]);
    assert_eq!(steps(&series), [2, 4, 5]);
    // The latest stays whatever is asked for.
    assert_eq!(series.retain(0, false).unwrap(), [2, 4]);
    assert_eq!(steps(&series), [5]);
    assert!(
        fs::read_dir(folder.path())
            .unwrap()
            .all(|entry| { !atomic::is_temporary(entry.unwrap().file_name().to_str().unwrap()) })
    );
}

proptest! {
    #[test]
    fn any_manifest_is_refused_or_read(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
        cuts in any::<bool>(),
    ) {
        let manifest = Manifest {
            schema: SCHEMA.to_owned(),
            step: 3,
            validation_loss: Some(1.5),
            recipe_hash: Some(Hash::of_bytes(b"recipe")),
            data_hash: None,
            state: Map::new(),
            files: [("a".to_owned(), FileRecord { bytes: 1, hash: Hash::of_bytes(b"a") })].into(),
        };
        let mut text = json_bytes(&serde_json::to_value(&manifest).unwrap());
        let len = text.len();
        for (index, byte) in changes {
            text[index.index(len)] = byte;
        }
        text.truncate(if cuts { cut.index(len) } else { len });
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(MANIFEST_FILE), &text).unwrap();
        match read_manifest(folder.path()) {
            Ok(read) => prop_assert!(read.files.keys().all(|name| is_plain_name(name))),
            Err(error) => prop_assert!(error.to_string().contains(MANIFEST_FILE), "{error}"),
        }
        // None of the files is there.
        prop_assert!(Checkpoint::open(folder.path(), Verify::Sizes).is_err());
    }
}

#[test]
fn an_adapter_lies_where_peft_looks_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("step");
    let tensor = OutTensor::f32("base_model.model.q_proj.lora_A.weight", &[1, 2], &[1.0, 2.0]);
    let config = serde_json::json!({"peft_type": "LORA"});
    let contents =
        Contents { kind: Kind::Adapter, weights: vec![tensor], config, ..Contents::default() };
    let manifest = write(&path, contents).unwrap();
    assert_eq!(manifest.kind(), Kind::Adapter);
    let names: Vec<&str> = manifest.files.keys().map(String::as_str).collect();
    assert_eq!(names, [ADAPTER_CONFIG_FILE, ADAPTER_FILE]);
    // Weights of a model that lie beside it are not taken for the adapter's.
    fs::write(path.join(SINGLE_FILE), b"something else").unwrap();
    let saved = Checkpoint::open(&path, Verify::Hashes).unwrap();
    assert_eq!(saved.weights().tensors().count(), 1);
}
