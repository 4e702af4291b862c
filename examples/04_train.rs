//! Training without files: a small model learns one sentence by heart.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::error::Error;

use cairn_data::loader::{LoaderBatch, Sequence};
use cairn_kernels::{Cpu, Encoding};
use cairn_model::init_weights;
use cairn_program::Recompute;
use cairn_spec::recipe::{Facts, Format, RecipeFile};
use cairn_train::{Learner, MicroBatch, Place, ProgramOptions, Programs};

const SENTENCE: &[u8] = b"A cairn is a pile of stones that shows the way. ";
const RECIPE: &str = r#"
schema = "train/2"
[model]
family = "llama"
hidden_size = 64
num_hidden_layers = 2
num_attention_heads = 4
intermediate_size = 160
vocab_size = 256
[data]
corpus = "none"
seq_len = 64
[budget]
steps = 60
"#;

/// One row: each byte, and the byte after it as its target.
fn batch() -> LoaderBatch {
    let length = SENTENCE.len();
    let id = |at: usize| u32::from(SENTENCE[at % length]);
    LoaderBatch {
        ids: (0..length).map(id).collect(),
        positions: (0..).take(length).collect(),
        targets: (1..=length).map(id).collect(),
        loss_weights: vec![1.0; length],
        sequences: vec![Sequence { start: 0, len: length }],
        row_tokens: length,
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let facts = Facts { available_threads: 1, tokenizer_vocab_size: None };
    let recipe = RecipeFile::parse(RECIPE, Format::Toml)?.resolve(&facts)?;
    let options = ProgramOptions::of_recipe(&recipe.optimizer, Encoding::F32, Recompute::None);
    let plan = Programs::new(&recipe.model, &options)?.memory_plan(SENTENCE.len())?;
    println!("memory: {}", plan.bytes());

    let mut learner = Learner::new(plan, Cpu::detect(1))?;
    init_weights(learner.session_mut(), &recipe.model, 0);
    learner.start_states();
    let batch = batch();
    let micro = MicroBatch::whole(&batch);
    let mean = 1.0 / SENTENCE.len() as f32;
    let mut loss = f64::NAN;
    for step in 0..60 {
        let mut sum = 0.0;
        learner.accumulate(&micro, mean, Place { seed: 0, step, first_token: 0 }, &mut sum)?;
        let norm = learner.update(3e-3, step)?;
        loss = sum / SENTENCE.len() as f64;
        if step % 10 == 9 {
            println!("step {:2}: loss {loss:.4}, gradient norm {norm:.3}", step + 1);
        }
    }
    // The same on every machine, thread count and instruction set.
    println!("state {}", learner.hash());
    assert!(loss < 0.5, "the sentence is learned");
    Ok(())
}
