use alloc::{vec, vec::Vec};

use lowbit_dtypes::{packed_len, unpack};
use pulp::{Simd, WithSimd};

use crate::{
    Error, Mat, MatMut, Params, QuantScheme, QuantType, Result, ScaleFormat, ZeroFormat, simd,
};

/// A quantized `(out_features, in_features)` weight matrix: bit-packed codes, scales and zeros.
///
/// `w[r][c] ≈ scale · (level(code[r][c]) − zero) + offset`, with the [`Params`] of the block that `(r, c)`
/// lies in ([`Granularity`](crate::Granularity)).
///
/// All three buffers are plain bytes, so that a matrix can be borrowed from a file as well as
/// owned (`S = Vec<u8>`):
///
/// | buffer | elements | layout |
/// |---|---|---|
/// | codes | `n × k` fields of `bits` bits | row-major, LSB first, each row padded to whole bytes |
/// | scales | one per block, [`ScaleFormat`](crate::ScaleFormat), little-endian | row-major over the grid of blocks |
/// | zeros | one per block, absent if symmetric | [`ZeroFormat::Int`]: as codes, over the grid of blocks; real: as scales |
///
/// The bytes of [`TwoLevel`](crate::TwoLevel) scales are those of a matrix of this kind, the grid of
/// blocks: its codes, then its scales (the steps), then its zeros (the minima).
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, Mat, QMatrix, QuantScheme};
///
/// let w = Mat::from_fn(2, 3, |r, c| r as f32 - c as f32);
/// let owned = QMatrix::quantize(w.as_ref(), QuantScheme::symmetric(8, Granularity::PerChannel))?;
/// let borrowed: QMatrix<&[u8]> = QMatrix::from_parts(
///     2, 3, owned.scheme(), owned.codes(), owned.scales(), owned.zeros())?;
/// assert_eq!(borrowed.dequantize(), owned.dequantize());
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct QMatrix<S = Vec<u8>> {
    rows: usize,
    cols: usize,
    scheme: QuantScheme,
    codes: S,
    scales: S,
    zeros: Option<S>,
}

impl<S: AsRef<[u8]>> QMatrix<S> {
    /// Assembles a matrix from its stored bytes, in the layout described on the type.
    ///
    /// # Errors
    /// [`Error::Bits`] and [`Error::EmptyBlock`] for an impossible scheme, [`Error::Length`] if a
    /// buffer is not exactly as long as the shape and scheme say (or `zeros` are given for a
    /// symmetric scheme, or missing for an affine one), [`Error::NotFinite`] if a scale or a
    /// zero is not a number, at its position in the grid of blocks.
    pub fn from_parts(
        rows: usize,
        cols: usize,
        scheme: QuantScheme,
        codes: S,
        scales: S,
        zeros: Option<S>,
    ) -> Result<Self> {
        scheme.check()?;
        let layout = Layout::new(rows, cols, scheme)?;
        let zeros_len = zeros.as_ref().map_or(0, |z| z.as_ref().len());
        for (what, expected, got) in [
            ("packed codes in bytes", layout.codes, codes.as_ref().len()),
            ("scales in bytes", layout.scales, scales.as_ref().len()),
            ("packed zeros in bytes", layout.zeros, zeros_len),
        ] {
            if expected != got {
                return Err(Error::Length { what, expected, got });
            }
        }
        let expected = usize::from(scheme.zero.is_stored());
        if expected != zeros.iter().len() {
            let what = "buffers of zeros";
            return Err(Error::Length { what, expected, got: zeros.iter().len() });
        }
        let not_finite = |format: ScaleFormat, bytes: &[u8]| {
            let at = format.read_all(bytes, layout.grid).iter().position(|x| !x.is_finite())?;
            Some((at / layout.grid.1, at % layout.grid.1))
        };
        if let Some((row, col)) = not_finite(scheme.scale_format, scales.as_ref()) {
            return Err(Error::NotFinite { what: "scale", row, col });
        }
        if let (Some(format), Some(zeros)) = (scheme.zero.real(), &zeros)
            && let Some((row, col)) = not_finite(format, zeros.as_ref())
        {
            return Err(Error::NotFinite { what: "zero", row, col });
        }
        Ok(Self::assemble(rows, cols, scheme, codes, scales, zeros))
    }

