//! Small floats in blocks that share a scale: OCP MX and NVFP4.

use crate::error::{Result, same_length};
use crate::simd::Isa;
use crate::simd::blocks::{
    Float, Int8, MxDequantize, MxQuantize, Nvfp4Dequantize, Nvfp4Quantize, Scaling,
};
use crate::table::first_not_finite;
use crate::{Error, F8E4M3, F8E8M0, Format, Rounding};

/// A microscaling format: blocks of 32 elements along a row share a power of two, an [`F8E8M0`].
///
/// `x = element(code) · scale`. From the OCP Microscaling Formats specification 1.0, as implemented by microxcaling and
/// torchao. The last block may be shorter.
///
/// ```
/// use lowbit_dtypes::{F8E8M0, Mx, Rounding, ScaleRule};
///
/// let x: Vec<f32> = (0..40).map(|i| i as f32 / 8.0).collect();
/// let (mut scales, mut codes) = ([F8E8M0::ONE; 2], [0; 40]);
/// Mx::Fp4.quantize(ScaleRule::Floor, Rounding::NearestEven, &x, &mut scales, &mut codes)?;
/// assert_eq!(scales, [F8E8M0::from_f32(0.5), F8E8M0::ONE]); // maxima 3.875 and 4.875
///
/// let mut back = [0.0; 40];
/// Mx::Fp4.dequantize(&scales, &codes, &mut back)?;
/// assert_eq!((back[8], back[31]), (1.0, 3.0)); // 3.875 saturates: 6 · 0.5
/// # Ok::<(), lowbit_dtypes::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mx {
    /// MXFP8 with elements [`Format::F8E4M3`]: 8.25 bits a number.
    Fp8E4M3,
    /// MXFP8 with elements [`Format::F8E5M2`]: 8.25 bits a number.
    Fp8E5M2,
    /// MXFP6 with elements [`Format::F6E2M3`]: 6.25 bits a number.
    Fp6E2M3,
    /// MXFP6 with elements [`Format::F6E3M2`]: 6.25 bits a number.
    Fp6E3M2,
    /// MXFP4, elements [`Format::F4E2M1`]: 4.25 bits a number.
    Fp4,
    /// MXINT8: an 8-bit integer in units of 1/64, −127 … 127: 8.25 bits a number.
    Int8,
}

/// How the scale `2^E` of an [`Mx`] block follows from its maximum, `emax` being the exponent of the largest element.
/// Stacks differ here; the names are torchao's. `E` is kept within −127 … 127.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ScaleRule {
    /// `E = floor(log2(max)) − emax`: OCP's. The largest numbers of a block may saturate (E2M1: 8 becomes 6).
    #[default]
    Floor,
    /// `E = ceil(log2(max)) − emax`: nothing saturates, up to one bit is lost.
    Ceil,
    /// Floor of the maximum rounded to the fraction bits of the element first.
    Even,
    /// The smallest `E` at which the maximum does not exceed the largest element, `ceil(log2(max / largest))`: NVIDIA's.
    Rceil,
}

impl Mx {
    /// Elements in a block.
    pub const BLOCK: usize = 32;

    /// The format of an element, unless it is an integer.
    pub const fn format(self) -> Option<Format> {
        match self {
            Self::Fp8E4M3 => Some(Format::F8E4M3),
            Self::Fp8E5M2 => Some(Format::F8E5M2),
            Self::Fp6E2M3 => Some(Format::F6E2M3),
            Self::Fp6E3M2 => Some(Format::F6E3M2),
            Self::Fp4 => Some(Format::F4E2M1),
            Self::Int8 => None,
        }
    }

    /// Width of an element's code, for [`pack`](crate::pack()).
    pub const fn bits(self) -> u32 {
        match self.format() {
            Some(format) => format.bits(),
            None => 8,
        }
    }

