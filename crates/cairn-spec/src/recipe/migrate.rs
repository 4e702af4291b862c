//! Schema versions of recipes, and the chain that brings an older file up to date.

use super::RecipeError;
use serde_json::{Map, Value};

/// The schema that this version writes.
pub const SCHEMA: &str = "train/2";

/// One step of the chain: turns the sections of a schema into those of the next.
type Migration = fn(Map<String, Value>) -> Result<Map<String, Value>, RecipeError>;

/// Every schema but the newest, oldest first, with the step to the next.
const CHAIN: [(&str, Migration); 1] = [("train/1", from_train_1)];

/// Takes the schema out of a file's tree and brings its sections to [`SCHEMA`].
pub(super) fn migrate(mut tree: Map<String, Value>) -> Result<Map<String, Value>, RecipeError> {
    let schema = match tree.remove("schema") {
        Some(Value::String(schema)) => schema,
        _ => return Err(RecipeError::MissingSchema),
    };
    if schema == SCHEMA {
        return Ok(tree);
    }
    let Some(start) = CHAIN.iter().position(|(name, _)| *name == schema) else {
        return Err(RecipeError::UnknownSchema { schema });
    };
    CHAIN[start..].iter().try_fold(tree, |tree, (_, step)| step(tree))
}

/// `train/1` had one flat `[train]` section, `lr` for the learning rate and `tokens_per_batch`.
fn from_train_1(mut tree: Map<String, Value>) -> Result<Map<String, Value>, RecipeError> {
    const MOVED: [(&str, &str, &str); 17] = [
        ("name", "run", "name"),
        ("seed", "run", "seed"),
        ("threads", "run", "threads"),
        ("dtype", "run", "weights"),
        ("lr", "optimizer", "learning_rate"),
        ("betas", "optimizer", "betas"),
        ("weight_decay", "optimizer", "weight_decay"),
        ("clip", "optimizer", "max_grad_norm"),
        ("schedule", "schedule", "kind"),
        ("warmup", "schedule", "warmup_steps"),
        ("min_lr_ratio", "schedule", "min_lr_ratio"),
        ("batch_size", "batch", "micro_batch_size"),
        ("accumulate", "batch", "grad_accum_steps"),
        ("steps", "budget", "steps"),
        ("tokens", "budget", "tokens"),
        ("eval_every", "eval", "every"),
        ("save_every", "checkpoint", "every"),
    ];
    let Some(old) = tree.remove("train") else { return Ok(tree) };
    let Value::Object(mut old) = old else {
        return Err(RecipeError::WrongType {
            key: "train".to_owned(),
            reason: format!("it is a section, not the value {old}"),
        });
    };
    for (from, section, key) in MOVED {
        if let Some(value) = old.remove(from) {
            let target = tree.entry(section).or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(target) = target {
                target.insert(key.to_owned(), value);
            }
        }
    }
    match old.into_iter().next() {
        None => Ok(tree),
        Some((key, _)) => {
            Err(RecipeError::UnknownKey { section: "train".to_owned(), key, nearest: None })
        }
    }
}