    /// Parts that are known to fit.
    pub(crate) fn assemble(
        rows: usize,
        cols: usize,
        scheme: QuantScheme,
        codes: S,
        scales: S,
        zeros: Option<S>,
    ) -> Self {
        Self { rows, cols, scheme, codes, scales, zeros }
    }

    /// Rows: the layer's out_features, `n`.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: the layer's in_features, `k`.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the matrix is stored.
    pub fn scheme(&self) -> QuantScheme {
        self.scheme
    }

    /// The packed codes.
    pub fn codes(&self) -> &[u8] {
        self.codes.as_ref()
    }

    /// The stored scales.
    pub fn scales(&self) -> &[u8] {
        self.scales.as_ref()
    }

    /// The packed zeros; `None` if the scheme is symmetric.
    pub fn zeros(&self) -> Option<&[u8]> {
        self.zeros.as_ref().map(S::as_ref)
    }

    /// What the codes of the block at `(block_row, block_col)` of the grid mean; scale 0 outside.
    pub fn params(&self, block_row: usize, block_col: usize) -> Params {
        let (grid_rows, grid_cols) = self.grid();
        if block_row >= grid_rows || block_col >= grid_cols {
            return Params::default();
        }
        let read = |format: ScaleFormat, bytes| {
            format.read(bytes, (grid_rows, grid_cols), block_row, block_col)
        };
        let zeros = self.zeros().unwrap_or(&[]);
        let scale = read(self.scheme.scale_format, self.scales());
        let (mut code, mut real) = (0, None);
        match self.scheme.zero {
            ZeroFormat::None | ZeroFormat::Midpoint => {}
            ZeroFormat::Int => {
                let bits = u32::from(self.scheme.dtype.bits());
                let row = zeros.get(block_row * packed_len(grid_cols, bits)..).unwrap_or(&[]);
                code = field(row, bits, block_col);
            }
            ZeroFormat::Real(format) | ZeroFormat::Offset(format) => {
                real = Some(read(format, zeros));
            }
        }
        self.scheme.params(scale, code, real)
    }

    /// The integer zeros of a row of blocks, one a byte; left alone if there are none.
    fn unpack_zeros(&self, block_row: usize, to: &mut [u8]) {
        if let (ZeroFormat::Int, Some(zeros)) = (self.scheme.zero, self.zeros()) {
            let bits = u32::from(self.scheme.dtype.bits());
            let stride = packed_len(to.len(), bits);
            let row = zeros.get(block_row * stride..).and_then(|zeros| zeros.get(..stride));
            // Fails only if `S` no longer gives the bytes that `from_parts` has checked.
            let _ = unpack(bits, row.unwrap_or(&[]), to);
        }
    }

    /// The grid of scales as the matrix as which it is stored; `None` unless scales are
    /// [`TwoLevel`](crate::TwoLevel).
    ///
    /// # Example
    /// ```
    /// use lowbit_core::{Mat, QMatrix, presets};
    ///
    /// let w = Mat::from_fn(2, 64, |r, c| (r + c) as f32);
    /// let (nvfp4, fit) = presets::nvfp4();
    /// let q = QMatrix::quantize_with(w.as_ref(), nvfp4, &fit, None)?;
    /// let scales = q.scale_grid().unwrap();
    /// assert_eq!((scales.rows(), scales.cols()), (2, 4)); // groups of 16
    /// assert_eq!(scales.dequantize().data()[3], q.params(0, 3).scale);
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub fn scale_grid(&self) -> Option<QMatrix<&[u8]>> {
        match self.scheme.scale_format {
            ScaleFormat::TwoLevel(two) => two.open(self.scales(), self.grid()),
            _ => None,
        }
    }

    /// Rows and columns of a full block.
    pub fn block(&self) -> (usize, usize) {
        self.scheme.granularity.block(self.rows, self.cols)
    }

    /// How many blocks there are down and across.
    pub fn grid(&self) -> (usize, usize) {
        self.scheme.granularity.grid(self.rows, self.cols)
    }

