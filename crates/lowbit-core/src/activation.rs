use crate::{Error, Result, qmatrix::round};

/// How a layer's input is quantized before the product. The default, `None` in
/// [`QLinear`](crate::QLinear), keeps it in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ActivationScheme {
    /// Symmetric int8, one scale for each row (token), computed when the row arrives:
    /// see [`quantize_row_int8`].
    Int8PerToken,
}

/// Quantizes one row of activations to int8: `scale = max|x| / 127`, `code = round(x / scale)`,
/// ties to even. Codes lie in −127..=127. A row of zeros gets scale 1.
///
/// Returns the scale.
///
/// # Errors
/// [`Error::Length`] if `codes` is not as long as `x`; [`Error::NotFinite`] (row 0) at the first
/// NaN or infinity. `codes` is not written then.
///
/// # Example
/// ```
/// let mut codes = [0; 3];
/// let scale = lowbit_core::quantize_row_int8(&[0.5, -1.27, 0.004], &mut codes)?;
/// assert_eq!((codes, scale), ([50, -127, 0], 0.01));
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[inline(always)] // so that a caller compiled for a newer CPU gets this loop compiled for it too
pub fn quantize_row_int8(x: &[f32], codes: &mut [i8]) -> Result<f32> {
    if x.len() != codes.len() {
        return Err(Error::Length { what: "int8 codes", expected: x.len(), got: codes.len() });
    }
    // As integers the absolute values keep their order, and NaN is larger than infinity: the
    // maximum finds both, and the loop vectorizes.
    let max = x.iter().fold(0, |max, x| max.max(x.to_bits() & 0x7fff_ffff));
    if max >= f32::INFINITY.to_bits() {
        let col = x.iter().position(|x| !x.is_finite()).unwrap_or(0);
        return Err(Error::NotFinite { what: "activation", row: 0, col });
    }
    let scale = match f32::from_bits(max) / 127.0 {
        0.0 => 1.0,
        scale => scale,
    };
    for (&x, code) in x.iter().zip(codes) {
        // |x / scale| <= 127.00002, or up to 254 where the scale is subnormal and was rounded down
        *code = round(x / scale).clamp(-127.0, 127.0) as i8;
    }
    Ok(scale)
}
