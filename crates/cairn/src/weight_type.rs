//! `--dtype`: how the weight matrices of a model are held in memory.

use std::sync::LazyLock;

use cairn_kernels::{Encoding, Layout};
use cairn_model::{
    BuildOptions, Head, TensorSource, build_program, stored_encoding, stored_encodings,
};
use cairn_program::{Class, Sizes};
use cairn_spec::{DType, ModelSpec};
use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use serde::{Serialize, Serializer};

use crate::model_folder::{ModelFolder, ModelWeights};
use crate::terminal::Terminal;

/// The flag.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct WeightTypeArgs {
    /// Type of weight matrices in memory; `auto` keeps the stored one, or takes f32 where matrices are
    /// stored in several, so that no value changes
    #[arg(
        long,
        value_enum,
        value_name = "TYPE",
        visible_alias = "weights",
        default_value_t = WeightType::AUTO
    )]
    pub(crate) dtype: WeightType,
}

/// Bytes of a model's weights in an encoding, as generation lays them out.
pub(crate) fn weight_bytes(spec: &ModelSpec, encoding: Encoding) -> anyhow::Result<usize> {
    let head = if spec.head.is_some() { Head::Logits } else { Head::Hidden };
    let options = BuildOptions { encoding, layout: Layout::Panel, ..BuildOptions::new(head) };
    let program = build_program(spec, &options)?;
    let sizes = Sizes::dense(1, 1);
    Ok(program.of_class(Class::Weight).map(|(_, weight)| weight.bytes(&sizes)).sum())
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

    /// The encoding for a model's weights; says on `terminal` where keeping what is stored takes more
    /// memory than the file.
    pub(crate) fn encoding(
        self,
        model: &ModelFolder,
        terminal: Terminal,
    ) -> anyhow::Result<Encoding> {
        if let (Self::AUTO, Some(pack)) = (self, model.pack()) {
            // Each matrix stays as it is stored: `ModelFolder::encodings`.
            return Ok(pack.storage().0);
        }
        let encoding = self.encoding_of(&model.spec, Some(&model.weights))?;
        if self == Self::AUTO && encoding == Encoding::F32 {
            warn_of_widening(model, terminal)?;
        }
        Ok(encoding)
    }

    /// The encoding for a model whose weights may be missing: `auto` is then what the description
    /// says.
    pub(crate) fn encoding_of(
        self,
        spec: &ModelSpec,
        weights: Option<&dyn TensorSource>,
    ) -> anyhow::Result<Encoding> {
        Ok(match (self.0, weights) {
            (Some(asked), _) => asked,
            (None, Some(weights)) => stored_encoding(spec, weights)?,
            (None, None) => match spec.dtype {
                DType::Bf16 => Encoding::Bf16,
                DType::F16 => Encoding::F16,
                _ => Encoding::F32,
            },
        })
    }
}

/// Says that matrices are held in more bytes than they are stored in, where they are.
fn warn_of_widening(model: &ModelFolder, terminal: Terminal) -> anyhow::Result<()> {
    const NARROWER: &str = "--dtype bf16 takes half of that, q8 a quarter";
    if let ModelWeights::Gguf(file) = &model.weights {
        let is_decoded = |name: &&str| model.weights.encoding(name).is_none();
        let tensors = file.tensors().filter(|tensor| is_decoded(&&*tensor.name));
        let mut names: Vec<&str> = tensors.map(|tensor| tensor.tensor_type.name()).collect();
        names.sort_unstable();
        names.dedup();
        if !names.is_empty() {
            let names = names.join(" and ");
            terminal.warn(format_args!("{names} weights are held as f32; {NARROWER}"));
            return Ok(());
        }
    }
    let stored = stored_encodings(&model.spec, &model.weights)?;
    if stored.len() > 1 {
        let names =
            stored.into_iter().map(|encoding| encoding.map_or("other types", Encoding::name));
        let names = names.collect::<Vec<_>>().join(" and ");
        terminal.warn(format_args!(
            "weight matrices are stored as {names}, so all are held as f32; {NARROWER}"
        ));
    }
    Ok(())
}
