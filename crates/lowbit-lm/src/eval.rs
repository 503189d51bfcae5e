//! How well a model predicts a text, and how far a quantized model is from the original.
//!
//! ```text
//! perplexity = exp(mean over predicted tokens of −ln p(token))
//! kl         = mean over predicted tokens of Σ p·(ln p − ln q)      p: original, q: quantized
//! top1       = share of predicted tokens where both models rank the same token first
//! ```
//!
//! Logits are f32, sums over tokens f64. Only figures on the same windows can be compared.

use std::collections::BTreeMap;
use std::sync::Arc;

use lowbit::metrics::{kl_divergence, log_sum_exp};
use lowbit::{Calibration, Calibrations, Context, Mat};

use crate::{Error, KvCache, Model, Result, Windows, ops};

/// How well a model predicts a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Perplexity {
    /// The exponential of the mean negative log-likelihood (natural logarithm) of a token.
    pub value: f64,
    /// Its standard error, as if the tokens were independent; NaN for a single token.
    pub standard_error: f64,
    /// Tokens predicted.
    pub tokens: usize,
}

/// How well a model predicts a text, and how far it is from its baseline.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// Of this model.
    pub perplexity: Perplexity,
    /// Mean Kullback-Leibler divergence of this model from the baseline, in nats a token. Rounding
    /// of the logits can make it negative by about 1e-7.
    pub kl: f64,
    /// Share of tokens, 0 to 1, where both models rank the same token first.
    pub top1: f64,
}

/// Measures the perplexity of `model`, window by window. `progress` gets the number of tokens done
/// so far, of [`windows.predicted()`](Windows::predicted).
///
/// # Errors
/// [`Error::Logits`] if the model's output is not finite, and as [`Model::forward`].
///
/// # Example
/// ```no_run
/// # fn main() -> Result<(), lowbit_lm::Error> {
/// use lowbit_lm::{Checkpoint, Model, Protocol, Windows, eval};
///
/// let checkpoint = Checkpoint::open("models/stories3m")?;
/// let text = b"Once upon a time, there was a little girl named Lily.";
/// let windows = Windows::from_text(&checkpoint, "story.txt", text, &Protocol::default())?;
/// let model = Model::load(&checkpoint)?;
/// let ctx = &mut lowbit::Context::new();
/// println!("{:.3}", eval::perplexity(&model, &windows, ctx, |_| ())?.value);
/// # Ok(())
/// # }
/// ```
pub fn perplexity(
    model: &Model,
    windows: &Windows,
    ctx: &mut Context,
    progress: impl FnMut(usize),
) -> Result<Perplexity> {
    let mut losses = Vec::with_capacity(windows.predicted());
    each_piece(model, windows, ctx, progress, |piece, logits, ctx| {
        losses.extend(losses_of(&piece, &logits, ctx)?);
        Ok(())
    })?;
    Ok(Perplexity::of(&losses))
}

/// The logits of an unquantized model on some windows, kept to compare other models with.
///
/// Takes `4 · vocab_size` bytes for each predicted token: 120 MB for 30,000 tokens of a vocabulary
/// of 1,000.
///
/// # Example
/// ```no_run
/// # fn main() -> Result<(), lowbit_lm::Error> {
/// use std::sync::Arc;
/// use lowbit::{Calibration, Method, PackedLinear, Quantizer};
/// use lowbit_lm::{Checkpoint, Model, Protocol, Windows, eval::Baseline};
///
/// let checkpoint = Checkpoint::open("models/stories3m")?;
/// let text = b"Once upon a time, there was a little girl named Lily.";
/// let windows = Windows::from_text(&checkpoint, "story.txt", text, &Protocol::default())?;
/// let ctx = &mut lowbit::Context::new();
///
/// let model = Model::load(&checkpoint)?;
/// let baseline = Baseline::new(&model, &windows, ctx, |_| ())?;
/// let method = Method::named("int4-g32").unwrap();
/// let quantized = model.with_linears(&checkpoint, |layer| {
///     let calibration = Calibration::new(layer.weight.cols());
///     let q = method.quantizer.quantize(layer.weight.as_ref(), &calibration, ctx)?;
///     Ok(Arc::new(PackedLinear::new(&q.layer.with_bias(layer.bias)?)?))
/// })?;
/// println!("{:?}", baseline.compare(&quantized, ctx, |_| ())?);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Baseline {
    windows: Windows,
    /// Of each piece of each window.
    logits: Vec<Mat<f32>>,
    perplexity: Perplexity,
}

impl Baseline {
    /// Runs `model` on the windows. `progress` gets the number of tokens done so far.
    ///
    /// # Errors
    /// As [`perplexity`].
    pub fn new(
        model: &Model,
        windows: &Windows,
        ctx: &mut Context,
        progress: impl FnMut(usize),
    ) -> Result<Self> {
        let mut losses = Vec::with_capacity(windows.predicted());
        let mut kept = Vec::with_capacity(windows.len());
        each_piece(model, windows, ctx, progress, |piece, logits, ctx| {
            losses.extend(losses_of(&piece, &logits, ctx)?);
            kept.push(logits);
            Ok(())
        })?;
        let perplexity = Perplexity::of(&losses);
        Ok(Self { windows: windows.clone(), logits: kept, perplexity })
    }

