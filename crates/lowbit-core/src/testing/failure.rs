use alloc::{boxed::Box, string::String, vec::Vec};
use core::{fmt, ops::Range};

/// What a kernel did wrong. Its text is one line; `Debug` prints the same, so that `unwrap` does.
#[derive(Clone, PartialEq)]
#[non_exhaustive]
pub enum Failure {
    /// The kernel returned an error.
    Refused {
        /// m, n and k of the problem.
        shape: (usize, usize, usize),
        /// The error's text.
        error: String,
    },
    /// The kernel's result is another one.
    Wrong(Box<Mismatch>),
    /// The problem itself has no reference: its parts do not fit each other.
    Problem(crate::Error),
}

/// The first wrong element of a result.
#[derive(Clone, Debug, PartialEq)]
pub struct Mismatch {
    /// m, n and k of the problem.
    pub shape: (usize, usize, usize),
    /// How many of the m·n elements are wrong.
    pub wrong: usize,
    /// Row (token) of the first.
    pub row: usize,
    /// Its column (output feature).
    pub col: usize,
    /// What the reference gives.
    pub expected: f64,
    /// What the kernel has written.
    pub got: f64,
    /// How far the two may be apart: 0 for integers.
    pub bound: f64,
    /// The fewest products with which the element is still wrong, where they could be told.
    pub cause: Option<Cause>,
}

/// The fewest neighbouring products with which an element is wrong: everything outside the range was
/// set to zero and the kernel run again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// Their positions in the sum.
    pub k: Range<usize>,
    /// The factors.
    pub products: Vec<(i32, i32)>,
    /// Their sum.
    pub expected: i32,
    /// What the kernel gives for it.
    pub got: i32,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { shape: (m, n, k), error } => {
                write!(f, "the kernel refused {m} x {n}, k = {k}: {error}")
            }
            Self::Wrong(mismatch) => mismatch.fmt(f),
            Self::Problem(error) => write!(f, "the reference has no result: {error}"),
        }
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (m, n, k) = self.shape;
        let Self { row, col, expected, got, bound, .. } = self;
        write!(f, "row {row}, column {col} of {m} x {n}, k = {k}: expected {expected}, got {got}")?;
        if *bound > 0.0 {
            let away = (expected - got).abs();
            write!(f, ", {away:e} away where at most {bound:e} is possible")?;
        }
        if let Some(cause) = &self.cause {
            write!(f, "; {cause}")?;
        }
        match self.wrong {
            0 | 1 => Ok(()),
            wrong => write!(f, " ({wrong} of {} elements are wrong)", m * n),
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 4;
        let Self { k, products, expected, got } = self;
        write!(f, "with k {}..{} alone: ", k.start, k.end)?;
        for (i, (a, b)) in products.iter().take(SHOWN).enumerate() {
            write!(f, "{}{a}·{b}", if i == 0 { "" } else { " + " })?;
        }
        if products.len() > SHOWN {
            f.write_str(" + …")?;
        }
        write!(f, " = {expected}, got {got}")
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl core::error::Error for Failure {}
