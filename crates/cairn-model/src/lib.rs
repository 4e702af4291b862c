//! From a model spec to its program, its tensor names and its initial weights.
