//! `lowbit quantize` beside other runs, killed, and with files of its own names in the model; what it leaves in
//! floats; and `lowbit inspect` on files that mean harm.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use lowbit::formats::{Dtype, Tensor, TensorSource, write_safetensors};
use lowbit_lm::Tensors;
use serde_json::{Value, json};
use tempfile::TempDir;

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lowbit"));
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[track_caller]
fn succeeds(args: &[&str]) -> String {
    let Output { status, stdout, stderr } = command(args).output().unwrap();
    assert!(status.success(), "{args:?}: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}

/// Exit status 2 and one line, which is returned.
#[track_caller]
fn refused(args: &[&str]) -> String {
    let Output { status, stdout, stderr } = command(args).output().unwrap();
    let said = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(2), "{args:?}: {said}");
    assert!(stdout.is_empty() && said.lines().count() == 1, "{args:?}: {said}");
    said
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A folder with a model of an unknown architecture, `blocks` times `layers` of the given shape.
fn model(blocks: usize, (n, k): (usize, usize), layers: &[&str], others: &[Tensor]) -> TempDir {
    let folder = TempDir::new().unwrap();
    let mut tensors = others.to_vec();
    for block in 0..blocks {
        for layer in layers {
            let name = format!("model.layers.{block}.{layer}.weight");
            let numbers: Vec<_> =
                (0..n * k).map(|i| ((i * 7 + block * 3) as f32 * 0.61).sin()).collect();
            tensors.push(Tensor::f32(name, vec![n, k], &numbers));
        }
    }
    save(&folder, &tensors);
    folder
}

fn save(folder: &TempDir, tensors: &[Tensor]) {
    let views: Vec<_> = tensors.iter().map(Tensor::view).collect();
    let file = fs::File::create(folder.path().join("model.safetensors")).unwrap();
    write_safetensors(std::io::BufWriter::new(file), &[], &views).unwrap();
    let config = json!({"architectures": ["OtherForCausalLM"], "model_type": "other"});
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
}

fn weight(name: &str, shape: [usize; 2]) -> Tensor {
    let numbers: Vec<_> = (0..shape[0] * shape[1]).map(|i| (i as f32 * 0.3).sin()).collect();
    Tensor::f32(name, shape.to_vec(), &numbers)
}

/// The files of a folder, by name; of the report what does not name the folder.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
    let mut files = BTreeMap::new();
    for entry in entries {
        let name = entry.file_name().into_string().unwrap();
        let mut bytes = fs::read(entry.path()).expect("files only");
        if name == "quantization.json" {
            let mut report = read_json(&entry.path());
            report["out"] = Value::Null;
            bytes = report.to_string().into_bytes();
        }
        files.insert(name, bytes);
    }
    files
}

fn spawn(args: &[&str]) -> Child {
    command(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn a_second_run_in_the_same_folder_is_refused_and_removes_nothing() {
    let model = model(24, (512, 1024), &["up"], &[]);
    let folder = TempDir::new().unwrap();
    let [out, whole] = ["out", "whole"].map(|name| folder.path().join(name));
    let part = folder.path().join("out.part");
    let args = |out: &Path, method: &str| {
        let paths = [model.path(), out].map(|path| path.to_str().unwrap().to_string());
        let [model, out] = paths;
        let args = ["quantize", &model, "--method", method, "--threads", "1", "--out", &out];
        args.map(String::from)
    };
    let first = args(&out, "nf4-g64");
    let first: Vec<_> = first.iter().map(String::as_str).collect();
    let mut running = spawn(&first);
    while !part.join(".lowbit/job.json").exists() {
        assert!(running.try_wait().unwrap().is_none(), "it has ended");
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut refusals = 0;
    for method in ["nf4-g64", "int8", "nf4-g64"] {
        let second = args(&out, method);
        let second: Vec<_> = second.iter().map(String::as_str).collect();
        let output = command(&second).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        if running.try_wait().unwrap().is_none() {
            assert_eq!(output.status.code(), Some(2));
            assert!(said.contains("out.part") && said.contains("another run"), "{said}");
            refusals += 1;
        }
    }
    assert!(running.wait().unwrap().success());
    assert!(refusals > 0, "the first run was too fast to be disturbed");
    let undisturbed = args(&whole, "nf4-g64");
    succeeds(&undisturbed.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(contents(&out), contents(&whole));
    assert!(!part.exists());
}

/// Processes are killed after more and more time, from the first system calls to the end.
#[test]
fn a_run_that_is_killed_at_any_time_continues_to_the_same_bytes() {
    let model = model(6, (64, 256), &["up", "down"], &[weight("lm_head.weight", [64, 256])]);
    fs::write(model.path().join("tokenizer.json"), "{}").unwrap();
    let folder = TempDir::new().unwrap();
    let [out, whole] = ["out", "whole"].map(|name| folder.path().join(name));
    let part = folder.path().join("out.part");
    let args = |out: &Path| {
        let [model, out] = [model.path(), out].map(|path| path.to_str().unwrap().to_string());
        ["quantize", &model, "--method", "int4-g32", "--threads", "1", "--out", &out]
            .map(String::from)
    };
    let run = args(&whole);
    let begun = std::time::Instant::now();
    succeeds(&run.iter().map(String::as_str).collect::<Vec<_>>());
    let time = begun.elapsed();
    let expected = contents(&whole);
    let run = args(&out);
    let run: Vec<_> = run.iter().map(String::as_str).collect();
    let mut continued = 0;
    for i in 0..40 {
        let mut child = spawn(&run);
        std::thread::sleep(time * i / 30);
        child.kill().unwrap();
        child.wait().unwrap();
        if out.exists() {
            assert!(!part.exists());
        } else {
            continued += usize::from(part.exists());
            // Every other time, what is there is also cut, as by a disk that lost it.
            let cut = part.join("model-00002-of-00007.safetensors");
            if let (0, Ok(bytes)) = (i % 2, fs::read(&cut)) {
                fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
            }
            succeeds(&run);
        }
        assert_eq!(contents(&out), expected, "killed after {i}/30 of its time");
        assert!(!part.exists());
        fs::remove_dir_all(&out).unwrap();
    }
    assert!(continued > 0, "no run was killed at work");
}

#[test]
fn files_of_a_model_that_have_names_of_the_work_are_copied() {
    let model = model(2, (8, 32), &["up"], &[]);
    let own = ["job.json", "report-00000.json", "quantization.json", "quantization-2.json"];
    for name in own {
        fs::write(model.path().join(name), name).unwrap();
    }
    let out = model.path().join("out");
    let [from, to] = [model.path(), &out].map(|path| path.to_str().unwrap());
    let args = ["quantize", from, "--method", "int8", "--out", to];
    assert!(succeeds(&args).contains("the report is quantization-3.json"));
    for name in own {
        assert_eq!(fs::read_to_string(out.join(name)).unwrap(), name);
    }
    assert_eq!(read_json(&out.join("quantization-3.json"))["method"], "int8");
    assert!(!out.join(".lowbit").exists());
    fs::remove_dir_all(&out).unwrap();
    fs::write(model.path().join(".lowbit"), "").unwrap();
    assert!(refused(&args).contains(".lowbit is in the way"));
}

/// Layers as Mixtral and Llava have them.
fn mixture() -> TempDir {
    let others = [
        weight("model.embed_tokens.weight", [64, 32]),
        weight("model.layers.0.moe.gate.weight", [8, 32]),
        weight("model.layers.0.moe.experts.0.w1.weight", [32, 32]),
        weight("model.layers.0.attn.relative_attention_bias.weight", [32, 8]),
        weight("model.layers.1.mlp.gate.weight", [32, 32]),
        weight("vision.layers.0.q_proj.weight", [32, 32]),
        weight("projector.linear_1.weight", [32, 32]),
        weight("language_model.lm_head.weight", [64, 32]),
        Tensor::f32("model.norm.weight", vec![32], &[1.0; 32]),
    ];
    model(0, (0, 0), &[], &others)
}

#[test]
fn routers_stay_floats_and_every_linear_layer_that_does_is_named() {
    let model = mixture();
    let from = model.path().to_str().unwrap();
    let out = model.path().join("out");
    let to = out.to_str().unwrap();
    let names = ["language_model.lm_head", "model.layers.0.moe.gate", "projector.linear_1"];
    for (format, method, key) in [
        ("compressed-tensors", "int4-g32", "ignore"),
        ("compressed-tensors", "fp8", "ignore"),
        ("awq", "int4-g32", "modules_to_not_convert"),
        ("fp8", "fp8-128x128", "modules_to_not_convert"),
        ("bnb", "nf4-g32", "llm_int8_skip_modules"),
        ("gptq", "int4-g32", "dynamic"),
        ("lowbit", "int4-g32", ""),
    ] {
        succeeds(&["quantize", from, "--method", method, "--format", format, "--out", to]);
        let config = read_json(&out.join("config.json"))["quantization_config"].clone();
        let expected = match key {
            "dynamic" => {
                let patterns = names.map(|name| format!("-:{}$", name.replace('.', r"\.")));
                json!(BTreeMap::from(patterns.map(|pattern| (pattern, json!({})))))
            }
            "" => Value::Null,
            _ => json!(names),
        };
        assert_eq!(config.get(key).unwrap_or(&Value::Null), &expected, "{format} {method}");
        // The tensors say the same.
        let tensors = Tensors::open(&out).unwrap();
        for name in names.iter().chain(&["model.layers.0.attn.relative_attention_bias"]) {
            assert_eq!(tensors.tensor(&format!("{name}.weight")).unwrap().dtype, Dtype::F32);
        }
        for name in ["model.layers.0.moe.experts.0.w1", "model.layers.1.mlp.gate"] {
            let float = tensors.tensor(&format!("{name}.weight")).map(|view| view.dtype);
            assert_ne!(float, Ok(Dtype::F32), "{name}");
        }
        fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn skip_leaves_layers_out_and_must_match_one() {
    let model = mixture();
    let from = model.path().to_str().unwrap();
    let out = model.path().join("out");
    let to = out.to_str().unwrap();
    let method = ["--method", "rtn", "--group-size", "32", "--format", "compressed-tensors"];
    let quantize = [&["quantize", from, "--out", to][..], &method].concat();
    succeeds(&[&quantize[..], &["--skip", "vision.*", "--skip", "*.lm_head"]].concat());
    let config = read_json(&out.join("config.json"));
    let expected = [
        "language_model.lm_head",
        "model.layers.0.moe.gate",
        "projector.linear_1",
        "vision.layers.0.q_proj",
    ];
    assert_eq!(config["quantization_config"]["ignore"], json!(expected));
    let tensors = Tensors::open(&out).unwrap();
    let (before, after) = (Tensors::open(model.path()).unwrap(), tensors);
    let name = "vision.layers.0.q_proj.weight";
    assert_eq!(before.tensor(name).unwrap().bytes, after.tensor(name).unwrap().bytes);
    fs::remove_dir_all(&out).unwrap();
    let said = refused(&[&quantize[..], &["--skip", "q_proj"]].concat());
    assert!(said.contains("--skip q_proj matches no layer"), "{said}");
    let said = refused(&[&quantize[..], &["--skip", "*"]].concat());
    assert!(said.contains("no layer to quantize"), "{said}");
    assert!(!out.exists() && !model.path().join("out.part").exists());
}

/// Also where the blocks behind are calibrated on what it gives.
#[test]
fn a_layer_that_is_skipped_stays_as_it_is_in_a_calibrated_model() {
    let stories = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/stories3m");
    let folder = TempDir::new().unwrap();
    let [out, text] = ["out", "text.txt"].map(|name| folder.path().join(name));
    let story = "Once upon a time there was a little girl. She liked to play. ".repeat(5);
    fs::write(&text, story).unwrap();
    let [from, out, text] = [&stories, &out, &text].map(|path| path.to_str().unwrap());
    let skip = ["--skip", "*.1.mlp.down_proj", "--skip", "*.v_proj"];
    let quantize = ["quantize", from, "--calibration", text, "--out", out, "--json", "--method"];
    let report = succeeds(&[&quantize[..], &["gptq", "--bits", "3"], &skip].concat());
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["layers"].as_array().unwrap().len(), 28 - 5);
    let floats = report["floats"].as_array().unwrap();
    assert_eq!(floats.len(), 6); // the head is one of them
    assert!(floats.contains(&json!("model.layers.1.mlp.down_proj")));
    let (before, after) =
        (Tensors::open(&stories).unwrap(), Tensors::open(Path::new(out)).unwrap());
    for name in ["model.layers.1.mlp.down_proj.weight", "model.layers.3.self_attn.v_proj.weight"] {
        assert_eq!(before.tensor(name).unwrap().bytes, after.tensor(name).unwrap().bytes);
    }
    succeeds(&["eval", out, "--text", text]);
    fs::remove_dir_all(out).unwrap();
    let said = refused(&[&quantize[..], &["awq"], &skip].concat());
    assert!(said.contains("--skip does not go with awq"), "{said}");
}

#[test]
fn groups_that_a_format_cannot_hold_are_refused_with_those_that_would_do() {
    // Rows of 576 and of 1536, as SmolLM2 has them: both are multiples of 192.
    let others = [
        weight("model.layers.0.up.weight", [16, 576]),
        weight("model.layers.0.down.weight", [16, 1536]),
    ];
    let model = model(0, (0, 0), &[], &others);
    let from = model.path().to_str().unwrap();
    let out = model.path().join("out");
    let to = out.to_str().unwrap();
    let sizes = "--group-size 16, 24, 32, 48, 64, 96, 192 or -1 (whole rows) would do";
    for (format, options) in [
        ("awq", &["rtn"][..]),
        ("compressed-tensors", &["rtn", "--zero-points"]),
        ("compressed-tensors", &["rtn", "--bits", "8"]),
    ] {
        let args = ["quantize", from, "--out", to, "--format", format, "--method"];
        let said = refused(&[&args[..], options].concat());
        assert!(said.contains("rows of 576 in groups of 128"), "{said}");
        assert!(said.contains(sizes), "{said}");
        assert!(!out.exists() && !model.path().join("out.part").exists());
    }
    for size in ["96", "192", "-1"] {
        let options = ["--method", "rtn", "--group-size", size, "--format", "awq"];
        succeeds(&[&["quantize", from, "--out", to][..], &options].concat());
        fs::remove_dir_all(&out).unwrap();
    }
    // GPTQModel rounds the number of groups up.
    succeeds(&["quantize", from, "--out", to, "--format", "gptq", "--method", "rtn"]);
}

#[test]
fn refusals_say_in_plain_words_what_is_wrong_and_what_would_do() {
    let model = model(1, (16, 256), &["up"], &[]);
    let from = model.path().to_str().unwrap();
    let out = model.path().join("out");
    let to = out.to_str().unwrap();
    for (format, options, words) in [
        ("awq", &["rtn", "--bits", "3"][..], &["codes of 3 bits", "--bits 4 would do"][..]),
        ("awq", &["int3-g128"], &["rtn, gptq, awq, spqr or best with --bits 4 would do"]),
        ("gptq", &["rtn", "--bits", "5"], &["codes of 5 bits", "--bits 4 would do"]),
        ("gptq", &["nf4-g64"], &["NF4 codes", "--format lowbit can"]),
        ("bnb", &["rtn"], &["8 bits, symmetric", "--bits 8 and --group-size -1"]),
        ("fp8", &["fp8"], &["scales (per channel)", "--method fp8-128x128 would do"]),
        ("fp8", &["rtn"], &["int4", "--method fp8-128x128 would do"]),
        ("compressed-tensors", &["fp8e5m2"], &["fp8 E5M2 codes", "--format lowbit can"]),
        ("compressed-tensors", &["int4-g32-is4"], &["quantized themselves"]),
    ] {
        let args = ["quantize", from, "--out", to, "--format", format, "--method"];
        let said = refused(&[&args[..], options].concat());
        for word in words {
            assert!(said.contains(word), "no {word:?} in {said}");
        }
        for debug in ["{", "PerGroup", "Midpoint", "Some("] {
            assert!(!said.contains(debug), "{debug:?} in {said}");
        }
        assert!(!out.exists() && !model.path().join("out.part").exists());
    }
}

/// Files that mean harm: what is printed, with exit status 0 or 2.
#[track_caller]
fn inspected(tensors: &[Tensor]) -> (Option<i32>, String) {
    let folder = TempDir::new().unwrap();
    save(&folder, tensors);
    let file: PathBuf = folder.path().join("model.safetensors");
    let output = command(&["inspect", file.to_str().unwrap()]).output().unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    (output.status.code(), said.concat())
}

#[test]
fn inspect_stands_shapes_of_the_own_layout_that_no_matrix_has() {
    for shape in [[0_u64, 1 << 40], [1 << 50, 0], [0, 0]] {
        let header = json!({
            "version": 1,
            "shape": shape,
            "scheme": {"dtype": {"int": 4}, "granularity": "channel", "scale": "f16", "zero": "midpoint"},
            "transforms": [],
        });
        let header = header.to_string().into_bytes();
        let bytes = |part: &str, bytes: Vec<u8>| {
            Tensor::new(format!("x.{part}"), Dtype::U8, vec![bytes.len()], bytes)
        };
        let tensors = [bytes("lowbit", header), bytes("codes", vec![]), bytes("scales", vec![])];
        let (code, said) = inspected(&tensors);
        assert_eq!(code, Some(0));
        assert!(said.contains("x  damaged") && said.contains("two sizes of 1 or more"), "{said}");
    }
}

#[test]
fn inspect_shows_hostile_names_and_shapes_in_one_line_each() {
    let long = "n".repeat(65_536);
    let longer = "é".repeat(50_000); // 100 kB
    let names = ["\u{1b}[2J\u{1b}]0;title\u{7}\nmodel: all is well", &long, &longer, "plain"];
    let one = |name: &&str| Tensor::f32(*name, vec![1], &[1.0]);
    let many = Tensor::f32("many", vec![1; 100_000], &[1.0]);
    let tensors: Vec<_> = names.iter().map(one).chain([many]).collect();
    let (code, said) = inspected(&tensors);
    assert_eq!((code, said.lines().count()), (Some(0), 6), "{said}");
    assert!(said.contains(r"\u{1b}[2J\u{1b}]0;title\u{7}\nmodel"), "{said}");
    assert!(said.contains("(100000 dimensions)"));
    assert!(said.chars().all(|c| c == '\n' || !c.is_control()));
    assert!(said.lines().all(|line| line.chars().count() < 600));
}

#[test]
fn a_message_does_not_repeat_a_hostile_shape() {
    let folder = TempDir::new().unwrap();
    let shape = "1,".repeat(2_000_000);
    let header = format!(
        "{{\"a\\u001b[31m\":{{\"dtype\":\"F32\",\"shape\":[{shape}1],\"data_offsets\":[0,8]}}}}"
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend([0; 8]);
    let file = folder.path().join("model.safetensors");
    fs::write(&file, bytes).unwrap();
    let said = refused(&["inspect", file.to_str().unwrap()]);
    assert!(said.len() < 4000 && said.contains(r"a\u{1b}[31m"), "{} bytes", said.len());
}
