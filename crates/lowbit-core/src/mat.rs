use alloc::{vec, vec::Vec};

use crate::{Error, Result};

/// Elements that `rows` rows of `cols` at distance `row_stride` span: the last row may end early.
fn span(rows: usize, cols: usize, row_stride: usize) -> Result<usize> {
    if row_stride < cols {
        return Err(Error::RowStride { row_stride, cols });
    }
    if rows == 0 || cols == 0 {
        return Ok(0);
    }
    (rows - 1)
        .checked_mul(row_stride)
        .and_then(|x| x.checked_add(cols))
        .ok_or(Error::TooLarge { rows, cols: row_stride })
}

/// A read-only row-major matrix over data that someone else owns; rows may be further apart than
/// they are long.
///
/// # Example
/// ```
/// use lowbit_core::MatRef;
///
/// // The first two columns of a 2 x 3 matrix.
/// let m = MatRef::with_row_stride(&[1, 2, 3, 4, 5, 6], 2, 2, 3)?;
/// assert_eq!(m.row(1), Some(&[4, 5][..]));
/// assert_eq!(m.get(1, 2), None);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Debug)]
pub struct MatRef<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<T> Clone for MatRef<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for MatRef<'_, T> {}

/// The same shape and elements, whatever lies between the rows.
impl<T: PartialEq> PartialEq for MatRef<'_, T> {
    fn eq(&self, other: &Self) -> bool {
        self.shape() == other.shape() && self.iter_rows().eq(other.iter_rows())
    }
}

impl<'a, T> MatRef<'a, T> {
    /// Views `data`, which must have exactly `rows · cols` elements.
    ///
    /// # Errors
    /// [`Error::Length`] if it has not, [`Error::TooLarge`] if that product overflows.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Result<Self> {
        let expected = span(rows, cols, cols)?;
        if data.len() != expected {
            return Err(Error::Length { what: "matrix data", expected, got: data.len() });
        }
        Ok(Self { data, rows, cols, row_stride: cols })
    }

    /// Views rows of `cols` elements that start `row_stride` elements apart.
    ///
    /// # Errors
    /// [`Error::Length`] if `data` ends before the last row does, [`Error::RowStride`] if
    /// `row_stride < cols`, [`Error::TooLarge`] on overflow.
    pub fn with_row_stride(
        data: &'a [T],
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Result<Self> {
        let expected = span(rows, cols, row_stride)?;
        if data.len() < expected {
            return Err(Error::Length { what: "matrix data", expected, got: data.len() });
        }
        Ok(Self { data, rows, cols, row_stride })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// `(rows, cols)`.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Distance between the starts of two rows, in elements.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// The elements, gaps between rows included.
    pub fn data(&self) -> &'a [T] {
        self.data
    }

    /// Row `r`, or `None` behind the last one.
    pub fn row(&self, r: usize) -> Option<&'a [T]> {
        if r >= self.rows {
            return None;
        }
        if self.cols == 0 {
            return Some(&[]);
        }
        self.data.get(r * self.row_stride..)?.get(..self.cols)
    }

    /// All rows from top to bottom.
    pub fn iter_rows(&self) -> impl ExactSizeIterator<Item = &'a [T]> + use<'a, T> {
        let this = *self;
        (0..self.rows).map(move |r| this.row(r).unwrap_or(&[]))
    }

    /// The rows `range.start..range.end`, or `None` if there are not as many.
    pub fn sub_rows(&self, range: core::ops::Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.rows {
            return None;
        }
        let start = range.start.saturating_mul(self.row_stride).min(self.data.len());
        Some(Self { data: &self.data[start..], rows: range.len(), ..*self })
    }

    /// The element at row `r`, column `c`, or `None` outside.
    pub fn get(&self, r: usize, c: usize) -> Option<&'a T> {
        self.row(r)?.get(c)
    }
}

/// A writable row-major matrix over data that someone else owns; see [`MatRef`].
///
/// # Example
/// ```
/// use lowbit_core::MatMut;
///
/// let mut data = [0; 6];
/// let mut m = MatMut::new(&mut data, 2, 3)?;
/// for (r, row) in m.iter_rows_mut().enumerate() {
///     row.fill(r);
/// }
/// assert_eq!(data, [0, 0, 0, 1, 1, 1]);
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Debug)]
pub struct MatMut<'a, T> {
    data: &'a mut [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a, T> MatMut<'a, T> {
    /// As [`MatRef::new`].
    ///
    /// # Errors
    /// As [`MatRef::new`].
    pub fn new(data: &'a mut [T], rows: usize, cols: usize) -> Result<Self> {
        MatRef::new(data, rows, cols)?;
        Ok(Self { data, rows, cols, row_stride: cols })
    }

    /// As [`MatRef::with_row_stride`].
    ///
    /// # Errors
    /// As [`MatRef::with_row_stride`].
    pub fn with_row_stride(
        data: &'a mut [T],
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Result<Self> {
        MatRef::with_row_stride(data, rows, cols, row_stride)?;
        Ok(Self { data, rows, cols, row_stride })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// `(rows, cols)`.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Distance between the starts of two rows, in elements.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// A read-only view of the same elements.
    pub fn as_ref(&self) -> MatRef<'_, T> {
        MatRef { data: self.data, rows: self.rows, cols: self.cols, row_stride: self.row_stride }
    }

    /// A shorter-lived view of the same elements, to pass on without giving this one up.
    pub fn reborrow(&mut self) -> MatMut<'_, T> {
        MatMut { data: self.data, rows: self.rows, cols: self.cols, row_stride: self.row_stride }
    }

    /// Row `r`, or `None` behind the last one.
    pub fn row_mut(&mut self, r: usize) -> Option<&mut [T]> {
        if r >= self.rows {
            return None;
        }
        if self.cols == 0 {
            return Some(&mut []);
        }
        self.data.get_mut(r * self.row_stride..)?.get_mut(..self.cols)
    }

    /// All rows from top to bottom.
    pub fn iter_rows_mut(&mut self) -> impl Iterator<Item = &mut [T]> {
        let cols = self.cols;
        // Matrices without columns still have rows.
        let empty = if cols == 0 { self.rows } else { 0 };
        let full = if cols == 0 { 0 } else { self.rows };
        self.data
            .chunks_mut(self.row_stride.max(1))
            .take(full)
            .map(move |row| &mut row[..cols])
            .chain((0..empty).map(|_| &mut [][..]))
    }

    /// The elements, gaps between rows included.
    pub fn into_data(self) -> &'a mut [T] {
        self.data
    }
}

