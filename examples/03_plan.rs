//! What a training run will take, before it starts: how memory falls as the limit does, because more
//! is computed again, and what is offered where nothing fits.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::error::Error;

use cairn_kernels::Cpu;
use cairn_spec::Hint;
use cairn_spec::recipe::{Facts, Format, RecipeFile};
use cairn_spec::units::RoundedBytes;
use cairn_train::{Plan, PlanRequest};

const RECIPE: &str = r#"
schema = "train/2"
[model]
family = "llama"
hidden_size = 256
num_hidden_layers = 8
num_attention_heads = 4
intermediate_size = 688
vocab_size = 2048
[data]
corpus = "data/none"
seq_len = 256
[batch]
micro_batch_size = 16
[budget]
tokens = "10M"
"#;

fn main() -> Result<(), Box<dyn Error>> {
    let file = RecipeFile::parse(RECIPE, Format::Toml)?;
    let facts = Facts { available_threads: 2, tokenizer_vocab_size: None };
    for limit in ["8GiB", "600MiB", "400MiB", "300MiB", "50MiB"] {
        let recipe =
            file.with_overrides(&[format!("run.memory_limit={limit}")])?.resolve(&facts)?;
        let request = PlanRequest {
            recipe: &recipe,
            baseline_bytes: 0,
            scratch_bytes: Cpu::scratch_bytes_of(recipe.run.threads) as u64,
            pace: None,
        };
        match Plan::new(&request) {
            Ok(plan) => println!(
                "{limit:>7}: {} at the peak, {:.1} GFLOP a step, {}",
                RoundedBytes(plan.bytes.total()),
                plan.flops_per_step / 1e9,
                plan.shape
            ),
            Err(error) => println!("{limit:>7}: {error}\n{:>9}{}", "", error.hints().join("\n")),
        }
    }
    Ok(())
}
