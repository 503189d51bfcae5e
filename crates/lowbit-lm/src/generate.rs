use std::ops::ControlFlow;

use lowbit::Context;

use crate::{Error, KvCache, Model, Result, Tokenizer, eval::argmax, tokenizer::Stream};

/// How the next token is chosen from the model's probabilities.
///
/// # Example
/// ```
/// use lowbit_lm::Sampling;
///
/// let greedy = Sampling::default();
/// assert_eq!(greedy.temperature, 0.0);
/// let varied = Sampling { temperature: 0.8, top_p: Some(0.95), seed: 7, ..greedy };
/// # let _ = varied;
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it: 1 samples from the model as it is, 0 always takes the likeliest
    /// token (greedy).
    pub temperature: f32,
    /// Only the so many likeliest tokens are candidates.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens are candidates that together have this probability (0 to 1).
    pub top_p: Option<f32>,
    /// The same seed gives the same tokens.
    pub seed: u64,
}

/// What [`generate`] wrote, and why it stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// The tokens of the prompt, with BOS.
    pub prompt: Vec<u32>,
    /// The new tokens, without the one that ended the text.
    pub tokens: Vec<u32>,
    /// Why there are no more.
    pub stop: Stop,
}

/// Why generation stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stop {
    /// The model ended the text, with EOS or with BOS, which opens another one.
    End,
    /// There are as many new tokens as were asked for.
    MaxTokens,
    /// The model's context is full.
    Context,
    /// The callback asked for it.
    Caller,
}

/// Continues `prompt` by up to `max_tokens` tokens. `on_text` gets each piece of new text as soon
/// as it is complete, and can stop.
///
/// # Errors
/// [`Error::Context`] if the prompt does not fit, [`Error::Empty`] if it has no tokens,
/// [`Error::Invalid`] if `sampling` is out of range, [`Error::Logits`] if the model's output is not
/// finite, and as [`Model::forward`].
///
/// # Example
/// ```no_run
/// # fn main() -> Result<(), lowbit_lm::Error> {
/// use std::ops::ControlFlow;
/// use lowbit_lm::{Checkpoint, Model, Sampling, generate};
///
/// let checkpoint = Checkpoint::open("models/stories3m")?;
/// let model = Model::load(&checkpoint)?;
/// let (prompt, sampling) = ("Once upon a time", Sampling::default());
/// let ctx = &mut lowbit::Context::new();
/// generate(&model, checkpoint.tokenizer(), prompt, 100, sampling, ctx, |text| {
///     print!("{text}");
///     ControlFlow::Continue(())
/// })?;
/// # Ok(())
/// # }
/// ```
pub fn generate(
    model: &Model,
    tokenizer: &Tokenizer,
    prompt: &str,
    max_tokens: usize,
    sampling: Sampling,
    ctx: &mut Context,
    mut on_text: impl FnMut(&str) -> ControlFlow<()>,
) -> Result<Generated> {
    sampling.check()?;
    let config = model.config();
    let mut prompt = tokenizer.encode(prompt)?;
    if prompt.is_empty() {
        prompt.extend(config.bos_token_id);
    }
    if prompt.is_empty() {
        let what = "the prompt has no tokens and the model no BOS: give a prompt".into();
        return Err(Error::Empty { what });
    }
    let (tokens, context) = (prompt.len(), config.max_position_embeddings);
    if tokens > context {
        return Err(Error::Context { what: "a prompt", tokens, context });
    }

    let mut cache = KvCache::new(config);
    let mut stream = Stream::new(tokenizer, &prompt);
    let mut tokens = Vec::new();
    let mut logits = model.forward_last(&prompt, &mut cache, ctx)?;
    let stop = loop {
        if tokens.len() == max_tokens {
            break Stop::MaxTokens;
        }
        if logits.iter().any(|logit| !logit.is_finite()) {
            return Err(Error::Logits { place: format!("token {} of the text", cache.len() - 1) });
        }
        let token = sampling.choose(&logits, tokens.len() as u64);
        if config.eos_token_id.contains(&token) || config.bos_token_id == Some(token) {
            break Stop::End;
        }
        tokens.push(token);
        let text = stream.push(token)?;
        if !text.is_empty() && on_text(&text).is_break() {
            return Ok(Generated { prompt, tokens, stop: Stop::Caller });
        }
        if cache.len() == cache.capacity() {
            break Stop::Context;
        }
        if tokens.len() < max_tokens {
            logits = model.forward_last(&[token], &mut cache, ctx)?;
        }
    };
    let rest = stream.finish()?;
    if !rest.is_empty() && on_text(&rest).is_break() {
        return Ok(Generated { prompt, tokens, stop: Stop::Caller });
    }
    Ok(Generated { prompt, tokens, stop })
}

