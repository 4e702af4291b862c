//! The virtual instruction set: a model is a program, and everything done with it walks that
//! program.
//!
//! | file | noun |
//! |---|---|
//! | `dim` | named dimensions and shapes |
//! | `value` | what instructions read and write |
//! | `op` | the operations and their attributes |
//! | `program` | the instruction list and its builder |
//! | `verify` | types and shapes of every operation, and the check of a whole program |
//! | `differentiate` | forward program → training program |
//! | `recompute` | memory for arithmetic |
//! | `cut` | a program in two at a block boundary |
//! | `update` | gradients → new weights, as a program |
//! | `plan` | offsets and lifetimes: bytes known before a run |
//! | `account` | FLOPs and bytes of each instruction |
//! | `session` | memory for programs that share weights and states |
//! | `execute` | each instruction through its kernel |
//! | `text` | programs to read |
//! | `picture` | programs to look at |
#![forbid(unsafe_code)]

mod account;
mod cut;
mod differentiate;
mod dim;
mod execute;
mod op;
mod picture;
mod plan;
mod program;
mod recompute;
mod session;
mod text;
mod update;
mod value;
mod verify;

pub use account::{Cost, Workload};
pub use cut::cut;
pub use differentiate::{BALANCE_WEIGHT, DifferentiateError, GRADIENT_PREFIX, Loss, differentiate};
pub use dim::{Dim, DimName, Shape, Sizes};
pub use execute::TOKEN_TYPES;
pub use op::{
    AdamWAttrs, AttentionAttrs, BalanceAttrs, DropoutAttrs, HeadAttrs, NormAttrs, Op, RopeAttrs,
    VIS_VERSION,
};
pub use plan::{ALIGNMENT, ArenaPlan, KvPlacement, Slot};
pub use program::{Builder, Instr, Program};
pub use recompute::{Recompute, recompute};
pub use session::{
    CacheOptions, Feed, FeedData, LentWeights, MemoryPlan, PlannedBytes, ProgramId, Run, RunError,
    Session, SessionError, SessionProgram,
};
pub use update::{GRAD_NORM_SQUARED, UpdateOptions, norm_program, update_program};
pub use value::{Class, Value, ValueId, ValueType};
pub use verify::VerifyError;
