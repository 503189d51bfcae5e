use lowbit_core::{Context, Error, Mat, MatRef, Result};
use pulp::Arch;

use crate::second_moment::{self, CHUNK, row_start};

/// Statistics of a layer's inputs `x`: not the samples, only what the algorithms need of them.
///
/// ```text
/// tokens          rows of x
/// min, max        of each channel x[.., j]
/// abs_max         the larger of −min and max
/// abs_mean        Σ |x[.., j]| / tokens
/// second_moment   H = Σ xᵀx, (k, k), if asked for: GPTQ's Hessian is 2·H / tokens
/// ```
///
/// They can be added up: [`observe`](Self::observe) adds a batch, [`merge`](Self::merge) what
/// another machine has seen, and [`calibrations`](crate::calibrations) keeps them in files.
///
/// # Precision
/// With `A = Σ |x_i·x_j|` over all tokens (up to 2^43), an element of H differs from its exact value
/// by at most `2^-17 · A`, and from that of another splitting of the tokens into calls by twice as
/// much; the tests see 1e-6. Each bound is larger by the 2^-149 a token that f32 loses near 0.
/// Products are summed in f32 over 128 tokens, hence 128 roundings of 2^-24, and those sums in f64.
/// The same calls give the same bits on every thread count and every CPU with a fused multiply-add
/// (others emulate it), and so do calls split at a multiple of 128 tokens. Merging in another order
/// moves H and the mean by at most 2^-52 of `A` and of the mean for each merge, and nothing else.
///
/// # Example
/// ```
/// use lowbit_algorithms::Calibration;
/// use lowbit_core::{Context, MatRef};
///
/// let mut c = Calibration::with_second_moment(2)?;
/// c.observe(MatRef::new(&[1.0, -4.0, 3.0, 0.0], 2, 2)?, &mut Context::new())?;
/// assert_eq!((c.tokens(), c.min(), c.max()), (2, &[1.0, -4.0][..], &[3.0, 0.0][..]));
/// assert_eq!((c.abs_max(), c.abs_mean()), (vec![3.0, 4.0], vec![2.0, 2.0]));
/// assert_eq!(c.second_moment()?.data(), [10.0, -4.0, -4.0, 16.0]);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    pub(crate) in_features: usize,
    pub(crate) tokens: u64,
    // Of each channel; empty before the first token.
    pub(crate) min: Vec<f32>,
    pub(crate) max: Vec<f32>,
    pub(crate) abs_sum: Vec<f64>,
    /// The rows of H up to the diagonal, back to back.
    pub(crate) triangle: Option<Vec<f64>>,
}

/// Tokens beyond this are refused: to here f64 counts exactly.
pub(crate) const MAX_TOKENS: u64 = 1 << 53;

impl Calibration {
    /// No tokens yet, of a layer with `in_features` inputs; without the second moment. Takes no
    /// memory before the first token.
    pub fn new(in_features: usize) -> Self {
        let (min, max, abs_sum) = (Vec::new(), Vec::new(), Vec::new());
        Self { in_features, tokens: 0, min, max, abs_sum, triangle: None }
    }

    /// No tokens yet, of a layer with `in_features` inputs; with the second moment. Its memory, see
    /// [`bytes`](Self::bytes), is taken here.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if there is not as much memory.
    pub fn with_second_moment(in_features: usize) -> Result<Self> {
        let too_large = Error::TooLarge { rows: in_features, cols: in_features };
        let mut triangle = Vec::new();
        match row_start(in_features).map(|len| (len, triangle.try_reserve_exact(len))) {
            Some((len, Ok(()))) => triangle.resize(len, 0.0),
            _ => return Err(too_large),
        }
        Ok(Self { triangle: Some(triangle), ..Self::new(in_features) })
    }

    /// Memory in bytes that a calibration of `in_features` = k channels takes: 16·k, and 4·k·(k + 1)
    /// for the second moment, of which one triangle is kept. While it observes, 2048·k more in the
    /// context. 2^64 − 1 if it is more than that.
    ///
    /// # Example
    /// ```
    /// use lowbit_algorithms::Calibration;
    ///
    /// assert_eq!(Calibration::bytes(4096, false), 65_536);
    /// assert_eq!(Calibration::bytes(4096, true), 67_190_784); // 64 MiB
    /// ```
    pub const fn bytes(in_features: usize, second_moment: bool) -> u64 {
        let k = in_features as u64;
        let triangle = if second_moment { k.saturating_mul(k.saturating_add(1)) } else { 0 };
        k.saturating_mul(16).saturating_add(triangle.saturating_mul(4))
    }

