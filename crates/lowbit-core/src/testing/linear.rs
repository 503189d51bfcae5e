use alloc::{boxed::Box, string::ToString};
use core::fmt;

use super::{
    bounds,
    failure::{Failure, Mismatch},
    family::Family,
};
use crate::{
    ActivationScheme, Context, Error, Granularity, Linear, Mat, MatMut, MatRef, QLinear, QMatrix,
    QuantScheme, Result,
};

/// `y = x·Wᵀ + bias` with quantized weights: a problem to hold a kernel against.
///
/// # Example
/// ```
/// use lowbit_core::testing::{Family, LinearProblem, Promise};
/// use lowbit_core::{Granularity, MatMut, MatRef, QLinear, QMatrix, QuantScheme};
///
/// // Dequantizes and multiplies in f32. A kernel of your own would pack `layer.weight()` first.
/// fn kernel(layer: &QLinear, x: MatRef<'_, f32>, mut y: MatMut<'_, f32>) -> Result<(), String> {
///     let w = layer.weight().dequantize();
///     for (x, y) in x.iter_rows().zip(y.iter_rows_mut()) {
///         for (w, y) in w.as_ref().iter_rows().zip(y) {
///             *y = x.iter().zip(w).map(|(x, w)| x * w).sum();
///         }
///     }
///     Ok(())
/// }
///
/// let w = Family::HeavyTails.matrix(5, 100, 1);
/// let w = QMatrix::quantize(w.as_ref(), QuantScheme::affine(4, Granularity::PerGroup(32)))?;
/// let problem = LinearProblem::new(QLinear::new(w), Family::OutlierChannels.matrix(3, 100, 2))?;
/// problem.check(Promise::Rounding, kernel).unwrap();
///
/// // The bound is tight enough to notice that one weight in a hundred is off by 0.1.
/// let failure = problem.check(Promise::Rounding, |layer, x, mut y| {
///     kernel(layer, x, y.reborrow())?;
///     y.row_mut(2).unwrap()[4] += x.row(2).unwrap()[99] * 0.1;
///     Ok::<(), String>(())
/// });
/// assert!(failure.unwrap_err().to_string().starts_with("row 2, column 4 of 3 x 5, k = 100: "));
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LinearProblem {
    layer: QLinear,
    x: Mat<f32>,
}

/// What a kernel promises about its results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Promise {
    /// The bits of [`QLinear`]'s own `forward`. (Ours promise it for integer activations.)
    Bits,
    /// The layer's numbers, multiplied and added in f32 in some order: [`bounds::linear`].
    Rounding,
    /// The layer with its input quantized to int8 for each token in some way: the difference from
    /// f32 activations, whatever the layer says, is within [`bounds::int8_activations`].
    Int8Activations,
}

impl LinearProblem {
    /// `layer` applied to the rows of `x`, `(m, in_features)`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` has another number of columns.
    pub fn new(layer: QLinear, x: Mat<f32>) -> Result<Self> {
        let (expected, got) = ((x.rows(), layer.in_features()), (x.rows(), x.cols()));
        if expected != got {
            return Err(Error::Shape { what: "input", expected, got });
        }
        Ok(Self { layer, x })
    }

    /// The layer.
    pub fn layer(&self) -> &QLinear {
        &self.layer
    }

