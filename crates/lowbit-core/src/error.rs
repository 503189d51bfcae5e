use alloc::string::String;

/// What can be wrong with the operands of this library. Every variant carries them.
///
/// # Example
/// ```
/// use lowbit_core::{Error, MatRef};
///
/// let error = MatRef::new(&[0.0_f32; 5], 2, 3).unwrap_err();
/// assert_eq!(error, Error::Length { what: "matrix data", expected: 6, got: 5 });
/// assert_eq!(error.to_string(), "matrix data: expected 6 elements, got 5");
/// ```
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A buffer is too short, or not exactly as long as the shape says.
    #[error("{what}: expected {expected} elements, got {got}")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// How many elements the shape asks for.
        expected: usize,
        /// How many there are.
        got: usize,
    },
    /// A matrix has another shape than the operation needs.
    #[error("{what}: expected {} x {}, got {} x {}", .expected.0, .expected.1, .got.0, .got.1)]
    Shape {
        /// Which matrix.
        what: &'static str,
        /// Expected rows and columns.
        expected: (usize, usize),
        /// Rows and columns found.
        got: (usize, usize),
    },
    /// Rows would overlap.
    #[error("row stride {row_stride} is smaller than the {cols} columns of a row")]
    RowStride {
        /// Distance between the starts of two rows, in elements.
        row_stride: usize,
        /// Elements of a row.
        cols: usize,
    },
    /// The number of elements does not fit `usize`.
    #[error("a matrix of {rows} x {cols} elements is too large for this machine")]
    TooLarge {
        /// Rows asked for.
        rows: usize,
        /// Columns (or row stride) asked for.
        cols: usize,
    },
    /// An integer width that the packed format does not have.
    #[error("codes of {bits} bits: expected 1 to 8")]
    Bits {
        /// The width asked for.
        bits: u8,
    },
    /// A group or block without elements.
    #[error("a block of {rows} x {cols} has no elements")]
    EmptyBlock {
        /// Rows of the block.
        rows: usize,
        /// Columns of the block.
        cols: usize,
    },
    /// NaN or infinity where only finite numbers have a meaning.
    #[error("{what} is not finite at row {row}, column {col}")]
    NotFinite {
        /// Which matrix.
        what: &'static str,
        /// Row of the first such value.
        row: usize,
        /// Column of the first such value.
        col: usize,
    },
    /// Nothing to take statistics of.
    #[error("{what}: expected at least one element, got none")]
    Empty {
        /// What has no elements.
        what: &'static str,
    },
    /// A number outside the range in which it has a meaning.
    #[error("{what}: expected {expected}, got {value:?}")]
    Parameter {
        /// Which parameter.
        what: &'static str,
        /// Its value.
        value: f64,
        /// The values that have a meaning.
        expected: &'static str,
    },
    /// A scale beyond the largest number of its format, or one whose outermost level is beyond f32.
    #[error(
        "scale {scale:e} of the block at row {row}, column {col} overflows {format}; choose a wider scale format"
    )]
    ScaleOverflow {
        /// The scale before rounding.
        scale: f32,
        /// The format it should be stored in.
        format: &'static str,
        /// First row of the block.
        row: usize,
        /// First column of the block.
        col: usize,
    },
    /// An integer outside the only values that have a meaning.
    #[error("{what}: expected {min} to {max}, got {got}")]
    OutOfRange {
        /// Which number.
        what: &'static str,
        /// The smallest value allowed.
        min: i64,
        /// The largest value allowed.
        max: i64,
        /// The value found.
        got: i64,
    },
    /// A range of real numbers that is empty, not finite, or without zero.
    #[error("range {lo:e} to {hi:e}: expected finite ends with lo <= 0 <= hi and lo < hi")]
    RealRange {
        /// The lower end.
        lo: f32,
        /// The upper end.
        hi: f32,
    },
    /// A bias that is too large for an i32 in units of its scale.
    #[error("bias {bias:e} at {index} is not within an i32 times its scale {scale:e}")]
    BiasOverflow {
        /// Position of the first such bias.
        index: usize,
        /// Its value.
        bias: f32,
        /// The scale of the accumulators, that of the input times that of the weight.
        scale: f64,
    },
    /// A real zero or an offset beyond the largest number of its format.
    #[error(
        "zero {zero:e} of the block at row {row}, column {col} overflows {format}; choose a wider format for zeros"
    )]
    ZeroOverflow {
        /// The zero-point or the offset.
        zero: f32,
        /// The format it should be stored in.
        format: &'static str,
        /// First row of the block.
        row: usize,
        /// First column of the block.
        col: usize,
    },
    /// A conversion of numbers or packed codes refused its operands.
    #[error(transparent)]
    Dtype(#[from] lowbit_dtypes::Error),
    /// A combination that the callee cannot compute.
    #[error("{by} does not support {what}")]
    Unsupported {
        /// Who refuses.
        by: &'static str,
        /// What it was asked for.
        what: String,
    },
}

impl Error {
    pub(crate) fn not_positive(what: &'static str, value: impl Into<f64>) -> Self {
        Self::Parameter { what, value: value.into(), expected: "a positive finite number" }
    }

    /// An index that is not below `count`.
    pub(crate) fn no_such(what: &'static str, count: usize, index: usize) -> Self {
        let number = |x: usize| i64::try_from(x).unwrap_or(i64::MAX);
        Self::OutOfRange { what, min: 0, max: number(count) - 1, got: number(index) }
    }

    /// The same error at another row, for callees that see one row at a time.
    #[must_use]
    pub fn at_row(self, row: usize) -> Self {
        match self {
            Self::NotFinite { what, col, .. } => Self::NotFinite { what, row, col },
            other => other,
        }
    }
}
