//! Measuring a model: loss, perplexity, bits per byte, and what general compressors make of the same text.
