//! Against figures that an independent program computed from the same weights.

use std::{fs, path::PathBuf};

use lowbit::{Context, Method};
use minilm::{Encoder, Kind, Study, mean};
use serde_json::Value;

/// The reference models and texts lie beside the workspace, where there are any.
fn shared(path: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data").join(path);
    if !path.exists() {
        println!("skipped: there is no {}", path.display());
        return None;
    }
    Some(path)
}

#[test]
fn sentences_have_the_embeddings_of_the_reference() {
    let Some(folder) = shared("models/minilm") else { return };
    let encoder = Encoder::open(&folder).unwrap();
    let golden: Value =
        serde_json::from_slice(&fs::read(folder.join("golden.json")).unwrap()).unwrap();
    let sentences = golden["sentences"].as_array().unwrap();
    assert_eq!(sentences.len(), 8);
    for sentence in sentences {
        let ids = sentence["ids"].as_array().unwrap().iter();
        let ids: Vec<_> = ids.map(|id| id.as_u64().unwrap() as u32).collect();
        let text = sentence["text"].as_str().unwrap();
        assert_eq!(encoder.windows(text, ids.len(), 1).unwrap()[0], ids);
        let states = encoder.forward(&ids, &mut Context::new(), |_, _, _| Ok(())).unwrap();
        for (i, expected) in sentence["mean_pooled_first16"].as_array().unwrap().iter().enumerate()
        {
            let sum: f32 = states.data().chunks(384).map(|row| row[i]).sum();
            let difference = f64::from(sum / ids.len() as f32) - expected.as_f64().unwrap();
            assert!(difference.abs() < 1e-5, "{text}: {i}: {difference}");
        }
    }
}

/// Squared errors of `intermediate.dense`, whose inputs have outlier features.
#[test]
fn outlier_methods_save_most_of_what_int8_activations_lose() {
    let (Some(folder), Some(text)) =
        (shared("models/minilm"), shared("text/wikitext2_valid_tokens.txt"))
    else {
        return;
    };
    let encoder = Encoder::open(&folder).unwrap();
    let ctx = &mut Context::new();
    let windows = encoder.windows(&fs::read_to_string(text).unwrap(), 128, 24).unwrap();
    let study =
        Study::new(&encoder, &folder, Kind::Intermediate, windows.split_at(12), ctx).unwrap();
    let mut error =
        |name: &str| mean(&study.errors(&Method::named(name).unwrap().quantizer, ctx).unwrap());
    let plain = error("w8a8");
    // An independent program has 2.63e-4 on other windows.
    assert!((2.0e-4..3.5e-4).contains(&plain), "{plain}");
    assert!(plain / error("llm-int8") > 3.0);
    assert!(plain / error("smoothquant") > 3.0);
    assert!(plain / error("smoothquant-auto") > 3.0);
    assert!(plain / error("smoothquant-rot-gptq") > 6.0);
}

#[test]
fn short_texts_and_unknown_tokens_are_refused() {
    let Some(folder) = shared("models/minilm") else { return };
    let encoder = Encoder::open(&folder).unwrap();
    assert!(encoder.windows("a word", 128, 1).is_err());
    let forward = |tokens: &[u32]| encoder.forward(tokens, &mut Context::new(), |_, _, _| Ok(()));
    assert!(forward(&[]).is_err() && forward(&[30_522]).is_err() && forward(&[101; 513]).is_err());
}
