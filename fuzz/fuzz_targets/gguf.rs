//! Any bytes are a file whose every value and tensor can be read, or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lowbit::formats::{TensorSource, gguf::Gguf};

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = Gguf::new("fuzz", bytes) else { return };
    for key in file.keys() {
        let value = file.get(key).expect("a key of the file's own");
        let _ = value.as_array().map(|array| array.iter().count());
    }
    for name in file.names() {
        let tensor = file.tensor(name).expect("a name of the file's own");
        let _ = tensor.to_f32();
    }
});