    /// Unpacks the codes of row `r`, one a byte.
    ///
    /// # Errors
    /// [`Error::Length`] if `to` is not as long as a row, [`Error::OutOfRange`] if `r` is behind the last
    /// one.
    pub fn unpack_row(&self, r: usize, to: &mut [u8]) -> Result<()> {
        if to.len() != self.cols {
            return Err(Error::Length {
                what: "unpacked codes",
                expected: self.cols,
                got: to.len(),
            });
        }
        if r >= self.rows {
            return Err(Error::no_such("row of a matrix", self.rows, r));
        }
        let bits = u32::from(self.scheme.dtype.bits());
        let stride = packed_len(self.cols, bits);
        unpack(bits, &self.codes()[r * stride..][..stride], to)?;
        Ok(())
    }

    /// The number at `(r, c)`, as [`dequantize`](Self::dequantize) gives it; 0 outside.
    pub(crate) fn real(&self, r: usize, c: usize) -> f32 {
        let (block_rows, block_cols) = self.block();
        let bits = u32::from(self.scheme.dtype.bits());
        let row = self.codes().get(r * packed_len(self.cols, bits)..).unwrap_or(&[]);
        let params = self.params(r / block_rows, c / block_cols);
        params.real(self.scheme.dtype.level(field(row, bits, c)))
    }

    /// The matrix that is computed with: [`Params::real`] of the level of every code.
    pub fn dequantize(&self) -> Mat<f32> {
        let mut w = Mat::zeros(self.rows, self.cols);
        self.dequantize_all(w.as_mut());
        w
    }

    /// [`dequantize`](Self::dequantize) into memory that is there already: several times as fast as into new
    /// memory, which the system has to find and to clear.
    ///
    /// # Errors
    /// [`Error::Shape`] if `to` is of another shape; nothing has been written then.
    ///
    /// # Example
    /// ```
    /// use lowbit_core::{Granularity, Mat, QMatrix, QuantScheme};
    ///
    /// let w = Mat::from_fn(4, 64, |r, c| ((r * 64 + c) as f32).sin());
    /// let q = QMatrix::quantize(w.as_ref(), QuantScheme::symmetric(4, Granularity::PerGroup(32)))?;
    /// let mut buffer = Mat::zeros(4, 64);
    /// q.dequantize_into(buffer.as_mut())?;
    /// assert_eq!(buffer, q.dequantize());
    /// assert!(q.dequantize_into(Mat::zeros(64, 4).as_mut()).is_err());
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub fn dequantize_into(&self, to: MatMut<'_, f32>) -> Result<()> {
        let expected = (self.rows, self.cols);
        if to.shape() != expected {
            return Err(Error::Shape { what: "dequantized matrix", expected, got: to.shape() });
        }
        self.dequantize_all(to);
        Ok(())
    }

    /// Dequantizes into a matrix of this shape.
    fn dequantize_all(&self, mut to: MatMut<'_, f32>) {
        if self.rows == 0 || self.cols == 0 {
            return;
        }
        let ((block_rows, _), grid) = (self.block(), self.grid());
        let levels = self.levels();
        let scales = self.scheme.scale_format.read_all(self.scales(), grid);
        let reals = match (self.scheme.zero, self.zeros()) {
            (ZeroFormat::Real(format) | ZeroFormat::Offset(format), Some(zeros)) => {
                format.read_all(zeros, grid)
            }
            _ => Vec::new(),
        };
        let mut zeros = vec![0; grid.1];
        let mut params = vec![Params::default(); grid.1];
        for (r, row) in to.iter_rows_mut().enumerate() {
            if r % block_rows == 0 {
                let blocks = r / block_rows * grid.1..(r / block_rows + 1) * grid.1;
                self.unpack_zeros(r / block_rows, &mut zeros);
                let real = reals.get(blocks.clone()).unwrap_or(&[]);
                let row_scales = scales.get(blocks).unwrap_or(&[]);
                for (b, (params, &scale)) in params.iter_mut().zip(row_scales).enumerate() {
                    *params = self.scheme.params(scale, zeros[b], real.get(b).copied());
                }
            }
            self.dequantize_row(r, &levels, |b| params[b], row);
        }
    }

