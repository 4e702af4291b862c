//! The virtual instruction set: programs, verification, differentiation, planning, accounting, execution.
