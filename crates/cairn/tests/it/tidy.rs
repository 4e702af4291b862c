//! The house rules that a test can check: layers, file names, headers, documented crates.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The layer of each crate; a dependency lies strictly lower.
const LAYERS: [(&str, u32); 12] = [
    ("cairn-spec", 0),
    ("cairn-kernels", 1),
    ("cairn-artifacts", 1),
    ("cairn-program", 2),
    ("cairn-data", 2),
    ("cairn-model", 3),
    ("cairn-engine", 4),
    ("cairn-eval", 5),
    ("cairn-convert", 5),
    ("cairn-train", 6),
    ("cairn-serve", 6),
    ("cairn", 7),
];

/// Names that say nothing about what a file defines.
const EMPTY_NAMES: [&str; 7] =
    ["utils.rs", "helpers.rs", "common.rs", "base.rs", "misc.rs", "types.rs", "mod.rs"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn all_sources() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for folder in ["crates", "examples"] {
        sources(&root().join(folder), &mut found);
    }
    found.sort();
    assert!(found.len() > 50, "the sources were found");
    found
}

/// Cairn crates named in the `[dependencies]` of a manifest.
fn dependencies(manifest: &str) -> Vec<String> {
    let table: toml::Table = manifest.parse().unwrap();
    let dependencies = table["dependencies"].as_table().unwrap();
    dependencies.keys().filter(|name| name.starts_with("cairn")).cloned().collect()
}

#[test]
fn dependencies_point_down() {
    let layers: BTreeMap<&str, u32> = LAYERS.into();
    let mut seen = Vec::new();
    for entry in std::fs::read_dir(root().join("crates")).unwrap() {
        let folder = entry.unwrap().path();
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).unwrap();
        let layer = *layers.get(name.as_str()).unwrap_or_else(|| panic!("{name} has no layer"));
        for dependency in dependencies(&manifest) {
            let lower = layers[dependency.as_str()];
            assert!(lower < layer, "{name} (layer {layer}) depends on {dependency} ({lower})");
        }
        seen.push(name);
    }
    assert_eq!(seen.len(), LAYERS.len(), "every layer has its crate");
}

#[test]
fn the_map_names_every_crate() {
    let map = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    for (name, layer) in LAYERS {
        assert!(map.contains(&format!("| {layer} | `{name}` |")), "{name} is not on the map");
    }
}

#[test]
fn files_are_named_after_what_they_define_and_say_what_lives_in_them() {
    for path in all_sources() {
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(!EMPTY_NAMES.contains(&name), "{} says nothing", path.display());
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("//!"), "{} does not open with //!", path.display());
    }
}

#[test]
fn unsafe_code_stays_inside_its_fence() {
    for path in all_sources() {
        let shown = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
        let fenced = shown.starts_with("crates/cairn-kernels/")
            || shown == "crates/cairn-artifacts/src/mmap.rs"
            // The allocators that count, in tests only.
            || shown.ends_with("tests/it/allocations.rs")
            || shown.ends_with("tests/it/tidy.rs");
        let text = std::fs::read_to_string(&path).unwrap();
        let blocks = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        let unsafe_lines = blocks.filter(|line| line.contains("unsafe {")).count();
        assert!(fenced || unsafe_lines == 0, "{shown} has unsafe code");
    }
}
