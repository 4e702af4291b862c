//! Programs as their users write them: gradients against finite differences, thin slices of what
//! is to come, and what the checks refuse.
#![expect(
    clippy::unwrap_used,
    clippy::float_cmp,
    reason = "tests fail by panicking, and bits are compared"
)]

mod compute;
mod cut;
mod dropout;
mod experts;
mod gradients;
mod harness;
mod plan;
mod registry;
mod slices;
mod verify;
