//! Slices, and the traits that make one function of all pairs of types.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::error::{Result, same_length};
use crate::format::Parts;
use crate::simd::lanes::{self, Code, ToOdd};
use crate::simd::{Isa, Kernel, Simd};
use crate::{Format, Overflow, Rounding};

/// A wider float that small ones are made of and turned into: `f32`, `f64`, `f16`, `bf16`.
pub trait Real: sealed::Real {}
impl<T: sealed::Real> Real for T {}

/// A float of 16 bits or fewer: `f16`, `bf16` and the types of this crate.
///
/// ```
/// use lowbit_dtypes::{Overflow, Rounding, SmallFloat, bf16};
/// let x = bf16::from_f32_with(1.01, Rounding::TowardZero, Overflow::Saturate);
/// assert_eq!(SmallFloat::to_f32(x), 1.0078125);
/// ```
pub trait SmallFloat: sealed::Small {
    /// The number, rounded once. For NaN, infinities and zero see [`Format::encode_with`].
    fn from_f32_with(x: f32, rounding: Rounding, overflow: Overflow) -> Self {
        Self::from_parts(Parts::of_f32(x), rounding, overflow)
    }

    /// The number, rounded once: through `f32` it would be rounded twice.
    fn from_f64_with(x: f64, rounding: Rounding, overflow: Overflow) -> Self {
        Self::from_parts(Parts::of_f64(x), rounding, overflow)
    }

    /// The number as an `f32`; exact.
    fn to_f32(self) -> f32 {
        let mut x = [0.0];
        Self::widen(Isa::baseline(), &[self], &mut x);
        x[0]
    }
}
impl<T: sealed::Small> SmallFloat for T {}

pub(crate) mod sealed {
    use super::*;

    pub trait Real: Copy {
        /// The slice itself, if it is one of f32.
        fn as_f32(_: &[Self]) -> Option<&[f32]> {
            None
        }
        fn as_f32_mut(_: &mut [Self]) -> Option<&mut [f32]> {
            None
        }
        /// The slice itself, if it is one of f64.
        fn as_f64(_: &[Self]) -> Option<&[f64]> {
            None
        }
        /// Exact, or rounded to odd.
        fn to_f32s(isa: Isa, src: &[Self], dst: &mut [f32]);
        fn from_f32s(isa: Isa, src: &[f32], dst: &mut [Self]);
    }

    pub trait Small: bytemuck::Pod {
        const FORMAT: Format;
        type Code: Code + bytemuck::Pod;
        fn from_parts(x: Parts, rounding: Rounding, overflow: Overflow) -> Self {
            let bits = Self::FORMAT.encode_parts(x, rounding, overflow);
            bytemuck::cast(Self::Code::from_bits(bits))
        }
        fn widen(isa: Isa, src: &[Self], dst: &mut [f32]);
    }
}

impl sealed::Real for f32 {
    fn as_f32(x: &[Self]) -> Option<&[f32]> {
        Some(x)
    }
    fn as_f32_mut(x: &mut [Self]) -> Option<&mut [f32]> {
        Some(x)
    }
    fn to_f32s(_: Isa, src: &[Self], dst: &mut [f32]) {
        dst.copy_from_slice(src);
    }
    fn from_f32s(_: Isa, src: &[f32], dst: &mut [Self]) {
        dst.copy_from_slice(src);
    }
}

impl sealed::Real for f64 {
    fn as_f64(x: &[Self]) -> Option<&[f64]> {
        Some(x)
    }
    fn to_f32s(isa: Isa, src: &[Self], dst: &mut [f32]) {
        isa.run(ToOdd { src, dst });
    }
    fn from_f32s(isa: Isa, src: &[f32], dst: &mut [Self]) {
        isa.run(Map(src, dst));
    }
}

impl sealed::Real for f16 {
    fn to_f32s(_: Isa, src: &[Self], dst: &mut [f32]) {
        src.convert_to_f32_slice(dst);
    }
    fn from_f32s(isa: Isa, src: &[f32], dst: &mut [Self]) {
        narrow(isa, src, dst, Rounding::NearestEven, Overflow::Infinity);
    }
}

impl sealed::Real for bf16 {
    fn to_f32s(isa: Isa, src: &[Self], dst: &mut [f32]) {
        isa.run(Map(src, dst));
    }
    fn from_f32s(isa: Isa, src: &[f32], dst: &mut [Self]) {
        narrow(isa, src, dst, Rounding::NearestEven, Overflow::Infinity);
    }
}

impl sealed::Small for f16 {
    const FORMAT: Format = Format::F16;
    type Code = u16;
    fn widen(isa: Isa, src: &[Self], dst: &mut [f32]) {
        sealed::Real::to_f32s(isa, src, dst);
    }
}

