//! `--dtype`: how the weight matrices of a model are held in memory.

use std::sync::LazyLock;

use cairn_kernels::{Compute, Encoding};
use cairn_model::{StoredWeights, TensorSource, stored_weights};
use cairn_spec::{DType, ModelSpec};
use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use serde::{Serialize, Serializer};

use crate::context::Context;
use crate::gate_file;
use crate::model_folder::{ModelFolder, ModelWeights};
use crate::pack_args::storage_of;
use crate::storage::Storage;
use crate::terminal::Terminal;

/// The flag.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct WeightTypeArgs {
    /// Type of weight matrices in memory; `auto` keeps each as it is stored, or takes f32 for what is
    /// stored as nothing that is computed with here, so that no value changes
    #[arg(
        long,
        value_enum,
        value_name = "TYPE",
        visible_alias = "weights",
        default_value_t = WeightType::AUTO
    )]
    pub(crate) dtype: WeightType,
}

/// What can be asked for: an encoding, or `auto`, as stored. All but `auto` round to the nearest where
/// they cannot hold a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WeightType(pub(crate) Option<Encoding>);

impl ValueEnum for WeightType {
    fn value_variants<'a>() -> &'a [Self] {
        static ALL: LazyLock<Vec<WeightType>> = LazyLock::new(|| {
            let encodings = Encoding::ALL.into_iter().map(|encoding| WeightType(Some(encoding)));
            std::iter::once(WeightType::AUTO).chain(encodings).collect()
        });
        &ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let help = match self.0 {
            None => "As stored",
            Some(Encoding::F32) => "32-bit floats",
            Some(Encoding::Bf16) => "The high half of 32-bit floats",
            Some(Encoding::Bf16z) => "The same values in 12 bits, if their exponents are few",
            Some(Encoding::F16) => "IEEE half-precision floats",
            Some(Encoding::Q8) => "Signed bytes, a scale for 32",
            Some(Encoding::Q4) => "Four bits, a scale for 32",
            Some(Encoding::Nf4) => {
                "Four bits, quantiles of the normal distribution, a scale for 64"
            }
            Some(Encoding::Fp8) => "Eight-bit floats (E4M3), a scale for 128",
            Some(Encoding::Fp4) => "Four-bit floats (MXFP4), a power of two for 32",
        };
        Some(PossibleValue::new(self.name()).help(help))
    }
}

impl Serialize for WeightType {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl WeightType {
    /// As stored.
    pub(crate) const AUTO: Self = Self(None);

    /// What flags and records call it.
    pub(crate) fn name(self) -> &'static str {
        self.0.map_or("auto", Encoding::name)
    }

    /// How the weights of a model are held that is to be computed with in `compute`: the one place that
    /// asks whether that may be done on this machine. Says where keeping what is stored takes more memory
    /// than the file.
    pub(crate) fn storage(
        self,
        model: &ModelFolder,
        compute: Compute,
        context: &Context,
    ) -> anyhow::Result<Storage> {
        let storage = match (self.0, model.pack()) {
            (Some(asked), _) => Storage::uniform(asked),
            (None, Some(pack)) => storage_of(pack),
            (None, None) => {
                let stored = stored_weights(&model.spec, &model.weights)?;
                warn_of_widening(&stored, model, context.terminal);
                as_stored(&stored)
            }
        };
        gate_file::check(model, (&storage, compute), context)?;
        Ok(storage)
    }

    /// How the weights of a model are held that may be missing: `auto` is then what the description
    /// says.
    pub(crate) fn storage_of(
        self,
        spec: &ModelSpec,
        weights: Option<&dyn TensorSource>,
    ) -> anyhow::Result<Storage> {
        Ok(match (self.0, weights) {
            (Some(asked), _) => Storage::uniform(asked),
            (None, Some(weights)) => as_stored(&stored_weights(spec, weights)?),
            (None, None) => Storage::uniform(match spec.dtype {
                DType::Bf16 => Encoding::Bf16,
                DType::F16 => Encoding::F16,
                _ => Encoding::F32,
            }),
        })
    }
}

/// Each matrix as it is stored, or in f32.
fn as_stored(stored: &StoredWeights) -> Storage {
    Storage { encoding: stored.most(), own: stored.others() }
}

/// Says that matrices are held in more bytes than they are stored in, where they are.
fn warn_of_widening(stored: &StoredWeights, model: &ModelFolder, terminal: Terminal) {
    const NARROWER: &str = "--dtype bf16 takes half of that, q8 a quarter";
    let widened = stored.widened();
    let Some((first, why)) = widened.first() else { return };
    let mut names = Vec::new();
    if let ModelWeights::Gguf(file) = &model.weights {
        let is_decoded = |name: &&str| model.weights.encoding(name).is_none();
        let tensors = file.tensors().filter(|tensor| is_decoded(&&*tensor.name));
        names.extend(tensors.map(|tensor| tensor.tensor_type.name()));
        names.sort_unstable();
        names.dedup();
    }
    let kinds = if names.is_empty() { String::new() } else { format!(" ({})", names.join(", ")) };
    let more = match widened.len() {
        1 => "is".to_owned(),
        count => format!("and {} more are", count - 1),
    };
    terminal
        .warn(format_args!("{first} {more} held as f32{kinds}, because {first} {why}; {NARROWER}"));
}
