use std::time::{Duration, Instant};

use lowbit::Context;

use crate::{Error, KvCache, Model, Result, eval::argmax};

/// How fast a model is, one text at a time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Tokens per second while a prompt of [`PROMPT`] tokens is read (fewer where the context is
    /// shorter), up to the logits after its last token.
    pub prefill_tokens_per_s: f64,
    /// Tokens per second while a text is written, one token after the other.
    pub decode_tokens_per_s: f64,
}

/// Tokens of the prompt that [`measure_speed`] reads.
pub const PROMPT: usize = 256;

/// Tokens written in one repetition, after so many others.
const STEPS: usize = 16;
const DEPTH: usize = 32;
/// The median needs a few.
const REPETITIONS: usize = 3;

/// Measures the speed of `model` on the threads of `ctx`: the median of repetitions of the same
/// work, after one to warm up, for about `time` each of prefill and decode, but at least three.
///
/// # Errors
/// [`Error::Context`] if the model's context is shorter than 4 tokens, and as [`Model::forward`].
///
/// # Example
/// ```no_run
/// # fn main() -> Result<(), lowbit_lm::Error> {
/// use std::time::Duration;
/// use lowbit_lm::{Checkpoint, Model, measure_speed};
///
/// let model = Model::load(&Checkpoint::open("models/stories3m")?)?;
/// let ctx = &mut lowbit::Context::new();
/// let speed = measure_speed(&model, Duration::from_millis(300), ctx)?;
/// println!("{:.0} tokens/s", speed.decode_tokens_per_s);
/// # Ok(())
/// # }
/// ```
pub fn measure_speed(model: &Model, time: Duration, ctx: &mut Context) -> Result<Speed> {
    let (context, vocab_size) = (model.config().max_position_embeddings, model.config().vocab_size);
    if context < 4 {
        return Err(Error::Context { what: "a measurement", tokens: 4, context });
    }
    // Which tokens they are does not matter.
    let prompt: Vec<u32> =
        (0..PROMPT.min(context - 1)).map(|i| (i * 31 % vocab_size) as u32).collect();
    let mut cache = KvCache::new(model.config());
    let prefill = median_seconds(time, || {
        cache.truncate(0);
        model.forward_last(&prompt, &mut cache, ctx).map(|_| ())
    })?;

    let steps = STEPS.min(context / 2);
    let depth = DEPTH.min(context - steps).min(prompt.len());
    let decode = median_seconds(time, || {
        cache.truncate(depth);
        let mut token = prompt[0];
        for _ in 0..steps {
            token = argmax(&model.forward_last(&[token], &mut cache, ctx)?) as u32;
        }
        Ok(())
    })?;
    Ok(Speed {
        prefill_tokens_per_s: prompt.len() as f64 / prefill,
        decode_tokens_per_s: steps as f64 / decode,
    })
}

fn median_seconds(time: Duration, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let began = Instant::now();
    let mut seconds = Vec::new();
    while seconds.len() < REPETITIONS || began.elapsed() < time {
        let start = Instant::now();
        work()?;
        // a clock may be too coarse for the smallest models
        seconds.push(start.elapsed().as_secs_f64().max(1e-9));
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}