    /// The windows it was made on.
    pub fn windows(&self) -> &Windows {
        &self.windows
    }

    /// Of the baseline itself.
    pub fn perplexity(&self) -> Perplexity {
        self.perplexity
    }

    /// Runs `model` on the same windows and compares. `progress` gets the number of tokens done so
    /// far.
    ///
    /// # Errors
    /// As [`perplexity`]; [`Error::Baseline`] if `model` has another vocabulary.
    pub fn compare(
        &self,
        model: &Model,
        ctx: &mut Context,
        progress: impl FnMut(usize),
    ) -> Result<Comparison> {
        let tokens = self.windows.predicted();
        let (mut losses, mut kl, mut top1) = (Vec::with_capacity(tokens), 0.0, 0_usize);
        let mut baseline = self.logits.iter();
        each_piece(model, &self.windows, ctx, progress, |piece, q, ctx| {
            let Some(p) = baseline.next() else { return Ok(()) };
            if p.cols() != q.cols() {
                return Err(Error::Baseline { expected: p.cols(), got: q.cols() });
            }
            losses.extend(losses_of(&piece, &q, ctx)?);
            let mut rows = vec![(0.0, false); q.rows()];
            ops::for_chunks(ctx, &mut rows, 8, |i, rows| {
                for (r, out) in rows.iter_mut().enumerate() {
                    let (p, q) = (p.as_ref().row(i * 8 + r), q.as_ref().row(i * 8 + r));
                    let (p, q) = (p.unwrap_or(&[]), q.unwrap_or(&[]));
                    // The rows are equally long: their matrices have as many columns.
                    *out = (kl_divergence(p, q).unwrap_or(f64::NAN), argmax(p) == argmax(q));
                }
            });
            kl += rows.iter().map(|(kl, _)| kl).sum::<f64>();
            top1 += rows.iter().filter(|(_, same)| *same).count();
            Ok(())
        })?;
        let perplexity = Perplexity::of(&losses);
        Ok(Comparison { perplexity, kl: kl / tokens as f64, top1: top1 as f64 / tokens as f64 })
    }
}

/// Statistics of the input of every linear layer of `model` over the windows, by the layer's name.
/// Layers with the same input (q, k and v; gate and up) share one calibration, as the files of
/// [`lowbit::calibrations`] do. With `second_moment` they keep `Σ xᵀx` too, which takes the memory
/// that [`Calibration::bytes`] says. `progress` gets the number of tokens done so far.
///
/// # Errors
/// [`Error::Layer`] if an input is not finite or there is no memory for the second moment, and as
/// [`Model::forward`].
///
/// # Example
/// ```no_run
/// use lowbit::calibrations;
/// use lowbit_lm::{Checkpoint, Model, Protocol, Windows, eval};
///
/// let checkpoint = Checkpoint::open("models/stories3m")?;
/// let text = b"Once upon a time, there was a little girl named Lily.";
/// let windows = Windows::from_text(&checkpoint, "story.txt", text, &Protocol::default())?;
/// let model = Model::load(&checkpoint)?;
/// let ctx = &mut lowbit::Context::new();
/// let statistics = eval::calibrate(&model, &windows, true, ctx, |_| ())?;
/// calibrations::save(&statistics, "stories3m.calibration.safetensors".as_ref())?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn calibrate(
    model: &Model,
    windows: &Windows,
    second_moment: bool,
    ctx: &mut Context,
    mut progress: impl FnMut(usize),
) -> Result<Calibrations> {
    // By the first of the names that share it, with the others.
    let mut shared: BTreeMap<String, (Vec<String>, Calibration)> = BTreeMap::new();
    let mut cache = KvCache::new(model.config());
    // The model has the other one while it shows the inputs.
    let mut own = ctx.pool().map_or_else(Context::new, |pool| Context::with_pool(pool.clone()));
    let mut done = 0;
    for tokens in windows.iter() {
        cache.truncate(0);
        model.observe(tokens, &mut cache, ctx, |names, x| {
            let Some((first, others)) = names.split_first() else { return Ok(()) };
            let error = |cause| Error::Layer { layer: (*first).to_owned(), cause };
            if !shared.contains_key(*first) {
                let others = others.iter().map(|&name| name.to_owned()).collect();
                let calibration = match second_moment {
                    true => Calibration::with_second_moment(x.cols()).map_err(error)?,
                    false => Calibration::new(x.cols()),
                };
                shared.insert((*first).to_owned(), (others, calibration));
            }
            let Some((_, calibration)) = shared.get_mut(*first) else { return Ok(()) };
            calibration.observe(x, &mut own).map_err(error)
        })?;
        done += tokens.len() - 1;
        progress(done);
    }
    let mut all = Calibrations::new();
    for (first, (others, calibration)) in shared {
        let calibration = Arc::new(calibration);
        all.extend(others.into_iter().map(|name| (name, calibration.clone())));
        all.insert(first, calibration);
    }
    Ok(all)
}

