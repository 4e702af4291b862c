//! A program: declared values and a straight-line list of instructions, and the builder that makes
//! one.
//!
//! **Invariant:** every temporary is written by exactly one instruction, before it is read.
//! Weights, gradients and states may be read and written in place; the operand then stands in the
//! inputs *and* the outputs of its instruction.
//!
//! Operands sit in fixed slots (see [`Op`]); an optional operand that is absent is `None`.

use std::collections::{BTreeMap, HashMap};

use cairn_kernels::{Compute, Encoding, Layout};
use serde::{Deserialize, Serialize};

use crate::dim::{Dim, Shape};
use crate::op::{Op, VIS_VERSION};
use crate::value::{Class, Value, ValueId, ValueType};
use crate::verify::{self, VerifyError};

/// One instruction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Instr {
    /// What it does.
    pub op: Op,
    /// Operands by slot.
    pub inputs: Vec<Option<ValueId>>,
    /// Results by slot; a result nobody reads may be left out.
    pub outputs: Vec<Option<ValueId>>,
    /// The transformer block it belongs to; `None` for embedding, final norm and head.
    pub block: Option<u32>,
    /// It is the first to write its gradient operand, so in the first micro-batch of a step it
    /// overwrites what is there instead of adding to it.
    pub first_write: bool,
    /// The arithmetic of its product; f32 where it has none.
    #[serde(default, skip_serializing_if = "Compute::is_f32")]
    pub compute: Compute,
}

impl Instr {
    /// Operands that are present.
    pub fn reads(&self) -> impl Iterator<Item = ValueId> + '_ {
        self.inputs.iter().flatten().copied()
    }

    /// Results that are present.
    pub fn writes(&self) -> impl Iterator<Item = ValueId> + '_ {
        self.outputs.iter().flatten().copied()
    }
}

/// A verified, typed, straight-line program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Program {
    /// Version of the instruction set it is written in.
    pub version: u32,
    /// Every declared value; a [`ValueId`] indexes it.
    pub values: Vec<Value>,
    /// In order of execution.
    pub instrs: Vec<Instr>,
    /// Temporaries that stay readable after a run.
    pub outputs: Vec<ValueId>,
    /// Instructions before this index are the forward pass; equal to `instrs.len()` where there is
    /// no backward pass.
    pub forward_len: usize,
}

impl Program {
    /// The declaration of a value.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.index()]
    }

    /// Finds a value by name.
    pub fn find(&self, name: &str) -> Option<ValueId> {
        self.ids().find(|&id| self.value(id).name == name)
    }

    /// Every value's id, in declaration order.
    pub fn ids(&self) -> impl Iterator<Item = ValueId> + use<> {
        let count = u32::try_from(self.values.len()).expect("the builder limits the count to u32");
        (0..count).map(ValueId)
    }

    /// Values of one class, in declaration order.
    pub fn of_class(&self, class: Class) -> impl Iterator<Item = (ValueId, &Value)> {
        self.ids().map(|id| (id, self.value(id))).filter(move |(_, value)| value.class == class)
    }

    /// Checks the whole program: every operand's type, shape, layout and order of dimensions, and
    /// that each temporary is written once before it is read.
    ///
    /// # Errors
    ///
    /// The first violation, naming the instruction, the value, what was expected and found.
    pub fn verify(&self) -> Result<(), VerifyError> {
        verify::verify(self)
    }

    /// Stores matrices among the weights in encodings of their own, by name; those that are not named,
    /// and those of plain row-major `f32`, stay as they are. Then each forward product is computed in
    /// `compute` where that multiplies what its weight has become, otherwise in f32.
    pub fn store_as(&mut self, encodings: &BTreeMap<String, Encoding>, compute: Compute) {
        for value in self.values.iter_mut().filter(|value| value.class == Class::Weight) {
            let ValueType::Encoded { layout, inputs, .. } = value.value_type else { continue };
            let Some(encoding) = encodings.get(&value.name) else { continue };
            let rows = value.shape.row_elements() / inputs.max(1);
            let encoding = encoding.for_shape(rows, inputs);
            value.value_type = ValueType::weight(encoding, encoding.layout_near(layout), inputs);
        }
        for index in 0..self.instrs.len() {
            let is_multiplied = verify::multiplies(self, &self.instrs[index], compute);
            self.instrs[index].compute = if is_multiplied { compute } else { Compute::F32 };
        }
    }

    /// Parameters in the weights: their elements, each tensor counted once.
    pub fn num_parameters(&self) -> usize {
        self.of_class(Class::Weight).map(|(_, weight)| weight.shape.row_elements()).sum()
    }

    pub(crate) fn builder(self) -> Builder {
        let names = self.ids().map(|id| (self.value(id).name.clone(), id)).collect();
        Builder { program: self, names, block: None, compute: Compute::F32 }
    }
}

