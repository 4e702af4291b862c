//! The command as a user runs it: a process, its streams and its exit code.

#[cfg(test)]
mod adapter;
#[cfg(test)]
mod allocations;
#[cfg(test)]
mod bad_input;
#[cfg(test)]
mod bench;
#[cfg(test)]
mod chat;
#[cfg(test)]
mod contract;
#[cfg(test)]
mod contracts;
#[cfg(test)]
mod crashes;
#[cfg(test)]
mod encoders;
#[cfg(test)]
mod encodings;
#[cfg(test)]
mod errors;
#[cfg(test)]
mod full_disk;
#[cfg(test)]
mod generate;
#[cfg(test)]
mod gguf;
#[cfg(test)]
mod gguf_file;
#[cfg(test)]
mod help;
#[cfg(test)]
mod inspect;
#[cfg(test)]
mod interrupted;
#[cfg(test)]
mod leanpack;
#[cfg(test)]
mod memory;
#[cfg(test)]
mod pipeline;
#[cfg(test)]
mod process;
#[cfg(test)]
mod running;
#[cfg(test)]
mod serve;
#[cfg(test)]
mod talk;
#[cfg(test)]
mod tidy;
#[cfg(test)]
mod unreadable;
#[cfg(test)]
mod workplace;

#[cfg(test)]
use process::{cairn, golden, shown, succeed};
