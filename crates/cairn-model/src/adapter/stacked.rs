//! Adapters of parameters, as PEFT 0.21 has them with transformers 5: `target_parameters`.
//!
//! Experts are no modules there but stacked matrices, `experts.gate_up_proj` and `experts.down_proj`. PEFT
//! wraps `experts` once for each of the two, `down_proj` outside: beside it, the pair of `gate_up_proj` is
//! called `experts.base_layer`. `A` has the experts' rows one after the other, `B` their columns by turns
//! (`ParamWrapper.get_delta_weight` of `tuners/lora/layer.py`). Gate and up are one matrix: they share `A`
//! and have each its rows of `B`. Of all other parameters the tensors are those of a module.

use cairn_spec::model::{Family, Mlp};
use cairn_spec::{LoraSpec, ModelSpec};

use super::{A_SUFFIX, Adapted, AdapterError, AdapterMap, B_SUFFIX, WRAPPER, names};
use crate::names::{Placement, Role, TensorSlice};

/// Experts' matrices: ours, the parameter that transformers holds them in, and whether other rows stand
/// before them there.
const EXPERTS: [(&str, &str, bool); 3] = [
    (".gate_proj.weight", ".gate_up_proj", false),
    (".up_proj.weight", ".gate_up_proj", true),
    (".down_proj.weight", ".down_proj", false),
];

/// What stacked experts' parameter a weight lies in, and whether it is its second half.
fn stack(weight: &str) -> Option<(String, bool)> {
    EXPERTS.iter().find_map(|(ours, theirs, is_second)| {
        let stem = weight.strip_suffix(ours)?;
        Some((format!("{stem}{theirs}"), *is_second))
    })
}

/// The parameter that transformers 5 holds a matrix of a family's module in.
pub(super) fn parameter(family: Family, slice: &TensorSlice, module: &str) -> String {
    match stack(&slice.weight).filter(|_| slice.role == Role::Experts) {
        Some((parameter, _)) => parameter,
        None => {
            let name = names(family, module).pop().expect("a module has a name");
            format!("{name}.weight")
        }
    }
}

impl AdapterMap {
    /// Adds the adapter of a parameter, or an expert's part of it.
    pub(super) fn add_parameter(
        &mut self,
        (spec, lora): (&ModelSpec, &LoraSpec),
        slice: &TensorSlice,
        module: &str,
        rank: usize,
    ) -> Result<(), AdapterError> {
        let parameter = parameter(spec.family, slice, module);
        #[expect(clippy::cast_possible_truncation, reason = "applied to f32 values")]
        let scale = lora.scale(&parameter, rank) as f32;
        let (Role::Experts, Mlp::Moe(moe)) = (slice.role, &spec.mlp) else {
            if matches!(slice.placement, Placement::TransposedColumns { .. }) {
                return Err(AdapterError::Transposed { parameter });
            }
            let name = parameter.trim_end_matches(".weight").to_owned();
            return self.add(slice, module, (name, rank, scale));
        };
        self.modules.insert(module.to_owned());
        let stem = slice.weight.trim_end_matches(".weight");
        let (a, b) = (format!("{parameter}{A_SUFFIX}"), format!("{stem}{B_SUFFIX}"));
        let adapted = Adapted { a, b, rank, scale };
        if self.adapted.contains_key(&slice.weight) {
            return Ok(());
        }
        let is_new = self.adapted.values().all(|other| other.a != adapted.a);
        let (path, _) = parameter.rsplit_once('.').expect("experts have a name");
        let down = lora.parameter_rank(&format!("{path}.down_proj"));
        let is_inside = down.is_some() && parameter.ends_with(".gate_up_proj");
        let name = format!("{WRAPPER}{path}{}", if is_inside { ".base_layer" } else { "" });
        let parts = moe.num_experts;
        if is_new {
            let (rows, columns) = (parts * rank, slice.columns);
            self.tensors.push(TensorSlice {
                weight: adapted.a.clone(),
                first_row: 0,
                rows,
                tensor: format!("{name}{A_SUFFIX}"),
                shape: vec![rows, columns],
                placement: Placement::Whole,
                ..slice.clone()
            });
        }
        let halves = if parameter.ends_with(".gate_up_proj") { 2 } else { 1 };
        let is_second = stack(&slice.weight).is_some_and(|(_, is_second)| is_second);
        let start = if is_second { slice.rows } else { 0 };
        self.tensors.push(TensorSlice {
            weight: adapted.b.clone(),
            first_row: 0,
            rows: parts * slice.rows,
            columns: rank,
            tensor: format!("{name}{B_SUFFIX}"),
            shape: vec![halves * slice.rows, rank * parts],
            placement: Placement::ColumnsByTurns { start, parts },
            ..slice.clone()
        });
        self.adapted.insert(slice.weight.clone(), adapted);
        Ok(())
    }
}