/// Writes a program instruction by instruction, inferring each result's type and shape.
#[derive(Debug)]
pub struct Builder {
    pub(crate) program: Program,
    names: HashMap<String, ValueId>,
    block: Option<u32>,
    compute: Compute,
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl Builder {
    /// An empty program.
    pub fn new() -> Self {
        let program = Program {
            version: VIS_VERSION,
            values: Vec::new(),
            instrs: Vec::new(),
            outputs: Vec::new(),
            forward_len: 0,
        };
        Self { program, names: HashMap::new(), block: None, compute: Compute::F32 }
    }

    /// Marks the instructions that follow as part of `block`.
    pub fn set_block(&mut self, block: Option<u32>) {
        self.block = block;
    }

    /// Sets the arithmetic of the products that follow, as far as their weights are stored in what
    /// it multiplies; the others stay in f32.
    pub fn set_compute(&mut self, compute: Compute) {
        self.compute = compute;
    }

    /// Declares a value that a batch fills.
    pub fn input(&mut self, name: &str, value_type: ValueType, dims: &[Dim]) -> ValueId {
        self.declare(name, Class::Input, value_type, Shape::new(dims))
    }

    /// Declares a row-major `f32` weight, or returns it if it exists (tied weights).
    pub fn weight(&mut self, name: &str, dims: &[Dim]) -> ValueId {
        self.names
            .get(name)
            .copied()
            .unwrap_or_else(|| self.declare(name, Class::Weight, ValueType::F32, Shape::new(dims)))
    }

    /// Declares an encoded weight matrix `[outputs.., inputs..]`, or returns it if it exists.
    pub fn matrix(
        &mut self,
        name: &str,
        outputs: &[Dim],
        inputs: &[Dim],
        storage: (Encoding, Layout),
    ) -> ValueId {
        if let Some(&id) = self.names.get(name) {
            return id;
        }
        let dims: Vec<Dim> = outputs.iter().chain(inputs).copied().collect();
        let size = |dims: &[Dim]| dims.iter().filter_map(|dim| dim.size).product();
        let (height, width) = (size(outputs), size(inputs));
        let encoding = storage.0.for_shape(height, width);
        let value_type = ValueType::weight(encoding, encoding.layout_near(storage.1), width);
        self.declare(name, Class::Weight, value_type, Shape(dims))
    }

    /// Declares a state: it persists between runs.
    pub fn state(&mut self, name: &str, value_type: ValueType, dims: &[Dim]) -> ValueId {
        self.names
            .get(name)
            .copied()
            .unwrap_or_else(|| self.declare(name, Class::State, value_type, Shape::new(dims)))
    }

    /// Declares a value of any class.
    ///
    /// # Panics
    ///
    /// Panics if the name is taken: the caller builds two values with one name.
    pub fn declare(
        &mut self,
        name: &str,
        class: Class,
        value_type: ValueType,
        shape: Shape,
    ) -> ValueId {
        let id = ValueId(u32::try_from(self.program.values.len()).expect("fewer than 2^32 values"));
        let previous = self.names.insert(name.to_owned(), id);
        assert!(previous.is_none(), "value {name} is declared twice");
        self.program.values.push(Value { name: name.to_owned(), class, value_type, shape });
        id
    }

    /// Appends an instruction with one result and returns that result.
    ///
    /// # Errors
    ///
    /// [`VerifyError`] when the operands do not fit the operation.
    pub fn push(&mut self, name: &str, op: Op, inputs: &[ValueId]) -> Result<ValueId, VerifyError> {
        let slots: Vec<_> = inputs.iter().copied().map(Some).collect();
        Ok(self.push_slots(op, slots, &[Some(name)])?[0].expect("slot 0 was named"))
    }

    /// Appends an instruction; a result slot without a name is left out. Result slots that hold a
    /// persistent value written in place are filled from the inputs.
    ///
    /// # Errors
    ///
    /// [`VerifyError`] when the operands do not fit the operation.
    pub fn push_slots(
        &mut self,
        op: Op,
        inputs: Vec<Option<ValueId>>,
        names: &[Option<&str>],
    ) -> Result<Vec<Option<ValueId>>, VerifyError> {
        let mut instr = Instr {
            op,
            inputs,
            outputs: Vec::new(),
            block: self.block,
            first_write: false,
            compute: Compute::F32,
        };
        let results = verify::infer(&self.program, &instr)
            .map_err(|fault| fault.at(self.program.instrs.len(), &instr))?;
        for (slot, result) in results.into_iter().enumerate() {
            let output = match result {
                verify::Inferred::InPlace(id) => id,
                verify::Inferred::New(value_type, shape) => {
                    let name = names.get(slot).copied().flatten();
                    name.map(|name| self.declare(name, Class::Temp, value_type, shape))
                }
            };
            instr.outputs.push(output);
        }
        if verify::multiplies(&self.program, &instr, self.compute) {
            instr.compute = self.compute;
        }
        let outputs = instr.outputs.clone();
        self.program.instrs.push(instr);
        Ok(outputs)
    }

    /// Keeps a temporary readable after a run.
    pub fn output(&mut self, id: ValueId) {
        if !self.program.outputs.contains(&id) {
            self.program.outputs.push(id);
        }
    }

    /// A name that is not taken: `base`, or `base.2`, `base.3` and so on.
    pub(crate) fn fresh(&self, base: &str) -> String {
        if !self.names.contains_key(base) {
            return base.to_owned();
        }
        (2..)
            .map(|n| format!("{base}.{n}"))
            .find(|name| !self.names.contains_key(name))
            .expect("an unused number exists")
    }

    /// Finds a declared value by name.
    pub fn find(&self, name: &str) -> Option<ValueId> {
        self.names.get(name).copied()
    }

    /// Ends the program as a forward pass.
    ///
    /// # Errors
    ///
    /// [`VerifyError`] when the whole does not verify.
    pub fn finish(mut self) -> Result<Program, VerifyError> {
        self.program.forward_len = self.program.instrs.len();
        self.program.verify()?;
        Ok(self.program)
    }

    /// Ends a program whose first `forward_len` instructions are the forward pass.
    pub(crate) fn finish_training(mut self, forward_len: usize) -> Result<Program, VerifyError> {
        self.program.forward_len = forward_len;
        self.program.verify()?;
        Ok(self.program)
    }
}
