use lowbit_core::{ActivationType, MatMut, MatRef};
use lowbit_dtypes::{bf16, f16};

/// What [`PackedLinear::forward_to`](crate::PackedLinear::forward_to) is given, `(m, in_features)`: a view
/// of f32 converts into it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Input<'a> {
    /// Numbers, which the layer quantizes as its activation scheme says.
    F32(MatRef<'a, f32>),
    /// Numbers `scale · code`, for a layer with [`ActivationType::Int8`] activations, whose own scales
    /// are not looked at.
    Int8 {
        /// −127..=127, as there.
        codes: MatRef<'a, i8>,
        /// One for all rows, or one for each.
        scales: &'a [f32],
    },
    /// Numbers `scale · (code − zero_point)`, for a layer with [`ActivationType::UInt8`] activations,
    /// whose own scales and zero-points are not looked at.
    UInt8 {
        /// 0..=255.
        codes: MatRef<'a, u8>,
        /// One for all rows, or one for each.
        scales: &'a [f32],
        /// One for all rows, or one for each.
        zero_points: &'a [u8],
    },
}

impl<'a> From<MatRef<'a, f32>> for Input<'a> {
    fn from(x: MatRef<'a, f32>) -> Self {
        Self::F32(x)
    }
}

impl<'a> Input<'a> {
    pub(crate) fn shape(self) -> (usize, usize) {
        match self {
            Self::F32(x) => x.shape(),
            Self::Int8 { codes, .. } => codes.shape(),
            Self::UInt8 { codes, .. } => codes.shape(),
        }
    }

    /// Of codes: what they are, their scales, and how many zero-points there are (1 for those that need
    /// none).
    pub(crate) fn codes(self) -> Option<(ActivationType, &'a [f32], usize)> {
        match self {
            Self::F32(_) => None,
            Self::Int8 { scales, .. } => Some((ActivationType::Int8, scales, 1)),
            Self::UInt8 { scales, zero_points, .. } => {
                Some((ActivationType::UInt8, scales, zero_points.len()))
            }
        }
    }
}

/// Where [`PackedLinear::forward_to`](crate::PackedLinear::forward_to) writes, `(m, out_features)`, and in which
/// form. Writable views of f32, bf16, f16 and i32 convert into it.
///
/// # Example
/// ```
/// use lowbit_core::{ActivationScheme, Context, Granularity, Mat, QLinear, QMatrix, QuantScheme};
/// use lowbit_kernels::{Output, PackedLinear};
///
/// let w = Mat::new(vec![1.27, -0.5], 1, 2)?;
/// let q = QMatrix::quantize(w.as_ref(), QuantScheme::symmetric(8, Granularity::PerChannel))?;
/// let int8 = ActivationScheme::INT8_PER_TOKEN;
/// let layer = PackedLinear::new(&QLinear::new(q).with_activation(Some(int8)))?;
/// let x = Mat::new(vec![1.0, 1.0], 1, 2)?;
///
/// let mut sums = Mat::<i32>::zeros(1, 1);
/// layer.forward_to(x.as_ref(), sums.as_mut(), &mut Context::new())?;
/// assert_eq!(sums.data(), [127 * 127 - 50 * 127]);
///
/// let mut codes = Mat::zeros(1, 1);
/// let y = Output::UInt8 { codes: codes.as_mut(), scale: 0.01, zero_point: 100 };
/// layer.forward_to(x.as_ref(), y, &mut Context::new())?;
/// assert_eq!(codes.data(), [177]);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub enum Output<'a> {
    /// What [`forward`](lowbit_core::Linear::forward) gives.
    F32(MatMut<'a, f32>),
    /// That, to the nearest, ties to even.
    Bf16(MatMut<'a, bf16>),
    /// That, to the nearest, ties to even; infinite beyond the largest number.
    F16(MatMut<'a, f16>),
    /// That as codes: `clamp(round(y / scale), −127, 127)`, ties to even, as the next layer would quantize it
    /// with a static scale. NaN becomes 0.
    Int8 {
        /// Where the codes go.
        codes: MatMut<'a, i8>,
        /// The step.
        scale: f32,
    },
    /// That as codes: `clamp(round(y / scale) + zero_point, 0, 255)`, ties to even. NaN becomes
    /// `zero_point`.
    UInt8 {
        /// Where the codes go.
        codes: MatMut<'a, u8>,
        /// The step.
        scale: f32,
        /// The code of 0.
        zero_point: u8,
    },
    /// `Σ (code − zero)·(a − zero_point)`, exactly, before scales and bias: of integer activations by
    /// weights with one scale in a row (and not [integer scales](lowbit_core::QuantScheme::has_integer_scales)).
    I32(MatMut<'a, i32>),
}

macro_rules! from_views {
    ($($variant:ident: $element:ty),*) => {$(
        impl<'a> From<MatMut<'a, $element>> for Output<'a> {
            fn from(y: MatMut<'a, $element>) -> Self {
                Self::$variant(y)
            }
        }
    )*};
}

from_views!(F32: f32, Bf16: bf16, F16: f16, I32: i32);

impl Output<'_> {
    pub(crate) fn shape(&self) -> (usize, usize) {
        match self {
            Self::F32(y) => y.shape(),
            Self::Bf16(y) => y.shape(),
            Self::F16(y) => y.shape(),
            Self::Int8 { codes, .. } => codes.shape(),
            Self::UInt8 { codes, .. } => codes.shape(),
            Self::I32(y) => y.shape(),
        }
    }
}
