use alloc::{vec, vec::Vec};
use core::ops::{Add, Mul, Neg, Sub};

use lowbit_dtypes::random;
use pulp::{Simd, WithSimd};

use crate::{Error, Mat, Result, simd};

/// A change of basis of a layer's input, as plain data: `T(x) = x·M` for a row `x` and an invertible
/// `(k, k)` matrix `M`. The layer's weight is stored in the new basis, `Q ≈ W·T⁻¹` with
/// `W·T⁻¹ = W·M⁻ᵀ`, so that `Q·T(x) ≈ W·x`.
///
/// | | `T(x)_j` | `(W·T⁻¹)_ij` | used by |
/// |---|---|---|---|
/// | [`Scale`](Self::Scale) | `x_j · s_j` | `W_ij / s_j` | SmoothQuant, AWQ |
/// | [`Permute`](Self::Permute) | `x_{p_j}` | `W_i,p_j` | act-order of GPTQ and SpQR |
/// | [`Hadamard`](Self::Hadamard) | `(x·D·H)_j` | `(W·D·H)_ij` | QuaRot, QuIP#, HIGGS |
///
/// A layer holds a sequence of them ([`QLinear::with_transforms`](crate::QLinear::with_transforms)),
/// which is applied from first to last.
///
/// # Example
/// ```
/// use lowbit_core::Transform;
///
/// let mut x = [3.0, 1.0, -2.0];
/// let spare = &mut [0.0; 3];
/// Transform::Scale(vec![1.0, 0.5, 2.0]).apply(&mut x, spare)?;
/// Transform::Permute(vec![2, 0, 1]).apply(&mut x, spare)?;
/// assert_eq!(x, [-4.0, 3.0, 0.5]);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Transform {
    /// A factor for each feature; finite and not 0, nor so small that its reciprocal is infinite.
    Scale(Vec<f32>),
    /// For each feature of the new order its place in the old one.
    Permute(Vec<u32>),
    /// Signs, then orthonormal Hadamard blocks.
    ///
    /// `D = diag(±1)` and `H` has the Sylvester matrices `H_b / √b` on its diagonal, `b` falling powers
    /// of two: one for a width that is a power of two, otherwise the largest that fits, then the
    /// largest that fits the rest, and so on: 172 = 128 + 32 + 8 + 4. `M = D·H` is orthogonal.
    Hadamard {
        /// Which features are negated first.
        negate: Vec<bool>,
    },
}

impl Transform {
    /// A [`Hadamard`](Self::Hadamard) transform of `k` features whose signs are drawn from `seed`.
    ///
    /// # Example
    /// ```
    /// use lowbit_core::Transform;
    ///
    /// // One large feature becomes 64 of equal size.
    /// let mut x = [0.0; 64];
    /// x[5] = 80.0;
    /// Transform::hadamard(64, 1).apply(&mut x, &mut [0.0; 64])?;
    /// assert!(x.iter().all(|x| x.abs() == 10.0));
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub fn hadamard(k: usize, seed: u64) -> Self {
        Self::Hadamard { negate: (0..k as u64).map(|j| random(seed, j) & 1 == 1).collect() }
    }

    /// The width `k` that it is of.
    pub fn features(&self) -> usize {
        match self {
            Self::Scale(scales) => scales.len(),
            Self::Permute(places) => places.len(),
            Self::Hadamard { negate } => negate.len(),
        }
    }

    /// Is this a transform of `k` features that can be undone?
    ///
    /// # Errors
    /// [`Error::Length`] if it is of another width, [`Error::Parameter`] at the first scale that is 0,
    /// not finite, or without a finite reciprocal, and at the first place of a permutation that is not
    /// below `k` or occurs twice.
    ///
    /// # Example
    /// ```
    /// use lowbit_core::Transform;
    ///
    /// assert!(Transform::Permute(vec![1, 0]).check(2).is_ok());
    /// assert!(Transform::Permute(vec![1, 1]).check(2).is_err());
    /// assert!(Transform::Scale(vec![1.0, 0.0]).check(2).is_err());
    /// ```
    pub fn check(&self, k: usize) -> Result<()> {
        same_length("features of a transform", k, self.features())?;
        match self {
            Self::Scale(scales) => {
                match scales.iter().find(|s| !(s.is_finite() && (1.0 / **s).is_finite())) {
                    Some(&s) => Err(Error::Parameter {
                        what: "scale of a feature",
                        value: f64::from(s),
                        expected: "a finite number with a finite reciprocal",
                    }),
                    None => Ok(()),
                }
            }
            Self::Permute(places) => {
                let mut seen = vec![false; k];
                for &place in places {
                    match seen.get_mut(place as usize) {
                        Some(seen) if !*seen => *seen = true,
                        _ => {
                            return Err(Error::Parameter {
                                what: "place in a permutation",
                                value: f64::from(place),
                                expected: "each number below in_features once",
                            });
                        }
                    }
                }
                Ok(())
            }
            Self::Hadamard { .. } => Ok(()),
        }
    }

