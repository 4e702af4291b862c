//! What happens to a pack between its opening and its reading.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::time::{Duration, SystemTime};

use cairn_artifacts::leanpack::{self, Contents, License, OutWeight, PackFile, Profile, Source};
use cairn_spec::ModelSpec;

use super::*;

/// A pack of zeros.
fn write(path: &Path) {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 32,
    });
    let spec = ModelSpec::from_hf_config(&config).unwrap();
    let map = crate::TensorMap::of_program(&spec);
    let weights = map.tensors().into_iter().map(|(name, shape)| OutWeight {
        name: name.to_owned(),
        dims: shape.iter().map(|&size| size as u64).collect(),
        encoding: "f32".to_owned(),
        layout: "row_major".to_owned(),
    });
    let weights: Vec<OutWeight> = weights.collect();
    let sizes: Vec<usize> =
        map.tensors().into_iter().map(|(_, shape)| 4 * shape.iter().product::<usize>()).collect();
    let contents = Contents {
        spec,
        policy: "f32/1".to_owned(),
        profile: Profile::portable(),
        plan: None,
        weights,
        files: Vec::new(),
        source: Source {
            format: "safetensors".to_owned(),
            tensors: Vec::new(),
            left_out: Vec::new(),
            files: Vec::new(),
        },
        license: License::default(),
        lineage: None,
        assignment: None,
    };
    leanpack::write(path, contents, &mut |index, out| {
        out.write_all(&vec![0; sizes[index]])?;
        Ok(true)
    })
    .unwrap();
}

fn source(path: &Path) -> PackSource {
    let check = PackCheck { verify: true, strict: false };
    PackSource::new(PackFile::open(path).unwrap(), check).unwrap()
}

#[test]
fn hashing_ends_when_somebody_wants_to_change_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.leanpack");
    write(&path);
    let (pack, cpu) = (source(&path), Cpu::detect(2));
    // Elsewhere nothing is mapped, and there is nothing to ask.
    let Ok(mapped) = pack.pack.map_weights() else { return };
    assert_eq!(pack.check_mapped(&mapped, &cpu), Ok(true));
    let writer = std::thread::spawn(move || OpenOptions::new().append(true).open(&path).unwrap());
    while mapped.holds() {
        std::thread::yield_now();
    }
    assert_eq!(pack.check_mapped(&mapped, &cpu), Ok(false));
    drop(mapped);
    let open = writer.join().unwrap();
    // As long as it is open for writing, weights are copied, and the reason is there to be told.
    assert!(pack.map(&cpu).unwrap().is_none());
    let reason = pack.copied_because().unwrap();
    assert!(reason.contains("a program has the file open for writing"), "{reason}");
    drop(open);
}

#[test]
fn a_file_that_changes_after_its_header_was_read_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.leanpack");
    write(&path);
    let (pack, cpu) = (source(&path), Cpu::detect(1));
    let tensor = &pack.pack.header().tensors[0];
    let mut bytes = vec![0; usize::try_from(tensor.bytes).unwrap()];
    let form = (Encoding::F32, Layout::RowMajor);
    assert_eq!(pack.read_stored(&tensor.name, form, &cpu, &mut bytes), Ok(true));
    let mut values = [1.0; 4];
    assert_eq!(pack.read_f32(&tensor.name, 0..4, &mut values), Ok(()));
    assert!(values.iter().all(|value| value.to_bits() == 0), "{values:?}");
    // As a clock that ticks between reading the header and the writing sees it.
    let later = SystemTime::UNIX_EPOCH + Duration::from_secs(5);
    File::options().write(true).open(&path).unwrap().set_modified(later).unwrap();
    let problem = pack.read_stored(&tensor.name, form, &cpu, &mut bytes).unwrap_err();
    assert!(problem.contains("it was changed since it was opened"), "{problem}");
    let problem = pack.read_f32(&tensor.name, 0..4, &mut values).unwrap_err();
    assert!(problem.contains("it was changed since it was opened"), "{problem}");
    match pack.map(&cpu) {
        Err(LoadError::Unreadable { problem, .. }) => {
            assert!(problem.contains("changed since it was opened"), "{problem}");
        }
        Ok(lent) => assert!(lent.is_none() && pack.copied_because().is_some()),
        Err(other) => panic!("{other}"),
    }
}
