//! What this machine was measured to do, kept between runs: ceilings and the tuner's choices.
//!
//! A profile is a file in the user's cache folder. It holds for one processor and one version of
//! the kernels; peaks and bandwidths in it are told apart by instruction set and threads. A file
//! that is damaged, foreign or of another version is refused with its name and never half used:
//! the caller measures again.

use std::fs;
use std::path::{Path, PathBuf};

use crate::bandwidth::Bandwidth;
use crate::cpu::Cpu;
use crate::isa::cpu_name;
use crate::peak::FmaPeak;
use crate::tuner::{Choice, Key, Tuning};

const SCHEMA: &str = "machine/1";
/// Version of the kernels that measurements hold for. It grows when a change of a kernel, of its
/// cuts or of a measurement makes older figures meaningless.
pub const KERNELS_VERSION: u32 = 2;

/// The measured figures of one machine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MachineProfile {
    peaks: Vec<FmaPeak>,
    bandwidths: Vec<Bandwidth>,
    /// The tuner's choices.
    pub tuning: Tuning,
}

/// A stored profile that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// The file cannot be read.
    #[error("cannot read the machine profile {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The file is not a machine profile of this version.
    #[error("{path} is not a machine profile of version {SCHEMA:?}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The file was measured elsewhere.
    #[error("{path} was measured on {found:?}, this machine is {expected:?}")]
    OtherMachine {
        /// The file.
        path: PathBuf,
        /// This machine.
        expected: String,
        /// The file's machine.
        found: String,
    },
    /// The file was measured with other kernels.
    #[error("{path} was measured with version {found} of the kernels, these are {KERNELS_VERSION}")]
    OtherKernels {
        /// The file.
        path: PathBuf,
        /// The file's version.
        found: u32,
    },
}

#[derive(serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    schema: Schema,
    machine: String,
    kernels: u32,
    peaks: Vec<FmaPeak>,
    bandwidths: Vec<Bandwidth>,
    choices: Vec<(Key, Choice)>,
}

#[derive(serde::Serialize, serde::Deserialize)]
enum Schema {
    #[serde(rename = "machine/1")]
    Version1,
}

impl MachineProfile {
    /// Reads a profile of this machine and these kernels.
    ///
    /// # Errors
    /// [`ProfileError`]: the file cannot be read, is damaged, or is another machine's or version's.
    /// Measure again in each case.
    pub fn load(path: &Path) -> Result<Self, ProfileError> {
        let io = |source| ProfileError::Io { path: path.to_owned(), source };
        let text = fs::read(path).map_err(io)?;
        let stored: Stored = serde_json::from_slice(&text)
            .map_err(|source| ProfileError::Format { path: path.to_owned(), source })?;
        let (expected, found) = (cpu_name(), stored.machine);
        if found != expected {
            return Err(ProfileError::OtherMachine { path: path.to_owned(), expected, found });
        }
        if stored.kernels != KERNELS_VERSION {
            let (path, found) = (path.to_owned(), stored.kernels);
            return Err(ProfileError::OtherKernels { path, found });
        }
        let tuning = Tuning { choices: stored.choices.into_iter().collect() };
        Ok(Self { peaks: stored.peaks, bandwidths: stored.bandwidths, tuning })
    }

    /// The text of the file, to be written whole or not at all.
    ///
    /// # Panics
    /// Never: numbers and names always have a text.
    pub fn to_json(&self) -> String {
        let stored = Stored {
            schema: Schema::Version1,
            machine: cpu_name(),
            kernels: KERNELS_VERSION,
            peaks: self.peaks.clone(),
            bandwidths: self.bandwidths.clone(),
            choices: self.tuning.choices.iter().map(|(key, choice)| (*key, *choice)).collect(),
        };
        serde_json::to_string_pretty(&stored).expect("numbers and names have a text")
    }

    /// The peak measured for the instruction set and threads of `cpu`.
    pub fn peak(&self, cpu: &Cpu) -> Option<FmaPeak> {
        let is_ours = |peak: &&FmaPeak| (peak.isa, peak.threads) == (cpu.isa(), cpu.threads());
        self.peaks.iter().find(is_ours).copied()
    }