    /// Replaces `x` by `T(x)`, in f32: one rounding for a scale, none for a permutation; for Hadamard
    /// blocks one for each of the `log₂ b` additions, in a fixed order, and one for the division by
    /// √b. `spare` is overwritten.
    ///
    /// # Errors
    /// [`Error::Length`] if `x` or `spare` is not as wide as this; nothing has been changed then.
    ///
    /// # Example
    /// See the [type](Self).
    pub fn apply(&self, x: &mut [f32], spare: &mut [f32]) -> Result<()> {
        struct Apply<'a>(&'a Transform, &'a mut [f32], &'a mut [f32]);
        impl WithSimd for Apply<'_> {
            type Output = ();

            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) {
                forward(self.0, self.1, self.2);
            }
        }
        same_length("transformed row", self.features(), x.len())?;
        same_length("spare row of a transform", self.features(), spare.len())?;
        simd::dispatch(Apply(self, x, spare));
        Ok(())
    }

    /// Replaces the `(n, k)` weight `w` by `W·T⁻¹`, computed in f64 and rounded once: the weight for
    /// inputs that were transformed. Algorithms quantize it.
    ///
    /// # Errors
    /// Those of [`check`](Self::check) with the columns of `w`.
    ///
    /// # Example
    /// ```
    /// use lowbit_core::{Mat, Transform};
    ///
    /// let mut w = Mat::new(vec![1.0, 2.0, 3.0, 4.0], 2, 2)?;
    /// Transform::Scale(vec![2.0, 0.5]).apply_to_weight(&mut w)?;
    /// assert_eq!(w.data(), [0.5, 4.0, 1.5, 8.0]);
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub fn apply_to_weight(&self, w: &mut Mat<f32>) -> Result<()> {
        self.each_row(w, |row, spare| match self {
            Self::Scale(scales) => {
                row.iter_mut().zip(scales).for_each(|(w, &s)| *w /= f64::from(s));
            }
            // Orthogonal: M⁻ᵀ is M.
            _ => forward(self, row, spare),
        })
    }

    /// The way back: replaces `w = W·T⁻¹` by `W = w·Mᵀ`, computed in f64 and rounded once.
    ///
    /// # Errors
    /// Those of [`check`](Self::check) with the columns of `w`.
    ///
    /// # Example
    /// ```
    /// use lowbit_core::{Mat, Transform};
    ///
    /// let mut w = Mat::new(vec![1.0, 2.0, 3.0, 4.0], 2, 2)?;
    /// Transform::Permute(vec![1, 0]).undo_on_weight(&mut w)?;
    /// assert_eq!(w.data(), [2.0, 1.0, 4.0, 3.0]);
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub fn undo_on_weight(&self, w: &mut Mat<f32>) -> Result<()> {
        self.each_row(w, |row, spare| match self {
            Self::Scale(_) => forward(self, row, spare),
            Self::Permute(places) => {
                spare.copy_from_slice(row);
                places.iter().zip(spare).for_each(|(&p, w)| row[p as usize] = *w);
            }
            Self::Hadamard { negate } => {
                hadamard(row);
                flip(row, negate);
            }
        })
    }

    /// Replaces `H = Σ xᵀx` by that of the transformed inputs, `Mᵀ·H·M`.
    ///
    /// # Errors
    /// Those of [`check`](Self::check) with the columns of `h`; [`Error::Shape`] if it is not square.
    ///
    /// # Example
    /// ```
    /// use lowbit_core::{Mat, Transform};
    ///
    /// let mut h = Mat::new(vec![4.0, 2.0, 2.0, 1.0], 2, 2)?;
    /// Transform::Scale(vec![0.5, 1.0]).apply_to_second_moment(&mut h)?;
    /// assert_eq!(h.data(), [1.0, 1.0, 1.0, 1.0]);
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub fn apply_to_second_moment(&self, h: &mut Mat<f64>) -> Result<()> {
        let k = h.cols();
        self.check(k)?;
        if h.rows() != k {
            let (expected, got) = ((k, k), (h.rows(), k));
            return Err(Error::Shape { what: "second moment", expected, got });
        }
        let mut spare = vec![0.0; k];
        // H is symmetric, and so is the result: rows, then what were columns.
        for _ in 0..2 {
            h.as_mut().iter_rows_mut().for_each(|row| forward(self, row, &mut spare));
            for r in 0..k {
                for c in r + 1..k {
                    h.data_mut().swap(r * k + c, c * k + r);
                }
            }
        }
        Ok(())
    }

    /// Bytes stored: 4 for each scale and for each place, a bit for each sign.
    ///
    /// # Example
    /// ```
    /// assert_eq!(lowbit_core::Transform::hadamard(64, 1).bytes(), 8);
    /// ```
    pub fn bytes(&self) -> usize {
        match self {
            Self::Scale(scales) => 4 * scales.len(),
            Self::Permute(places) => 4 * places.len(),
            Self::Hadamard { negate } => negate.len().div_ceil(8),
        }
    }

    fn each_row(&self, w: &mut Mat<f32>, f: impl Fn(&mut [f64], &mut [f64])) -> Result<()> {
        self.check(w.cols())?;
        if w.data().is_empty() {
            return Ok(()); // however many rows there are
        }
        let (mut wide, mut spare) = (vec![0.0; w.cols()], vec![0.0; w.cols()]);
        for row in w.as_mut().iter_rows_mut() {
            wide.iter_mut().zip(&*row).for_each(|(wide, &w)| *wide = f64::from(w));
            f(&mut wide, &mut spare);
            row.iter_mut().zip(&wide).for_each(|(w, &wide)| *w = wide as f32);
        }
        Ok(())
    }
}

