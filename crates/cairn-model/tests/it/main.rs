//! The models against what transformers and PyTorch compute for them.

mod goldens;
mod training;