    /// The input, `(m, in_features)`.
    pub fn x(&self) -> MatRef<'_, f32> {
        self.x.as_ref()
    }

    /// `(m, n, k)`.
    pub fn shape(&self) -> (usize, usize, usize) {
        (self.x.rows(), self.layer.out_features(), self.x.cols())
    }

    /// What `layer.forward` gives, `(m, out_features)`.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if the layer quantizes its input and that has a NaN or infinity.
    pub fn reference(&self) -> Result<Mat<f32>> {
        let mut y = Mat::zeros(self.x.rows(), self.layer.out_features());
        self.layer.forward(self.x(), y.as_mut(), &mut Context::new())?;
        Ok(y)
    }

    /// What `kernel` writes for this problem.
    ///
    /// The kernel gets the layer, the input and the output. The output is full of NaN: a kernel sets
    /// every element.
    ///
    /// # Errors
    /// [`Failure::Refused`] with the kernel's error.
    pub fn run<E: fmt::Display>(
        &self,
        kernel: impl FnOnce(&QLinear, MatRef<'_, f32>, MatMut<'_, f32>) -> Result<(), E>,
    ) -> Result<Mat<f32>, Failure> {
        let mut y = Mat::from_fn(self.x.rows(), self.layer.out_features(), |_, _| f32::NAN);
        match kernel(&self.layer, self.x(), y.as_mut()) {
            Ok(()) => Ok(y),
            Err(error) => Err(Failure::Refused { shape: self.shape(), error: error.to_string() }),
        }
    }

    /// Holds what `kernel` writes against the reference, as closely as the kernel promises.
    ///
    /// Where a bound is infinite, because a sum may overflow f32 or the input is not finite, nothing
    /// is checked.
    ///
    /// # Errors
    /// [`Failure::Wrong`] at the first element that is too far away, [`Failure::Refused`] with the
    /// kernel's error, [`Failure::Problem`] if there is no reference.
    pub fn check<E: fmt::Display>(
        &self,
        promise: Promise,
        kernel: impl FnOnce(&QLinear, MatRef<'_, f32>, MatMut<'_, f32>) -> Result<(), E>,
    ) -> Result<(), Failure> {
        let (expected, bound) = self.expected(promise).map_err(Failure::Problem)?;
        let got = self.run(kernel)?;
        let error = |i: usize| (f64::from(expected.data()[i]) - f64::from(got.data()[i])).abs();
        // Written so that a NaN is wrong.
        let is_right = |i: usize| match &bound {
            None => expected.data()[i].to_bits() == got.data()[i].to_bits(),
            Some(bound) => error(i) <= bound.data()[i] || bound.data()[i] == f64::INFINITY,
        };
        let len = expected.data().len();
        let Some(first) = (0..len).find(|&i| !is_right(i)) else { return Ok(()) };
        let n = self.layer.out_features();
        Err(Failure::Wrong(Box::new(Mismatch {
            shape: self.shape(),
            wrong: (first..len).filter(|&i| !is_right(i)).count(),
            row: first / n,
            col: first % n,
            expected: expected.data()[first].into(),
            got: got.data()[first].into(),
            bound: bound.map_or(0.0, |bound| bound.data()[first]),
            cause: None,
        })))
    }

    /// The reference for a promise, and how far away a result may be; `None` for not a bit.
    fn expected(&self, promise: Promise) -> Result<(Mat<f32>, Option<Mat<f64>>)> {
        match promise {
            Promise::Bits => Ok((self.reference()?, None)),
            Promise::Rounding => {
                Ok((self.reference()?, Some(bounds::linear(&self.layer, self.x())?)))
            }
            Promise::Int8Activations => {
                let layer = self.layer.clone().with_activation(None);
                let bound = bounds::int8_activations(&layer, self.x())?;
                Ok((Self { layer, x: self.x.clone() }.reference()?, Some(bound)))
            }
        }
    }

    /// Problems on which kernels for quantized weights have failed, about 330 small ones in a fixed
    /// order, with f32 activations and with [`ActivationScheme::INT8_PER_TOKEN`]:
    ///
    /// * weights and inputs at the ends of their ranges, symmetric and affine, of 2 to 8 bits;
    /// * every k up to 70 with groups of 32, so that the last group has every length;
    /// * m and n around 4, 8, 16, 32 and 64, 0 and 1 included;
    /// * weights and inputs of every [`Family`].
    ///
    /// # Example
    /// ```
    /// use lowbit_core::testing::{LinearProblem, Promise};
    /// use lowbit_core::{Context, Linear};
    ///
    /// for problem in LinearProblem::adversarial() {
    ///     problem
    ///         .check(Promise::Bits, |layer, x, y| layer.forward(x, y, &mut Context::new()))
    ///         .unwrap();
    /// }
    /// ```
    pub fn adversarial() -> impl Iterator<Item = Self> {
        let affine = QuantScheme::affine(4, Granularity::PerGroup(32));
        let sizes = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65];
        let extremes = [2, 3, 4, 5, 7, 8].into_iter().flat_map(|bits| {
            [QuantScheme::symmetric, QuantScheme::affine].map(|scheme| {
                (Family::Extremes, (2, 33, 129), scheme(bits, Granularity::PerChannel))
            })
        });
        let tails = (0..=70).map(move |k| (Family::Normal, (3, 5, k), affine));
        let edges = sizes.into_iter().flat_map(move |size| {
            [(size, 3, 40), (2, size, 40)].map(|shape| (Family::Normal, shape, affine))
        });
        let families = Family::ALL.into_iter().flat_map(|family| {
            [4, 8].into_iter().flat_map(move |bits| {
                [QuantScheme::symmetric, QuantScheme::affine]
                    .map(|scheme| (family, (3, 7, 70), scheme(bits, Granularity::PerGroup(24))))
            })
        });
        let specs = extremes.chain(tails).chain(edges).chain(families);
        specs.flat_map(|(family, shape, scheme)| {
            [None, Some(ActivationScheme::INT8_PER_TOKEN)]
                .into_iter()
                // A family whose scales overflow f16 has no layer.
                .filter_map(move |activation| Self::of(family, shape, scheme, activation))
        })
    }

    /// A problem from a family, with a bias.
    fn of(
        family: Family,
        (m, n, k): (usize, usize, usize),
        scheme: QuantScheme,
        activation: Option<ActivationScheme>,
    ) -> Option<Self> {
        let w = family.matrix(n, k, 1);
        let bias = Family::Normal.matrix(1, n, 2).data().to_vec();
        let weight = QMatrix::quantize(w.as_ref(), scheme).ok()?;
        let layer = QLinear::new(weight).with_activation(activation).with_bias(Some(bias)).ok()?;
        Self::new(layer, family.matrix(m, k, 3)).ok()
    }
}
