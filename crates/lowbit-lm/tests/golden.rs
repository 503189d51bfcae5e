//! Against figures and texts that an independent program computed from the same models.

use std::{fs, ops::ControlFlow, path::PathBuf, sync::Arc};

use lowbit::{Calibration, Context, Method, PackedLinear, Quantizer};
use lowbit_lm::{Checkpoint, KvCache, Model, Protocol, Sampling, Windows, eval, generate};
use serde_json::Value;

/// A path from the root of the workspace, if there is such a file or folder. The reference models
/// and texts lie beside the workspace, where there are any.
fn find(path: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(path);
    if !path.exists() {
        println!("skipped: there is no {}", path.display());
        return None;
    }
    Some(path)
}

fn shared(path: &str) -> Option<PathBuf> {
    find(&format!("../shared/data/{path}"))
}

fn context() -> Context {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    Context::with_pool(Arc::new(pool))
}

fn greedy(checkpoint: &Checkpoint, prompt: &str, max_tokens: usize) -> (Vec<u32>, String) {
    let model = Model::load(checkpoint).unwrap();
    let (tokenizer, mut text) = (checkpoint.tokenizer(), prompt.to_owned());
    let ctx = &mut context();
    let generated =
        generate(&model, tokenizer, prompt, max_tokens, Sampling::default(), ctx, |piece| {
            text += piece;
            ControlFlow::Continue(())
        })
        .unwrap();
    let all = [generated.prompt, generated.tokens.clone()].concat();
    assert_eq!(tokenizer.decode(&all).unwrap(), text);
    (generated.tokens, text)
}

fn check_perplexity(
    model: &str,
    text: &str,
    protocol: &Protocol,
    expected: f64,
    tokens: usize,
    windows: usize,
) {
    let (Some(folder), Some(file)) =
        (shared(&format!("models/{model}")), shared(&format!("text/{text}")))
    else {
        return;
    };
    let checkpoint = Checkpoint::open(folder).unwrap();
    let loaded = Model::load(&checkpoint).unwrap();
    let w = Windows::from_text(&checkpoint, text, &fs::read(file).unwrap(), protocol).unwrap();
    assert_eq!((w.predicted(), w.len()), (tokens, windows));
    let got = eval::perplexity(&loaded, &w, &mut context(), |_| ()).unwrap();
    println!("{model} {text}: {got:?}, expected {expected}");
    assert!((got.value / expected - 1.0).abs() < 1e-5, "{got:?}, expected {expected}");
}

fn per_story() -> Protocol {
    let document_mark = Some("<|endoftext|>".into());
    Protocol { document_mark, skip_bytes: 1_048_576, ..Protocol::default() }
}

const STORIES: &str = "tinystories_train_2MiB_eot.txt";

#[test]
fn stories260k_reproduces_its_perplexity_per_story() {
    check_perplexity("stories260k", STORIES, &per_story(), 4.627914, 29_879, 83);
}

#[test]
fn babyllama361_reproduces_its_perplexity_per_story() {
    check_perplexity("babyllama361", STORIES, &per_story(), 2.030185, 29_835, 117);
}

#[test]
fn stories260k_reproduces_its_perplexity_on_a_stream() {
    let protocol = Protocol::default();
    check_perplexity("stories260k", "tinyshakespeare.txt", &protocol, 114.8214, 30_000, 59);
}

/// `<unk>` is plain text here. Only the windows: the model is not run.
#[test]
fn wikitext_is_cut_into_as_many_windows() {
    let (Some(folder), Some(text)) =
        (shared("models/babyllama361"), shared("text/wikitext2_valid_tokens.txt"))
    else {
        return;
    };
    let checkpoint = Checkpoint::open(folder).unwrap();
    let text = fs::read(text).unwrap();
    let w = Windows::from_text(&checkpoint, "text", &text, &Protocol::default()).unwrap();
    assert_eq!((w.predicted(), w.len()), (30_000, 118));
}

#[test]
fn prompts_have_the_reference_tokens() {
    let both = "Zoë said: “Hi!”\n漢 42";
    let prompts: [(&str, &str, &[u32]); 3] = [
        (
            "stories260k",
            "Once upon a time, there was a little girl named Lily.",
            &[1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426],
        ),
        (
            "stories260k",
            both,
            &[
                1, 410, 469, 414, 198, 174, 336, 467, 410, 465, 440, 417, 443, 466, 13, 233, 191,
                165, 410, 484, 479,
            ],
        ),
        (
            "babyllama361",
            both,
            &[
                1, 259, 318, 263, 198, 174, 259, 268, 261, 266, 267, 316, 259, 314, 289, 266, 292,
                315, 13, 233, 191, 165, 259, 333, 328,
            ],
        ),
    ];
    for (model, text, expected) in prompts {
        let Some(folder) = shared(&format!("models/{model}")) else { return };
        let checkpoint = Checkpoint::open(folder).unwrap();
        assert_eq!(checkpoint.tokenizer().encode(text).unwrap(), expected);
        assert_eq!(checkpoint.tokenizer().decode(expected).unwrap(), text);
    }
}

