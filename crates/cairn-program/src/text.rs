//! Programs as text: one line per instruction, made to be read and diffed.
//!
//! ```text
//! model.layers.0.attn.normed : f32[t, d=64] = rms_norm(x0, model.layers.0.input_layernorm.weight) eps=1e-5
//! ```

use std::fmt;

use crate::program::{Instr, Program};
use crate::value::{Class, ValueId};

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "program vis/{}", self.version)?;
        for (class, title) in [
            (Class::Input, "input"),
            (Class::Weight, "weight"),
            (Class::Gradient, "gradient"),
            (Class::State, "state"),
        ] {
            for (_, value) in self.of_class(class) {
                writeln!(f, "  {title} {} : {}{}", value.name, value.value_type, value.shape)?;
            }
        }
        let mut block = None;
        for (index, instr) in self.instrs.iter().enumerate() {
            if index == self.forward_len {
                writeln!(f, "backward:")?;
                block = None;
            }
            if instr.block != block {
                block = instr.block;
                match block {
                    Some(block) => writeln!(f, " block {block}:")?,
                    None => writeln!(f, " outside the blocks:")?,
                }
            }
            self.write_instr(f, index, instr)?;
        }
        let names: Vec<&str> = self.outputs.iter().map(|&id| self.name_of(id)).collect();
        writeln!(f, "output {}", names.join(", "))
    }
}

impl Program {
    fn name_of(&self, id: ValueId) -> &str {
        &self.value(id).name
    }

    fn write_instr(&self, f: &mut fmt::Formatter<'_>, index: usize, instr: &Instr) -> fmt::Result {
        write!(f, "{index:5}  ")?;
        let mut first = true;
        for id in instr.writes() {
            if !first {
                f.write_str(", ")?;
            }
            first = false;
            let value = self.value(id);
            write!(f, "{}", value.name)?;
            if value.class == Class::Temp {
                write!(f, " : {}{}", value.value_type, value.shape)?;
            }
        }
        write!(f, " = {}(", instr.op.name())?;
        let operands: Vec<&str> =
            instr.inputs.iter().map(|id| id.map_or("_", |id| self.name_of(id))).collect();
        write!(f, "{})", operands.join(", "))?;
        // The attributes follow the name in the operation's own text.
        let text = instr.op.to_string();
        f.write_str(&text[instr.op.name().len()..])?;
        if instr.compute.is_f32() { writeln!(f) } else { writeln!(f, " compute={}", instr.compute) }
    }
}