impl sealed::Small for bf16 {
    const FORMAT: Format = Format::BF16;
    type Code = u16;
    fn widen(isa: Isa, src: &[Self], dst: &mut [f32]) {
        sealed::Real::to_f32s(isa, src, dst);
    }
}

/// Exact conversion, one by one.
struct Map<'a, A, B>(&'a [A], &'a mut [B]);

impl Kernel for Map<'_, f32, f64> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (y, &x) in self.1.iter_mut().zip(self.0) {
            *y = f64::from(x);
        }
    }
}

impl Kernel for Map<'_, bf16, f32> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (y, x) in self.1.iter_mut().zip(self.0) {
            *y = f32::from_bits(u32::from(x.to_bits()) << 16);
        }
    }
}

fn narrow<D: sealed::Small>(
    isa: Isa,
    src: &[f32],
    dst: &mut [D],
    rounding: Rounding,
    overflow: Overflow,
) {
    lanes::encode::<D::Code>(
        isa,
        D::FORMAT,
        src,
        bytemuck::must_cast_slice_mut(dst),
        rounding,
        overflow,
    );
}

/// Elements converted at a time where f32 is only a step on the way.
const CHUNK: usize = 1024;

/// `encode` by way of f32, where that is exact or nearly so, else one by one.
fn encode_any<S: Real, C: Code>(
    isa: Isa,
    format: Format,
    src: &[S],
    dst: &mut [C],
    rounding: Rounding,
    overflow: Overflow,
) {
    if let Some(src) = S::as_f32(src) {
        return lanes::encode(isa, format, src, dst, rounding, overflow);
    }
    // Rounding to odd keeps what the other roundings ask of the lost bits, but not how many there were.
    if let (Some(src), Rounding::Stochastic { seed, index }) = (S::as_f64(src), rounding) {
        return lanes::encode_f64_stochastic(isa, format, src, dst, (seed, index), overflow);
    }
    let mut buffer = [0.0; CHUNK];
    for (i, (src, dst)) in src.chunks(CHUNK).zip(dst.chunks_mut(CHUNK)).enumerate() {
        let buffer = &mut buffer[..src.len()];
        S::to_f32s(isa, src, buffer);
        lanes::encode(isa, format, buffer, dst, rounding.at(i * CHUNK), overflow);
    }
}

/// Rounds every number of `src`; element i as [`SmallFloat::from_f32_with`] does, with index `index + i` where the
/// rounding is stochastic.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) unless the slices have the same length; nothing is written then.
///
/// ```
/// use lowbit_dtypes::{F8E4M3, Overflow, Rounding, decode_slice, encode_slice};
///
/// let x = [0.1f32, -3.0, 1000.0];
/// let mut small = [F8E4M3::ZERO; 3];
/// encode_slice(&x, &mut small, Rounding::NearestEven, Overflow::Saturate)?;
/// let mut back = [0.0f32; 3];
/// decode_slice(&small, &mut back)?;
/// assert_eq!(back, [0.1015625, -3.0, 448.0]);
/// # Ok::<(), lowbit_dtypes::Error>(())
/// ```
pub fn encode_slice<S: Real, D: SmallFloat>(
    src: &[S],
    dst: &mut [D],
    rounding: Rounding,
    overflow: Overflow,
) -> Result<()> {
    encode_slice_on(Isa::best(), src, dst, rounding, overflow)
}

#[doc(hidden)]
pub fn encode_slice_on<S: Real, D: SmallFloat>(
    isa: Isa,
    src: &[S],
    dst: &mut [D],
    rounding: Rounding,
    overflow: Overflow,
) -> Result<()> {
    same_length("dst", src.len(), dst.len())?;
    let codes: &mut [D::Code] = bytemuck::must_cast_slice_mut(dst);
    encode_any(isa, D::FORMAT, src, codes, rounding, overflow);
    Ok(())
}

/// The numbers of `src`: exact, except that those beyond `f16` (which only E8M0 has) or below its subnormals are
/// rounded to the nearest.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) unless the slices have the same length; nothing is written then.
pub fn decode_slice<S: SmallFloat, D: Real>(src: &[S], dst: &mut [D]) -> Result<()> {
    decode_slice_on(Isa::best(), src, dst)
}

#[doc(hidden)]
pub fn decode_slice_on<S: SmallFloat, D: Real>(isa: Isa, src: &[S], dst: &mut [D]) -> Result<()> {
    same_length("dst", src.len(), dst.len())?;
    by_f32(isa, dst, |at, x| S::widen(isa, &src[at..at + x.len()], x));
    Ok(())
}

