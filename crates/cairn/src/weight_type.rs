//! `--dtype`: how the weight matrices of a model are held in memory.

use cairn_kernels::{Encoding, Layout};
use cairn_model::{
    BuildOptions, Head, TensorSource, build_program, stored_encoding, stored_encodings,
};
use cairn_program::{Class, Sizes};
use cairn_spec::{DType, ModelSpec};
use clap::{Args, ValueEnum};
use serde::Serialize;

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
        default_value_t = WeightType::Auto
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

/// What can be asked for. All but `auto` round to the nearest where they cannot hold a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum WeightType {
    /// As stored.
    Auto,
    /// 32-bit floats.
    F32,
    /// The high half of 32-bit floats.
    Bf16,
    /// The same values in 12 bits, if their exponents are few.
    Bf16z,
    /// IEEE half-precision floats.
    F16,
    /// Signed bytes, a scale for 32.
    Q8,
    /// Four bits, a scale for 32.
    Q4,
    /// Four bits, quantiles of the normal distribution, a scale for 64.
    Nf4,
    /// Eight-bit floats (E4M3), a scale for 128.
    Fp8,
    /// Four-bit floats (MXFP4), a power of two for 32.
    Fp4,
}

impl WeightType {
    /// The encoding for a model's weights; says on `terminal` where keeping what is stored takes more
    /// memory than the file.
    pub(crate) fn encoding(
        self,
        model: &ModelFolder,
        terminal: Terminal,
    ) -> anyhow::Result<Encoding> {
        if let (Self::Auto, Some(pack)) = (self, model.pack()) {
            // Each matrix stays as it is stored: `ModelFolder::encodings`.
            return Ok(pack.storage().0);
        }
        let encoding = self.encoding_of(&model.spec, Some(&model.weights))?;
        if self == Self::Auto && encoding == Encoding::F32 {
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
        Ok(match (self.asked(), weights) {
            (Some(asked), _) => asked,
            (None, Some(weights)) => stored_encoding(spec, weights)?,
            (None, None) => match spec.dtype {
                DType::Bf16 => Encoding::Bf16,
                DType::F16 => Encoding::F16,
                _ => Encoding::F32,
            },
        })
    }

    fn asked(self) -> Option<Encoding> {
        match self {
            Self::Auto => None,
            Self::F32 => Some(Encoding::F32),
            Self::Bf16 => Some(Encoding::Bf16),
            Self::Bf16z => Some(Encoding::Bf16z),
            Self::F16 => Some(Encoding::F16),
            Self::Q8 => Some(Encoding::Q8),
            Self::Q4 => Some(Encoding::Q4),
            Self::Nf4 => Some(Encoding::Nf4),
            Self::Fp8 => Some(Encoding::Fp8),
            Self::Fp4 => Some(Encoding::Fp4),
        }
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
