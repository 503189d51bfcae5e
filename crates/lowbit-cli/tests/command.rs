//! The command as a user meets it: what it prints, and how it refuses.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

fn lowbit(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lowbit")).args(args).output().unwrap()
}

/// Exit status 2, nothing on standard output, and one line that has all of `words` in it.
#[track_caller]
fn refuses(args: &[&str], words: &[&str]) {
    let output = lowbit(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{args:?} printed {:?}", output.stdout);
    assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "{args:?}: no {word:?} in {stderr}");
    }
}

fn embedded() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/stories3m")
}

/// A copy of the embedded model for a test to damage.
struct Copy(TempDir);

impl Copy {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        for file in ["config.json", "tokenizer.json", "model.safetensors"] {
            fs::copy(embedded().join(file), folder.path().join(file)).unwrap();
        }
        // 20 tokens or so: enough to calibrate on, with a word that they are few.
        let text = "Once upon a time there was a cat. The cat had a red ball and a big box.";
        fs::write(folder.path().join("text.txt"), text).unwrap();
        Self(folder)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn edit(self, name: &str, f: impl FnOnce(&mut Vec<u8>)) -> Self {
        let mut bytes = fs::read(self.file(name)).unwrap();
        f(&mut bytes);
        fs::write(self.file(name), bytes).unwrap();
        self
    }

    fn replace(self, name: &str, from: &str, to: &str) -> Self {
        self.edit(name, |bytes| {
            let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).expect(from);
            bytes.splice(at..at + from.len(), to.bytes());
        })
    }

    #[track_caller]
    fn refused(&self, words: &[&str]) {
        let (model, text) = (self.0.path().to_str().unwrap(), self.file("text.txt"));
        refuses(&["eval", model, "--text", text.to_str().unwrap()], words);
        refuses(&["compare", model, "--text", text.to_str().unwrap()], words);
        refuses(&["generate", model, "--prompt", "Once"], words);
    }
}

#[test]
fn compare_prints_json_and_nothing_else() {
    let folder = TempDir::new().unwrap();
    let plot = folder.path().join("plot.svg");
    let output = lowbit(&[
        "compare",
        "--json",
        "--methods",
        "int8,int2-g32",
        "--max-tokens",
        "400",
        "--threads",
        "1",
        "--plot",
        plot.to_str().unwrap(),
    ]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["model"].as_str().unwrap().contains("stories3m"));
    assert!((1..=400).contains(&report["tokens"].as_u64().unwrap()));
    let rows = report["rows"].as_array().unwrap();
    let methods: Vec<_> = rows.iter().map(|row| row["method"].as_str().unwrap()).collect();
    assert_eq!(methods, ["f32", "int8", "int2-g32"]);
    let number = |row: usize, key: &str| rows[row][key].as_f64().expect(key);
    assert_eq!((number(0, "kl"), number(0, "top1")), (0.0, 1.0));
    assert!((number(1, "perplexity") / number(0, "perplexity") - 1.0).abs() < 0.01);
    assert!(number(1, "kl") < number(2, "kl"));
    assert!((number(2, "bits_per_weight") - 2.5).abs() < 1e-9);
    assert_eq!(number(2, "weight_bytes") * 32.0, number(0, "weight_bytes") * 2.5);
    for row in 0..3 {
        assert!(number(row, "prefill_tokens_per_s") > 0.0);
        assert!(number(row, "decode_tokens_per_s") > 0.0);
    }
    let svg = fs::read_to_string(plot).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("int2-g32"));
}

#[test]
fn methods_that_calibrate_do_so_on_a_text_and_continue_behind_finished_blocks() {
    let copy = Copy::new();
    let [model, text, finished] = ["", "text.txt", "finished"].map(|file| copy.file(file));
    let [model, text, finished] = [&model, &text, &finished].map(|path| path.to_str().unwrap());
    let compare = ["compare", model, "--text", text, "--methods", "smoothquant"];
    refuses(&compare, &["calibration.tokens", "--calibration FILE"]);
    let options = ["--calibration", text, "--resume", finished, "--json"];
    let compare = [&compare[..], &options].concat();
    let (first, second) = (json(&compare), json(&compare));
    assert_eq!(first["rows"][1]["kl"], second["rows"][1]["kl"]);
    assert!(copy.file("finished/smoothquant/block-0000.safetensors").exists());
    let other = [&compare[..5], &["llm-int8"], &options].concat();
    json(&other); // a folder for each method
    let text = "The dog saw a big red ball and ran. ".repeat(80); // nothing to say about it
    fs::write(copy.file("other.txt"), text).unwrap();
    let other = copy.file("other.txt");
    let other =
        [&compare[..6], &["--calibration", other.to_str().unwrap()], &options[2..]].concat();
    refuses(&other, &["block-0000.safetensors", "another recipe, text or model"]);
}

