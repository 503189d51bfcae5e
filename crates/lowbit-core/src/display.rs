//! Schemes in plain words, as messages and reports name them: `int4, groups of 128, f16 scales, zero at
//! the midpoint`.

use core::fmt::{Display, Formatter, Result};

use lowbit_dtypes::Format;

use crate::{
    ActivationScales, ActivationScheme, ActivationType, Base, Granularity, Outliers, QuantScheme,
    QuantType, Rounding, ScaleFormat, StepFormat, Transform, TwoLevel, ZeroFormat,
};

/// # Example
/// ```
/// use lowbit_core::{Granularity, QuantScheme};
///
/// let scheme = QuantScheme::symmetric(4, Granularity::PerGroup(128));
/// assert_eq!(scheme.to_string(), "int4, groups of 128, f16 scales, zero at the midpoint");
/// ```
impl Display for QuantScheme {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Self { dtype, granularity, scale_format, zero } = self;
        write!(f, "{dtype}, {granularity}, {scale_format} scales")?;
        match zero {
            ZeroFormat::None => Ok(()),
            zero => write!(f, ", {zero}"),
        }
    }
}

impl Display for QuantType {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match *self {
            Self::Int { bits } => write!(f, "int{bits}"),
            Self::Float(format) => float(format, f),
            Self::NF4 => f.write_str("NF4"),
            Self::AF4 => f.write_str("AF4"),
            Self::FP4_BNB => f.write_str("FP4 of bitsandbytes"),
            Self::IQ4_NL => f.write_str("IQ4_NL"),
            Self::Table(levels) => write!(f, "a table of {} levels", levels.as_slice().len()),
        }
    }
}

/// As `fp8 E4M3`.
fn float(format: Format, f: &mut Formatter<'_>) -> Result {
    let (bits, e, m) = (format.bits(), format.exponent_bits(), format.fraction_bits());
    write!(f, "fp{bits} E{e}M{m}")
}

impl Display for Granularity {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Self::PerTensor => f.write_str("per tensor"),
            Self::PerChannel => f.write_str("per channel"),
            Self::PerColumn => f.write_str("per column"),
            Self::PerGroup(size) => write!(f, "groups of {size}"),
            Self::PerBlock(rows, cols) => write!(f, "blocks of {rows} x {cols}"),
        }
    }
}

impl Display for ScaleFormat {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Self::TwoLevel(two) => two.fmt(f),
            other => f.write_str(other.name()),
        }
    }
}

impl Display for TwoLevel {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Self { dtype, granularity, base, format } = self;
        let format = match format {
            StepFormat::F32 => "f32",
            StepFormat::F16 => "f16",
            StepFormat::Bf16 => "bf16",
        };
        let base = match base {
            Base::Zero => "",
            Base::Midpoint => " of both signs",
            Base::Minimum => " above a minimum",
        };
        write!(f, "two-level ({dtype}{base}, {granularity} of scales, {format} steps)")
    }
}

impl Display for ZeroFormat {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Self::None => f.write_str("no zero"),
            Self::Midpoint => f.write_str("zero at the midpoint"),
            Self::Int => f.write_str("integer zero-points"),
            Self::Real(format) => write!(f, "real zero-points in {format}"),
            Self::Offset(format) => write!(f, "offsets in {format}"),
        }
    }
}

/// # Example
/// ```
/// use lowbit_core::ActivationScheme;
///
/// assert_eq!(ActivationScheme::INT8_PER_TOKEN.to_string(), "int8, a scale per token");
/// ```
impl Display for ActivationScheme {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self.dtype {
            ActivationType::Bf16 => self.dtype.fmt(f),
            dtype => write!(f, "{dtype}, {}", self.scales),
        }
    }
}

impl Display for ActivationType {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match *self {
            Self::Int8 => f.write_str("int8"),
            Self::UInt8 => f.write_str("uint8"),
            Self::Int16 => f.write_str("int16"),
            Self::Float(format) => float(format, f),
            Self::Bf16 => f.write_str("bf16"),
        }
    }
}

impl Display for ActivationScales {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Self::PerToken => f.write_str("a scale per token"),
            Self::PerTokenGroup(size) => write!(f, "a scale per {size} features of a token"),
            Self::PerTensor => f.write_str("a scale per batch"),
            Self::Static { scale, zero_point } => {
                write!(f, "the static scale {scale:e} with zero-point {zero_point}")
            }
        }
    }
}

impl Display for Transform {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(match self {
            Self::Scale(_) => "a scale of channels",
            Self::Permute(_) => "a permutation",
            Self::Hadamard { .. } => "a Hadamard rotation",
        })
    }
}

impl Display for Outliers {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Self::Threshold(threshold) => write!(f, "features beyond {threshold}"),
            Self::Columns(known) => write!(f, "{} known features", known.columns().len()),
            Self::Sparse(sparse) => write!(f, "{} single weights", sparse.values().len()),
        }
    }
}

impl Display for Rounding {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(match self {
            Self::NearestEven => "rounding to nearest, ties to even",
            Self::NearestAway => "rounding to nearest, ties away from zero",
            Self::NearestUp => "rounding to nearest, ties up",
            Self::Floor => "rounding down",
            Self::TowardZero => "rounding toward zero",
            Self::Stochastic { .. } => "stochastic rounding",
        })
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;

    #[test]
    fn schemes_are_said_in_plain_words() {
        let group = Granularity::PerGroup;
        let levels = QuantScheme::levels;
        let e2m1 = QuantType::Float(Format::F4E2M1);
        let nvfp4 = ScaleFormat::TwoLevel(TwoLevel::NVFP4);
        for (scheme, expected) in [
            (
                QuantScheme::affine(3, Granularity::PerChannel),
                "int3, per channel, f16 scales, integer zero-points",
            ),
            (
                QuantScheme { scale_format: ScaleFormat::E8m0, ..levels(e2m1, group(32)) },
                "fp4 E2M1, groups of 32, E8M0 scales",
            ),
            (
                QuantScheme { scale_format: nvfp4, ..levels(e2m1, group(16)) },
                "fp4 E2M1, groups of 16, two-level (fp8 E4M3, per tensor of scales, f32 steps) scales",
            ),
            (
                QuantScheme {
                    zero: ZeroFormat::Offset(ScaleFormat::F16),
                    scale_format: ScaleFormat::F32,
                    ..levels(QuantType::Int { bits: 4 }, Granularity::PerBlock(8, 4))
                },
                "int4, blocks of 8 x 4, f32 scales, offsets in f16",
            ),
        ] {
            assert_eq!(scheme.to_string(), expected);
        }
    }
}