#[test]
fn greedy_texts_are_the_reference_texts() {
    for (model, expected) in [
        (
            "stories260k",
            "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. She wanted to play with it, but it was too high.\nLily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do",
        ),
        (
            "babyllama361",
            "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine. One day, she went t",
        ),
    ] {
        let Some(folder) = shared(&format!("models/{model}")) else { return };
        let (tokens, text) = greedy(&Checkpoint::open(folder).unwrap(), "Once upon a time", 100);
        assert_eq!((tokens.len(), text.as_str()), (100, expected));
    }
}

#[test]
fn logits_after_the_prompt_are_the_reference_logits() {
    for (model, first, max, argmax) in [
        ("stories260k", [-10.1366, -5.3295, -10.1381, -10.1369, -10.1372, -10.1383], 17.7994, 432),
        ("babyllama361", [-8.6893, -2.1339, -8.4792, -8.5310, -8.6035, -8.8095], 11.5942, 281),
    ] {
        let Some(folder) = shared(&format!("models/{model}")) else { return };
        let checkpoint = Checkpoint::open(folder).unwrap();
        let model = Model::load(&checkpoint).unwrap();
        let prompt = checkpoint.tokenizer().encode("Once upon a time").unwrap();
        let mut cache = KvCache::new(model.config());
        let logits = model.forward_last(&prompt, &mut cache, &mut context()).unwrap();
        for (got, expected) in logits.iter().zip(first).chain([(&logits[argmax], max)]) {
            assert!((got - expected).abs() < 1e-4, "{got} {expected}");
        }
        assert!(logits.iter().all(|&logit| logit <= logits[argmax]));
    }
}

/// The model that the repository holds, against what its training script wrote beside it.
#[test]
fn stories3m_does_what_it_did_when_it_was_trained() {
    let (Some(folder), Some(golden)) =
        (find("models/stories3m"), find("models/stories3m/golden.json"))
    else {
        return;
    };
    let golden: Value = serde_json::from_slice(&fs::read(golden).unwrap()).unwrap();
    let ids = |field: &str| -> Vec<u32> {
        golden[field].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let prompt = golden["prompt"].as_str().unwrap();
    assert_eq!(checkpoint.tokenizer().encode(prompt).unwrap(), ids("prompt_ids"));
    let expected = ids("greedy_ids");
    let (tokens, text) = greedy(&checkpoint, prompt, expected.len());
    assert_eq!((tokens, text.as_str()), (expected, golden["greedy_text"].as_str().unwrap()));

    let tokens = fs::read_to_string(folder.join("eval.tokens")).unwrap();
    let w = Windows::from_tokens(checkpoint.config(), "eval.tokens", &tokens).unwrap();
    assert_eq!(w.predicted() as u64, golden["eval_tokens"].as_u64().unwrap());
    let model = Model::load(&checkpoint).unwrap();
    let got = eval::perplexity(&model, &w, &mut context(), |_| ()).unwrap();
    let expected = golden["eval_perplexity"].as_f64().unwrap();
    assert!((got.value / expected - 1.0).abs() < 1e-5, "{got:?}, expected {expected}");
}

/// The orders that reference figures show for both models, on a third of their text.
#[test]
fn quantized_models_rank_as_they_should() {
    for model in ["stories260k", "babyllama361"] {
        let (Some(folder), Some(file)) =
            (shared(&format!("models/{model}")), shared(&format!("text/{STORIES}")))
        else {
            return;
        };
        let checkpoint = Checkpoint::open(folder).unwrap();
        let protocol = Protocol { max_tokens: 10_000, ..per_story() };
        let text = fs::read(file).unwrap();
        let windows = Windows::from_text(&checkpoint, STORIES, &text, &protocol).unwrap();
        let (dense, ctx) = (Model::load(&checkpoint).unwrap(), &mut context());
        let baseline = eval::Baseline::new(&dense, &windows, ctx, |_| ()).unwrap();
        let mut compare = |name: &str| {
            let quantizer = Method::named(name).unwrap().quantizer;
            let quantized = dense.with_linears(&checkpoint, |layer| {
                let calibration = Calibration::new(layer.weight.cols());
                let q = quantizer.quantize(layer.weight.as_ref(), &calibration, ctx)?.layer;
                Ok(Arc::new(PackedLinear::new(&q.with_bias(layer.bias)?)?))
            });
            baseline.compare(&quantized.unwrap(), ctx, |_| ()).unwrap()
        };
        for (name, bound) in [("int8", 0.001), ("w8a8", 0.002)] {
            let gap = compare(name).perplexity.value / baseline.perplexity().value - 1.0;
            assert!(gap.abs() < bound, "{model} {name}: {gap}");
        }
        let kl = ["int8", "int4-g32-zp", "int4-g32", "int4", "int3-g32", "int2-g32"]
            .map(|name| compare(name).kl);
        assert!(kl.is_sorted() && kl[0] < 0.001, "{model}: {kl:?}");
    }
}
