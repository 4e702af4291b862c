//! Serving one model: the KV cache, the sampler and generation.