/// Fills `dst` by way of f32: `fill` is given places of `dst` and their f32.
fn by_f32<D: Real>(isa: Isa, dst: &mut [D], fill: impl Fn(usize, &mut [f32])) {
    if let Some(dst) = D::as_f32_mut(dst) {
        return fill(0, dst);
    }
    let mut buffer = [0.0; CHUNK];
    for (i, dst) in dst.chunks_mut(CHUNK).enumerate() {
        let buffer = &mut buffer[..dst.len()];
        fill(i * CHUNK, buffer);
        D::from_f32s(isa, buffer, dst);
    }
}

impl Format {
    /// [`encode_with`](Self::encode_with) of every number, element i with index `index + i` where the rounding is
    /// stochastic. An `f64` is rounded once.
    ///
    /// # Errors
    /// [`Error::Length`](crate::Error::Length) unless the slices have the same length; nothing is written then.
    ///
    /// ```
    /// use lowbit_dtypes::{Format, Overflow, Rounding};
    ///
    /// let mut codes = [0; 3];
    /// let rounding = Rounding::Stochastic { seed: 1, index: 0 };
    /// Format::F4E2M1.encode_slice(&[0.5f32, -6.0, 0.7], &mut codes, rounding, Overflow::Saturate)?;
    /// assert_eq!(codes[..2], [0x1, 0xf]); // numbers that have a code keep it
    /// assert!([0x1, 0x2].contains(&codes[2])); // 0.5 or, in two of five cases, 1
    /// # Ok::<(), lowbit_dtypes::Error>(())
    /// ```
    pub fn encode_slice<S: Real>(
        self,
        src: &[S],
        codes: &mut [u8],
        rounding: Rounding,
        overflow: Overflow,
    ) -> Result<()> {
        self.encode_slice_on(Isa::best(), src, codes, rounding, overflow)
    }

    #[doc(hidden)]
    pub fn encode_slice_on<S: Real>(
        self,
        isa: Isa,
        src: &[S],
        codes: &mut [u8],
        rounding: Rounding,
        overflow: Overflow,
    ) -> Result<()> {
        same_length("codes", src.len(), codes.len())?;
        encode_any(isa, self, src, codes, rounding, overflow);
        Ok(())
    }

    /// [`decode`](Self::decode) of every code.
    ///
    /// # Errors
    /// [`Error::Length`](crate::Error::Length) unless the slices have the same length; nothing is written then.
    pub fn decode_slice<D: Real>(self, codes: &[u8], dst: &mut [D]) -> Result<()> {
        self.decode_slice_on(Isa::best(), codes, dst)
    }

    #[doc(hidden)]
    pub fn decode_slice_on<D: Real>(self, isa: Isa, codes: &[u8], dst: &mut [D]) -> Result<()> {
        same_length("dst", codes.len(), dst.len())?;
        by_f32(isa, dst, |at, x| lanes::decode(isa, self, &codes[at..at + x.len()], x));
        Ok(())
    }
}

/// `x` with its significand rounded to the 10 bits of TF32, as an `f32`.
///
/// Tensor cores may instead ignore the low 13 bits: [`Rounding::TowardZero`]. PTX `cvt.rna.tf32` is
/// [`Rounding::NearestAway`]. Overflow goes to infinity; NaN stays a quiet NaN of its sign.
///
/// ```
/// use lowbit_dtypes::{Rounding, tf32};
/// assert_eq!(tf32(1.0 + 1.0 / 2048.0, Rounding::NearestEven), 1.0);
/// assert_eq!(tf32(1.0 + 1.0 / 2048.0, Rounding::NearestAway), 1.0 + 1.0 / 1024.0);
/// ```
pub const fn tf32(x: f32, rounding: Rounding) -> f32 {
    let code = Format::TF32.encode_parts(Parts::of_f32(x), rounding, Overflow::Infinity);
    f32::from_bits(code << 13)
}

/// [`tf32`] of every number, element i with index `index + i` where the rounding is stochastic.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) unless the slices have the same length; nothing is written then.
pub fn tf32_slice(src: &[f32], dst: &mut [f32], rounding: Rounding) -> Result<()> {
    tf32_slice_on(Isa::best(), src, dst, rounding)
}

#[doc(hidden)]
pub fn tf32_slice_on(isa: Isa, src: &[f32], dst: &mut [f32], rounding: Rounding) -> Result<()> {
    same_length("dst", src.len(), dst.len())?;
    for (i, (src, dst)) in src.chunks(CHUNK).zip(dst.chunks_mut(CHUNK)).enumerate() {
        let codes: &mut [u32] = bytemuck::must_cast_slice_mut(dst);
        lanes::encode(isa, Format::TF32, src, codes, rounding.at(i * CHUNK), Overflow::Infinity);
        // A code has 19 bits, sign first: the front of an f32.
        for code in codes {
            *code <<= 13;
        }
    }
    Ok(())
}
