//! Training: the loop, schedules, checkpoints and run folders.
