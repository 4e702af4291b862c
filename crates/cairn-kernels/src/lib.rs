//! Kernels, the registry that names them, the thread pool, the arena and the tuner.
