//! Ways to quantize a layer, by name: `int4-g128-zp`, `nf4-g64-a8`, or a method of `compare`.

use std::str::FromStr;

use anyhow::{Context as _, Result, bail, ensure};
use lowbit::{
    ActivationScheme, Calibration, Context, Granularity, MatRef, Method, QLinear, QuantScheme,
    QuantType, Quantizer, Rtn, ScaleFormat, TwoLevel, ZeroFormat, dtypes::Format, presets,
};

/// A way to quantize a layer without having seen its inputs.
#[derive(Clone)]
pub(crate) struct Scheme {
    pub(crate) name: String,
    how: How,
    /// Replaces what a method says.
    activation: Option<Option<ActivationScheme>>,
}

#[derive(Clone)]
enum How {
    Rtn(Box<Rtn>),
    Method(&'static Method),
}

/// What `--help` says of the names.
pub(crate) const HELP: &str = "\
int1 to int8, nf4, af4, fp4, iq4nl, fp8, fp8e5m2, mxfp4, mxfp8 or nvfp4. Behind it, with hyphens between: \
g128 or 128x128 for groups or blocks that share a scale (otherwise a row does), zp for zero-points, \
f32, f16, bf16 or e8m0 for how scales are stored, is4 for scales that are integers of 4 bits, a8 for int8 activations. \
Or a method of `compare`";

impl Scheme {
    /// With activations of the given type, whatever the name says.
    pub(crate) fn with_activation(self, activation: Option<ActivationScheme>) -> Self {
        Self { activation: Some(activation), ..self }
    }

    /// Quantizes the `(out_features, in_features)` weight `w`.
    pub(crate) fn quantize(
        &self,
        w: MatRef<'_, f32>,
        ctx: &mut Context,
    ) -> lowbit::Result<QLinear> {
        let calibration = Calibration::new(w.cols());
        let layer = match &self.how {
            How::Rtn(rtn) => rtn.quantize(w, &calibration, ctx)?.layer,
            How::Method(method) => method.quantizer.quantize(w, &calibration, ctx)?.layer,
        };
        Ok(match self.activation {
            Some(activation) => layer.with_activation(activation),
            None => layer,
        })
    }
}

impl FromStr for Scheme {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        let (how, activation) = match Method::named(name) {
            Some(method) => (How::Method(method), None),
            None => {
                let (rtn, activation) = rtn(name)?;
                (How::Rtn(Box::new(rtn)), Some(activation))
            }
        };
        Ok(Self { name: name.to_string(), how, activation })
    }
}

fn rtn(name: &str) -> Result<(Rtn, Option<ActivationScheme>)> {
    let row = Granularity::PerChannel;
    let mut parts = name.split('-');
    let levels = |dtype| (QuantScheme::levels(dtype, row), presets::nf4(row).1);
    let (mut scheme, fit) = match parts.next().unwrap_or_default() {
        "nf4" => presets::nf4(row),
        "af4" => levels(QuantType::AF4),
        "fp4" => levels(QuantType::FP4_BNB),
        "iq4nl" => levels(QuantType::IQ4_NL),
        "fp8" => presets::fp8(Format::F8E4M3, row),
        "fp8e5m2" => presets::fp8(Format::F8E5M2, row),
        "mxfp4" => presets::mx(Format::F4E2M1),
        "mxfp8" => presets::mx(Format::F8E4M3),
        "nvfp4" => presets::nvfp4(),
        other => match other.strip_prefix("int").and_then(|bits| bits.parse().ok()) {
            Some(bits @ 1..=8) => presets::gptq_sym(bits, row),
            _ => bail!("no scheme {name}: expected int4-g128, nf4-g64, mxfp4 or another of --help"),
        },
    };
    let mut activation = None;
    for part in parts {
        let number = |digits: &str| {
            let number = digits.parse::<usize>().ok().filter(|&n| n > 0);
            number.with_context(|| format!("scheme {name}: {part:?} has no meaning, see --help"))
        };
        match part {
            "zp" => {
                let is_int = matches!(scheme.dtype, QuantType::Int { .. });
                ensure!(is_int, "scheme {name}: only integers have zero-points");
                scheme.zero = ZeroFormat::Int;
            }
            "f32" => scheme.scale_format = ScaleFormat::F32,
            "f16" => scheme.scale_format = ScaleFormat::F16,
            "bf16" => scheme.scale_format = ScaleFormat::Bf16,
            "e8m0" => scheme.scale_format = ScaleFormat::E8m0,
            "a8" => activation = Some(ActivationScheme::INT8_PER_TOKEN),
            _ => match (part.strip_prefix("is"), part.strip_prefix('g'), part.split_once('x')) {
                (Some(bits), ..) => {
                    let bits = number(bits)? as u8;
                    scheme.scale_format = ScaleFormat::TwoLevel(TwoLevel::integer(bits));
                }
                (_, Some(size), _) => scheme.granularity = Granularity::PerGroup(number(size)?),
                (.., Some((rows, cols))) => {
                    scheme.granularity = Granularity::PerBlock(number(rows)?, number(cols)?);
                }
                _ => {
                    number("")?;
                }
            },
        }
    }
    Ok((Rtn { scheme, fit }, activation))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_is_stored_and_computed_with() {
        let groups = Granularity::PerGroup;
        for (name, scheme, activation) in [
            ("int4-g128", QuantScheme::symmetric(4, groups(128)), false),
            ("int4-g128-zp", QuantScheme::affine(4, groups(128)), false),
            ("int5-g16-a8", QuantScheme::symmetric(5, groups(16)), true),
            ("mxfp4-a8", presets::mx(Format::F4E2M1).0, true),
            ("nf4-g64", presets::nf4(groups(64)).0, false),
            (
                "int6-128x64-bf16",
                QuantScheme {
                    scale_format: ScaleFormat::Bf16,
                    ..QuantScheme::symmetric(6, Granularity::PerBlock(128, 64))
                },
                false,
            ),
            (
                "int4-g32-is4",
                QuantScheme {
                    scale_format: ScaleFormat::TwoLevel(TwoLevel::integer(4)),
                    ..QuantScheme::symmetric(4, groups(32))
                },
                false,
            ),
        ] {
            let w = lowbit::Mat::from_fn(4, 256, |r, c| ((r * 256 + c) as f32).sin());
            let named: Scheme = name.parse().unwrap();
            let layer = named.quantize(w.as_ref(), &mut Context::new()).unwrap();
            assert_eq!(layer.weight().scheme(), scheme, "{name}");
            assert_eq!(layer.activation().is_some(), activation, "{name}");
            let f32 = named.with_activation(None).quantize(w.as_ref(), &mut Context::new());
            assert_eq!(f32.unwrap().activation(), None, "{name}");
        }
    }

    #[test]
    fn names_without_a_meaning_are_refused() {
        for (name, word) in [
            ("int9", "int9"),
            ("int0", "int0"),
            ("", "--help"),
            ("int4-g0", "\"g0\""),
            ("int4-gx", "\"gx\""),
            ("int4-0x8", "\"0x8\""),
            ("int4-fast", "\"fast\""),
            ("int4-is", "\"is\""),
            ("nf4-zp", "zero-points"),
        ] {
            let error = name.parse::<Scheme>().err().unwrap().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
