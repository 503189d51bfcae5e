use std::{ops::ControlFlow, sync::Arc};

use lowbit::{Context, Linear, MatMut, MatRef, calibrations};
use serde_json::json;

use super::tiny::{Tiny, VOCAB};
use crate::{
    Checkpoint, DenseLinear, Model, Protocol, Sampling, Stop, Windows, eval, eval::Baseline,
    generate,
};

fn tiny() -> (Checkpoint, Model) {
    let checkpoint = Tiny::new(json!({})).open().unwrap();
    let model = Model::load(&checkpoint).unwrap();
    (checkpoint, model)
}

fn windows(checkpoint: &Checkpoint, text: &str, protocol: &Protocol) -> crate::Result<Windows> {
    Windows::from_text(checkpoint, "text.txt", text.as_bytes(), protocol)
}

const SPACE: u32 = 259;
const A: u32 = 260;
const B: u32 = 261;
const C: u32 = 262;
const AB: u32 = 263;

#[test]
fn a_stream_is_cut_into_windows_that_bos_opens() {
    let (checkpoint, _) = tiny();
    let protocol = Protocol { window: Some(3), max_tokens: 8, ..Protocol::default() };
    let w = windows(&checkpoint, "abcab\r\ncab", &protocol).unwrap();
    let newline = 3 + 10;
    let expected: [&[u32]; 3] = [&[1, SPACE, AB, C], &[1, AB, newline, C], &[1, AB]];
    assert_eq!(w.iter().collect::<Vec<_>>(), expected);
    assert_eq!((w.len(), w.predicted()), (3, 7));

    let short = Protocol { max_tokens: 4, ..protocol.clone() };
    assert_eq!(windows(&checkpoint, "abcab\r\ncab", &short).unwrap().predicted(), 4);
    let skip = Protocol { skip_bytes: 3, ..protocol };
    let w = windows(&checkpoint, "abcab", &skip).unwrap();
    assert_eq!(w.iter().next().unwrap(), [1, SPACE, AB]);
    // the longest windows fill the context
    let w = windows(&checkpoint, &"c".repeat(100), &Protocol::default()).unwrap();
    assert_eq!(w.iter().map(<[u32]>::len).collect::<Vec<_>>(), [48, 48, 8]);
    assert_eq!(w.first(60).predicted(), 47);
    assert_eq!((w.first(5).predicted(), w.first(1).predicted(), w.first(0).predicted()), (5, 1, 1));
    assert_eq!(w.first(5).iter().next().unwrap(), &w.iter().next().unwrap()[..6]);
}

#[test]
fn with_a_mark_each_document_is_a_window() {
    let (checkpoint, _) = tiny();
    let mark = Some("|".to_owned());
    let protocol = Protocol { document_mark: mark, max_tokens: 5, window: Some(3), skip_bytes: 0 };
    let w = windows(&checkpoint, " a\n| |bcbc|c|c", &protocol).unwrap();
    // 2 tokens, none, 5 cut to 3, and a third document would make 7
    let expected: [&[u32]; 2] = [&[1, SPACE, A], &[1, SPACE, B, C]];
    assert_eq!(w.iter().collect::<Vec<_>>(), expected);
}

