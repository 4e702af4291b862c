//! Measurements on the golden models.

#[cfg(test)]
mod corpora;
#[cfg(test)]
mod decoding;
#[cfg(test)]
mod losses;
#[cfg(test)]
mod model;
