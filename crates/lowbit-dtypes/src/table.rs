//! Formats of 4 bits that are a list of 16 numbers.

use crate::Error;
use crate::error::{Result, same_length};
use crate::simd::table::{DequantizeBlocks, Encode, QuantizeBlocks};
use crate::simd::{Isa, Kernel, Plain, Search};

/// A format of 16 levels: `level(code) = levels[code]`.
///
/// A number becomes the nearest level; exactly between two, the lower one. The constants are the tables of the field;
/// [`Table16::new`] takes any other.
///
/// ```
/// use lowbit_dtypes::Table16;
///
/// assert_eq!(Table16::NF4.code(0.5), 12); // 0.44 is nearer than 0.56
/// assert_eq!(Table16::NF4.level(7), 0.0);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Table16 {
    levels: [f32; 16],
    pub(crate) search: Search,
    /// The largest magnitude.
    pub(crate) reach: f32,
}

impl Table16 {
    /// NormalFloat 4 of QLoRA (Dettmers et al., arXiv:2305.14314, appendix E): levels of equal probability under a
    /// normal distribution, −1 and 1 and an exact 0 (code 7). The published f32 values, as in bitsandbytes;
    /// [`nf4_from_quantiles`] rebuilds them and says where they differ. A threshold is the f32 nearest to the midpoint;
    /// four midpoints are ties between two f32, where the decimals in the source of bitsandbytes name the other one
    /// (those above codes 0, 8, 12 and 14), so a number equal to it can get the neighbouring code there.
    pub const NF4: Self = Self::nearest([
        -1.0,
        -0.696_192_8,
        -0.525_073_05,
        -0.394_917_5,
        -0.284_441_38,
        -0.184_773_43,
        -0.091_050_036,
        0.0,
        0.079_580_3,
        0.160_930_2,
        0.246_112_3,
        0.337_915_24,
        0.440_709_83,
        0.562_617,
        0.722_956_84,
        1.0,
    ]);

    /// AbnormalFloat 4 for blocks of 64 (Yoshida, arXiv:2306.06965), ascending; bitsandbytes stores the same levels in
    /// descending order. Exact 0 is code 7.
    pub const AF4: Self = Self::nearest([
        -1.0,
        -0.694_410_1,
        -0.512_437_4,
        -0.373_695_1,
        -0.256_075_52,
        -0.149_824_78,
        -0.049_348_12,
        0.0,
        0.042_731_64,
        0.129_344_83,
        0.219_612_74,
        0.316_756_66,
        0.425_638_82,
        0.554_962_34,
        0.724_248_63,
        1.0,
    ]);

    /// The 4-bit float of bitsandbytes, which is not [`Format::F4E2M1`](crate::Format::F4E2M1): a sign bit and the
    /// magnitudes {0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4}, codes 0 and 8 both zero. The thresholds are the decimals of
    /// bitsandbytes, on |x|; a number on one goes to the smaller magnitude, and only negative numbers set the sign.
    pub const FP4_BNB: Self = {
        let magnitudes = [0.0, 0.0625 / 12.0, 8.0 / 12.0, 1.0, 4.0 / 12.0, 0.5, 2.0 / 12.0, 0.25];
        let ascending = [0, 1, 6, 7, 4, 5, 2, 3];
        let above: [f32; 7] =
            [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333];
        let mut levels = [0.0; 16];
        let mut order = [0; 16];
        let mut thresholds = [0.0; 15];
        let mut i = 0;
        while i < 8 {
            levels[i] = magnitudes[i];
            levels[8 + i] = -magnitudes[i];
            order[8 + i] = ascending[i];
            order[7 - i] = 8 + ascending[i];
            if i < 7 {
                thresholds[8 + i] = above[i];
                // -t itself goes to the smaller magnitude, which is the upper side.
                thresholds[6 - i] = (-above[i]).next_down();
            }
            i += 1;
        }
        thresholds[7] = (0f32).next_down(); // zeros of either sign are code 0
        Self::with_thresholds(levels, order, &thresholds)
    };

    /// The non-linear table of ggml's IQ4_NL and IQ4_XS, in units of its scale: −127 … 113. There is no 0; 1 is code 8.
    pub const IQ4_NL: Self = Self::nearest([
        -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0,
        69.0, 89.0, 113.0,
    ]);

    /// A table of your own, in any order; of equal levels the one with the lower code is taken.
    ///
    /// # Errors
    /// [`Error::Level`] at the first level that is not finite.
    ///
    /// ```
    /// use lowbit_dtypes::Table16;
    /// let squares = Table16::new(core::array::from_fn(|i| (i * i) as f32))?;
    /// assert_eq!(squares.code(10.0), 3);
    /// # Ok::<(), lowbit_dtypes::Error>(())
    /// ```
    pub const fn new(levels: [f32; 16]) -> Result<Self> {
        let mut code = 0;
        while code < 16 {
            if !levels[code].is_finite() {
                return Err(Error::Level { value: levels[code], code });
            }
            code += 1;
        }
        Ok(Self::nearest(levels))
    }

