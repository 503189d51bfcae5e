//! A small, readable Llama-family decoder whose linear layers can be swapped, and its evaluation.