    /// Adds the rows (tokens) of a layer's input `x`, `(tokens, in_features)`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` does not have in_features columns, [`Error::NotFinite`] at the first
    /// NaN or infinity and, with the second moment, at the first number whose square is too large
    /// to be summed in f32 (|x| of about 1.1e18 or more), [`Error::TooLarge`] beyond 2^53 tokens. Nothing
    /// has been added then.
    pub fn observe(&mut self, x: MatRef<'_, f32>, ctx: &mut Context) -> Result<()> {
        if x.cols() != self.in_features {
            let expected = (x.rows(), self.in_features);
            return Err(Error::Shape { what: "calibration input", expected, got: x.shape() });
        }
        let tokens = self.add_tokens(x.rows() as u64)?;
        let limit = match self.triangle {
            Some(_) => (f32::MAX / (2 * CHUNK) as f32).sqrt(),
            None => f32::MAX,
        };
        for (row, x) in x.iter_rows().enumerate() {
            // NaN is not below the limit either. Without a branch for each number, this is fast.
            if !x.iter().fold(true, |ok, x| ok & (x.abs() <= limit)) {
                let what = match x.iter().position(|x| !x.is_finite()) {
                    Some(col) => ("calibration input", col),
                    None => {
                        let large = x.iter().position(|x| x.abs() > limit);
                        ("sum of squares of the calibration input", large.unwrap_or(0))
                    }
                };
                return Err(Error::NotFinite { what: what.0, row, col: what.1 });
            }
        }
        if x.rows() == 0 {
            return Ok(());
        }
        self.tokens = tokens;
        self.prepare();
        Arch::new().dispatch(|| {
            for x in x.iter_rows() {
                let channels = self.min.iter_mut().zip(&mut self.max).zip(&mut self.abs_sum);
                for (((min, max), sum), &x) in channels.zip(x) {
                    let x = x + 0.0; // so that a zero is positive, whichever came first
                    *min = if x < *min { x } else { *min };
                    *max = if x > *max { x } else { *max };
                    *sum += f64::from(x.abs());
                }
            }
        });
        if let Some(triangle) = &mut self.triangle {
            second_moment::add(x, triangle, ctx);
        }
        Ok(())
    }