    /// Row `ids[i]` of [`dequantize`](Self::dequantize) in row `i` of `to`, in any order and as often as
    /// asked for: the lookup of tokens in a quantized embedding. Only these rows are unpacked, and nothing
    /// is allocated.
    ///
    /// # Errors
    /// [`Error::Shape`] if `to` is not `(ids.len(), cols)`, [`Error::OutOfRange`] at the first id that is
    /// not below the number of rows; nothing has been written then.
    ///
    /// # Example
    /// ```
    /// use lowbit_core::{Granularity, Mat, QMatrix, QuantScheme};
    ///
    /// let embedding = Mat::from_fn(100, 64, |token, c| ((token * 64 + c) as f32).sin());
    /// let scheme = QuantScheme::symmetric(4, Granularity::PerGroup(32));
    /// let embedding = QMatrix::quantize(embedding.as_ref(), scheme)?;
    ///
    /// let mut x = Mat::zeros(3, 64);
    /// embedding.dequantize_rows(&[7, 99, 7], x.as_mut())?;
    /// assert_eq!(x.as_ref().row(1), embedding.dequantize().as_ref().row(99));
    /// assert!(embedding.dequantize_rows(&[7, 100, 7], x.as_mut()).is_err());
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub fn dequantize_rows(&self, ids: &[u32], mut to: MatMut<'_, f32>) -> Result<()> {
        let expected = (ids.len(), self.cols);
        if to.shape() != expected {
            return Err(Error::Shape { what: "dequantized rows", expected, got: to.shape() });
        }
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.rows) {
            return Err(Error::no_such("row of a matrix", self.rows, id as usize));
        }
        let (block_rows, _) = self.block();
        let levels = self.levels();
        for (&id, to) in ids.iter().zip(to.iter_rows_mut()) {
            let r = id as usize;
            self.dequantize_row(r, &levels, |b| self.params(r / block_rows, b), to);
        }
        Ok(())
    }

    /// The levels of all codes.
    fn levels(&self) -> [f32; 256] {
        let dtype = self.scheme.dtype;
        let mut levels = [0.0; 256];
        for (code, level) in (0..=dtype.max_code()).zip(&mut levels) {
            *level = dtype.level(code);
        }
        levels
    }

    /// Row `r`, whose blocks have `params`.
    fn dequantize_row(
        &self,
        r: usize,
        levels: &[f32; 256],
        params: impl Fn(usize) -> Params,
        to: &mut [f32],
    ) {
        /// Codes unpacked at a time, in the first cache with what they stand for; their fields are whole bytes,
        /// whatever their width.
        const CHUNK: usize = 4096;
        let bits = u32::from(self.scheme.dtype.bits());
        let packed = self.codes().get(r * packed_len(self.cols, bits)..).unwrap_or(&[]);
        let mut unpacked = [0_u8; CHUNK];
        for (i, to) in to.chunks_mut(CHUNK).enumerate() {
            let codes = &mut unpacked[..to.len()];
            let bytes = packed.get(i * packed_len(CHUNK, bits)..).unwrap_or(&[]);
            let bytes = bytes.get(..packed_len(codes.len(), bits)).unwrap_or(&[]);
            // Fails only if `S` no longer gives the bytes that `from_parts` has checked.
            if unpack(bits, bytes, codes).is_err() {
                continue;
            }
            let (dtype, block_cols, start) = (self.scheme.dtype, self.block().1, i * CHUNK);
            simd::dispatch(Reals { dtype, codes, levels, block_cols, start, params: &params, to });
        }
    }

    /// Every byte stored: codes, scales and zeros, padding included.
    pub fn bytes(&self) -> usize {
        self.codes().len() + self.scales().len() + self.zeros().map_or(0, <[u8]>::len)
    }

    /// [`bytes`](Self::bytes) in bits over the number of weights; 0 for a matrix without any.
    pub fn bits_per_weight(&self) -> f64 {
        let weights = self.rows as f64 * self.cols as f64;
        if weights == 0.0 { 0.0 } else { self.bytes() as f64 * 8.0 / weights }
    }
}