impl Perplexity {
    /// From the negative log-likelihood of each token, at least one.
    fn of(losses: &[f64]) -> Self {
        let n = losses.len() as f64;
        let mean = losses.iter().sum::<f64>() / n;
        let variance = losses.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / (n - 1.0);
        let value = mean.exp();
        Self { value, standard_error: value * (variance / n).sqrt(), tokens: losses.len() }
    }
}

/// Tokens whose logits are in memory at a time: vocabularies are large, and so are contexts.
const PIECE: usize = 512;

/// A part of a window.
struct Piece<'a> {
    window: usize,
    start: usize,
    /// What the logits after each of the piece's tokens should predict.
    targets: &'a [u32],
}

/// Calls `f(piece, logits, ctx)` for each piece of each window.
fn each_piece(
    model: &Model,
    windows: &Windows,
    ctx: &mut Context,
    mut progress: impl FnMut(usize),
    mut f: impl FnMut(Piece<'_>, Mat<f32>, &Context) -> Result<()>,
) -> Result<()> {
    let mut cache = KvCache::new(model.config());
    let mut done = 0;
    for (window, tokens) in windows.iter().enumerate() {
        cache.truncate(0);
        let given = &tokens[..tokens.len() - 1];
        for (i, (given, targets)) in given.chunks(PIECE).zip(tokens[1..].chunks(PIECE)).enumerate()
        {
            let logits = model.forward(given, &mut cache, ctx)?;
            f(Piece { window, start: i * PIECE, targets }, logits, ctx)?;
            done += targets.len();
            progress(done);
        }
    }
    Ok(())
}

/// The negative log-likelihood of each target.
fn losses_of(piece: &Piece<'_>, logits: &Mat<f32>, ctx: &Context) -> Result<Vec<f64>> {
    let mut losses = vec![0.0; logits.rows()];
    ops::for_chunks(ctx, &mut losses, 8, |i, losses| {
        for (r, loss) in losses.iter_mut().enumerate() {
            let row = logits.as_ref().row(i * 8 + r).unwrap_or(&[]);
            *loss = negative_log_likelihood(row, piece.targets[i * 8 + r]);
        }
    });
    match losses.iter().position(|loss| !loss.is_finite()) {
        None => Ok(losses),
        Some(position) => {
            let (token, window) = (piece.start + position, piece.window);
            Err(Error::Logits { place: format!("token {token} of window {window}") })
        }
    }
}

/// `−ln softmax(logits)[token]`; not finite if any logit is not.
fn negative_log_likelihood(logits: &[f32], token: u32) -> f64 {
    let finite = logits.iter().all(|l| l.is_finite());
    match logits.get(token as usize) {
        Some(&logit) if finite => log_sum_exp(logits) - f64::from(logit),
        _ => f64::NAN,
    }
}

/// The first of the largest.
pub(crate) fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_ignore_a_shift_of_all_logits() {
        let logits = [1.0_f32, -2.5, 3.0, 0.25];
        let shifted = logits.map(|l| l + 64.0);
        let (a, b) = (negative_log_likelihood(&logits, 3), negative_log_likelihood(&shifted, 3));
        assert!((a - b).abs() < 1e-12);
    }

    #[test]
    fn the_likelihood_of_a_coin_is_as_by_hand() {
        assert!((negative_log_likelihood(&[3.0_f32.ln(), 0.0], 1) - 4.0_f64.ln()).abs() < 1e-7);
    }

    #[test]
    fn extreme_logits_stay_finite_and_bad_ones_do_not() {
        assert_eq!(negative_log_likelihood(&[-3e38, 3e38], 1), 0.0);
        assert!(negative_log_likelihood(&[-3e38, 3e38], 0).is_finite());
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(!negative_log_likelihood(&[0.0, bad], 0).is_finite());
        }
        assert!(!negative_log_likelihood(&[0.0], 1).is_finite());
    }

    #[test]
    fn the_standard_error_is_that_of_the_mean_times_the_perplexity() {
        let p = Perplexity::of(&[1.0, 3.0]);
        assert!((p.value - 2.0_f64.exp()).abs() < 1e-12);
        assert!((p.standard_error - 2.0_f64.exp()).abs() < 1e-12); // variance 2, over 2 tokens
        assert!(Perplexity::of(&[1.0]).standard_error.is_nan());
    }

    #[test]
    fn of_equal_logits_the_first_is_the_top() {
        assert_eq!(argmax(&[1.0, 2.0, 2.0]), 1);
    }
}
