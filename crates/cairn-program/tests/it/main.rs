//! Programs as their users write them: gradients against finite differences, thin slices of what
//! is to come, and what the checks refuse.

mod cut;
mod gradients;
mod harness;
mod plan;
mod slices;
mod verify;