/// f32 or f64.
trait Real:
    Copy + From<f32> + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Neg<Output = Self>
{
    fn rounded(x: f64) -> Self;
}

impl Real for f32 {
    #[inline(always)]
    fn rounded(x: f64) -> Self {
        x as Self
    }
}

impl Real for f64 {
    #[inline(always)]
    fn rounded(x: f64) -> Self {
        x
    }
}

/// `x·M`; a place of a permutation that is none gives 0.
#[inline(always)]
fn forward<T: Real>(transform: &Transform, x: &mut [T], spare: &mut [T]) {
    match transform {
        Transform::Scale(scales) => {
            for (x, &s) in x.iter_mut().zip(scales) {
                *x = *x * T::from(s);
            }
        }
        Transform::Permute(places) => {
            spare.copy_from_slice(x);
            for (x, &place) in x.iter_mut().zip(places) {
                *x = spare.get(place as usize).copied().unwrap_or(T::from(0.0));
            }
        }
        Transform::Hadamard { negate } => {
            flip(x, negate);
            hadamard(x);
        }
    }
}

#[inline(always)]
fn flip<T: Real>(x: &mut [T], negate: &[bool]) {
    for (x, &negate) in x.iter_mut().zip(negate) {
        *x = if negate { -*x } else { *x };
    }
}