    /// Quantizes to a scale a block and a code a number: `x / scale`, rounded and saturating. Stochastic rounding gives
    /// number i the index `index + i`.
    ///
    /// A block with a NaN or an infinity gets the scale NaN and codes 0, so all of it reads as NaN. A block of zeros
    /// gets the smallest scale.
    ///
    /// # Errors
    /// [`Error::Length`] unless there is a scale for every 32 numbers and a code a number; nothing is written then.
    pub fn quantize(
        self,
        rule: ScaleRule,
        rounding: Rounding,
        x: &[f32],
        scales: &mut [F8E8M0],
        codes: &mut [u8],
    ) -> Result<()> {
        self.quantize_on(Isa::best(), rule, rounding, x, scales, codes)
    }

    #[doc(hidden)]
    pub fn quantize_on(
        self,
        isa: Isa,
        rule: ScaleRule,
        rounding: Rounding,
        src: &[f32],
        scales: &mut [F8E8M0],
        codes: &mut [u8],
    ) -> Result<()> {
        same_length("scales", src.len().div_ceil(Self::BLOCK), scales.len())?;
        same_length("codes", src.len(), codes.len())?;
        let scales: &mut [u8] = bytemuck::must_cast_slice_mut(scales);
        let (max, fraction_bits) = match self.format() {
            Some(format) => (format.max(), format.fraction_bits()),
            None => (127.0 / 64.0, 6),
        };
        let scaling = Scaling::new(rule, max, fraction_bits);
        match self.format() {
            Some(format) => {
                let element = Float::new(format);
                isa.run(MxQuantize { element, scaling, rounding, src, scales, codes });
            }
            None => {
                isa.run(MxQuantize { element: Int8, scaling, rounding, src, scales, codes });
            }
        }
        Ok(())
    }

    /// The reverse of [`quantize`](Self::quantize). A scale of NaN makes its block NaN.
    ///
    /// # Errors
    /// [`Error::Length`] unless there is a scale for every 32 numbers and a code a number; nothing is written then.
    pub fn dequantize(self, scales: &[F8E8M0], codes: &[u8], x: &mut [f32]) -> Result<()> {
        self.dequantize_on(Isa::best(), scales, codes, x)
    }

    #[doc(hidden)]
    pub fn dequantize_on(
        self,
        isa: Isa,
        scales: &[F8E8M0],
        codes: &[u8],
        dst: &mut [f32],
    ) -> Result<()> {
        same_length("codes", dst.len(), codes.len())?;
        same_length("scales", dst.len().div_ceil(Self::BLOCK), scales.len())?;
        let scales: &[u8] = bytemuck::must_cast_slice(scales);
        match self.format() {
            Some(format) => {
                let element = Float::new(format);
                isa.run(MxDequantize { element, scales, codes, dst });
            }
            None => isa.run(MxDequantize { element: Int8, scales, codes, dst }),
        }
        Ok(())
    }
}

/// NVIDIA's FP4: blocks of 16 [`Format::F4E2M1`] elements along a row share an [`F8E4M3`] scale, the tensor an `f32`.
///
/// `x = element(code) · scale · global`: 4.5 bits a number. The last block may be shorter.
///
/// ```
/// use lowbit_dtypes::{F8E4M3, Nvfp4, Rounding};
///
/// let x: Vec<f32> = (0..32).map(|i| i as f32 - 10.0).collect();
/// let nvfp4 = Nvfp4::fit(&x)?;
/// let (mut scales, mut codes) = ([F8E4M3::ONE; 2], [0; 32]);
/// nvfp4.quantize(Rounding::NearestEven, &x, &mut scales, &mut codes)?;
/// assert_eq!(scales[1], F8E4M3::MAX); // the block with the largest number, 21
///
/// let mut back = [0.0; 32];
/// nvfp4.dequantize(&scales, &codes, &mut back)?;
/// assert!((back[31] - 21.0).abs() < 1e-5);
/// # Ok::<(), lowbit_dtypes::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nvfp4 {
    global: f32,
    min_scale: F8E4M3,
}

impl Nvfp4 {
    /// Elements in a block.
    pub const BLOCK: usize = 16;

