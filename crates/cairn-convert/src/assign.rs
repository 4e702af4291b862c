//! Encodings for single weights under a limit of bytes, chosen by what each costs on a text.
//!
//! Weights are taken by class: the same module of all layers. Each class is measured in each encoding
//! by itself (`sensitivity`). All begin in what takes the fewest bytes; then, again and again,
//! the change that lowers the divergence most for its bytes is made, as long as it fits. Measurements do
//! not depend on threads, so the choice is a function of model, text, limit and encodings.

use std::collections::BTreeMap;

use cairn_artifacts::hash::Hasher;
use cairn_artifacts::leanpack::{AssignedClass, Assignment};
use cairn_kernels::{Cpu, Encoding};

use crate::error::ConvertError;
use crate::sensitivity::{ClassCost, Cost, Matrix, Probe, SensitivityJob, classes};

/// How many bytes a pack may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteLimit {
    /// Of the whole file.
    pub file: u64,
    /// Of everything that is no weight matrix.
    pub others: u64,
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    /// The encoding of each weight matrix.
    pub encodings: BTreeMap<String, Encoding>,
    /// How it came about.
    pub assignment: Assignment,
}

/// Chooses. `progress` is told measurements done and in all, and ends them by returning `false`.
///
/// # Errors
///
/// [`ConvertError::ByteLimit`] if no choice is small enough; otherwise as
/// [`sensitivity`](crate::sensitivity()).
///
/// # Panics
///
/// As [`sensitivity`](crate::sensitivity()).
pub fn choose_encodings(
    job: &SensitivityJob<'_>,
    limit: ByteLimit,
    cpu: Cpu,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Chosen, ConvertError> {
    let mut probe = Probe::new(job, cpu)?;
    let measured = probe.class_costs(false, progress)?;
    let room = limit.file.saturating_sub(limit.others);
    let choice = choose(&measured, room).map_err(|least| ConvertError::ByteLimit {
        limit: limit.file,
        least: least.saturating_add(limit.others),
    })?;
    let (_, groups) = classes(job.spec)?;
    let mut encodings = BTreeMap::new();
    let mut matrices: Vec<(&Matrix, Encoding)> = Vec::new();
    let mut rows = Vec::new();
    for (class, &index) in measured.iter().zip(&choice) {
        let Cost { encoding, bytes, kl, .. } = class.rounded[index];
        rows.push(AssignedClass {
            class: class.class.clone(),
            encoding: encoding.to_owned(),
            bytes: bytes as u64,
            kl,
        });
        let encoding = job.encodings[index];
        for matrix in &groups[&class.class] {
            encodings.insert(matrix.name.clone(), encoding);
            matrices.push((matrix, encoding));
        }
    }
    let Cost { kl, perplexity_change, .. } = probe.cost(&matrices)?;
    let mut hasher = Hasher::new();
    job.rows.iter().flatten().for_each(|id| hasher.update(&id.to_le_bytes()));
    let assignment = Assignment {
        limit_bytes: limit.file,
        text: hasher.finish(),
        tokens: job.rows.iter().map(Vec::len).sum::<usize>() as u64,
        kl,
        perplexity_change,
        classes: rows,
    };
    Ok(Chosen { encodings, assignment })
}

/// For each class which of its costs to take; the fewest bytes there are, where they are too many.
fn choose(classes: &[ClassCost], room: u64) -> Result<Vec<usize>, u64> {
    let least = |class: &ClassCost| {
        let costs = class.rounded.iter().enumerate();
        let smaller =
            costs.min_by(|(_, a), (_, b)| a.bytes.cmp(&b.bytes).then(a.kl.total_cmp(&b.kl)));
        smaller.map_or(0, |(index, _)| index)
    };
    let mut choice: Vec<usize> = classes.iter().map(least).collect();
    let bytes = |class: usize, index: usize| classes[class].rounded[index].bytes as u64;
    let mut used: u64 = choice.iter().enumerate().map(|(class, &index)| bytes(class, index)).sum();
    if used > room {
        return Err(used);
    }
    loop {
        let mut best: Option<(f64, usize, usize)> = None;
        for (class, &now) in choice.iter().enumerate() {
            let costs = &classes[class].rounded;
            for (index, cost) in costs.iter().enumerate() {
                let won = costs[now].kl - cost.kl;
                let more = bytes(class, index).saturating_sub(bytes(class, now));
                // Where both are infinite, nothing is won, and the difference is no number.
                if won.is_nan() || won <= 0.0 || more > room - used {
                    continue;
                }
                #[expect(clippy::cast_precision_loss, reason = "a rate to compare by")]
                let rate = won / more.max(1) as f64;
                if best.is_none_or(|(highest, ..)| rate > highest) {
                    best = Some((rate, class, index));
                }
            }
        }
        let Some((_, class, index)) = best else { return Ok(choice) };
        used = used - bytes(class, choice[class]) + bytes(class, index);
        choice[class] = index;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(name: &str, costs: &[(usize, f64)]) -> ClassCost {
        let cost =
            |&(bytes, kl): &(usize, f64)| Cost { encoding: "", bytes, kl, perplexity_change: 0.0 };
        ClassCost {
            class: name.to_owned(),
            matrices: 1,
            elements: 1,
            rounded: costs.iter().map(cost).collect(),
        }
    }

    #[test]
    fn bytes_go_where_they_lower_the_divergence_most() {
        let classes =
            [class("a", &[(100, 0.0), (50, 0.1), (25, 0.9)]), class("b", &[(80, 0.0), (20, 0.01)])];
        let check = |room, expected: Result<Vec<usize>, u64>| {
            assert_eq!(choose(&classes, room), expected, "{room} bytes");
        };
        check(44, Err(45));
        check(45, Ok(vec![2, 1]));
        check(70, Ok(vec![1, 1]));
        check(119, Ok(vec![1, 1]));
        check(120, Ok(vec![0, 1]));
        check(179, Ok(vec![0, 1]));
        check(180, Ok(vec![0, 0]));
    }

    #[test]
    fn what_costs_more_bytes_and_divergence_is_never_chosen() {
        let classes = [class("a", &[(40, 0.2), (30, 0.1), (20, 0.5)])];
        assert_eq!(choose(&classes, 1000), Ok(vec![1]));
    }
}
