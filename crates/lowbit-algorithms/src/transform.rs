//! What a transform of a layer's inputs does to their statistics.

use lowbit_core::{Error, Mat, Result, Transform};

use crate::{Calibration, second_moment::row_start};

impl Calibration {
    /// Replaces the statistics of x by those of `T(x)`, for algorithms that quantize `W·T⁻¹`.
    ///
    /// Exact but for rounding, with one exception: behind a Hadamard transform the range and the mean
    /// magnitude of a channel cannot be known without the samples. They become bounds, the sums over
    /// the block divided by √b.
    ///
    /// # Errors
    /// Those of [`Transform::check`] for in_features; [`Error::TooLarge`] if there is no memory for a
    /// square copy of the second moment. Nothing has changed then.
    ///
    /// # Example
    /// ```
    /// use lowbit_algorithms::Calibration;
    /// use lowbit_core::{Context, Mat, Transform};
    ///
    /// let mut c = Calibration::with_second_moment(2)?;
    /// c.observe(Mat::new(vec![1.0, -4.0, 3.0, 0.0], 2, 2)?.as_ref(), &mut Context::new())?;
    /// c.transform(&Transform::Scale(vec![1.0, 0.5]))?;
    /// assert_eq!(c.abs_max(), [3.0, 2.0]);
    /// assert_eq!(c.second_moment()?.data(), [10.0, -2.0, -2.0, 4.0]);
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub fn transform(&mut self, transform: &Transform) -> Result<()> {
        let k = self.in_features;
        transform.check(k)?;
        if self.triangle.is_some() && self.tokens > 0 {
            let mut h = self.second_moment()?;
            transform.apply_to_second_moment(&mut h)?;
            self.triangle = Some(lower(&h));
        }
        if self.tokens == 0 {
            return Ok(());
        }
        match transform {
            Transform::Scale(scales) => {
                for (j, &s) in scales.iter().enumerate() {
                    let ends = (self.min[j] * s, self.max[j] * s);
                    (self.min[j], self.max[j]) = (ends.0.min(ends.1), ends.0.max(ends.1));
                    self.abs_sum[j] *= f64::from(s.abs());
                }
            }
            Transform::Permute(places) => {
                let at = |j: u32| j as usize; // `check` has seen that there is such a place
                self.min = places.iter().map(|&p| self.min[at(p)]).collect();
                self.max = places.iter().map(|&p| self.max[at(p)]).collect();
                self.abs_sum = places.iter().map(|&p| self.abs_sum[at(p)]).collect();
            }
            Transform::Hadamard { .. } => {
                let largest = self.abs_max();
                let mut start = 0;
                while start < k {
                    let block = 1 << (k - start).ilog2();
                    let channels = start..start + block;
                    let root = (block as f64).sqrt();
                    let max: f64 = largest[channels.clone()].iter().map(|&x| f64::from(x)).sum();
                    let mean: f64 = self.abs_sum[channels.clone()].iter().sum();
                    // f32 may round a sum down.
                    let max = ((max / root) as f32).next_up();
                    self.min[channels.clone()].fill(-max);
                    self.max[channels.clone()].fill(max);
                    self.abs_sum[channels].fill(mean / root);
                    start += block;
                }
            }
            other => {
                let what = format!("{other:?}");
                return Err(Error::Unsupported { by: "a calibration", what });
            }
        }
        Ok(())
    }

    /// `E[x_j²]` of each channel.
    ///
    /// # Errors
    /// As [`second_moment`](Self::second_moment).
    pub(crate) fn mean_squares(&self) -> Result<Vec<f64>> {
        let triangle = self.triangle()?;
        let row = |r: usize| triangle_row(triangle, r).last().copied().unwrap_or_default();
        Ok((0..self.in_features).map(|r| row(r) / self.tokens as f64).collect())
    }

    /// The rows of H up to the diagonal, back to back.
    ///
    /// # Errors
    /// As [`second_moment`](Self::second_moment).
    pub(crate) fn triangle(&self) -> Result<&[f64]> {
        let Some(triangle) = &self.triangle else {
            let what = "the second moment: make it by Calibration::with_second_moment".into();
            return Err(Error::Unsupported { by: "this calibration", what });
        };
        self.check_seen(self.in_features)?;
        Ok(triangle)
    }
}

/// Row `r` of a lower triangle, `r + 1` elements; empty behind the last one.
pub(crate) fn triangle_row(triangle: &[f64], r: usize) -> &[f64] {
    let start = row_start(r).unwrap_or(usize::MAX);
    triangle.get(start..start.saturating_add(r + 1)).unwrap_or(&[])
}

fn lower(h: &Mat<f64>) -> Vec<f64> {
    let rows = h.as_ref();
    let rows = rows.iter_rows().enumerate();
    rows.flat_map(|(r, row)| row[..=r].iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use lowbit_core::Context;

    use super::*;

    #[test]
    fn statistics_are_those_of_the_transformed_inputs_or_bounds_of_them() {
        let k = 44;
        let mut x = Mat::from_fn(50, k, |r, c| ((r * k + c * c) as f32 * 0.7).sin() * c as f32);
        let observe = |x: &Mat<f32>| {
            let mut c = Calibration::with_second_moment(k).unwrap();
            c.observe(x.as_ref(), &mut Context::new()).unwrap();
            c
        };
        let mut transformed = observe(&x);
        for transform in [
            Transform::Scale((0..k).map(|j| if j % 2 == 0 { 0.5 } else { -2.0 }).collect()),
            Transform::Permute((0..k as u32).map(|j| (j * 5 + 3) % k as u32).collect()),
            Transform::hadamard(k, 1),
        ] {
            transformed.transform(&transform).unwrap();
            for row in x.as_mut().iter_rows_mut() {
                transform.apply(row, &mut vec![0.0; k]).unwrap();
            }
            let expected = observe(&x);
            let (got, want) =
                (transformed.second_moment().unwrap(), expected.second_moment().unwrap());
            let largest = want.data().iter().fold(0.0, |max: f64, h| max.max(h.abs()));
            for (got, want) in got.data().iter().zip(want.data()) {
                assert!((got - want).abs() < 1e-5 * largest, "{got} {want}");
            }
            if let Transform::Hadamard { .. } = transform {
                let bounds = transformed.abs_max().into_iter().zip(expected.abs_max());
                assert!(bounds.into_iter().all(|(bound, max)| bound >= max));
                let means = transformed.abs_mean().into_iter().zip(expected.abs_mean());
                assert!(means.into_iter().all(|(bound, mean)| bound >= mean));
            } else {
                assert_eq!(transformed.min(), expected.min());
                assert_eq!(transformed.max(), expected.max());
            }
        }
    }
}