/// A row-major matrix that owns its elements, rows back to back.
///
/// # Example
/// ```
/// use lowbit_core::Mat;
///
/// let m = Mat::from_fn(2, 2, |r, c| 10 * r + c);
/// assert_eq!(m.data(), [0, 1, 10, 11]);
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mat<T> {
    data: Vec<T>,
    rows: usize,
    cols: usize,
}

impl<T> Mat<T> {
    /// Takes `data`, which must have exactly `rows · cols` elements.
    ///
    /// # Errors
    /// As [`MatRef::new`].
    pub fn new(data: Vec<T>, rows: usize, cols: usize) -> Result<Self> {
        MatRef::new(&data, rows, cols)?;
        Ok(Self { data, rows, cols })
    }

    /// The matrix whose element at `(r, c)` is `f(r, c)`.
    pub fn from_fn(rows: usize, cols: usize, mut f: impl FnMut(usize, usize) -> T) -> Self {
        let mut data = Vec::with_capacity(rows.saturating_mul(cols));
        for r in 0..if cols == 0 { 0 } else { rows } {
            data.extend((0..cols).map(|c| f(r, c)));
        }
        Self { data, rows, cols }
    }

    /// A matrix of zeros (of `T::default()`); like `vec![]`, it needs the memory to exist.
    pub fn zeros(rows: usize, cols: usize) -> Self
    where
        T: Clone + Default,
    {
        Self { data: vec![T::default(); rows.saturating_mul(cols)], rows, cols }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All elements, row after row.
    pub fn data(&self) -> &[T] {
        &self.data
    }

    /// All elements, row after row.
    pub fn data_mut(&mut self) -> &mut [T] {
        &mut self.data
    }

    /// A read-only view.
    pub fn as_ref(&self) -> MatRef<'_, T> {
        MatRef { data: &self.data, rows: self.rows, cols: self.cols, row_stride: self.cols }
    }

    /// A writable view.
    pub fn as_mut(&mut self) -> MatMut<'_, T> {
        MatMut { data: &mut self.data, rows: self.rows, cols: self.cols, row_stride: self.cols }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strided_view_skips_the_gaps_and_may_end_with_its_last_row() {
        let data: Vec<i32> = (0..8).collect();
        let m = MatRef::with_row_stride(&data, 2, 3, 5).unwrap();
        assert_eq!(m.iter_rows().collect::<Vec<_>>(), [&[0, 1, 2][..], &[5, 6, 7][..]]);
        assert_eq!(m.sub_rows(1..2).unwrap().row(0), Some(&[5, 6, 7][..]));
        assert_eq!(m.sub_rows(2..2).unwrap().rows(), 0);
        assert_eq!(m.sub_rows(1..3), None);
        assert!(
            MatRef::<u8>::with_row_stride(&[], 3, 0, usize::MAX).unwrap().sub_rows(2..3).is_some()
        );
        assert!(MatRef::with_row_stride(&data[..7], 2, 3, 5).is_err());
    }

    #[test]
    fn views_without_elements_still_have_a_shape() {
        for (rows, cols) in [(0, 0), (0, 3), (3, 0)] {
            let m = MatRef::<f32>::new(&[], rows, cols).unwrap();
            assert_eq!((m.shape(), m.iter_rows().len()), ((rows, cols), rows));
            let mut empty = Mat::<f32>::zeros(rows, cols);
            assert_eq!(empty.as_mut().iter_rows_mut().count(), rows);
        }
    }

    #[test]
    fn impossible_shapes_are_errors() {
        let huge = usize::MAX;
        assert_eq!(MatRef::<u8>::new(&[], huge, 2), Err(Error::TooLarge { rows: huge, cols: 2 }));
        assert_eq!(
            MatRef::with_row_stride(&[0; 9], 3, 3, 2),
            Err(Error::RowStride { row_stride: 2, cols: 3 })
        );
        assert!(MatMut::new(&mut [0; 5], 2, 3).is_err());
        assert!(Mat::new(vec![0; 5], 2, 3).is_err());
    }
}