    const fn nearest(levels: [f32; 16]) -> Self {
        // The codes in ascending order of their levels, of equal ones only the first.
        let mut order = [0; 16];
        let mut count = 0;
        let mut code = 0;
        while code < 16 {
            // Insert the code behind every level that is below its own.
            let mut at = count;
            while at > 0 && levels[order[at - 1] as usize] > levels[code] {
                at -= 1;
            }
            if at == 0 || levels[order[at - 1] as usize] < levels[code] {
                let mut i = count;
                while i > at {
                    order[i] = order[i - 1];
                    i -= 1;
                }
                order[at] = code as u8;
                count += 1;
            }
            code += 1;
        }
        let mut thresholds = [f32::INFINITY; 15];
        let mut i = 1;
        while i < count {
            let (low, high) = (levels[order[i - 1] as usize], levels[order[i] as usize]);
            let middle = ((low as f64 + high as f64) / 2.0) as f32;
            // Between neighbours it could be the higher one, which must keep its code.
            thresholds[i - 1] = middle.min(high.next_down());
            i += 1;
        }
        Self::with_thresholds(levels, order, &thresholds)
    }

    const fn with_thresholds(levels: [f32; 16], order: [u8; 16], thresholds: &[f32; 15]) -> Self {
        let mut reach = 0.0;
        let mut i = 0;
        while i < 16 {
            if levels[i].abs() > reach {
                reach = levels[i].abs();
            }
            i += 1;
        }
        Self { levels, search: Search::new(thresholds, order, reach), reach }
    }

    /// The levels, by code.
    pub const fn levels(&self) -> &[f32; 16] {
        &self.levels
    }

    /// The largest magnitude of a level: 1 for NF4, 127 for IQ4_NL.
    pub const fn reach(&self) -> f32 {
        self.reach
    }

    /// The level of the low four bits of `code`.
    pub const fn level(&self, code: u8) -> f32 {
        self.levels[(code & 15) as usize]
    }

    /// The code of the nearest level. NaN gets that of the lowest.
    pub fn code(&self, x: f32) -> u8 {
        let mut code = [0];
        Encode { table: self, src: &[x], codes: &mut code }.run(Plain);
        code[0]
    }

    /// [`code`](Self::code) of every number.
    ///
    /// # Errors
    /// [`Error::Length`] unless the slices have the same length.
    pub fn encode_slice(&self, x: &[f32], codes: &mut [u8]) -> Result<()> {
        self.encode_slice_on(Isa::best(), x, codes)
    }

    #[doc(hidden)]
    pub fn encode_slice_on(&self, isa: Isa, x: &[f32], codes: &mut [u8]) -> Result<()> {
        same_length("codes", x.len(), codes.len())?;
        isa.run(Encode { table: self, src: x, codes });
        Ok(())
    }

    /// [`level`](Self::level) of every code.
    ///
    /// # Errors
    /// [`Error::Length`] unless the slices have the same length.
    pub fn decode_slice(&self, codes: &[u8], x: &mut [f32]) -> Result<()> {
        self.dequantize(codes.len().max(1), &[1.0][..usize::from(!codes.is_empty())], codes, x)
    }

    /// Quantizes blocks of `block` numbers (the last may be shorter) by their absolute maxima:
    /// `scale = max|x| / reach` and `code = code(x · (reach / max|x|))`, for tables that reach 1 exactly as
    /// bitsandbytes does. A block of zeros has scale 0.
    ///
    /// One code a byte; [`NibbleOrder`](crate::NibbleOrder) packs them.
    ///
    /// # Errors
    /// Before anything is written: [`Error::Block`] if `block` is 0, [`Error::Length`] unless there is a scale a block
    /// and a code a number. [`Error::NotFinite`] at the first NaN or infinity; scales and codes are unspecified then.
    ///
    /// ```
    /// use lowbit_dtypes::Table16;
    ///
    /// let x = [0.5, -2.0, 0.0, 1.0, 3.0];
    /// let (mut scales, mut codes) = ([0.0; 2], [0; 5]);
    /// Table16::NF4.quantize(4, &x, &mut scales, &mut codes)?;
    /// assert_eq!((scales, codes), ([2.0, 3.0], [10, 0, 7, 12, 15]));
    ///
    /// let mut back = [0.0; 5];
    /// Table16::NF4.dequantize(4, &scales, &codes, &mut back)?;
    /// assert_eq!(back[1..3], [-2.0, 0.0]);
    /// # Ok::<(), lowbit_dtypes::Error>(())
    /// ```
    pub fn quantize(
        &self,
        block: usize,
        x: &[f32],
        scales: &mut [f32],
        codes: &mut [u8],
    ) -> Result<()> {
        self.quantize_on(Isa::best(), block, x, scales, codes)
    }