    /// The global scale of a tensor: `max|x| / (448 · 6)`, so that the largest number gets the largest block scale and the
    /// largest element. 1 for zeros only.
    ///
    /// # Errors
    /// [`Error::NotFinite`] at the first NaN or infinity.
    pub fn fit(x: &[f32]) -> Result<Self> {
        let max = Isa::best().abs_max(x);
        if !max.is_finite() {
            first_not_finite(x)?;
        }
        let global = max / (448.0 * 6.0);
        Self::with_global(if global > 0.0 { global } else { 1.0 })
    }

    /// A given global scale: 1 where there is none.
    ///
    /// # Errors
    /// [`Error::Scale`] unless it is positive and finite.
    pub fn with_global(global: f32) -> Result<Self> {
        if global > 0.0 && global.is_finite() {
            Ok(Self { global, min_scale: F8E4M3::MIN_POSITIVE_SUBNORMAL })
        } else {
            Err(Error::Scale { value: global })
        }
    }

    /// The smallest scale that a block may get. Stacks differ: NVIDIA's Model-Optimizer takes 2^-9, the smallest number,
    /// which is what this type starts with; torchao takes 2^-6, the smallest normal one. Blocks of zeros get it, too.
    pub const fn with_min_scale(self, min_scale: F8E4M3) -> Self {
        Self { min_scale, ..self }
    }

    /// The global scale.
    pub const fn global(self) -> f32 {
        self.global
    }

    /// Quantizes to a scale a block and a code a number: `scale = e4m3(max|x| / 6 / global)`, to nearest even and at least
    /// the smallest scale, and the f32 `x / (scale · global)`, rounded; both saturating. Stochastic rounding gives number i
    /// the index `index + i`.
    ///
    /// # Errors
    /// [`Error::Length`] unless there is a scale for every 16 numbers and a code a number; nothing is written then.
    /// [`Error::NotFinite`] at the first NaN or infinity; scales and codes are unspecified then.
    pub fn quantize(
        self,
        rounding: Rounding,
        x: &[f32],
        scales: &mut [F8E4M3],
        codes: &mut [u8],
    ) -> Result<()> {
        self.quantize_on(Isa::best(), rounding, x, scales, codes)
    }

    #[doc(hidden)]
    pub fn quantize_on(
        self,
        isa: Isa,
        rounding: Rounding,
        src: &[f32],
        scales: &mut [F8E4M3],
        codes: &mut [u8],
    ) -> Result<()> {
        same_length("scales", src.len().div_ceil(Self::BLOCK), scales.len())?;
        same_length("codes", src.len(), codes.len())?;
        let mut not_finite = false;
        isa.run(Nvfp4Quantize {
            global: self.global,
            min_scale: self.min_scale.to_f32(),
            rounding,
            src,
            scales: bytemuck::must_cast_slice_mut(scales),
            codes,
            not_finite: &mut not_finite,
        });
        if not_finite { first_not_finite(src) } else { Ok(()) }
    }

    /// The reverse of [`quantize`](Self::quantize). A scale of NaN makes its block NaN.
    ///
    /// # Errors
    /// [`Error::Length`] unless there is a scale for every 16 numbers and a code a number; nothing is written then.
    pub fn dequantize(self, scales: &[F8E4M3], codes: &[u8], x: &mut [f32]) -> Result<()> {
        self.dequantize_on(Isa::best(), scales, codes, x)
    }

    #[doc(hidden)]
    pub fn dequantize_on(
        self,
        isa: Isa,
        scales: &[F8E4M3],
        codes: &[u8],
        dst: &mut [f32],
    ) -> Result<()> {
        same_length("codes", dst.len(), codes.len())?;
        same_length("scales", dst.len().div_ceil(Self::BLOCK), scales.len())?;
        let scales = bytemuck::must_cast_slice(scales);
        isa.run(Nvfp4Dequantize { global: self.global, scales, codes, dst });
        Ok(())
    }
}
