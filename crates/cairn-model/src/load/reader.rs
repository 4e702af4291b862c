//! The weights of a model's program, read out of its files one at a time.

use cairn_kernels::Cpu;
use cairn_kernels::memory::BytesMut;
use cairn_program::ValueType;
use cairn_spec::ModelSpec;

use super::fill::{Coverage, Filling};
use super::{LoadError, Naming, TensorSource, check_tensors, copies};
use crate::names::{TensorMap, TensorSlice};

/// The weights of a model's program, read out of its files one at a time.
#[expect(missing_debug_implementations, reason = "sources of tensors need not have one")]
pub struct WeightReader<'a> {
    map: TensorMap,
    spec: ModelSpec,
    naming: Naming,
    source: &'a dyn TensorSource,
    spelled: Box<dyn Fn(&str) -> String + 'a>,
}

impl<'a> WeightReader<'a> {
    /// Compares the tensors of `source` with those that the spec needs.
    ///
    /// # Errors
    ///
    /// [`LoadError::Mismatch`] lists every missing, extra and misshaped tensor; [`LoadError::Copy`]
    /// names a second head that a tied model would not use.
    pub fn new(spec: &ModelSpec, source: &'a dyn TensorSource) -> Result<Self, LoadError> {
        let naming = source.naming();
        let map = naming.map(spec, |tensor| source.shape(tensor).is_some())?;
        let spelled = Box::new(check_tensors(spec, &map, (source, naming))?);
        copies::check(spec, source)?;
        Ok(Self { map, spec: spec.clone(), naming, source, spelled })
    }

    /// The tensors that hold weights, as the source spells them, in program order.
    pub fn tensors(&self) -> Vec<String> {
        self.map.tensors().into_iter().map(|(name, _)| (self.spelled)(name)).collect()
    }

    /// Rows and columns of a weight, a vector's being one column; `None` if the model has no such weight.
    pub fn shape(&self, weight: &str) -> Option<(usize, usize)> {
        let slices = self.map.slices_of(weight);
        let columns = slices.first()?.columns;
        Some((slices.iter().map(|slice| slice.rows).sum(), columns))
    }

    /// Encodes one weight into `stored`, of which every byte is written; returns whether every value
    /// is known to be the source's, bit for bit. Of an encoding with shared scales nothing is known,
    /// unless the source is stored in it.
    ///
    /// # Errors
    ///
    /// [`LoadError::Unmapped`] if the model has no such weight, [`LoadError::Unreadable`] if its
    /// tensors cannot be read, [`LoadError::Overflow`] if the encoding makes finite values infinite.
    ///
    /// # Panics
    ///
    /// Panics if `stored` has another length than the form says, or is not aligned as weights are.
    pub fn read(
        &self,
        weight: &str,
        value_type: ValueType,
        cpu: &Cpu,
        stored: &mut [u8],
    ) -> Result<bool, LoadError> {
        let slices: Vec<TensorSlice> = self
            .map
            .slices_of(weight)
            .iter()
            .map(|slice| TensorSlice { tensor: (self.spelled)(&slice.tensor), ..slice.clone() })
            .collect();
        if slices.is_empty() {
            return Err(LoadError::Unmapped { name: weight.to_owned() });
        }
        let encoding = value_type.encoding().expect("a weight has an encoding");
        let layout = value_type.layout();
        let source = self.source;
        let rows = slices.iter().map(|slice| slice.rows).sum();
        let (form, coverage, slices) = ((encoding, layout), Coverage::All, &slices);
        let filling = Filling { slices, rows, form, source, coverage, compares: true };
        let filled = filling.fill(cpu, stored)?;
        let offset = self.naming.offset(&self.spec, weight);
        if offset != 0.0 {
            BytesMut::new(stored).f32s().iter_mut().for_each(|value| *value += offset);
        }
        filling.release();
        match filled.too_large.told(weight) {
            None => Ok(filled.is_exact && offset == 0.0),
            Some(text) => Err(LoadError::Overflow { encoding, tensors: vec![text] }),
        }
    }
}