/// `x·H`: in each block the fast Walsh-Hadamard transform, neighbours first, then the division by √b.
#[inline(always)]
fn hadamard<T: Real>(mut x: &mut [T]) {
    while !x.is_empty() {
        let (block, rest) = x.split_at_mut(1 << x.len().ilog2());
        let mut half = 1;
        while half < block.len() {
            for pair in block.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        let scale = T::rounded(1.0 / libm::sqrt(block.len() as f64));
        for x in block {
            *x = *x * scale;
        }
        x = rest;
    }
}

fn same_length(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::Length { what, expected, got }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Row `j` of the Sylvester matrices on the diagonal, from the definition: the sign at `(i, j)` of
    /// a block is that of the number of bits that `i` and `j` share.
    fn definition(k: usize, negate: &[bool]) -> Mat<f64> {
        let mut starts = vec![];
        let mut start = 0;
        while start < k {
            let block = 1 << (k - start).ilog2();
            starts.extend(vec![(start, block); block]);
            start += block;
        }
        Mat::from_fn(k, k, |i, j| {
            let (start, block) = starts[i];
            if starts[j].0 != start {
                return 0.0;
            }
            let odd = ((i - start) & (j - start)).count_ones() % 2 == 1;
            let sign = if odd != negate[i] { -1.0 } else { 1.0 };
            sign / (block as f64).sqrt()
        })
    }

    fn weight(n: usize, k: usize) -> Mat<f32> {
        Mat::from_fn(n, k, |r, c| ((r * 31 + c * 17) as f32 * 0.7).sin())
    }

    fn all(k: usize) -> [Transform; 3] {
        [
            Transform::Scale((0..k).map(|j| 0.25 + (j % 7) as f32 * 0.5).collect()),
            Transform::Permute((0..k).map(|j| ((j * 5 + 3) % k) as u32).collect()),
            Transform::hadamard(k, 7),
        ]
    }

    #[test]
    fn hadamard_blocks_are_the_definition_and_orthogonal() {
        for k in [0, 1, 2, 3, 16, 64, 172, 352] {
            let Transform::Hadamard { negate } = Transform::hadamard(k, 3) else { unreachable!() };
            let m = definition(k, &negate);
            let transform = Transform::Hadamard { negate };
            for i in 0..k {
                let mut x = vec![0.0_f32; k];
                x[i] = 1.0;
                transform.apply(&mut x, &mut vec![0.0; k]).unwrap();
                for (j, x) in x.iter().enumerate() {
                    assert_eq!(*x, m.data()[i * k + j] as f32, "{k} {i} {j}");
                }
                for other in 0..k {
                    let dot: f64 =
                        (0..k).map(|j| m.data()[i * k + j] * m.data()[other * k + j]).sum();
                    assert!((dot - f64::from(u8::from(i == other))).abs() < 1e-12);
                }
            }
        }
    }

    #[test]
    fn a_transformed_weight_times_a_transformed_input_is_the_same_product() {
        for k in [1, 6, 64, 172] {
            for transform in all(k) {
                let (w, x) = (weight(5, k), weight(1, k));
                let dot = |w: &[f32], x: &[f32]| -> f64 {
                    w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum()
                };
                let (mut tw, mut tx) = (w.clone(), x.clone());
                transform.apply_to_weight(&mut tw).unwrap();
                transform.apply(tx.data_mut(), &mut vec![0.0; k]).unwrap();
                for (w, tw) in w.as_ref().iter_rows().zip(tw.as_ref().iter_rows()) {
                    assert!((dot(w, x.data()) - dot(tw, tx.data())).abs() < 1e-5 * k as f64);
                }
                transform.undo_on_weight(&mut tw).unwrap();
                for (w, back) in w.data().iter().zip(tw.data()) {
                    assert!((w - back).abs() <= 1e-6, "{k} {w} {back}");
                }
            }
        }
    }

    #[test]
    fn the_second_moment_is_that_of_the_transformed_inputs() {
        let moment = |x: &Mat<f32>| {
            Mat::from_fn(x.cols(), x.cols(), |i, j| {
                let rows = x.as_ref();
                rows.iter_rows().map(|x| f64::from(x[i]) * f64::from(x[j])).sum::<f64>()
            })
        };
        for k in [7, 44] {
            for transform in all(k) {
                let mut x = weight(9, k);
                let mut h = moment(&x);
                transform.apply_to_second_moment(&mut h).unwrap();
                for row in x.as_mut().iter_rows_mut() {
                    transform.apply(row, &mut vec![0.0; k]).unwrap();
                }
                for (a, b) in h.data().iter().zip(moment(&x).data()) {
                    assert!((a - b).abs() < 1e-4, "{a} {b}");
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_undone_is_refused() {
        for bad in [
            Transform::Scale(vec![1.0, 0.0]),
            Transform::Scale(vec![f32::NAN, 1.0]),
            Transform::Scale(vec![1e-40, 1.0]),
            Transform::Permute(vec![0, 0]),
            Transform::Permute(vec![0, 2]),
            Transform::hadamard(3, 0),
        ] {
            assert!(bad.check(2).is_err(), "{bad:?}");
            assert!(bad.apply_to_weight(&mut weight(2, 2)).is_err());
        }
        // An unchecked permutation does not panic.
        let mut x = [1.0, 2.0];
        Transform::Permute(vec![5, 0]).apply(&mut x, &mut [0.0; 2]).unwrap();
        assert_eq!(x, [0.0, 1.0]);
    }
}
