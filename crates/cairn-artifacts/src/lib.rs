//! Files: safetensors, checkpoints, hashes, atomic writes and run records.