impl Sampling {
    fn check(self) -> Result<()> {
        let Self { temperature, top_k, top_p, .. } = self;
        if !(temperature >= 0.0 && temperature.is_finite()) {
            let message = format!("temperature: expected a number from 0 on, got {temperature}");
            return Err(Error::Invalid(message));
        }
        if top_k == Some(0) {
            return Err(Error::Invalid("top_k: expected at least 1, got 0".into()));
        }
        match top_p {
            Some(p) if !(p > 0.0 && p <= 1.0) => {
                Err(Error::Invalid(format!("top_p: expected a number above 0, at most 1, got {p}")))
            }
            _ => Ok(()),
        }
    }

    /// The `index`-th token of a text, from its finite logits.
    fn choose(self, logits: &[f32], index: u64) -> u32 {
        let likeliest = argmax(logits);
        if self.temperature == 0.0 {
            return likeliest as u32;
        }
        let (max, temperature) = (logits[likeliest], f64::from(self.temperature));
        let weight = |logit: f32| (f64::from(logit - max) / temperature).exp();
        let mut candidates: Vec<(f64, u32)> =
            logits.iter().zip(0..).map(|(&logit, token)| (weight(logit), token)).collect();
        if self.top_k.is_some() || self.top_p.is_some() {
            // stable, so that equals stay in the order of their tokens
            candidates.sort_by(|a, b| b.0.total_cmp(&a.0));
            candidates.truncate(self.top_k.unwrap_or(usize::MAX));
        }
        let mut total: f64 = candidates.iter().map(|(weight, _)| weight).sum();
        if let Some(p) = self.top_p {
            let (mut kept, mut count) = (0.0, 0);
            while count < candidates.len() && (count == 0 || kept < f64::from(p) * total) {
                kept += candidates[count].0;
                count += 1;
            }
            candidates.truncate(count);
            total = kept;
        }
        let mut rest = uniform(self.seed, index) * total;
        for (weight, token) in &candidates {
            rest -= weight;
            if rest < 0.0 {
                return *token;
            }
        }
        // rounding: the sum came out a little smaller than `total`
        likeliest as u32
    }
}

/// Number `index` of the stream `seed`, in 0 ≤ u < 1: SplitMix64, a counter through a mixer.
fn uniform(seed: u64, index: u64) -> f64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    (z >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(sampling: Sampling, logits: &[f32], n: u64) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for i in 0..n {
            counts[sampling.choose(logits, i) as usize] += 1.0 / n as f64;
        }
        counts
    }

    #[test]
    fn sampling_follows_the_probabilities() {
        let logits = [1.0_f32, 2.0, 0.0, -1.0];
        let total: f64 = logits.iter().map(|l| f64::from(*l / 0.5).exp()).sum();
        let sampling = Sampling { temperature: 0.5, seed: 3, ..Sampling::default() };
        for (got, logit) in frequencies(sampling, &logits, 20_000).iter().zip(logits) {
            assert!((got - f64::from(logit / 0.5).exp() / total).abs() < 0.01);
        }
    }

    #[test]
    fn top_k_and_top_p_leave_only_the_likeliest() {
        let logits = [1.0, 2.0, 0.0, -1.0]; // probabilities 0.24, 0.64, 0.09, 0.03
        let base = Sampling { temperature: 1.0, seed: 1, ..Sampling::default() };
        let used = |s| frequencies(s, &logits, 2000).iter().map(|f| *f > 0.0).collect::<Vec<_>>();
        assert_eq!(used(base), [true; 4]);
        assert_eq!(used(Sampling { top_k: Some(1), ..base }), [false, true, false, false]);
        assert_eq!(used(Sampling { top_k: Some(2), ..base }), [true, true, false, false]);
        assert_eq!(used(Sampling { top_p: Some(0.5), ..base }), [false, true, false, false]);
        assert_eq!(used(Sampling { top_p: Some(0.9), ..base }), [true, true, true, false]);
        assert_eq!(used(Sampling { top_p: Some(1.0), ..base }), [true; 4]);
    }

    #[test]
    fn a_seed_is_a_text_and_zero_temperature_needs_none() {
        let logits: Vec<f32> = (0..50).map(|i| (i as f32).sin()).collect();
        let text = |seed| {
            let s = Sampling { temperature: 1.0, seed, ..Sampling::default() };
            (0..20).map(|i| s.choose(&logits, i)).collect::<Vec<_>>()
        };
        assert_eq!(text(5), text(5));
        assert_ne!(text(5), text(6));
        assert_eq!(Sampling::default().choose(&[0.0, 3.0, 3.0], 9), 1);
    }

    #[test]
    fn settings_out_of_range_are_errors() {
        let base = Sampling::default();
        for bad in [
            Sampling { temperature: -1.0, ..base },
            Sampling { temperature: f32::NAN, ..base },
            Sampling { top_k: Some(0), ..base },
            Sampling { top_p: Some(0.0), ..base },
            Sampling { top_p: Some(1.5), ..base },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}
