//! Checkpoint containers, read without copying.
