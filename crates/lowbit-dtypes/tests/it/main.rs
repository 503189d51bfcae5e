//! The public surface against tables, golden vectors and a slow exact model.

mod blocks;
mod codec;
mod reference;
mod slices;
mod tables;
mod types;
