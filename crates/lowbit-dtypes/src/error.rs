/// What a conversion can refuse. Nothing has been written when one is returned, but for [`Error::NotFinite`], which a
/// block quantizer finds on its way.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two slices that belong together have different lengths.
    #[error("expected {expected} elements in {what}, got {got}")]
    Length {
        /// The slice that does not fit.
        what: &'static str,
        /// The length that the other operands call for.
        expected: usize,
        /// The length it has.
        got: usize,
    },
    /// A slice is not a whole number of blocks.
    #[error("expected a whole number of blocks of {block} elements, got {got} elements")]
    Block {
        /// Elements in a block.
        block: usize,
        /// Elements given.
        got: usize,
    },
    /// No integer of this type has that many bits.
    #[error("expected a width of 1 to {max} bits, got {got}")]
    BitWidth {
        /// The widest that is possible here.
        max: u32,
        /// The width asked for.
        got: u32,
    },
    /// An integer does not fit its width.
    #[error("expected integers of {bits} bits, got {value} at index {index}")]
    Range {
        /// The width asked for.
        bits: u32,
        /// The first integer that does not fit.
        value: i32,
        /// Where it stands.
        index: usize,
    },
    /// A NaN or an infinity where the result would have no meaning.
    #[error("expected finite numbers, got {value} at index {index}")]
    NotFinite {
        /// The first such number.
        value: f32,
        /// Where it stands.
        index: usize,
    },
    /// A scale that cannot scale.
    #[error("expected a positive finite scale, got {value}")]
    Scale {
        /// The scale.
        value: f32,
    },
    /// A float format that does not fit 8 bits or is not exact in `bf16`.
    #[error(
        "expected at most 8 bits whose values are exact in bf16, got {exponent_bits} exponent bits, \
         {fraction_bits} fraction bits, bias {bias}"
    )]
    Format {
        /// Width of the exponent field.
        exponent_bits: u32,
        /// Width of the fraction field.
        fraction_bits: u32,
        /// Exponent bias.
        bias: i32,
    },
    /// A name that is no format's.
    #[error("expected the name of a float format, such as float8_e4m3fn")]
    Name,
    /// A string that is no number.
    #[error("expected a decimal number, inf or nan")]
    Parse,
    /// A table entry that cannot be a level.
    #[error("expected finite levels, got {value} at code {code}")]
    Level {
        /// The entry.
        value: f32,
        /// Its code.
        code: usize,
    },
}

/// The result of a conversion.
pub type Result<T, E = Error> = core::result::Result<T, E>;

pub(crate) fn same_length(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::Length { what, expected, got }) }
}
