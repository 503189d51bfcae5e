use alloc::vec::Vec;
use core::{fmt, mem, ops::Range};

use proptest::strategy::ValueTree;

use crate::Mat;

/// A number with simpler ones: zero, then what `simpler` offers.
pub(super) trait Element: Copy + Default + PartialEq + fmt::Debug {
    /// How many candidates there are.
    const CANDIDATES: usize;

    /// The `i`-th one.
    fn simpler(self, i: usize) -> Self;
}

impl Element for f32 {
    const CANDIDATES: usize = 3;

    fn simpler(self, i: usize) -> Self {
        match i {
            0 => 1.0_f32.copysign(self),
            // A number of few digits: the power of two below, then with one bit more.
            1 => f32::from_bits(self.to_bits() & 0xff80_0000),
            _ => f32::from_bits(self.to_bits() & 0xffc0_0000),
        }
    }
}

impl Element for i8 {
    const CANDIDATES: usize = 1;

    fn simpler(self, _: usize) -> Self {
        self.signum()
    }
}

impl Element for u8 {
    const CANDIDATES: usize = 1;

    fn simpler(self, _: usize) -> Self {
        self.min(1)
    }
}

/// What a test fails on, and how to make it smaller without leaving what made it fail.
///
/// proptest would draw another matrix for another shape. A matrix that is cut keeps its numbers, so
/// that whatever was wrong with them usually still is.
pub(super) trait Shrink: Clone + fmt::Debug {
    /// Sizes that can be cut: rows and columns, or m, n and k.
    fn sizes(&self) -> Vec<usize>;

    /// What is left of it if size `dim` is cut to a range of it.
    fn cut(&self, dim: usize, range: Range<usize>) -> Self;

    /// Numbers it consists of.
    fn len(&self) -> usize;

    /// With a range of its numbers set to zero; `None` if they are.
    fn zero(&self, range: Range<usize>) -> Option<Self>;

    /// With number `index` replaced by its `i`-th simpler one; `None` if it has none such.
    fn simpler(&self, index: usize, i: usize) -> Option<Self>;
}

/// Candidates for each element of [`Shrink`]: the most that an [`Element`] has.
const CANDIDATES: usize = 3;

impl<T: Element> Shrink for Mat<T> {
    fn sizes(&self) -> Vec<usize> {
        [self.rows(), self.cols()].into()
    }

    fn cut(&self, dim: usize, range: Range<usize>) -> Self {
        let (rows, cols) = if dim == 0 { (range, 0..self.cols()) } else { (0..self.rows(), range) };
        Mat::from_fn(rows.len(), cols.len(), |r, c| {
            self.data()[(rows.start + r) * self.cols() + cols.start + c]
        })
    }

    fn len(&self) -> usize {
        self.data().len()
    }

    fn zero(&self, range: Range<usize>) -> Option<Self> {
        if self.data()[range.clone()].iter().all(|x| *x == T::default()) {
            return None;
        }
        let mut simpler = self.clone();
        simpler.data_mut()[range].fill(T::default());
        Some(simpler)
    }

    fn simpler(&self, index: usize, i: usize) -> Option<Self> {
        let x = self.data()[index];
        if i >= T::CANDIDATES || x == T::default() || x == x.simpler(i) {
            return None;
        }
        let mut simpler = self.clone();
        simpler.data_mut()[index] = x.simpler(i);
        Some(simpler)
    }
}

/// The factors of `a·bᵀ`: `(m, k)` and `(n, k)`. Their sizes are m, n and k; their numbers are those of
/// `a`, then those of `b`.
#[derive(Clone, Debug)]
pub(super) struct Operands<A, B> {
    pub(super) a: Mat<A>,
    pub(super) b: Mat<B>,
}

impl<A: Element, B: Element> Shrink for Operands<A, B> {
    fn sizes(&self) -> Vec<usize> {
        [self.a.rows(), self.b.rows(), self.a.cols()].into()
    }

    fn cut(&self, dim: usize, range: Range<usize>) -> Self {
        match dim {
            0 => Self { a: self.a.cut(0, range), b: self.b.clone() },
            1 => Self { a: self.a.clone(), b: self.b.cut(0, range) },
            _ => Self { a: self.a.cut(1, range.clone()), b: self.b.cut(1, range) },
        }
    }

    fn len(&self) -> usize {
        self.a.len() + self.b.len()
    }

    fn zero(&self, range: Range<usize>) -> Option<Self> {
        let len = self.a.len();
        let a = self.a.zero(range.start.min(len)..range.end.min(len));
        let b = self.b.zero(range.start.max(len) - len..range.end.max(len) - len);
        if a.is_none() && b.is_none() {
            return None;
        }
        let a = a.unwrap_or_else(|| self.a.clone());
        Some(Self { a, b: b.unwrap_or_else(|| self.b.clone()) })
    }

    fn simpler(&self, index: usize, i: usize) -> Option<Self> {
        match index.checked_sub(self.a.len()) {
            None => Some(Self { a: self.a.simpler(index, i)?, b: self.b.clone() }),
            Some(index) => Some(Self { a: self.a.clone(), b: self.b.simpler(index, i)? }),
        }
    }
}