/// What codes of a row stand for: levels first, then each block's [`Params::real`] of them.
struct Reals<'a, P> {
    dtype: QuantType,
    codes: &'a [u8],
    levels: &'a [f32; 256],
    block_cols: usize,
    /// The column of the first code.
    start: usize,
    params: &'a P,
    to: &'a mut [f32],
}

impl<P: Fn(usize) -> Params> WithSimd for Reals<'_, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { dtype, codes, levels, block_cols, start, params, to } = self;
        match dtype {
            QuantType::Int { .. } => integers(codes, to),
            _ => look_up(codes, levels, to),
        }
        let mut done = 0;
        while done < to.len() {
            let col = start + done;
            let end = to.len().min(done + block_cols - col % block_cols);
            let params = params(col / block_cols);
            let (vectors, rest) = S::as_mut_simd_f32s(&mut to[done..end]);
            let (scale, zero) = (simd.splat_f32s(params.scale), simd.splat_f32s(params.zero));
            let offset = simd.splat_f32s(params.offset);
            for w in vectors {
                let scaled = simd.mul_f32s(scale, simd.sub_f32s(*w, zero));
                *w = simd.add_f32s(scaled, offset);
            }
            for w in rest {
                *w = params.real(*w);
            }
            done = end;
        }
    }
}

// Functions of their own, since only of arguments the compiler knows that they do not overlap.

#[inline(always)]
fn integers(codes: &[u8], to: &mut [f32]) {
    for (w, &code) in to.iter_mut().zip(codes) {
        *w = f32::from(code);
    }
}

#[inline(always)]
fn look_up(codes: &[u8], levels: &[f32; 256], to: &mut [f32]) {
    for (w, &code) in to.iter_mut().zip(codes) {
        *w = levels[usize::from(code)];
    }
}

impl QuantScheme {
    /// What a scale means beside the code of a zero, or a zero or offset of its own.
    #[inline]
    fn params(self, scale: f32, zero: u8, real: Option<f32>) -> Params {
        let real = real.unwrap_or_default();
        let (zero, offset) = match self.zero {
            ZeroFormat::None => (0.0, 0.0),
            ZeroFormat::Midpoint => (f32::from(self.midpoint()), 0.0),
            ZeroFormat::Int => (f32::from(zero), 0.0),
            ZeroFormat::Real(_) => (real, 0.0),
            ZeroFormat::Offset(_) => (0.0, real),
        };
        Params { scale, zero, offset }
    }

    /// [`QMatrix::bytes`] of a `rows × cols` matrix stored this way.
    ///
    /// # Errors
    /// [`Error::Bits`] and [`Error::EmptyBlock`] for an impossible scheme, [`Error::TooLarge`] for an
    /// impossible size.
    ///
    /// # Example
    /// ```
    /// use lowbit_core::{Granularity, QuantScheme};
    ///
    /// let scheme = QuantScheme::symmetric(4, Granularity::PerGroup(128));
    /// assert_eq!(scheme.bytes(4096, 4096)?, 4096 * (4096 / 2 + 32 * 2));
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub fn bytes(self, rows: usize, cols: usize) -> Result<usize> {
        self.check()?;
        let Layout { codes, scales, zeros, .. } = Layout::new(rows, cols, self)?;
        Ok(codes + scales + zeros)
    }
}

/// What shape and scheme say about the three buffers.
pub(crate) struct Layout {
    pub(crate) block: (usize, usize),
    pub(crate) grid: (usize, usize),
    /// Bytes of one row of codes.
    pub(crate) stride: usize,
    pub(crate) codes: usize,
    pub(crate) scales: usize,
    pub(crate) zeros: usize,
}