#[test]
fn texts_and_windows_that_make_no_sense_are_errors() {
    let (checkpoint, _) = tiny();
    let base = Protocol::default();
    let mark = |m: &str| Some(m.to_owned());
    for (text, protocol, expected) in [
        (
            "",
            base.clone(),
            "text.txt: there is no text to evaluate on in its 0 bytes after the first 0",
        ),
        (
            " \n",
            base.clone(),
            "text.txt: there is no text to evaluate on in its 2 bytes after the first 0",
        ),
        (
            "abc",
            Protocol { skip_bytes: 9, ..base.clone() },
            "text.txt: there is no text to evaluate on in its 3 bytes after the first 9",
        ),
        (
            "abc",
            Protocol { window: Some(48), ..base.clone() },
            "a window with its BOS of 49 tokens does not fit the model's context of 48: make it shorter",
        ),
        (
            "abc",
            Protocol { window: Some(0), ..base.clone() },
            "window 0 and max_tokens 30000: both must be at least 1",
        ),
        (
            "abc",
            Protocol { max_tokens: 0, ..base.clone() },
            "window 47 and max_tokens 0: both must be at least 1",
        ),
        ("abc", Protocol { document_mark: mark(""), ..base.clone() }, "the document mark is empty"),
        (
            "abc|",
            Protocol { document_mark: mark("|"), max_tokens: 1, ..base.clone() },
            "text.txt: its first document has more than 1 tokens",
        ),
        (
            "||",
            Protocol { document_mark: mark("|"), ..base.clone() },
            "text.txt: there is no document between the marks",
        ),
    ] {
        assert_eq!(windows(&checkpoint, text, &protocol).unwrap_err().to_string(), expected);
    }
    let no_bos = Tiny::new(json!({"bos_token_id": null})).open().unwrap();
    let error = windows(&no_bos, "abc", &base).unwrap_err().to_string();
    assert!(error.contains("config.json: bos_token_id: expected"), "{error}");
}

#[test]
fn a_token_file_is_checked_line_by_line() {
    let (checkpoint, _) = tiny();
    let read = |text: &str| Windows::from_tokens(checkpoint.config(), "t.tokens", text);
    let w = read("1 5 6\n\n1 7\n").unwrap();
    assert_eq!((w.len(), w.predicted()), (2, 3));
    let long = "1 ".repeat(49);
    for (text, expected) in [
        ("1 5\n1 x", "t.tokens: line 2: expected tokens, got \"x\""),
        ("5 1", "t.tokens: line 1: expected 1, BOS, as the first token, got 5"),
        ("1", "t.tokens: line 1: expected at least two tokens, got one"),
        ("\n", "t.tokens: there are no tokens in it"),
        ("1 264", "token 264 is outside the model's vocabulary of 264"),
        (&long, "a window of 49 tokens does not fit the model's context of 48: make it shorter"),
    ] {
        assert_eq!(read(text).unwrap_err().to_string(), expected);
    }
}

#[test]
fn a_file_of_tokens_is_known_by_what_is_in_it() {
    let (checkpoint, _) = tiny();
    for (text, tokens) in [
        ("1 260 261\n1 262\n", true),
        ("1 260 261\r\n\r\n\t1 262", true),
        ("[1, 260, 261],\n[1, 262]", true),
        ("1 2 3 4 5 6 7 8 9 # ten", false),
        ("1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 x", true),
        ("1999", false),
        ("3.5 4.25 1e9", false),
        ("a 1 b 2", false),
        ("12345678901 12345678901", false),
        ("", false),
    ] {
        assert_eq!(Windows::is_token_file("text", text.as_bytes()), tokens, "{text}");
        assert!(Windows::is_token_file("a.tokens", text.as_bytes()));
    }
    let read = |text: &str, protocol: &Protocol| {
        Windows::from_bytes(&checkpoint, "t", text.as_bytes(), protocol)
    };
    let protocol = Protocol { max_tokens: 3, ..Protocol::default() };
    let w = read("1 260 261\n1 262\n1 262 262", &protocol).unwrap();
    assert_eq!(w.iter().collect::<Vec<_>>(), [&[1, A, B][..], &[1, C]]);
    assert_eq!(read("ab", &protocol).unwrap(), windows(&checkpoint, "ab", &protocol).unwrap());
    for (text, protocol, expected) in [
        ("1 260\n7 261", protocol.clone(), "t: line 2: expected 1, BOS, as the first token, got 7"),
        ("[1, 260]", protocol.clone(), "t: line 1: expected tokens, got \"[1,\""),
        (
            "1 260",
            Protocol { window: Some(3), ..protocol.clone() },
            "t is a file of tokens, and its lines are its windows: leave window and skipped bytes out",
        ),
        (
            "1 260",
            Protocol { skip_bytes: 1, ..protocol },
            "t is a file of tokens, and its lines are its windows: leave window and skipped bytes out",
        ),
    ] {
        assert_eq!(read(text, &protocol).unwrap_err().to_string(), expected);
    }
}