/// Shrinks by cutting sizes in halves and then by one, setting ever shorter runs of numbers to zero,
/// and simplifying those that are left, in this order.
#[derive(Clone, Debug)]
pub(super) struct ShrinkTree<T> {
    value: T,
    /// What failed last, while `value` is a candidate.
    failing: Option<T>,
    /// The smallest sizes allowed.
    least: Vec<usize>,
    step: usize,
}

/// Ways of cutting one size: the first half, the second, all but the last, all but the first.
const CUTS: usize = 4;

impl<T: Shrink> ShrinkTree<T> {
    pub(super) fn new(value: T, least: Vec<usize>) -> Self {
        Self { value, failing: None, least, step: 0 }
    }

    /// The candidate of `from` at `step`; `None` if it is no simpler.
    fn candidate(&self, from: &T, step: usize) -> Option<T> {
        let sizes = from.sizes();
        let cuts = sizes.len() * CUTS;
        if step < cuts {
            let (dim, size) = (step / CUTS, sizes[step / CUTS]);
            let range = match step % CUTS {
                0 => 0..size / 2,
                1 => size.div_ceil(2)..size,
                2 => 0..size.saturating_sub(1),
                _ => size.min(1)..size,
            };
            let least = self.least.get(dim).copied().unwrap_or(0);
            return (range.len() < size && range.len() >= least).then(|| from.cut(dim, range));
        }
        // Runs of numbers as the nodes of a binary heap: 1 is everything, 2 and 3 its halves, …
        let (node, len) = (step - cuts + 1, from.len());
        let leaves = len.next_power_of_two();
        if node < 2 * leaves {
            let run = leaves >> node.ilog2();
            let start = (node - (1 << node.ilog2())) * run;
            return if start < len { from.zero(start..len.min(start + run)) } else { None };
        }
        let step = node - 2 * leaves;
        from.simpler(step / CANDIDATES, step % CANDIDATES)
    }

    /// Steps there are for `from`.
    fn steps(from: &T) -> usize {
        from.sizes().len() * CUTS + 2 * from.len().next_power_of_two() + CANDIDATES * from.len() - 1
    }

    /// Makes the next candidate of `from` the value, or `from` itself where there is none.
    fn advance(&mut self, from: T) -> bool {
        while self.step < Self::steps(&from) {
            if let Some(candidate) = self.candidate(&from, self.step) {
                self.value = candidate;
                self.failing = Some(from);
                return true;
            }
            self.step += 1;
        }
        self.value = from;
        false
    }
}

impl<T: Shrink> ValueTree for ShrinkTree<T> {
    type Value = T;

    fn current(&self) -> T {
        self.value.clone()
    }

    /// The value fails too: what made it simpler may do so again.
    fn simplify(&mut self) -> bool {
        self.failing = None;
        let from = self.value.clone();
        self.advance(from)
    }

    /// The value does not fail: tries the next way from what did.
    fn complicate(&mut self) -> bool {
        match mem::take(&mut self.failing) {
            Some(from) => {
                self.step += 1;
                // Without another way the value is back at what failed: a change as well.
                self.advance(from);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a failing test leaves of a matrix.
    fn shrunk(w: Mat<f32>, least: [usize; 2], fails: impl Fn(&Mat<f32>) -> bool) -> Mat<f32> {
        assert!(fails(&w));
        let mut tree = ShrinkTree::new(w, least.into());
        if !tree.simplify() {
            return tree.current();
        }
        loop {
            let again = if fails(&tree.current()) { tree.simplify() } else { tree.complicate() };
            if !again {
                assert!(fails(&tree.current()), "the last value of a tree fails");
                return tree.current();
            }
        }
    }

    fn matrix() -> Mat<f32> {
        Mat::from_fn(37, 53, |r, c| (r * 53 + c) as f32 * 0.37 + 1.0)
    }

    #[test]
    fn a_matrix_shrinks_to_the_number_that_matters() {
        let secret = matrix().data()[20 * 53 + 31];
        let small = shrunk(matrix(), [0, 0], |w| w.data().contains(&secret));
        assert_eq!((small.rows(), small.data()), (1, &[secret][..]));
        assert_eq!(shrunk(matrix(), [0, 0], |_| true).data(), []);
    }

    #[test]
    fn the_smallest_sizes_are_kept_and_their_numbers_become_simple() {
        let small = shrunk(matrix(), [2, 3], |w| w.data().iter().any(|w| *w > 0.5));
        assert_eq!((small.rows(), small.cols()), (2, 3));
        assert_eq!(small.data().iter().filter(|w| **w != 0.0).count(), 1);
        assert_eq!(small.data().iter().sum::<f32>(), 1.0);
    }

    #[test]
    fn two_distant_numbers_are_found_among_zeros() {
        let small =
            shrunk(matrix(), [0, 0], |w| w.cols() >= 40 && w.data().iter().sum::<f32>() > 9.0);
        assert_eq!((small.rows(), small.cols()), (1, 40));
        assert!(small.data().iter().filter(|w| **w != 0.0).count() <= 10);
    }
}
