//! Text to batches: tokenizers, corpora, shards and the resumable loader.
