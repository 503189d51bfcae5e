use alloc::{boxed::Box, format, string::ToString};
use core::{fmt, ops::Range};

use super::{
    failure::{Cause, Failure, Mismatch},
    random::Random,
    shrink::{Element, Operands},
};
use crate::{Error, Mat, MatMut, MatRef, Result};

/// What the left factor of an integer product consists of: `u8` or `i8`. Sealed.
#[expect(private_bounds, reason = "sealed: the reference and the shrinking know these two")]
pub trait Int8: Element + Into<i32> + 'static {
    /// The numbers at the ends of the range and next to its special ones.
    const EXTREMES: &'static [Self];

    /// The number with these bits.
    fn from_bits(bits: u8) -> Self;
}

impl Int8 for u8 {
    const EXTREMES: &'static [Self] = &[255, 128, 127, 0];

    fn from_bits(bits: u8) -> Self {
        bits
    }
}

impl Int8 for i8 {
    const EXTREMES: &'static [Self] = &[-128, -127, 127, 0];

    fn from_bits(bits: u8) -> Self {
        bits as i8
    }
}

/// `c = a·bᵀ` of 8-bit integers: a problem to hold a kernel against.
///
/// `a` is `(m, k)` of `u8` or `i8`, `b` is `(n, k)` of `i8`: both have their rows along k, as
/// activations and weights do. `c` is `(m, n)` of `i32` and exact: there is one right result.
///
/// # Example
/// ```
/// use lowbit_core::testing::Int8Problem;
/// use lowbit_core::{Mat, MatMut, MatRef};
///
/// // A kernel with sums of 16 bits.
/// fn kernel(a: MatRef<'_, u8>, b: MatRef<'_, i8>, mut c: MatMut<'_, i32>) -> Result<(), String> {
///     for (a, c) in a.iter_rows().zip(c.iter_rows_mut()) {
///         for (b, c) in b.iter_rows().zip(c) {
///             let products = a.iter().zip(b).map(|(&a, &b)| i16::from(a) * i16::from(b));
///             *c = products.fold(0, i16::saturating_add).into();
///         }
///     }
///     Ok(())
/// }
///
/// let a = Mat::from_fn(1, 64, |_, _| 255);
/// let b = Mat::from_fn(1, 64, |_, c| if c < 32 { 1 } else { 127 });
/// let failure = Int8Problem::new(a, b)?.check(kernel).unwrap_err();
/// assert_eq!(
///     failure.to_string(),
///     "row 0, column 0 of 1 x 1, k = 64: expected 1044480, got 32767; \
///      with k 62..64 alone: 255·127 + 255·127 = 64770, got 32767",
/// );
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Int8Problem<A> {
    a: Mat<A>,
    b: Mat<i8>,
}

/// The longest sum whose every value fits `i32`: 255 · 128 · 65793 < 2^31.
pub(super) const MAX_K: usize = 65_793;

/// In every element of the output before a kernel runs.
const POISON: i32 = 0x5a5a_5a5a;

impl<A: Int8> Int8Problem<A> {
    /// The product of `a` `(m, k)` and the transpose of `b` `(n, k)`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the two have not the same k, [`Error::Unsupported`] if k is beyond 65793
    /// and a sum might not fit `i32`.
    pub fn new(a: Mat<A>, b: Mat<i8>) -> Result<Self> {
        if a.cols() != b.cols() {
            let (expected, got) = ((b.rows(), a.cols()), (b.rows(), b.cols()));
            return Err(Error::Shape { what: "right factor", expected, got });
        }
        if a.cols() > MAX_K {
            let what = format!("sums of {} products: an i32 holds {MAX_K}", a.cols());
            return Err(Error::Unsupported { by: "Int8Problem", what });
        }
        Ok(Self { a, b })
    }

