//! Against figures and texts that an independent program computed from the same models.

use std::{fs, path::PathBuf, sync::Arc};

use lowbit::Context;
use lowbit_lm::{Checkpoint, Model, Protocol, Windows, eval};

/// The reference models and texts lie beside the workspace, where there are any.
fn shared(path: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data").join(path);
    if !path.exists() {
        println!("skipped: there is no {}", path.display());
        return None;
    }
    Some(path)
}

fn context() -> Context {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    Context::with_pool(Arc::new(pool))
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
    let start = std::time::Instant::now();
    let got = eval::perplexity(&loaded, &w, &mut context(), |_| ()).unwrap();
    println!("{model} {text}: {got:?}, expected {expected}, {:?}", start.elapsed());
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