#[test]
fn outliers_are_listed_and_drawn() {
    let copy = Copy::new();
    let [model, text, plot] = ["", "text.txt", "plot.svg"].map(|file| copy.file(file));
    let [model, text, plot] = [&model, &text, &plot].map(|path| path.to_str().unwrap());
    let outliers = ["outliers", model, "--text", text, "--threshold", "1", "--plot", plot];
    let report = json(&[&outliers[..], &["--json"]].concat());
    let inputs = report["inputs"].as_array().unwrap();
    assert!(inputs.len().is_multiple_of(4) && !inputs.is_empty());
    assert!(!report["features"].as_array().unwrap().is_empty());
    assert!(fs::read_to_string(plot).unwrap().contains("<circle"));
    let table = String::from_utf8(lowbit(&outliers).stdout).unwrap();
    assert!(table.contains("outlier features of the residual stream"), "{table}");
    refuses(&["outliers", model, "--text", text, "--threshold", "0"], &["threshold"]);
}

#[test]
fn eval_reports_the_perplexity_of_a_text() {
    let copy = Copy::new();
    let (model, text) = (copy.0.path().to_str().unwrap(), copy.file("text.txt"));
    let output = lowbit(&["eval", model, "--text", text.to_str().unwrap(), "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!((1.0..1024.0).contains(&report["perplexity"].as_f64().unwrap()), "{report}");
    assert_eq!(report["windows"], 1);
}

#[test]
fn tokens_are_read_as_tokens_and_said_to_be() {
    let model = embedded();
    let model = model.to_str().unwrap();
    let folder = TempDir::new().unwrap();
    let tokens = embedded().join("eval.tokens");
    let (tokens, renamed) = (tokens.to_str().unwrap(), folder.path().join("story.txt"));
    fs::copy(tokens, &renamed).unwrap();
    let eval = |text: &[&str]| {
        let output = lowbit(&[&["eval", model, "--json"][..], text].concat());
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["tokens"], 10_387);
        (report["perplexity"].as_f64().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (own, said) = eval(&[]);
    assert!((own - 8.378).abs() < 5e-4, "{own}"); // by PyTorch, models/README.md
    assert_eq!(said, "");
    for text in [tokens, renamed.to_str().unwrap()] {
        let (perplexity, said) = eval(&["--text", text]);
        assert_eq!(perplexity, own);
        assert!(said.contains("is a file of tokens, not a text: read as "), "{said}");
    }
    let five = lowbit(&["eval", model, "--max-tokens", "5"]);
    let five = String::from_utf8(five.stdout).unwrap();
    assert!(five.ends_with("(5 tokens in 1 window)\n"), "{five}");
    refuses(&["eval", model, "--text", tokens, "--window", "9"], &["a file of tokens", "window"]);

    let weights = embedded().join("model.safetensors");
    let weights = weights.to_str().unwrap();
    refuses(
        &["eval", model, "--text", weights],
        &["expected a text, but it is a safetensors file"],
    );
    let latin = folder.path().join("latin-1.txt");
    std::fs::write(&latin, b"caf\xe9 au lait").unwrap();
    let latin = latin.to_str().unwrap();
    refuses(
        &["outliers", model, "--text", latin],
        &["expected a text in UTF-8, but byte 3 is 0xe9"],
    );
    refuses(&["eval", folder.path().to_str().unwrap()], &["config.json", "No such file"]);
}

#[test]
fn calibration_refuses_what_says_nothing_and_says_what_says_little() {
    let model = embedded();
    let model = model.to_str().unwrap();
    let folder = TempDir::new().unwrap();
    let (text, out) = (folder.path().join("text"), folder.path().join("out"));
    let (text, out) = (text.to_str().unwrap(), out.to_str().unwrap());
    let quantize =
        ["quantize", model, "--method", "awq", "--out", out, "--calibration", text, "--json"];
    for (bytes, word) in [
        (&b"Hi there."[..], "tokens to calibrate on"),
        (b"Once \xff upon", "byte 5 is 0xff"),
        (b"PK\x03\x04 \xff", "it is a zip archive"),
    ] {
        fs::write(text, bytes).unwrap();
        refuses(&quantize, &[word]);
        assert!(!Path::new(out).exists());
    }
    fs::write(text, "Once upon a time there was a cat. ".repeat(8)).unwrap();
    let output = lowbit(&quantize);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("give a text of at least 640 tokens"), "{said}");
}

#[test]
#[cfg(unix)]
fn what_never_ends_is_no_file_of_a_model() {
    use std::os::unix::fs::symlink;
    let refused = |copy: &Copy, file: &str, what: &str| {
        let (model, text) = (copy.0.path().to_str().unwrap(), copy.file("text.txt"));
        refuses(
            &["eval", model, "--text", text.to_str().unwrap()],
            &[file, "expected a file", what],
        );
    };
    for file in ["config.json", "tokenizer.json", "model.safetensors", "text.txt"] {
        let copy = Copy::new();
        fs::remove_file(copy.file(file)).unwrap();
        symlink("/dev/zero", copy.file(file)).unwrap();
        refused(&copy, file, "a device");
        fs::remove_file(copy.file(file)).unwrap();
        assert!(Command::new("mkfifo").arg(copy.file(file)).status().unwrap().success());
        refused(&copy, file, "a pipe");
    }
}

#[test]
fn files_of_another_kind_are_named() {
    let weights = "model.safetensors";
    let put = |bytes: &'static [u8]| move |to: &mut Vec<u8>| *to = bytes.to_vec();
    Copy::new().edit(weights, put(b"GGUF\x03\0\0\0\0\0\0\0")).refused(&[weights, "GGUF file"]);
    Copy::new()
        .edit(weights, put(b"version https://git-lfs.github.com/spec/v1\noid sha256:00"))
        .refused(&[weights, "git lfs pull"]);
    Copy::new()
        .edit("config.json", put(b"<!DOCTYPE html><html></html>"))
        .refused(&["config.json", "web page"]);
    Copy::new()
        .edit("tokenizer.json", put(b"\x1f\x8b\x08\0\0"))
        .refused(&["tokenizer.json", "gzip"]);
    let copy = Copy::new();
    fs::rename(copy.file(weights), copy.file("pytorch_model.bin")).unwrap();
    copy.refused(&[weights, "save pytorch_model.bin"]);
}

#[test]
fn rounding_to_nearest_needs_no_tokenizer_and_no_context() {
    let copy = Copy::new().replace("config.json", "\"max_position_embeddings\": 512,", "");
    let quantize = |copy: &Copy, out: &str| {
        let out = copy.file(out);
        let (model, out) = (copy.0.path().to_str().unwrap(), out.to_str().unwrap());
        json(&["quantize", model, "--method", "int8", "--out", out, "--json"])["layers"]
            .as_array()
            .unwrap()
            .len()
    };
    assert_eq!(quantize(&copy, "a"), 28);
    let copy = copy.edit("tokenizer.json", |json| json.truncate(9));
    assert_eq!(quantize(&copy, "b"), 28);
    fs::remove_file(copy.file("tokenizer.json")).unwrap();
    assert_eq!(quantize(&copy, "c"), 28);
}

#[test]
fn generate_continues_the_prompt_the_same_way_for_the_same_seed() {
    let model = embedded();
    let generate = |extra: &[&str]| {
        let prompt = [
            "generate",
            model.to_str().unwrap(),
            "--prompt",
            "Once upon a time",
            "--max-tokens",
            "20",
        ];
        let output = lowbit(&[&prompt[..], extra].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let greedy = generate(&[]);
    assert!(greedy.starts_with("Once upon a time") && greedy.len() > 30, "{greedy}");
    let sampled = generate(&["--temperature", "1", "--seed", "7"]);
    assert_eq!(sampled, generate(&["--temperature", "1", "--seed", "7", "--threads", "1"]));
    assert_ne!(sampled, generate(&["--temperature", "1", "--seed", "8"]));
}

#[test]
fn bench_convert_reports_a_rate_for_each_size() {
    let output = lowbit(&["bench", "convert", "--to", "bf16", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    assert_eq!((&rows[0]["from"], &rows[0]["to"]), (&Value::from("f32"), &Value::from("bf16")));
    assert!(rows.iter().all(|row| row["gbps"].as_f64().unwrap() > 0.0));
}

#[test]
fn bench_quantize_reports_a_rate_for_each_scheme() {
    let output = lowbit(&["bench", "quantize", "--scheme", "activation-int8", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0]["scheme"], "activation-int8");
    assert!(rows[0]["gbps"].as_f64().unwrap() > 0.0);
    refuses(&["bench", "quantize", "--scheme", "int9"], &["int9", "int4-g32"]);
}

#[test]
fn bench_gemm_reports_a_layer_of_any_scheme() {
    let small = ["bench", "gemm", "--m", "2", "--n", "64", "--k", "128", "--threads", "1"];
    let gemm = |more: &[&'static str]| [&small[..], more].concat();
    for (scheme, compute) in [("int4-g32-zp", "int8"), ("int5-g16", "f32"), ("w8a8", "int8")] {
        let output = lowbit(&gemm(&["--scheme", scheme, "--compute", compute, "--json"]));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&report["op"], &report["scheme"]), (&"gemm".into(), &scheme.into()));
        assert_eq!(report["compute"], compute);
        assert!(report["packed_bits_per_weight"].as_f64().unwrap() >= 4.0);
        assert!(report["gops"].as_f64().unwrap() > 0.0);
    }
    refuses(&gemm(&["--scheme", "int4-g0"]), &["int4-g0"]);
    refuses(&gemm(&["--scheme", "int4-g32", "--kernel", "abacus"]), &["abacus"]);
    refuses(&gemm(&["--scheme", "int4-g32", "--compute", "int7"]), &["int7"]);
}

#[test]
fn bench_lm_measures_each_method_on_the_same_shape() {
    let output = lowbit(&[
        "bench",
        "lm",
        "--layers",
        "1",
        "--vocab",
        "64",
        "--methods",
        "f32,int4-g32-a8",
        "--json",
    ]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!((&rows[0]["method"], &rows[1]["method"]), (&"f32".into(), &"int4-g32-a8".into()));
    let number = |row: usize, key: &str| rows[row][key].as_f64().expect(key);
    assert_eq!(number(0, "weight_bytes"), 4.0 * f64::from(2048 * (2 * 2560 + 3 * 8192)));
    assert!(number(1, "weight_bytes") < number(0, "weight_bytes") / 5.0);
    assert!((0..2).all(|row| number(row, "decode_tokens_per_s") > 0.0));
    refuses(&["bench", "lm", "--methods", "f32,int9"], &["int9"]);
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    refuses(&["bench", "convert", "--to", "f9"], &["f9", "e4m3"]);
    refuses(&["compare", "--methods", "int8,int99"], &["int99", "int4-g32"]);
    refuses(&["compare", "--threads", "0"], &["threads", "0"]);
    refuses(&["compare", "--kernel", "abacus"], &["abacus", "scalar"]);
    refuses(&["compare", "--plot", "/does/not/exist/plot.svg"], &["/does/not/exist/plot.svg"]);
    refuses(&["compare", "--max-tokens", "0"], &["0"]);
    refuses(&["compare", "/does/not/exist"], &["/does/not/exist"]);
    refuses(&["eval", "/does/not/exist", "--text", "/nor/this"], &["/nor/this"]);
    refuses(&["nonsense"], &["nonsense"]);
    let model = embedded();
    refuses(
        &["generate", model.to_str().unwrap(), "--prompt", "a", "--temperature", "-1"],
        &["temperature"],
    );
    refuses(&["generate", "--prompt", "a", "--top-k", "3"], &["--top-k", "--temperature 1"]);
    refuses(&["generate", "--prompt", "a", "--seed", "3"], &["--seed", "--temperature 1"]);
}

#[test]
fn texts_that_cannot_be_evaluated_are_refused() {
    let copy = Copy::new().edit("text.txt", |text| *text = b" \n ".to_vec());
    let (model, text) = (copy.0.path().to_str().unwrap(), copy.file("text.txt"));
    refuses(&["eval", model, "--text", text.to_str().unwrap()], &["text.txt", "no text"]);
    fs::write(&text, "Once upon a time").unwrap();
    let eval = ["eval", model, "--text", text.to_str().unwrap()];
    refuses(&[&eval[..], &["--window", "512"]].concat(), &["513", "512"]);
    refuses(&[&eval[..], &["--window", "0"]].concat(), &["window 0"]);
}

#[test]
fn damaged_models_are_refused_by_file_and_tensor() {
    let weights = "model.safetensors";
    Copy::new().edit(weights, |bytes| bytes.truncate(4)).refused(&[weights]);
    Copy::new().edit(weights, |bytes| bytes.truncate(5000)).refused(&[weights]);
    Copy::new().edit(weights, |bytes| bytes.truncate(bytes.len() - 1)).refused(&[weights]);
    Copy::new()
        .edit(weights, |bytes| {
            let end = bytes.len();
            bytes[end - 2..].copy_from_slice(&0x7fc0_u16.to_le_bytes()); // a bf16 NaN
        })
        .refused(&[weights, "model.", "not finite"]);
    Copy::new().replace(weights, "\"BF16\"", "\"I16\" ").refused(&[weights, "I16"]);
    Copy::new()
        .replace("config.json", "\"intermediate_size\": 640", "\"intermediate_size\": 641")
        .refused(&[weights, "mlp.", "641"]);
    Copy::new()
        .replace("config.json", "LlamaForCausalLM", "GrokForCausalLM")
        .refused(&["config.json", "Grok"]);
    Copy::new().edit("config.json", |json| json.truncate(9)).refused(&["config.json"]);
    Copy::new().edit("tokenizer.json", |json| json.truncate(9)).refused(&["tokenizer.json"]);
    let copy = Copy::new();
    fs::remove_file(copy.file(weights)).unwrap();
    copy.refused(&[weights]);
}

fn json(args: &[&str]) -> Value {
    let output = lowbit(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_quantized_checkpoint_predicts_as_well_as_the_model_that_was_quantized() {
    let copy = Copy::new();
    let model = copy.0.path().to_str().unwrap();
    let text = copy.file("text.txt");
    let text = text.to_str().unwrap();
    for (method, formats) in [
        ("int4-g32", &["lowbit", "gptq", "awq", "compressed-tensors", "gguf"][..]),
        ("int8", &["lowbit", "compressed-tensors"]),
        ("llm-int8-bnb", &["lowbit", "bnb"]),
        ("w8a8", &["lowbit", "compressed-tensors"]),
    ] {
        let compared = json(&["compare", model, "--methods", method, "--text", text, "--json"]);
        let expected = compared["rows"][1]["perplexity"].as_f64().unwrap();
        for format in formats {
            let out = copy.file(&format!("{method}-{format}"));
            let out = out.to_str().unwrap();
            let args = ["quantize", model, "--method", method, "--format", format, "--out", out];
            let report = json(&[&args[..], &["--json"]].concat());
            assert_eq!(report["layers"].as_array().unwrap().len(), 28);
            let got =
                json(&["eval", out, "--text", text, "--json"])["perplexity"].as_f64().unwrap();
            // bitsandbytes stores 127 times the scale, rounded.
            let close = if *format == "bnb" { 1e-5 } else { 1e-12 };
            assert!((got / expected - 1.0).abs() < close, "{method} {format}: {got} {expected}");

            let inspected = json(&["inspect", out, "--json"]);
            let layers = inspected["layers"].as_array().unwrap();
            assert_eq!(layers.len(), 28);
            assert!(layers.iter().all(|layer| layer["problem"].is_null()));
            assert_eq!(inspected["tensors"].as_array().unwrap().len(), 10);
            assert!(!Path::new(&format!("{out}.part")).exists());
        }
    }
    let generated = lowbit(&[
        "generate",
        copy.file("int4-g32-gptq").to_str().unwrap(),
        "--prompt",
        "Once upon a time",
        "--max-tokens",
        "8",
    ]);
    assert!(generated.status.success());
}

#[test]
fn a_gguf_file_alone_is_a_model() {
    let copy = Copy::new();
    let path = |name: &str| copy.file(name).to_str().unwrap().to_owned();
    let (model, text) = (path(""), path("text.txt"));
    let quantize = |from: &str, format: &str, out: &str| {
        let how = ["--method", "int4-g32", "--format", format, "--out", out, "--json"];
        json(&[&["quantize", from][..], &how].concat())
    };
    let perplexity = |model: &str| {
        json(&["eval", model, "--text", &text, "--json"])["perplexity"].as_f64().unwrap()
    };
    quantize(&model, "gguf", &path("out"));
    let expected = perplexity(&path("out"));
    // Without config.json and tokenizer.json, under any name, or as the only one of its folder.
    fs::create_dir(copy.file("alone")).unwrap();
    let blob = path("alone/blob");
    fs::copy(copy.file("out/model.gguf"), &blob).unwrap();
    for alone in [&blob, &path("alone")] {
        assert_eq!(perplexity(alone), expected);
    }
    let inspected = json(&["inspect", &blob, "--json"]);
    assert_eq!(inspected["metadata"]["general.architecture"], "\"llama\"");
    assert_eq!(inspected["layers"].as_array().unwrap().len(), 28);
    let generated = lowbit(&["generate", &blob, "--prompt", "Once", "--max-tokens", "4"]);
    assert!(generated.status.success());
    let compared = json(&["compare", &blob, "--methods", "int8", "--text", &text, "--json"]);
    assert!((compared["rows"][0]["perplexity"].as_f64().unwrap() / expected - 1.0).abs() < 1e-6);

    // From GGUF to a folder of its own, and to GGUF again; 4 bits of 4 bits lose next to nothing.
    for format in ["gptq", "gguf"] {
        let out = path(&format!("again-{format}"));
        quantize(&blob, format, &out);
        assert!((perplexity(&out) / expected - 1.0).abs() < 0.05, "{format}");
        for file in ["config.json", "tokenizer.json"] {
            assert!(Path::new(&out).join(file).is_file());
        }
        assert!(!Path::new(&out).join("blob").exists());
    }
    refuses(
        &["quantize", &blob, "--method", "gptq", "--format", "gptq", "--out", &path("x")],
        &["alone/calibration.tokens", "--calibration FILE"],
    );
    fs::copy(&blob, copy.file("alone/other.gguf")).unwrap();
    refuses(&["eval", &path("alone"), "--text", &text], &["several GGUF models, blob, other.gguf"]);
}

/// Of layers that a method has calibrated, block by block: [`eval`] of the files is what `compare` has shown.
#[test]
fn a_calibrated_checkpoint_predicts_as_compare_says() {
    let copy = Copy::new();
    let [model, text, out] = ["", "text.txt", "out"].map(|file| copy.file(file));
    let [model, text, out] = [&model, &text, &out].map(|path| path.to_str().unwrap());
    let calibration = ["--calibration", text];
    for (method, options, formats) in [
        (
            "gptq-int4-g32-zp",
            &["gptq", "--bits", "4", "--group-size", "32", "--zero-points"][..],
            &["lowbit", "gptq", "awq", "compressed-tensors"][..],
        ),
        ("awq-g32", &["awq", "--group-size", "32"], &["lowbit"]),
        ("spqr-int3-g16", &["spqr", "--bits", "3"], &["lowbit"]),
        ("smoothquant", &["smoothquant"], &["lowbit"]),
        ("best-l4", &["best-l4"], &["lowbit"]),
    ] {
        let compare = ["compare", model, "--methods", method, "--text", text, "--json"];
        let compared = json(&[&compare[..], &calibration].concat());
        let expected = compared["rows"][1]["perplexity"].as_f64().unwrap();
        for format in formats {
            let quantize = ["quantize", model, "--out", out, "--json", "--format", format];
            let args = [&quantize[..], &calibration, &["--method"], options].concat();
            let report = json(&args);
            let got =
                json(&["eval", out, "--text", text, "--json"])["perplexity"].as_f64().unwrap();
            // Layers that no kernel computes yet are computed by the reference in one, in f32 in the other.
            assert!((got / expected - 1.0).abs() < 1e-6, "{method} {format}: {got} {expected}");
            let folded = report["folded"].as_array().unwrap().len();
            let scales = matches!(method, "awq-g32" | "smoothquant");
            assert_eq!(folded, if scales { 8 } else { 0 }, "{method}");
            // Two queries share a key in this model, so o cannot hand its scale to v.
            let substitutions = report["substitutions"].as_array().unwrap().len();
            assert_eq!(substitutions, if scales { 4 } else { 0 }, "{method}");
            let files = fs::read_dir(out).unwrap().map(|entry| entry.unwrap().file_name());
            let mut files: Vec<_> = files.map(|name| name.into_string().unwrap()).collect();
            files.retain(|name| !name.starts_with("model-0000"));
            files.sort();
            let index = "model.safetensors.index.json";
            let others = ["quantization.json", "text.txt", "tokenizer.json"];
            assert_eq!(files, [&["config.json", index][..], &others].concat());
            fs::remove_dir_all(out).unwrap();
        }
    }
}

#[test]
fn a_format_without_a_place_for_scales_gets_none_and_says_so() {
    let copy = Copy::new();
    let [model, text, out] = ["", "text.txt", "out"].map(|file| copy.file(file));
    let [model, text, out] = [&model, &text, &out].map(|path| path.to_str().unwrap());
    for (method, format) in [("awq-g32", "awq"), ("smoothquant", "compressed-tensors")] {
        let quantize = ["quantize", model, "--out", out, "--json", "--calibration", text];
        let report = json(&[&quantize[..], &["--method", method, "--format", format]].concat());
        let substitutions = report["substitutions"].as_array().unwrap();
        assert_eq!(substitutions.len(), 4);
        let said = substitutions[0].as_str().unwrap();
        assert!(
            said.contains("o_proj: its input is not scaled") && said.contains(format),
            "{said}"
        );
        let perplexity =
            |model| json(&["eval", model, "--text", text, "--json"])["perplexity"].as_f64();
        let (got, f32) = (perplexity(out).unwrap(), perplexity(model).unwrap());
        assert!((got / f32 - 1.0).abs() < 0.1, "{got} {f32}");
        fs::remove_dir_all(out).unwrap();
    }
}

/// The process is killed; what comes after it makes the same files as a process that nobody has disturbed.
#[test]
fn a_run_that_was_killed_continues_and_gives_the_same_bytes() {
    let copy = Copy::new();
    let calibration = embedded().join("calibration.tokens");
    fs::copy(calibration, copy.file("calibration.tokens")).unwrap();
    let [model, killed, whole] = ["", "killed", "whole"].map(|file| copy.file(file));
    let args = |out: &Path| {
        let [model, out] = [&model, out].map(|path| path.to_str().unwrap().to_string());
        let args = ["quantize", &model, "--method", "best-int4-g16", "--out", &out];
        let tokens = ["--calibration-tokens", "1000", "--json"];
        args.into_iter().chain(tokens).map(String::from).collect::<Vec<_>>()
    };
    let mut child = Command::new(env!("CARGO_BIN_EXE_lowbit"))
        .args(args(&killed))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let part = copy.file("killed.part");
    while !part.join(".lowbit/blocks/block-0001.safetensors").exists() {
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!killed.exists() && part.exists());
    let other = args(&killed).into_iter().map(|arg| arg.replace("best-int4-g16", "int8"));
    let other: Vec<_> = other.collect();
    let other: Vec<_> = other.iter().map(String::as_str).collect();
    refuses(&other, &["killed.part", "begun with another"]);

    let run = |out: &Path| {
        let args = args(out);
        json(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let (mut continued, mut expected) = (run(&killed), run(&whole));
    assert!(!part.exists());
    for report in [&mut continued, &mut expected] {
        report["out"] = Value::Null;
    }
    assert_eq!(continued, expected);
    let mut files = 0;
    for entry in fs::read_dir(&whole).unwrap() {
        let name = entry.unwrap().file_name();
        if name == "quantization.json" {
            continue; // as printed
        }
        let bytes = |out: &Path| fs::read(out.join(&name)).unwrap();
        assert!(bytes(&killed) == bytes(&whole), "{name:?}");
        files += 1;
    }
    assert_eq!((files, fs::read_dir(&killed).unwrap().count()), (10, 11));
}

/// Its tensors are enough for methods that look at nothing else.
#[test]
fn a_model_of_another_architecture_is_quantized_where_nothing_must_be_run() {
    let copy = Copy::new().replace("config.json", "LlamaForCausalLM", "GrokForCausalLM");
    let [model, text, out] = ["", "text.txt", "out"].map(|file| copy.file(file));
    let [model, text, out] = [&model, &text, &out].map(|path| path.to_str().unwrap());
    let quantize = ["quantize", model, "--out", out, "--json", "--method"];
    let unknown = "architecture that is known here";
    for more in [&["gptq", "--calibration", text][..], &["int4-g32", "--format", "gguf"]] {
        refuses(&[&quantize[..], more].concat(), &[unknown, "Grok"]);
    }
    let report =
        json(&[&quantize[..], &["rtn", "--group-size", "32", "--format", "gptq"]].concat());
    assert_eq!(report["method"], "int4-g32");
    assert_eq!(report["layers"].as_array().unwrap().len(), 28);
    let again = copy.file("again");
    let again = again.to_str().unwrap();
    refuses(&["quantize", out, "--out", again, "--method", "rtn"], &["quantized already"]);
    // The layers are those of the known architecture.
    for folder in [model, out] {
        let config = Path::new(folder).join("config.json");
        let json = fs::read_to_string(&config).unwrap();
        fs::write(config, json.replace("GrokForCausalLM", "LlamaForCausalLM")).unwrap();
    }
    json(&["quantize", model, "--out", again, "--method", "int4-g32", "--json"]);
    let perplexity = |model| json(&["eval", model, "--text", text, "--json"])["perplexity"].clone();
    assert_eq!(perplexity(out), perplexity(again));
}

#[test]
fn quantize_refuses_before_it_writes() {
    let copy = Copy::new();
    let [model, text, out] = ["", "text.txt", "out"].map(|file| copy.file(file));
    let [model, text, out] = [&model, &text, &out].map(|path| path.to_str().unwrap());
    let part = format!("{out}.part");
    let quantize = |method, format| {
        let model = ["quantize", model, "--method", method, "--format", format, "--out", out];
        [&model[..], &["--calibration", text]].concat()
    };
    for (method, format, words) in [
        ("int3-g32", "awq", "codes of 3 bits"),
        ("w8a8", "gptq", "quantized activations"),
        ("w8a8-rot", "compressed-tensors", "a transform of the input"),
        ("spqr", "gptq", "outliers"),
        ("llm-int8", "compressed-tensors", "outliers"),
        ("best-int4-g16", "awq", "two-level"),
        ("nf4-g64", "gguf", "NF4, groups of 64"),
        ("gptq-int4-g128", "gguf", "--group-size 32 would do"),
        ("int4-g32", "bnb", "anything but 8 bits"),
    ] {
        refuses(&quantize(method, format), &[method, format, words]);
        assert!(!Path::new(&part).exists() && !Path::new(out).exists());
    }
    let without = quantize("smoothquant", "lowbit");
    refuses(&without[..8], &["calibration.tokens", "--calibration FILE"]);
    refuses(&[&without[..], &["--bits", "4"]].concat(), &["smoothquant", "--bits"]);
    refuses(&quantize("gptq5", "lowbit"), &["gptq5", "gptq, awq, spqr or best"]);
    fs::create_dir(&part).unwrap();
    fs::write(Path::new(&part).join("letter.txt"), "").unwrap();
    refuses(&quantize("int8", "lowbit"), &["int8", "--calibration"]);
    refuses(&quantize("int8", "lowbit")[..8], &["out.part", "no unfinished run"]);
    fs::create_dir(out).unwrap();
    refuses(&quantize("int8", "lowbit"), &["out exists"]);
    let nowhere = copy.file("nowhere/out/");
    let nowhere = ["quantize", model, "--method", "int8", "--out", nowhere.to_str().unwrap()];
    refuses(&nowhere, &["nowhere", "make it first"]);
    refuses(&["eval", model, "--text", text, "--threads", "100000"], &["100000", "1024"]);
}

/// As the caches of models have them.
#[cfg(unix)]
#[test]
fn files_behind_links_are_part_of_a_model() {
    let copy = Copy::new();
    let (links, out) = (copy.file("links"), copy.file("out/"));
    fs::create_dir(&links).unwrap();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::os::unix::fs::symlink(copy.file(name), links.join(name)).unwrap();
    }
    let [links, out] = [&links, &out].map(|path| path.to_str().unwrap());
    json(&["quantize", links, "--method", "int8", "--out", out, "--json"]);
    let text = copy.file("text.txt");
    fs::write(&text, "Once upon a time there was a little girl. She liked to play.").unwrap();
    json(&["eval", out, "--text", text.to_str().unwrap(), "--json"]);
}

#[test]
fn inspect_names_what_is_damaged() {
    let copy = Copy::new();
    let out = copy.file("out");
    let out = out.to_str().unwrap();
    let model = copy.0.path().to_str().unwrap();
    let args = ["quantize", model, "--method", "int8", "--format", "bnb", "--out", out];
    assert!(lowbit(&args).status.success());
    let file = copy.file("out/model-00002-of-00005.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let header_len = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..header_len]).unwrap();
    let row_maxima = &header["model.layers.0.mlp.down_proj.SCB"]["data_offsets"];
    let last = header_len + row_maxima[1].as_u64().unwrap() as usize - 4;
    bytes[last..last + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&file, bytes).unwrap();
    let inspected = json(&["inspect", file.to_str().unwrap(), "--json"]);
    let damaged: Vec<_> = inspected["layers"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|layer| Some((layer["name"].as_str()?, layer["problem"].as_str()?)))
        .collect();
    let [(name, problem)] = damaged[..] else { panic!("{damaged:?}") };
    assert_eq!(name, "model.layers.0.mlp.down_proj");
    assert!(problem.contains("scale is not finite"), "{problem}");
    refuses(&["inspect", "/nowhere/model.gguf"], &["/nowhere/model.gguf"]);
}
