use lowbit_core::{Error, MatRef, Result};

/// Statistics of a layer's inputs: not the samples, only what the algorithms need of them.
///
/// # Example
/// ```
/// use lowbit_algorithms::Calibration;
/// use lowbit_core::MatRef;
///
/// let mut c = Calibration::new(2);
/// c.observe(MatRef::new(&[1.0, -4.0, 3.0, 0.0], 2, 2)?)?;
/// assert_eq!((c.tokens(), c.abs_max(), c.abs_mean()), (2, &[3.0, 4.0][..], vec![2.0, 2.0]));
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    tokens: u64,
    abs_max: Vec<f32>,
    abs_sum: Vec<f64>,
}

impl Calibration {
    /// No tokens yet, of a layer with `in_features` inputs.
    pub fn new(in_features: usize) -> Self {
        Self { tokens: 0, abs_max: vec![0.0; in_features], abs_sum: vec![0.0; in_features] }
    }

    /// Adds the rows (tokens) of a layer's input `x`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` does not have in_features columns, [`Error::NotFinite`] at the first
    /// NaN or infinity. Nothing has been added then.
    pub fn observe(&mut self, x: MatRef<'_, f32>) -> Result<()> {
        if x.cols() != self.in_features() {
            let expected = (x.rows(), self.in_features());
            return Err(Error::Shape { what: "calibration input", expected, got: x.shape() });
        }
        for (row, x) in x.iter_rows().enumerate() {
            if let Some(col) = x.iter().position(|x| !x.is_finite()) {
                return Err(Error::NotFinite { what: "calibration input", row, col });
            }
        }
        for x in x.iter_rows() {
            for ((max, sum), &x) in self.abs_max.iter_mut().zip(&mut self.abs_sum).zip(x) {
                *max = max.max(x.abs());
                *sum += f64::from(x.abs());
            }
        }
        self.tokens += x.rows() as u64;
        Ok(())
    }

    /// Adds what another machine has seen of the same layer.
    ///
    /// # Errors
    /// [`Error::Length`] if `other` is of another width.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        self.check(other.in_features())?;
        self.tokens += other.tokens;
        for (max, &other) in self.abs_max.iter_mut().zip(&other.abs_max) {
            *max = max.max(other);
        }
        for (sum, other) in self.abs_sum.iter_mut().zip(&other.abs_sum) {
            *sum += other;
        }
        Ok(())
    }

    /// Width of the layer's input.
    pub fn in_features(&self) -> usize {
        self.abs_max.len()
    }

    /// Rows seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The largest `|x|` of each input channel; 0 before the first token.
    pub fn abs_max(&self) -> &[f32] {
        &self.abs_max
    }

    /// The mean of `|x|` of each input channel; 0 before the first token.
    pub fn abs_mean(&self) -> Vec<f64> {
        let tokens = self.tokens.max(1) as f64;
        self.abs_sum.iter().map(|sum| sum / tokens).collect()
    }

    /// Is this calibration of a layer with `in_features` inputs?
    pub(crate) fn check(&self, in_features: usize) -> Result<()> {
        if self.in_features() == in_features {
            return Ok(());
        }
        let (expected, got) = (in_features, self.in_features());
        Err(Error::Length { what: "calibration channels", expected, got })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_halves_equals_observing_the_whole() {
        let x: Vec<f32> = (0..40).map(|i| ((i * 7 % 11) as f32 - 5.0) * 0.25).collect();
        let [mut whole, mut left, mut right] = [(); 3].map(|()| Calibration::new(4));
        whole.observe(MatRef::new(&x, 10, 4).unwrap()).unwrap();
        left.observe(MatRef::new(&x[..12], 3, 4).unwrap()).unwrap();
        right.observe(MatRef::new(&x[12..], 7, 4).unwrap()).unwrap();
        left.merge(&right).unwrap();
        assert_eq!(left, whole);
    }

    #[test]
    fn a_bad_batch_leaves_no_trace() {
        let mut c = Calibration::new(2);
        let x = [1.0, 2.0, f32::NAN, 3.0];
        assert_eq!(
            c.observe(MatRef::new(&x, 2, 2).unwrap()),
            Err(Error::NotFinite { what: "calibration input", row: 1, col: 0 })
        );
        assert!(c.observe(MatRef::new(&x, 1, 4).unwrap()).is_err());
        assert!(c.merge(&Calibration::new(3)).is_err());
        assert_eq!(c, Calibration::new(2));
    }
}
