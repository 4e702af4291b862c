//! The crate's integration tests, as one binary.

#[cfg(test)]
mod gguf;
#[cfg(test)]
mod mapped;
#[cfg(test)]
mod mixed;
#[cfg(test)]
mod packs;
#[cfg(test)]
mod sensitivity;
