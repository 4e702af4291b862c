//! Train or validation: decided for a group as a whole, so that near-copies stay on one side.
//!
//! The side is a hash of (seed, group) against the wanted fraction: it does not depend on the other
//! groups, so a corpus that grows keeps its split. Only where that would leave a side empty does the
//! group nearest to the border change sides.

use std::fmt;

use cairn_artifacts::hash::Hasher;
use serde::{Deserialize, Serialize};

use super::CorpusError;

/// A side of the split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// What is learned from.
    Train,
    /// What is measured on.
    Validation,
}

impl Split {
    /// Both, in order.
    pub const ALL: [Self; 2] = [Self::Train, Self::Validation];

    /// `train` or `validation`, as in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is kept together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SplitBy {
    /// Groups: packages, else top folders.
    #[default]
    Group,
    /// Single documents. Near-copies may then be on both sides, and validation looks better than
    /// it is.
    Document,
}

/// How to split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitSettings {
    /// Another seed gives another split.
    pub seed: u64,
    /// Wanted share of the groups in validation; 0 for none.
    pub validation_fraction: f64,
    /// What is kept together.
    pub by: SplitBy,
}

impl Default for SplitSettings {
    fn default() -> Self {
        Self { seed: 0, validation_fraction: 0.05, by: SplitBy::Group }
    }
}

impl SplitSettings {
    /// Assigns a side to every name, in the order given.
    ///
    /// # Errors
    ///
    /// [`CorpusError::Setting`] for a fraction outside 0 to 1, [`CorpusError::OneGroup`] if there is
    /// only one name to put on two sides.
    pub(super) fn assign<'a>(
        &self,
        names: impl Iterator<Item = &'a str>,
    ) -> Result<Vec<Split>, CorpusError> {
        let fraction = self.validation_fraction;
        if !(0.0..1.0).contains(&fraction) {
            return Err(CorpusError::Setting {
                name: "validation_fraction",
                value: fraction.to_string(),
                expected: "at least 0 and below 1",
            });
        }
        let mut only = None;
        let places: Vec<f64> = names
            .inspect(|name| only = Some((*name).to_owned()))
            .map(|name| place(self.seed, name))
            .collect();
        let side = |place: &f64| if *place < fraction { Split::Validation } else { Split::Train };
        let mut sides: Vec<Split> = places.iter().map(side).collect();
        if fraction == 0.0 {
            return Ok(sides);
        }
        if let ([_], Some(group)) = (sides.as_slice(), only) {
            return Err(CorpusError::OneGroup { group });
        }
        let nearest = |first: bool| {
            let compare = |a: &(usize, &f64), b: &(usize, &f64)| a.1.total_cmp(b.1);
            let places = places.iter().enumerate();
            let found = if first { places.min_by(compare) } else { places.max_by(compare) };
            found.map(|(index, _)| index)
        };
        for (missing, first) in [(Split::Validation, true), (Split::Train, false)] {
            if !sides.contains(&missing)
                && let Some(index) = nearest(first)
            {
                sides[index] = missing;
            }
        }
        Ok(sides)
    }
}

/// Where a name falls between 0 and 1 under a seed.
fn place(seed: u64, name: &str) -> f64 {
    let mut hasher = Hasher::new();
    hasher.update(b"cairn corpus split/1");
    hasher.update(&seed.to_le_bytes());
    hasher.update(name.as_bytes());
    let [a, b, c, d, ..] = *hasher.finish().as_bytes();
    f64::from(u32::from_le_bytes([a, b, c, d])) / (f64::from(u32::MAX) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|index| format!("group-{index}")).collect()
    }

    fn assign(settings: &SplitSettings, names: &[String]) -> Result<Vec<Split>, CorpusError> {
        settings.assign(names.iter().map(String::as_str))
    }

    #[test]
    fn fraction_is_met_and_growth_keeps_the_sides() {
        let settings = SplitSettings { validation_fraction: 0.2, ..SplitSettings::default() };
        let sides = assign(&settings, &names(2000)).unwrap();
        let validation = sides.iter().filter(|side| **side == Split::Validation).count();
        // 400 expected, standard deviation 18.
        assert!((310..490).contains(&validation), "{validation}");
        assert_eq!(assign(&settings, &names(1000)).unwrap(), sides[..1000]);
        let other = SplitSettings { seed: 1, ..settings };
        assert_ne!(assign(&other, &names(2000)).unwrap(), sides);
    }

    #[test]
    fn no_side_stays_empty() {
        for seed in 0..50 {
            for (fraction, count) in [(0.001, 2), (0.001, 7), (0.999, 2), (0.999, 5)] {
                let settings =
                    SplitSettings { seed, validation_fraction: fraction, by: SplitBy::Group };
                let sides = assign(&settings, &names(count)).unwrap();
                for side in Split::ALL {
                    assert!(sides.contains(&side), "{side} is empty with seed {seed}");
                }
            }
        }
    }

    #[test]
    fn impossible_splits_are_refused() {
        let with =
            |validation_fraction| SplitSettings { validation_fraction, ..SplitSettings::default() };
        for fraction in [1.0, -0.1, f64::NAN, f64::INFINITY] {
            let error = assign(&with(fraction), &names(3)).unwrap_err();
            assert!(matches!(error, CorpusError::Setting { .. }), "{error}");
        }
        let error = assign(&with(0.5), &names(1)).unwrap_err();
        assert!(matches!(error, CorpusError::OneGroup { .. }), "{error}");
        assert_eq!(assign(&with(0.0), &names(1)).unwrap(), [Split::Train]);
        assert_eq!(assign(&with(0.5), &[]).unwrap(), []);
    }
}
