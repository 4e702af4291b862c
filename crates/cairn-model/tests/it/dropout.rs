//! Where dropout stands in the programs of the families, and that only training has it.

use std::collections::BTreeSet;

use cairn_model::{BuildOptions, Head, build_program};
use cairn_program::Op;
use cairn_spec::ModelSpec;
use cairn_spec::model::Dropout;

use crate::goldens::spec;

const DROPOUT: Dropout = Dropout { embd: 0.1, attn: 0.2, resid: 0.3 };

fn dropping(name: &str) -> ModelSpec {
    let fields = spec(name).into_fields();
    ModelSpec::new(cairn_spec::model::ModelFields { dropout: DROPOUT, ..fields }).unwrap()
}

#[test]
fn every_dropout_of_a_model_has_a_site_of_its_own() {
    // Grouped heads, learned positions, windows, latent attention.
    for name in ["llama", "gpt2", "gemma3_text", "deepseek_v3"] {
        let spec = dropping(name);
        let layers = spec.num_hidden_layers;
        let options = BuildOptions { dropout: true, ..BuildOptions::new(Head::TokenLogprob) };
        let program = build_program(&spec, &options).unwrap();
        let (mut probabilities, mut elements, mut sites) = (0, 0, BTreeSet::new());
        for instr in &program.instrs {
            let (dropout, count, rates) = match &instr.op {
                Op::Attention(attrs) => (attrs.dropout, &mut probabilities, &[0.2][..]),
                Op::Dropout(attrs) => (Some(*attrs), &mut elements, &[0.1, 0.3][..]),
                _ => continue,
            };
            let dropout = dropout.expect("attention drops");
            assert!(rates.contains(&dropout.p), "{name}: {dropout:?}");
            assert!(sites.insert(dropout.site), "{name}: site {} twice", dropout.site);
            *count += 1;
        }
        assert_eq!((probabilities, elements), (layers, 1 + 2 * layers), "{name}");
        // Without the option, as scoring and generation build it, nothing drops.
        let program = build_program(&spec, &BuildOptions::new(Head::GatheredLogits)).unwrap();
        assert!(program.instrs.iter().all(|instr| !instr.op.drops()), "{name}");
    }
}

/// A family's own name for the rate of attention's probabilities, read and written.
#[test]
fn the_rate_is_in_config_json() {
    for (name, key) in [
        ("llama", "attention_dropout"),
        ("gpt2", "attn_pdrop"),
        ("gpt_neox", "attention_dropout"),
        ("phi3", "attention_dropout"),
        ("bert", "attention_probs_dropout_prob"),
        ("modernbert", "attention_dropout"),
        ("deepseek_v3", "attention_dropout"),
    ] {
        let config = dropping(name).to_hf_config().unwrap();
        assert_eq!(config[key], 0.2, "{name}");
        let read = ModelSpec::from_hf_config(&config).unwrap().dropout.attn;
        assert_eq!(read.to_bits(), DROPOUT.attn.to_bits(), "{name}");
    }
}
