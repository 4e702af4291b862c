//! Changes from the command line: `section.key=value`, and sweeps over several values.
//!
//! An override changes its own key and no other. `section.key=null` takes a key out of the recipe,
//! as if its file did not have it: so a budget in steps replaces one in tokens.

use super::RecipeError;
use super::file::check_key;
use serde_json::{Map, Value};

/// Most runs a sweep may have.
pub const SWEEP_RUNS_MAX: usize = 1000;

/// The value that takes a key out of the recipe; the text of these letters is written `'"null"'`.
const ABSENT: &str = "null";

/// Sets one key, or takes it out; the value is checked when the sections are read again.
pub(super) fn apply(sections: &mut Map<String, Value>, text: &str) -> Result<(), RecipeError> {
    let (section, key, value) = split(text)?;
    let target = sections.entry(section).or_insert_with(|| Value::Object(Map::new()));
    let Value::Object(target) = target else { return Ok(()) };
    if value == ABSENT {
        // Nothing of a misspelled key would be left for the check of the sections to find.
        check_key(section, key)?;
        target.remove(key);
    } else {
        target.insert(key.to_owned(), parse_value(value));
    }
    Ok(())
}

fn split(text: &str) -> Result<(&str, &str, &str), RecipeError> {
    let bad = |reason: &str| RecipeError::BadOverride {
        text: text.to_owned(),
        reason: reason.to_owned(),
    };
    let (path, value) = text.split_once('=').ok_or_else(|| bad("there is no '='"))?;
    let (section, key) = path.split_once('.').ok_or_else(|| bad("the key has no section"))?;
    if section.is_empty() || key.is_empty() || value.trim().is_empty() {
        return Err(bad("section, key or value is empty"));
    }
    Ok((section.trim(), key.trim(), value.trim()))
}

/// A value in TOML's syntax; anything else is a text, so that paths and words need no quotes.
fn parse_value(text: &str) -> Value {
    let parsed = toml::from_str::<Map<String, Value>>(&format!("value = {text}"));
    match parsed {
        // One value and nothing smuggled in after it.
        Ok(mut table) if table.len() == 1 => table.remove("value").unwrap_or_default(),
        _ => Value::String(text.to_owned()),
    }
}

/// Expands `section.key=a,b` arguments into the overrides of each run of the grid; the last
/// argument varies fastest.
///
/// # Errors
///
/// [`RecipeError::BadOverride`] for an argument of another form, [`RecipeError::SweepTooLarge`]
/// beyond [`SWEEP_RUNS_MAX`] runs.
pub fn expand_sweep(arguments: &[impl AsRef<str>]) -> Result<Vec<Vec<String>>, RecipeError> {
    let mut runs: Vec<Vec<String>> = vec![Vec::new()];
    for argument in arguments {
        let (section, key, values) = split(argument.as_ref())?;
        let values = split_values(values);
        let count = runs.len().saturating_mul(values.len());
        if count > SWEEP_RUNS_MAX {
            return Err(RecipeError::SweepTooLarge { runs: count, max: SWEEP_RUNS_MAX });
        }
        let longer = |run: &Vec<String>| {
            let with = values.iter().map(|value| format!("{section}.{key}={value}"));
            with.map(|text| run.iter().cloned().chain([text]).collect()).collect::<Vec<_>>()
        };
        runs = runs.iter().flat_map(longer).collect();
    }
    Ok(runs)
}

/// Splits at commas that are neither in brackets nor in quotes.
fn split_values(text: &str) -> Vec<&str> {
    let (mut values, mut start, mut depth, mut quote) = (Vec::new(), 0, 0usize, None);
    for (i, c) in text.char_indices() {
        match (c, quote) {
            (_, Some(open)) if c == open => quote = None,
            (_, Some(_)) => {}
            ('"' | '\'', None) => quote = Some(c),
            ('[' | '{', None) => depth += 1,
            (']' | '}', None) => depth = depth.saturating_sub(1),
            (',', None) if depth == 0 => {
                values.push(text[start..i].trim());
                start = i + 1;
            }
            _ => {}
        }
    }
    values.push(text[start..].trim());
    values
}
