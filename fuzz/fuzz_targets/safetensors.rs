//! Any bytes are a file whose every tensor can be read, or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lowbit::formats::{Safetensors, TensorSource};

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = Safetensors::new("fuzz", bytes) else { return };
    for name in file.names() {
        let tensor = file.tensor(name).expect("a name of the file's own");
        let _ = tensor.to_f32();
    }
});
