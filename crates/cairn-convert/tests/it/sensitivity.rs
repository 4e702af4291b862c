//! What rounding costs, on a model whose every other number is known.

use std::path::Path;

use cairn_artifacts::safetensors::WeightFolder;
use cairn_convert::{SensitivityJob, sensitivity};
use cairn_kernels::{Cpu, Encoding};

use crate::packs::spec;

#[test]
fn what_is_not_rounded_costs_nothing_and_every_class_is_put_back() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/qwen3");
    let (spec, weights) = (spec(&folder), WeightFolder::open(&folder).unwrap());
    let rows = [(3..15).collect(), (20..32).collect()];
    let encodings = [Encoding::Q8, Encoding::F32, Encoding::Bf16];
    let job = SensitivityJob { spec: &spec, source: &weights, rows: &rows, encodings: &encodings };
    let mut told = 0;
    let measured = sensitivity(&job, Cpu::detect(2), &mut |done, total| {
        assert!(done == told && done < total);
        told += 1;
        true
    })
    .unwrap();
    assert_eq!((measured.tokens, measured.targets), (24, 22));
    assert!((measured.perplexity - measured.loss.exp()).abs() < 1e-9);
    let names: Vec<&str> = measured.classes.iter().map(|class| class.class.as_str()).collect();
    assert_eq!((names[0], names[names.len() - 1]), ("embed_tokens", "all"));
    assert!(names.contains(&"self_attn.q_proj") && names.contains(&"mlp.down_proj"), "{names:?}");
    for class in &measured.classes {
        let [q8, plain, bf16] = class.rounded[..] else { panic!("{class:?}") };
        // All that was rounded before is as it was.
        assert_eq!((plain.kl, plain.perplexity_change), (0.0, 0.0), "{}", class.class);
        assert!(q8.kl > 0.0 && bf16.kl > 0.0, "{class:?}");
        assert_eq!(plain.bytes, 2 * bf16.bytes);
        assert!(q8.bytes < bf16.bytes);
    }
    let [rest @ .., all] = &measured.classes[..] else { panic!("several classes") };
    assert_eq!(all.elements, rest.iter().map(|class| class.elements).sum::<usize>());
    assert!(measured.svg().matches("<rect").count() == names.len() * encodings.len());
}