    /// The bandwidth measured for the instruction set and threads of `cpu`.
    pub fn bandwidth(&self, cpu: &Cpu) -> Option<Bandwidth> {
        let is_ours = |one: &&Bandwidth| (one.isa, one.threads) == (cpu.isa(), cpu.threads());
        self.bandwidths.iter().find(is_ours).copied()
    }

    /// Every peak, in the order of measurement.
    pub fn peaks(&self) -> &[FmaPeak] {
        &self.peaks
    }

    /// Every bandwidth, in the order of measurement.
    pub fn bandwidths(&self) -> &[Bandwidth] {
        &self.bandwidths
    }

    /// Keeps a peak in place of an earlier one for the same instruction set and threads.
    pub fn keep_peak(&mut self, peak: FmaPeak) {
        self.peaks.retain(|old| (old.isa, old.threads) != (peak.isa, peak.threads));
        self.peaks.push(peak);
    }

    /// Keeps a bandwidth in place of an earlier one for the same instruction set and threads.
    pub fn keep_bandwidth(&mut self, bandwidth: Bandwidth) {
        let key = (bandwidth.isa, bandwidth.threads);
        self.bandwidths.retain(|old| (old.isa, old.threads) != key);
        self.bandwidths.push(bandwidth);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::Encoding;
    use crate::isa::Isa;
    use crate::tuner::{ProductKind, TuneCase};

    fn peak(gflops: f64) -> FmaPeak {
        FmaPeak { isa: Isa::Scalar, threads: 2, gflops }
    }

    fn bandwidth(gbs: f64) -> Bandwidth {
        let (isa, threads, buffer_bytes) = (Isa::Scalar, 2, 1 << 30);
        Bandwidth { isa, threads, buffer_bytes, passes: 15, gbs, gbs_min: 0.5 * gbs, gbs_max: gbs }
    }

    #[test]
    fn figures_are_kept_for_their_instruction_set_and_threads() {
        let mut profile = MachineProfile::default();
        profile.keep_peak(peak(1.0));
        profile.keep_peak(peak(2.0));
        profile.keep_bandwidth(bandwidth(3.0));
        let cpu = Cpu::new(Isa::Scalar, 2);
        assert_eq!(profile.peak(&cpu), Some(peak(2.0)));
        assert_eq!(profile.bandwidth(&cpu), Some(bandwidth(3.0)));
        assert_eq!(profile.peaks().len(), 1);
        let other = Cpu::new(Isa::Scalar, 1);
        assert_eq!((profile.peak(&other), profile.bandwidth(&other)), (None, None));
    }

    #[test]
    fn a_profile_reads_back_equal_and_others_are_refused() {
        let file = format!("cairn-profile-{}.json", std::process::id());
        let path = std::env::temp_dir().join(file);
        let mut profile = MachineProfile::default();
        profile.keep_peak(peak(1.5));
        profile.keep_bandwidth(bandwidth(2.5));
        let cpu = Cpu::detect(1);
        let case =
            TuneCase { product: ProductKind::Matmul, encoding: Encoding::F32, t: 9, n: 33, k: 40 };
        profile.tuning.measure(&cpu, &[case], |_| {});
        let text = profile.to_json();
        fs::write(&path, &text).unwrap();
        assert_eq!(MachineProfile::load(&path).unwrap(), profile);
        let altered = |from: &str, to: &str| {
            assert!(text.contains(from), "{from}");
            fs::write(&path, text.replace(from, to)).unwrap();
            MachineProfile::load(&path).unwrap_err()
        };
        let other = altered(&cpu_name(), "another machine");
        assert!(matches!(other, ProfileError::OtherMachine { .. }), "{other}");
        let other = altered("\"kernels\": 2", "\"kernels\": 1");
        assert!(matches!(other, ProfileError::OtherKernels { found: 1, .. }), "{other}");
        let broken = altered("machine/1", "machine/9");
        assert!(matches!(broken, ProfileError::Format { .. }), "{broken}");
        let broken = altered("]", "");
        assert!(matches!(broken, ProfileError::Format { .. }), "{broken}");
        fs::remove_file(&path).unwrap();
        assert!(matches!(MachineProfile::load(&path), Err(ProfileError::Io { .. })));
    }
}