    /// The left factor, `(m, k)`.
    pub fn a(&self) -> MatRef<'_, A> {
        self.a.as_ref()
    }

    /// The right factor, `(n, k)`.
    pub fn b(&self) -> MatRef<'_, i8> {
        self.b.as_ref()
    }

    /// `(m, n, k)`.
    pub fn shape(&self) -> (usize, usize, usize) {
        (self.a.rows(), self.b.rows(), self.a.cols())
    }

    /// The right result, `(m, n)`: `c[i][j] = Σ a[i][l]·b[j][l]`.
    pub fn reference(&self) -> Mat<i32> {
        Mat::from_fn(self.a.rows(), self.b.rows(), |i, j| {
            self.products(i, j).map(|(a, b)| a * b).sum()
        })
    }

    /// The products whose sum is `c[i][j]`.
    fn products(&self, i: usize, j: usize) -> impl Iterator<Item = (i32, i32)> {
        let (a, b) = (self.a().row(i).unwrap_or(&[]), self.b().row(j).unwrap_or(&[]));
        a.iter().zip(b).map(|(&a, &b)| (a.into(), b.into()))
    }

    /// What `kernel` writes for this problem.
    ///
    /// The kernel gets `a`, `b` and the output. The output is full of some number that is not the
    /// result: a kernel sets every element and adds to none.
    ///
    /// # Errors
    /// [`Failure::Refused`] with the kernel's error.
    pub fn run<E: fmt::Display>(
        &self,
        mut kernel: impl FnMut(MatRef<'_, A>, MatRef<'_, i8>, MatMut<'_, i32>) -> Result<(), E>,
    ) -> Result<Mat<i32>, Failure> {
        let mut c = Mat::from_fn(self.a.rows(), self.b.rows(), |_, _| POISON);
        match kernel(self.a(), self.b(), c.as_mut()) {
            Ok(()) => Ok(c),
            Err(error) => Err(Failure::Refused { shape: self.shape(), error: error.to_string() }),
        }
    }

    /// Holds what `kernel` writes against the reference: every element must be the same.
    ///
    /// If one is not, the kernel is run a few more times, with all but a range of k set to zero, to
    /// find the fewest products that go wrong.
    ///
    /// # Errors
    /// [`Failure::Wrong`] at the first element that differs, [`Failure::Refused`] with the kernel's
    /// error.
    pub fn check<E: fmt::Display>(
        &self,
        mut kernel: impl FnMut(MatRef<'_, A>, MatRef<'_, i8>, MatMut<'_, i32>) -> Result<(), E>,
    ) -> Result<(), Failure> {
        let (expected, got) = (self.reference(), self.run(&mut kernel)?);
        let differ = |i: &usize| expected.data()[*i] != got.data()[*i];
        let Some(first) = (0..expected.data().len()).find(differ) else { return Ok(()) };
        let (row, col) = (first / self.b.rows(), first % self.b.rows());
        Err(Failure::Wrong(Box::new(Mismatch {
            shape: self.shape(),
            wrong: (first..expected.data().len()).filter(differ).count(),
            row,
            col,
            expected: expected.data()[first].into(),
            got: got.data()[first].into(),
            bound: 0.0,
            cause: self.cause(row, col, kernel),
        })))
    }

    /// The shortest range of k, found by halving from both ends, with which `c[row][col]` is wrong.
    fn cause<E: fmt::Display>(
        &self,
        row: usize,
        col: usize,
        mut kernel: impl FnMut(MatRef<'_, A>, MatRef<'_, i8>, MatMut<'_, i32>) -> Result<(), E>,
    ) -> Option<Cause> {
        let mut wrong = |k: Range<usize>| {
            // The shape stays: it may be what the kernel does not like.
            let mut a = self.a.clone();
            for row in a.as_mut().iter_rows_mut() {
                row[..k.start].fill(A::default());
                row[k.end..].fill(A::default());
            }
            let problem = Self { a, b: self.b.clone() };
            let expected = problem.products(row, col).map(|(a, b)| a * b).sum();
            let got = *problem.run(&mut kernel).ok()?.as_ref().get(row, col)?;
            let products = problem.products(row, col).skip(k.start).take(k.len()).collect();
            (got != expected).then_some(Cause { k, products, expected, got })
        };
        let mut cause = wrong(0..self.a.cols())?;
        let mut cut = cause.k.len().next_power_of_two();
        while cut > 0 {
            let (start, end) = (cause.k.start, cause.k.end);
            let shorter = [start + cut..end, start..end.saturating_sub(cut)];
            match shorter.into_iter().filter(|k| k.start < k.end).find_map(&mut wrong) {
                Some(shorter) => cause = shorter,
                None => cut /= 2,
            }
        }
        Some(cause)
    }

    /// Problems on which integer kernels have failed, about 1000 small ones in a fixed order:
    ///
    /// * every number at an end of its range (−128, −127, 127; 0, 127, 128, 255), all alike and with
    ///   alternating signs, for every k up to 66 and some beyond, up to sums that f32 does not hold;
    /// * every k up to 130 (so every k mod 64, with and without a whole step before it), and rows m
    ///   and n around 4, 8, 16, 32 and 64, 0 and 1 included, with random numbers.
    ///
    /// # Example
    /// ```
    /// use lowbit_core::testing::Int8Problem;
    ///
    /// for problem in Int8Problem::<i8>::adversarial() {
    ///     problem.check(|a, b, mut c| {
    ///         for (a, c) in a.iter_rows().zip(c.iter_rows_mut()) {
    ///             for (b, c) in b.iter_rows().zip(c) {
    ///                 *c = a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum();
    ///             }
    ///         }
    ///         Ok::<(), String>(())
    ///     }).unwrap();
    /// }
    /// ```
    pub fn adversarial() -> impl Iterator<Item = Self> {
        let extremes = A::EXTREMES.iter().flat_map(|&a| {
            [-128_i8, -127, 127].into_iter().flat_map(move |b| {
                let lengths = (1..=66).chain([127, 128, 129, 4099]);
                lengths.map(move |k| Self {
                    a: Mat::from_fn(
                        2,
                        k,
                        |r, c| if r == 1 && c % 2 == 1 { A::EXTREMES[2] } else { a },
                    ),
                    // Row 0 all alike, row 1 alternating, row 2 in runs of four.
                    b: Mat::from_fn(3, k, |r, c| {
                        if [false, c % 2 == 1, c / 4 % 2 == 1][r] { b.saturating_neg() } else { b }
                    }),
                })
            })
        });
        let tails = (0..=130).map(|k| (3, 5, k));
        let edges = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65];
        let edges = edges.into_iter().flat_map(|size| [(size, 3, 67), (2, size, 67)]);
        extremes.chain(
            tails
                .chain(edges)
                .map(|(m, n, k)| Self::from_operands(random_operands(m, n, k, (m + n + k) as u64))),
        )
    }

    /// Of factors that fit each other, with k up to [`MAX_K`].
    pub(super) fn from_operands(Operands { a, b }: Operands<A, i8>) -> Self {
        Self { a, b }
    }
}

/// Random numbers over the whole range; or, for one seed in three each, the ends of the range only,
/// and mostly zeros.
pub(super) fn random_operands<A: Int8>(m: usize, n: usize, k: usize, seed: u64) -> Operands<A, i8> {
    let mut random = Random(seed);
    let style = random.below(3);
    let mut bits = |extremes: [u8; 4]| match style {
        0 => random.bits() as u8,
        1 => extremes[random.below(4)],
        _ if random.below(4) > 0 => 0,
        _ => random.bits() as u8,
    };
    // As u8 and as i8: 255 or −1, 128 or −128, 127, 0; and −128, −127, 127, 0.
    let a = Mat::from_fn(m, k, |_, _| A::from_bits(bits([255, 128, 127, 0])));
    let b = Mat::from_fn(n, k, |_, _| i8::from_bits(bits([128, 129, 127, 0])));
    Operands { a, b }
}