#[test]
fn a_text_is_utf_8_or_refused() {
    let (checkpoint, _) = tiny();
    let read = |text: &[u8], skip_bytes: usize| {
        let protocol = Protocol { skip_bytes, ..Protocol::default() };
        Windows::from_bytes(&checkpoint, "t", text, &protocol)
    };
    let ab: &[u32] = &[1, SPACE, AB];
    for (text, skip) in [
        (&b"ab"[..], 0),
        (b"\xef\xbb\xbfab", 0), // a byte order mark
        (b"\xe6\xbc\xa2ab", 1), // the first byte of a character passed over
        (b"ab\xe6\xbc", 0),     // the last byte of a character cut off
    ] {
        assert_eq!(read(text, skip).unwrap().iter().collect::<Vec<_>>(), [ab], "{text:x?}");
    }
    for (text, expected) in [
        (
            &b"ab\xffab"[..],
            "t: expected a text in UTF-8, but byte 2 is 0xff: is this another file?",
        ),
        (b"\xa2ab", "t: expected a text in UTF-8, but byte 0 is 0xa2: is this another file?"),
        (b"ab\0ab", "t: expected a text in UTF-8, but byte 2 is 0: is this another file?"),
        (b"GGUF\x03\0\0\0", "t: expected a text, but it is a GGUF file of llama.cpp"),
        (b"\xff\xfea\0", "t: expected a text, but it is a text in UTF-16: save it as UTF-8"),
    ] {
        assert_eq!(read(text, 0).unwrap_err().to_string(), expected);
    }
}

#[test]
fn too_few_tokens_to_calibrate_on_are_an_error_and_few_are_said() {
    let (checkpoint, _) = tiny(); // of 40 inputs at most
    let check = |tokens: usize| {
        let protocol = Protocol { max_tokens: tokens, ..Protocol::default() };
        windows(&checkpoint, &"c".repeat(100), &protocol)
            .unwrap()
            .check_calibration(checkpoint.config())
    };
    assert_eq!(
        check(15).unwrap_err().to_string(),
        "15 tokens to calibrate on, for layers of up to 40 inputs: give a text of at least 16 tokens, better 40"
    );
    assert_eq!(
        check(16).unwrap().unwrap(),
        "16 tokens to calibrate on, for layers of up to 40 inputs: give a text of at least 40 tokens"
    );
    assert!(check(39).unwrap().is_some());
    assert_eq!(check(40).unwrap(), None);
}

#[test]
fn uniform_logits_have_the_perplexity_of_the_vocabulary() {
    let mut tiny = Tiny::new(json!({"tie_word_embeddings": false}));
    tiny.tensors.get_mut("lm_head.weight").unwrap().1.fill(0.0);
    let checkpoint = tiny.open().unwrap();
    let model = Model::load(&checkpoint).unwrap();
    let w = windows(&checkpoint, "abccba abc", &Protocol::default()).unwrap();
    let mut done = 0;
    let got = eval::perplexity(&model, &w, &mut Context::new(), |tokens| done = tokens).unwrap();
    assert!((got.value - VOCAB as f64).abs() < 1e-9, "{got:?}");
    assert!(got.standard_error < 1e-6);
    assert_eq!((got.tokens, done), (w.predicted(), w.predicted()));
}