    #[doc(hidden)]
    pub fn quantize_on(
        &self,
        isa: Isa,
        block: usize,
        x: &[f32],
        scales: &mut [f32],
        codes: &mut [u8],
    ) -> Result<()> {
        check_blocks(block, x.len(), scales.len())?;
        same_length("codes", x.len(), codes.len())?;
        let mut not_finite = false;
        isa.run(QuantizeBlocks {
            table: self,
            block,
            src: x,
            scales,
            codes,
            not_finite: &mut not_finite,
        });
        if not_finite { first_not_finite(x) } else { Ok(()) }
    }

    /// The reverse of [`quantize`](Self::quantize): `x = level(code) · scale`.
    ///
    /// # Errors
    /// Before anything is written: [`Error::Block`] if `block` is 0, [`Error::Length`] unless there is a scale a block
    /// and a code a number.
    pub fn dequantize(
        &self,
        block: usize,
        scales: &[f32],
        codes: &[u8],
        x: &mut [f32],
    ) -> Result<()> {
        self.dequantize_on(Isa::best(), block, scales, codes, x)
    }

    #[doc(hidden)]
    pub fn dequantize_on(
        &self,
        isa: Isa,
        block: usize,
        scales: &[f32],
        codes: &[u8],
        x: &mut [f32],
    ) -> Result<()> {
        same_length("codes", x.len(), codes.len())?;
        check_blocks(block, x.len(), scales.len())?;
        isa.run(DequantizeBlocks { levels: &self.levels, block, scales, codes, dst: x });
        Ok(())
    }
}

fn check_blocks(block: usize, count: usize, scales: usize) -> Result<()> {
    if block == 0 {
        return Err(Error::Block { block, got: count });
    }
    same_length("scales", count.div_ceil(block), scales)
}

pub(crate) fn first_not_finite(x: &[f32]) -> Result<()> {
    match x.iter().position(|x| !x.is_finite()) {
        Some(index) => Err(Error::NotFinite { value: x[index], index }),
        None => Ok(()),
    }
}

/// NF4 built from its definition: with `o = (1 − 1/30 + 1 − 1/32) / 2`, to the 7 digits bitsandbytes gives it, and Φ⁻¹ the
/// quantile function of the normal distribution, the negative levels are −Φ⁻¹ at 7 points from `o` towards ½ out of 8
/// equal steps with ½ itself, the positive ones Φ⁻¹ at 8 points out of 9; between them 0; all divided by the largest.
///
/// Against the published [`Table16::NF4`]: codes 0, 2, 3, 5, 7 and 15 round to the same f32; the other ten differ, by
/// 8e-9 to 1.1e-7, as if those had been computed in f32. Take the constants to read files; take this to see where they
/// come from.
///
/// ```
/// use lowbit_dtypes::{Table16, nf4_from_quantiles};
/// for (built, &published) in nf4_from_quantiles().iter().zip(Table16::NF4.levels()) {
///     assert!((built - f64::from(published)).abs() < 2e-7);
/// }
/// ```
pub fn nf4_from_quantiles() -> [f64; 16] {
    const OFFSET: f64 = 0.9677083;
    let point = |i: usize, steps: usize| OFFSET + (0.5 - OFFSET) * i as f64 / (steps - 1) as f64;
    let largest = normal_quantile(point(0, 9));
    let mut levels = [0.0; 16];
    for i in 0..8 {
        levels[15 - i] = normal_quantile(point(i, 9)) / largest;
        if i < 7 {
            levels[i] = -normal_quantile(point(i, 8)) / largest;
        }
    }
    levels
}

/// Φ⁻¹(p) for ½ ≤ p < 0.999, by Newton's method on Marsaglia's series
/// `Φ(x) = ½ + φ(x)·(x + x³/3 + x⁵/15 + …)` ("Evaluating the normal distribution", J. Stat. Software 11, 2004).
fn normal_quantile(p: f64) -> f64 {
    const SQRT_TAU: f64 = 2.506_628_274_631_000_7;
    let mut x = 0.0;
    for _ in 0..20 {
        let density = exp(-x * x / 2.0) / SQRT_TAU;
        let (mut sum, mut term) = (x, x);
        for i in 1..80 {
            term *= x * x / f64::from(2 * i + 1);
            sum += term;
        }
        x -= (0.5 + density * sum - p) / density;
    }
    x
}

/// `e^x` for −8 < x ≤ 0 by its series at x/16; core has none.
fn exp(x: f64) -> f64 {
    let x = x / 16.0;
    let (mut sum, mut term) = (1.0, 1.0);
    for i in 1..24 {
        term *= x / f64::from(i);
        sum += term;
    }
    for _ in 0..4 {
        sum *= sum;
    }
    sum
}
