//! What `lowbit quantize` writes, read by the programs that define the formats: see `readers.py`, which skips what is
//! not installed.

use std::{
    fs::File,
    io::BufWriter,
    path::{Path, PathBuf},
    process::Command,
};

use lowbit::formats::{Tensor, write_safetensors};
use lowbit_lm::Checkpoint;
use tempfile::TempDir;

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/stories3m")
}

/// The weights that lowbit computes with, in f32, in a file.
fn write_weights(folder: &Path, to: &Path) {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let weights = checkpoint.linear_names().into_iter().map(|name| {
        let weight = checkpoint.linear(&name).unwrap().weight;
        Tensor::f32(format!("{name}.weight"), vec![weight.rows(), weight.cols()], weight.data())
    });
    let weights: Vec<_> = weights.collect();
    let views: Vec<_> = weights.iter().map(Tensor::view).collect();
    write_safetensors(BufWriter::new(File::create(to).unwrap()), &[], &views).unwrap();
}

/// Has every reader look at what each method makes in a format.
#[track_caller]
fn read_by(readers: &[&str], format: &str, methods: &[&[&str]]) {
    let folder = TempDir::new().unwrap();
    let mut made = Vec::new();
    for method in methods {
        let out = folder.path().join(method.join(" "));
        let output = Command::new(env!("CARGO_BIN_EXE_lowbit"))
            .args([Path::new("quantize"), &model(), "--format".as_ref(), format.as_ref()])
            .args([Path::new("--out"), &out, "--method".as_ref()])
            .args(*method)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{method:?}: {said}");
        write_weights(&out, &folder.path().join(method.join(" ") + ".weights"));
        made.push(out);
    }
    for reader in readers {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/readers.py");
        let python = Command::new("python3").arg(script).arg(reader).args(&made).output();
        let Ok(output) = python else {
            eprintln!("skipped {reader}: there is no python3");
            continue;
        };
        let printed = String::from_utf8_lossy(&output.stdout);
        let said = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(0) => eprintln!("{format}: {}", printed.trim()),
            Some(3) => eprintln!("skipped {reader}: {}", printed.trim()),
            _ => panic!("{format} by {reader}: {printed}{said}"),
        }
    }
}

#[test]
fn compressed_tensors_and_transformers_read_integers() {
    read_by(
        &["compressed-tensors", "transformers"],
        "compressed-tensors",
        &[
            &["rtn", "--group-size", "64"],
            &["rtn", "--group-size", "32", "--zero-points"],
            &["rtn", "--bits", "3", "--group-size", "-1"],
            &["rtn", "--bits", "8", "--group-size", "128"],
            &["int8"],
        ],
    );
    read_by(&["compressed-tensors"], "compressed-tensors", &[&["w8a8"]]);
}

#[test]
fn compressed_tensors_and_transformers_read_floats() {
    let readers = ["compressed-tensors", "transformers"];
    let methods: [&[&str]; 5] = [&["fp8"], &["mxfp8"], &["fp8-128x128"], &["mxfp4"], &["nvfp4"]];
    read_by(&readers, "compressed-tensors", &methods);
}

#[test]
fn transformers_reads_blocks_of_fp8() {
    read_by(&["transformers"], "fp8", &[&["fp8-128x128"]]);
}

#[test]
fn bitsandbytes_reads_nf4_and_int8() {
    read_by(&["bitsandbytes"], "bnb", &[&["nf4-g64"], &["fp4-g64"], &["llm-int8-bnb"]]);
}

#[test]
fn the_layouts_of_autogptq_and_autoawq_hold_the_weights() {
    let gptq: [&[&str]; 4] = [
        &["rtn", "--group-size", "128"],
        &["rtn", "--bits", "3", "--group-size", "32"],
        &["rtn", "--bits", "8", "--group-size", "-1"],
        &["rtn", "--bits", "4", "--group-size", "96", "--zero-points"],
    ];
    read_by(&["autogptq"], "gptq", &gptq);
    let awq: [&[&str]; 2] =
        [&["rtn", "--group-size", "128"], &["rtn", "--group-size", "64", "--zero-points"]];
    read_by(&["autoawq"], "awq", &awq);
}

#[test]
fn the_package_gguf_reads_blocks_of_ggml() {
    let methods: [&[&str]; 3] =
        [&["rtn"], &["rtn", "--bits", "8", "--group-size", "32"], &["rtn", "--zero-points"]];
    read_by(&["gguf"], "gguf", &methods);
}