#[test]
fn a_model_is_its_own_equal_and_a_spoiled_one_is_not() {
    let (checkpoint, model) = tiny();
    let w = windows(&checkpoint, &"abcc ba cab".repeat(10), &Protocol::default()).unwrap();
    let ctx = &mut Context::new();
    let baseline = Baseline::new(&model, &w, ctx, |_| ()).unwrap();
    assert_eq!(baseline.perplexity(), eval::perplexity(&model, &w, ctx, |_| ()).unwrap());
    let same = baseline.compare(&model, ctx, |_| ()).unwrap();
    assert_eq!((same.perplexity, same.kl, same.top1), (baseline.perplexity(), 0.0, 1.0));

    let spoiled = model
        .with_linears(&checkpoint, |mut layer| {
            layer.weight.data_mut().iter_mut().step_by(3).for_each(|w| *w = 0.0);
            Ok(Arc::new(DenseLinear::new(layer.weight.as_ref(), layer.bias)?))
        })
        .unwrap();
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap());
    let got = baseline.compare(&spoiled, ctx, |_| ()).unwrap();
    assert!(got.kl > 1e-3 && got.top1 < 1.0, "{got:?}");
    let parallel = baseline.compare(&spoiled, &mut Context::with_pool(pool), |_| ()).unwrap();
    assert_eq!(got, parallel);
}

#[test]
fn calibration_sees_every_layer_and_shares_what_is_the_same() {
    let (checkpoint, model) = tiny();
    let w = windows(&checkpoint, "abccba abc", &Protocol::default()).unwrap();
    let seen = eval::calibrate(&model, &w, true, &mut Context::new(), |_| ()).unwrap();
    let mut names = checkpoint.linear_names();
    names.sort();
    assert_eq!(names, seen.keys().cloned().collect::<Vec<_>>());
    for (name, linear) in model.linears() {
        let calibration = &seen[name];
        assert_eq!(calibration.in_features(), linear.in_features());
        assert_eq!(calibration.tokens() as usize, w.predicted() + w.len());
        assert!(calibration.abs_max().iter().all(|&max| max > 0.0));
        assert!(calibration.second_moment().unwrap().data()[0] > 0.0);
    }
    let of = |part: &str| &seen[&format!("model.layers.1.{part}_proj")];
    assert!(Arc::ptr_eq(of("self_attn.q"), of("self_attn.v")));
    assert!(Arc::ptr_eq(of("mlp.gate"), of("mlp.up")));
    assert!(!Arc::ptr_eq(of("self_attn.q"), of("mlp.up")));

    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap());
    let parallel = &mut Context::with_pool(pool);
    assert_eq!(eval::calibrate(&model, &w, true, parallel, |_| ()).unwrap(), seen);
    let without = eval::calibrate(&model, &w, false, parallel, |_| ()).unwrap();
    assert!(without.values().all(|calibration| !calibration.has_second_moment()));

    // Another machine has seen the same windows.
    let mut sum = seen.clone();
    let bytes = calibrations::to_bytes(&seen).unwrap();
    calibrations::merge(&mut sum, &calibrations::from_bytes("other", &bytes).unwrap()).unwrap();
    let name = "model.layers.1.mlp.up_proj";
    assert_eq!(sum[name].tokens(), 2 * seen[name].tokens());
    assert_eq!(sum[name].abs_mean(), seen[name].abs_mean());
    assert!(Arc::ptr_eq(&sum[name], &sum["model.layers.1.mlp.gate_proj"]));
}

/// A layer that overflows.
struct Infinite(usize, usize);

impl Linear for Infinite {
    fn in_features(&self) -> usize {
        self.1
    }

    fn out_features(&self) -> usize {
        self.0
    }

    fn forward(
        &self,
        _: MatRef<'_, f32>,
        mut y: MatMut<'_, f32>,
        _: &mut Context,
    ) -> lowbit::Result<()> {
        y.iter_rows_mut().for_each(|row| row.fill(f32::INFINITY));
        Ok(())
    }
}