    /// Adds what another machine has seen of the same layer.
    ///
    /// # Errors
    /// [`Error::Length`] if `other` is of another width, [`Error::Unsupported`] if only one of the
    /// two has the second moment, [`Error::TooLarge`] beyond 2^53 tokens. Nothing has been added then.
    ///
    /// # Example
    /// See [`calibrations`](crate::calibrations), which merges those of a whole model.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        self.check_merge(other)?;
        self.add(other);
        Ok(())
    }

    /// [`merge`](Self::merge) after [`check_merge`](Self::check_merge).
    pub(crate) fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        if other.tokens > 0 {
            self.prepare();
        }
        self.min.iter_mut().zip(&other.min).for_each(|(min, other)| *min = min.min(*other));
        self.max.iter_mut().zip(&other.max).for_each(|(max, other)| *max = max.max(*other));
        self.abs_sum.iter_mut().zip(&other.abs_sum).for_each(|(sum, other)| *sum += other);
        if let (Some(h), Some(other)) = (&mut self.triangle, &other.triangle) {
            h.iter_mut().zip(other).for_each(|(h, other)| *h += other);
        }
    }

    /// Makes room for the channels, before the first token.
    fn prepare(&mut self) {
        self.min.resize(self.in_features, f32::INFINITY);
        self.max.resize(self.in_features, f32::NEG_INFINITY);
        self.abs_sum.resize(self.in_features, 0.0);
    }

    /// Can `other` be added?
    pub(crate) fn check_merge(&self, other: &Self) -> Result<()> {
        other.check(self.in_features)?;
        if self.has_second_moment() != other.has_second_moment() {
            let what = "one with and one without the second moment".into();
            return Err(Error::Unsupported { by: "merging calibrations", what });
        }
        self.add_tokens(other.tokens)?;
        Ok(())
    }

    fn add_tokens(&self, more: u64) -> Result<u64> {
        let tokens = self.tokens.saturating_add(more);
        if tokens <= MAX_TOKENS {
            return Ok(tokens);
        }
        let rows = usize::try_from(tokens).unwrap_or(usize::MAX);
        Err(Error::TooLarge { rows, cols: self.in_features })
    }

    /// Width k of the layer's input.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Rows seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The smallest x of each input channel; empty before the first token.
    pub fn min(&self) -> &[f32] {
        &self.min
    }

    /// The largest x of each input channel; empty before the first token.
    pub fn max(&self) -> &[f32] {
        &self.max
    }

    /// The largest `|x|` of each input channel; empty before the first token.
    pub fn abs_max(&self) -> Vec<f32> {
        self.min.iter().zip(&self.max).map(|(min, max)| min.abs().max(max.abs())).collect()
    }

    /// The mean of `|x|` of each input channel; empty before the first token.
    pub fn abs_mean(&self) -> Vec<f64> {
        self.abs_sum.iter().map(|sum| sum / self.tokens as f64).collect()
    }

    /// Whether this was made [`with_second_moment`](Self::with_second_moment).
    pub fn has_second_moment(&self) -> bool {
        self.triangle.is_some()
    }

    /// The plain sum `H = Σ xᵀx` over all tokens, `(k, k)`, symmetric to the bit. A channel without
    /// a signal has zeros in its row and column, and only then a zero on the diagonal (or if all its
    /// |x| are below 2^-75, whose squares f32 cannot represent). A copy of 8·k² bytes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if this was not made
    /// [`with_second_moment`](Self::with_second_moment), as [`check_seen`](Self::check_seen) before
    /// the first token, [`Error::TooLarge`] if there is no memory for the copy.
    pub fn second_moment(&self) -> Result<Mat<f64>> {
        let Some(triangle) = &self.triangle else {
            let what = "the second moment: make it by Calibration::with_second_moment".into();
            return Err(Error::Unsupported { by: "this calibration", what });
        };
        let k = self.in_features;
        self.check_seen(k)?;
        let mut h = Vec::new();
        let len = k.checked_mul(k).filter(|&len| h.try_reserve_exact(len).is_ok());
        h.resize(len.ok_or(Error::TooLarge { rows: k, cols: k })?, 0.0);
        let mut rest = triangle.as_slice();
        for r in 0..k {
            let Some((row, behind)) = rest.split_at_checked(r + 1) else { break };
            h[r * k..][..=r].copy_from_slice(row);
            rest = behind;
        }
        // The other triangle in blocks, because one of the two sides jumps from row to row.
        const BLOCK: usize = 16;
        for r0 in (0..k).step_by(BLOCK) {
            for c0 in (r0..k).step_by(BLOCK) {
                for r in r0..k.min(r0 + BLOCK) {
                    for c in c0.max(r)..k.min(c0 + BLOCK) {
                        h[r * k + c] = h[c * k + r];
                    }
                }
            }
        }
        Mat::new(h, k, k)
    }

    /// Is this the calibration of a layer with `in_features` inputs, and has it seen any?
    /// Algorithms that use the statistics ask this first.
    ///
    /// # Errors
    /// [`Error::Length`] if it is of another width, or of no tokens.
    ///
    /// # Example
    /// ```
    /// use lowbit_algorithms::Calibration;
    ///
    /// let error = Calibration::new(64).check_seen(64).unwrap_err();
    /// assert_eq!(error.to_string(), "calibration: expected at least one element, got none");
    /// ```
    pub fn check_seen(&self, in_features: usize) -> Result<()> {
        self.check(in_features)?;
        if self.tokens > 0 {
            return Ok(());
        }
        Err(Error::Empty { what: "calibration" })
    }

    /// Is this calibration of a layer with `in_features` inputs?
    pub(crate) fn check(&self, in_features: usize) -> Result<()> {
        if self.in_features == in_features {
            return Ok(());
        }
        let (expected, got) = (in_features, self.in_features);
        Err(Error::Length { what: "calibration channels", expected, got })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    /// Channels of very different size, as activations have, some of them rarely alive, one dead.
    fn input(tokens: usize, k: usize, seed: usize) -> Mat<f32> {
        Mat::from_fn(tokens, k, |t, c| {
            let noise = (((t * k + c) * 7919 + seed * 104_729) as f64).sin() * 43_758.545_3;
            let noise = (noise - noise.floor()) as f32 - 0.5;
            match c % 5 {
                0 => noise * 100.0,
                1 => noise,
                2 => noise.powi(9) * 1e4,
                3 => (noise + 3.0) * 1e-3,
                _ if c == 4 => 0.0,
                _ => noise.max(0.4) - 0.4,
            }
        })
    }

    fn observed(x: MatRef<'_, f32>, ctx: &mut Context) -> Calibration {
        let mut c = Calibration::with_second_moment(x.cols()).unwrap();
        c.observe(x, ctx).unwrap();
        c
    }

    /// `(Σ x_i·x_j, Σ |x_i·x_j|)`; the products are exact in f64.
    fn exact(x: MatRef<'_, f32>) -> (Mat<f64>, Mat<f64>) {
        let sum = |f: fn(f64) -> f64| {
            Mat::from_fn(x.cols(), x.cols(), |i, j| {
                x.iter_rows().map(|x| f(f64::from(x[i]) * f64::from(x[j]))).sum()
            })
        };
        (sum(|x| x), sum(f64::abs))
    }

    /// The largest `(|a − b| − tiny) / scale`.
    fn error(a: &Mat<f64>, b: &Mat<f64>, scale: &Mat<f64>, tokens: usize) -> f64 {
        let tiny = tokens as f64 * 2.0_f64.powi(-149);
        let errors = a.data().iter().zip(b.data()).zip(scale.data());
        let error = |((a, b), scale): ((&f64, &f64), &f64)| match (a - b).abs() - tiny {
            error if error <= 0.0 => 0.0,
            error => error / scale,
        };
        errors.map(error).fold(0.0, f64::max)
    }

    /// Between two splittings; the distance to the exact value is half of it.
    const BOUND: f64 = 1.0 / 65536.0;

    #[test]
    fn the_second_moment_is_inside_its_bound() {
        let mut worst = 0.0_f64;
        for (tokens, k) in [(1, 1), (3, 5), (127, 31), (128, 32), (129, 33), (700, 70), (1500, 129)]
        {
            let x = input(tokens, k, tokens);
            let c = observed(x.as_ref(), &mut Context::new());
            let (h, (exact, scale)) = (c.second_moment().unwrap(), exact(x.as_ref()));
            worst = worst.max(error(&h, &exact, &scale, tokens));
            for r in 0..k {
                for c in 0..r {
                    assert_eq!(h.data()[r * k + c].to_bits(), h.data()[c * k + r].to_bits());
                }
                let dead = r == 4 && k > 4;
                assert_eq!(h.data()[r * k + r] == 0.0, dead || exact.data()[r * k + r] == 0.0);
            }
        }
        assert!(worst < BOUND / 2.0, "{worst:e}");
        assert!(worst < 1e-6, "{worst:e}"); // as the documentation of the type says
    }

    #[test]
    fn tiny_and_large_numbers_stay_inside_the_bound_too() {
        for scale in [1e-30_f32, 1e-20, 1e-10, 1e10, 1e15] {
            let mut x = input(300, 20, 1);
            x.data_mut().iter_mut().for_each(|x| *x *= scale);
            let h = observed(x.as_ref(), &mut Context::new()).second_moment().unwrap();
            let (exact, sum) = exact(x.as_ref());
            assert!(error(&h, &exact, &sum, 300) < BOUND / 2.0, "{scale:e}");
        }
    }

    #[test]
    fn threads_and_strides_do_not_show_in_the_bits() {
        let x = input(1300, 131, 3);
        let view = MatRef::with_row_stride(&x.data()[1..], 1299, 100, 131).unwrap();
        let one = observed(view, &mut Context::new());
        for threads in [1, 2, 3, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(observed(view, &mut Context::with_pool(Arc::new(pool))), one, "{threads}");
        }
        let copy: Vec<f32> = view.iter_rows().flatten().copied().collect();
        assert_eq!(observed(MatRef::new(&copy, 1299, 100).unwrap(), &mut Context::new()), one);
    }

    #[test]
    fn batches_of_whole_chunks_give_the_same_bits_as_one() {
        let (x, ctx) = (input(5 * CHUNK + 9, 40, 4), &mut Context::new());
        let whole = observed(x.as_ref(), ctx);
        for split in [CHUNK, 2 * CHUNK, 5 * CHUNK] {
            let mut c = observed(x.as_ref().sub_rows(0..split).unwrap(), ctx);
            c.observe(x.as_ref().sub_rows(split..x.rows()).unwrap(), ctx).unwrap();
            assert_eq!(c, whole);
        }
        let mut c = observed(x.as_ref().sub_rows(0..100).unwrap(), ctx);
        c.observe(x.as_ref().sub_rows(100..x.rows()).unwrap(), ctx).unwrap();
        let (h, expected) = (c.second_moment().unwrap(), whole.second_moment().unwrap());
        assert!(error(&h, &expected, &exact(x.as_ref()).1, x.rows()) < BOUND);
        c.triangle.clone_from(&whole.triangle);
        assert_eq!(c, whole); // but for H
    }

    #[test]
    fn statistics_of_channels_are_as_by_hand() {
        let x = [1.0, -0.0, -4.0, 2.0, 0.0, 3.0, -3.0, -0.0, -2.0];
        let mut c = Calibration::new(3);
        assert!(c.min().is_empty() && c.abs_max().is_empty() && c.abs_mean().is_empty());
        c.observe(MatRef::new(&x, 3, 3).unwrap(), &mut Context::new()).unwrap();
        assert_eq!(c.tokens(), 3);
        assert_eq!(c.min(), [-3.0, 0.0, -4.0]);
        assert_eq!(c.max(), [2.0, 0.0, 3.0]);
        assert!(c.min()[1].is_sign_positive() && c.max()[1].is_sign_positive());
        assert_eq!(c.abs_max(), [3.0, 0.0, 4.0]);
        assert_eq!(c.abs_mean(), [2.0, 0.0, 3.0]);
    }

    #[test]
    fn a_bad_batch_leaves_no_trace() {
        let ctx = &mut Context::new();
        for mut c in [Calibration::new(2), Calibration::with_second_moment(2).unwrap()] {
            c.observe(MatRef::new(&[0.5, -1.0], 1, 2).unwrap(), ctx).unwrap();
            let before = c.clone();
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let x = [1.0, 2.0, bad, 3.0];
                let error = c.observe(MatRef::new(&x, 2, 2).unwrap(), ctx).unwrap_err();
                let expected = Error::NotFinite { what: "calibration input", row: 1, col: 0 };
                assert_eq!(error, expected);
            }
            let wide = MatRef::new(&[1.0; 4], 1, 4).unwrap();
            assert_eq!(
                c.observe(wide, ctx).unwrap_err().to_string(),
                "calibration input: expected 1 x 2, got 1 x 4"
            );
            let other = Calibration { tokens: MAX_TOKENS, ..c.clone() };
            assert!(matches!(c.merge(&other), Err(Error::TooLarge { .. })));
            let other = Calibration { triangle: c.triangle.clone(), ..Calibration::new(3) };
            assert_eq!(
                c.merge(&other).unwrap_err().to_string(),
                "calibration channels: expected 2 elements, got 3"
            );
            assert_eq!(c, before);
        }
    }

    #[test]
    fn squares_beyond_f32_are_an_error_with_their_place() {
        let mut c = Calibration::with_second_moment(2).unwrap();
        let x = [1.0, 2.0, 3.0, -2e18];
        let view = MatRef::new(&x, 2, 2).unwrap();
        assert_eq!(
            c.observe(view, &mut Context::new()).unwrap_err().to_string(),
            "sum of squares of the calibration input is not finite at row 1, column 1"
        );
        assert_eq!(c, Calibration::with_second_moment(2).unwrap());
        assert!(Calibration::new(2).observe(view, &mut Context::new()).is_ok());

        let largest = (f32::MAX / 256.0).sqrt();
        assert!(largest > 1.1e18);
        let x = Mat::from_fn(CHUNK, 2, |_, _| largest);
        let h = observed(x.as_ref(), &mut Context::new()).second_moment().unwrap();
        assert!(h.data().iter().all(|h| h.is_finite()));
    }

    #[test]
    fn a_width_beyond_memory_is_an_error() {
        for k in [usize::MAX, usize::MAX - 1, 1 << 40, 1 << 25] {
            let expected = Error::TooLarge { rows: k, cols: k };
            assert_eq!(Calibration::with_second_moment(k), Err(expected));
            assert_eq!(Calibration::new(k).in_features(), k);
            assert!(Calibration::bytes(k, true) >= 1 << 52);
        }
        assert_eq!(Calibration::bytes(usize::MAX, true), u64::MAX);
    }

    #[test]
    fn statistics_that_are_not_there_are_errors() {
        let ctx = &mut Context::new();
        let mut c = Calibration::new(2);
        assert!(c.check_seen(3).is_err() && c.check_seen(2).is_err());
        c.observe(MatRef::new(&[], 0, 2).unwrap(), ctx).unwrap();
        assert!(c.check_seen(2).is_err());
        c.observe(MatRef::new(&[1.0, 2.0], 1, 2).unwrap(), ctx).unwrap();
        assert!(c.check_seen(2).is_ok());
        assert_eq!(
            c.second_moment().unwrap_err().to_string(),
            "this calibration does not support the second moment: make it by Calibration::with_second_moment"
        );
        let mut with = Calibration::with_second_moment(2).unwrap();
        assert!(with.second_moment().is_err());
        assert_eq!(
            with.merge(&c).unwrap_err().to_string(),
            "merging calibrations does not support one with and one without the second moment"
        );
        assert_eq!(with.tokens(), 0);
    }

    #[test]
    fn layers_without_inputs_have_statistics_too() {
        let c = observed(MatRef::new(&[], 3, 0).unwrap(), &mut Context::new());
        assert_eq!((c.tokens(), c.abs_max().len()), (3, 0));
        assert_eq!(c.second_moment().unwrap(), Mat::zeros(0, 0));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// As the documentation of the type promises.
        #[test]
        fn merging_in_any_order_is_the_same(
            sizes in prop::collection::vec(0..70_usize, 2..6),
            k in 1..40_usize,
            seed in 0..1000_usize,
            order in any::<prop::sample::Index>(),
        ) {
            let ctx = &mut Context::new();
            let x = input(sizes.iter().sum(), k, seed);
            let mut start = 0;
            let parts: Vec<_> = sizes.iter().map(|&size| {
                start += size;
                observed(x.as_ref().sub_rows(start - size..start).unwrap(), ctx)
            }).collect();
            let none = || Calibration::with_second_moment(k).unwrap();
            let mut left = none();
            parts.iter().for_each(|part| left.merge(part).unwrap());
            // from the right: a + (b + (c + …))
            let right = parts.iter().rev().fold(none(), |sum, part| {
                let mut part = part.clone();
                part.merge(&sum).unwrap();
                part
            });
            let mut turned = none();
            let first = order.index(parts.len());
            parts[first..].iter().chain(&parts[..first]).for_each(|p| turned.merge(p).unwrap());
            let mut two = [parts[0].clone(), parts[1].clone()];
            two[0].merge(&parts[1]).unwrap();
            two[1].merge(&parts[0]).unwrap();
            prop_assert_eq!(&two[0], &two[1]); // commutative to the bit

            let whole = observed(x.as_ref(), ctx);
            prop_assume!(whole.tokens() > 0);
            let scale = exact(x.as_ref()).1;
            let tolerance = 2.0_f64.powi(-52) * parts.len() as f64;
            for c in [&right, &turned] {
                prop_assert_eq!((c.tokens(), c.min(), c.max()), (left.tokens(), left.min(), left.max()));
                for (a, b) in c.abs_mean().iter().zip(left.abs_mean()) {
                    prop_assert!((a - b).abs() <= tolerance * b);
                }
                let (a, b) = (c.second_moment().unwrap(), left.second_moment().unwrap());
                let slack = 1.0 + BOUND; // H is itself rounded
                prop_assert!(error(&a, &b, &scale, 0) <= tolerance * slack);
            }
            prop_assert_eq!((left.tokens(), left.min(), left.max()), (whole.tokens(), whole.min(), whole.max()));
            let (a, b) = (left.second_moment().unwrap(), whole.second_moment().unwrap());
            prop_assert!(error(&a, &b, &scale, x.rows()) <= BOUND);
        }
    }
}