impl Layout {
    pub(crate) fn new(rows: usize, cols: usize, scheme: QuantScheme) -> Result<Self> {
        let too_large = || Error::TooLarge { rows, cols };
        // Eight bits a code at most, four bytes a scale: no product below can overflow after this.
        if rows.checked_mul(cols).is_none_or(|x| x > usize::MAX / 16)
            || rows.max(cols) > usize::MAX / 16
        {
            return Err(too_large());
        }
        let bits = u32::from(scheme.dtype.bits());
        let block = scheme.granularity.block(rows, cols);
        let grid = scheme.granularity.grid(rows, cols);
        let stride = packed_len(cols, bits);
        let scales = scheme.scale_format.bytes(grid).ok_or_else(too_large)?;
        let zeros = match scheme.zero {
            ZeroFormat::None | ZeroFormat::Midpoint => 0,
            ZeroFormat::Int => grid.0 * packed_len(grid.1, bits),
            ZeroFormat::Real(format) | ZeroFormat::Offset(format) => {
                format.bytes(grid).ok_or_else(too_large)?
            }
        };
        Ok(Self { block, grid, stride, codes: rows * stride, scales, zeros })
    }
}

/// The code of `bits` bits at `index`, in the order of [`unpack`].
fn field(packed: &[u8], bits: u32, index: usize) -> u8 {
    let bit = index * bits as usize;
    let byte = |i: usize| u16::from(packed.get(i).copied().unwrap_or(0));
    let word = byte(bit / 8) | byte(bit / 8 + 1) << 8;
    (word >> (bit % 8)) as u8 & ((1_u16 << bits) - 1) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowbit_dtypes::pack;

    /// One number at a time, as the documentation of the type says.
    fn plain(q: &QMatrix) -> Vec<u32> {
        let all = (0..q.rows()).flat_map(|r| (0..q.cols()).map(move |c| (r, c)));
        all.map(|(r, c)| q.real(r, c).to_bits()).collect()
    }

    #[test]
    fn dequantized_in_vectors_is_the_same_as_one_by_one() {
        use crate::{Granularity::*, TwoLevel, presets};
        let scales = [
            ScaleFormat::F32,
            ScaleFormat::F16,
            ScaleFormat::Bf16,
            ScaleFormat::TwoLevel(TwoLevel::BILEVEL4),
        ];
        let mut schemes = Vec::new();
        for bits in 1..=8 {
            for granularity in
                [PerTensor, PerChannel, PerColumn, PerGroup(16), PerGroup(40), PerBlock(3, 7)]
            {
                let symmetric = QuantScheme::symmetric(bits, granularity);
                for scale_format in scales {
                    schemes.push(QuantScheme { scale_format, ..symmetric });
                    for zero in [
                        ZeroFormat::Int,
                        ZeroFormat::Real(scale_format),
                        ZeroFormat::Offset(scale_format),
                    ] {
                        schemes.push(QuantScheme { scale_format, zero, ..symmetric });
                    }
                }
            }
        }
        for granularity in [PerChannel, PerGroup(32)] {
            schemes.push(presets::nf4(granularity).0);
            schemes.push(presets::fp8(lowbit_dtypes::Format::F8E4M3, granularity).0);
            schemes.push(QuantScheme::levels(QuantType::LLOYD_MAX8, granularity));
        }
        schemes.push(presets::mx(lowbit_dtypes::Format::F4E2M1).0);
        schemes.push(presets::nvfp4().0);
        for (rows, cols) in [(1, 1), (5, 33), (4, 700)] {
            let w = Mat::from_fn(rows, cols, |r, c| ((r * cols + c) as f32 * 0.7).sin());
            for &scheme in &schemes {
                let q = QMatrix::quantize(w.as_ref(), scheme).unwrap();
                let bits: Vec<_> = q.dequantize().data().iter().map(|x| x.to_bits()).collect();
                assert_eq!(bits, plain(&q), "{rows} x {cols} {scheme:?}");
            }
        }
    }

    #[test]
    fn a_single_field_is_what_unpacking_the_row_gives() {
        for bits in 1..=8 {
            let codes: Vec<u8> =
                (0..23).map(|i| (i * 37 + 11) as u8 & ((1_u16 << bits) - 1) as u8).collect();
            let mut packed = vec![0; packed_len(codes.len(), bits)];
            pack(bits, &codes, &mut packed).unwrap();
            assert!(codes.iter().enumerate().all(|(i, &code)| field(&packed, bits, i) == code));
        }
    }
}