#[test]
fn a_model_without_finite_logits_is_an_error() {
    let (checkpoint, model) = tiny();
    let broken = model
        .with_linears(&checkpoint, |layer| {
            Ok(Arc::new(Infinite(layer.weight.rows(), layer.weight.cols())))
        })
        .unwrap();
    let w = windows(&checkpoint, "abc", &Protocol::default()).unwrap();
    let ctx = &mut Context::new();
    let error = eval::perplexity(&broken, &w, ctx, |_| ()).unwrap_err().to_string();
    assert_eq!(error, "the logits after token 0 of window 0 are not finite: the model is damaged");
    let error = eval::calibrate(&broken, &w, true, ctx, |_| ()).unwrap_err().to_string();
    assert!(error.starts_with("model.layers.0.self_attn.o_proj: "), "{error}");
    let go = |_: &str| ControlFlow::Continue(());
    let text = generate(&broken, checkpoint.tokenizer(), "a", 5, Sampling::default(), ctx, go);
    assert!(text.is_err());
}

#[test]
fn generation_streams_its_text_and_stops_where_it_should() {
    let checkpoint = Tiny::new(json!({"bos_token_id": null, "eos_token_id": null})).open().unwrap();
    let model = Model::load(&checkpoint).unwrap();
    let (ctx, tokenizer) = (&mut Context::new(), checkpoint.tokenizer());
    let sampling = Sampling { temperature: 1.0, seed: 4, ..Sampling::default() };
    let mut run = |prompt: &str, max_tokens: usize, pieces: &mut Vec<String>, limit: usize| {
        generate(&model, tokenizer, prompt, max_tokens, sampling, ctx, |text| {
            pieces.push(text.to_owned());
            if pieces.len() == limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    };
    let none = usize::MAX;
    let first = run("ab", 10, &mut vec![], none).unwrap();
    assert_eq!((first.prompt.as_slice(), first.stop), (&[1, SPACE, AB][..], Stop::MaxTokens));
    assert_eq!(first.tokens.len(), 10);
    assert_eq!(run("ab", 10, &mut vec![], none).unwrap(), first);
    assert!(run("ab", 0, &mut vec![], none).unwrap().tokens.is_empty());

    let full = run("ab", 100, &mut vec![], none).unwrap();
    // the last token was chosen after the context was full
    assert_eq!((full.prompt.len() + full.tokens.len(), full.stop), (49, Stop::Context));
    let mut pieces = Vec::new();
    assert_eq!(run("ab", 100, &mut pieces, 2).unwrap().stop, Stop::Caller);
    assert_eq!(pieces.len(), 2);
    assert!(run(&"c".repeat(60), 5, &mut vec![], none).is_err());

    // the same text where its fourth token is an end
    let ends = Tiny::new(json!({"eos_token_id": [first.tokens[3], 2]})).open().unwrap();
    let model = Model::load(&ends).unwrap();
    let go = |_: &str| ControlFlow::Continue(());
    let ended = generate(&model, ends.tokenizer(), "ab", 10, sampling, ctx, go).unwrap();
    assert_eq!((ended.tokens.as_slice(), ended.stop), (&first.tokens[..3], Stop::End));
}

#[test]
fn speed_is_measured_even_in_a_short_context() {
    let time = std::time::Duration::from_millis(1);
    for context in [4, 5, 48] {
        let tiny = Tiny::new(json!({"max_position_embeddings": context}));
        let model = Model::load(&tiny.open().unwrap()).unwrap();
        let speed = crate::measure_speed(&model, time, &mut Context::new()).unwrap();
        assert!(speed.prefill_tokens_per_s > 0.0 && speed.decode_tokens_per_s > 0.0);
    }
    let tiny = Tiny::new(json!({"max_position_embeddings": 3}));
    let model = Model::load(&tiny.open().unwrap()).unwrap();
    assert!(crate::measure_speed(&model, time, &mut Context::new()).is_err());
}
