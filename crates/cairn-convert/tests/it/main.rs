//! The crate's integration tests, as one binary.

#[cfg(test)]
mod packs;
