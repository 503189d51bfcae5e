//! Ways to quantize a layer, by name: `int4-g128-zp`, `nf4-g64-a8`, or a method of `compare`; or a family of
//! methods with its bits and group size.

use std::str::FromStr;

use anyhow::{Context as _, Result, bail, ensure};
use clap::builder::RangedU64ValueParser;
use lowbit::{
    ActivationScheme, Awq, Calibration, ChannelScale, Context, Gptq, Granularity, Mat, MatRef,
    Method, Needs, OutlierRule, QLinear, QuantScheme, QuantType, Quantizer, Recipe, Rtn,
    ScaleFormat, Spqr, TwoLevel, ZeroFormat, dtypes::Format, presets,
};

/// A way to quantize a layer.
#[derive(Clone)]
pub(crate) struct Scheme {
    pub(crate) name: String,
    pub(crate) recipe: Box<Recipe<'static>>,
}

/// What `--help` says of the names.
pub(crate) const HELP: &str = "\
int1 to int8, nf4, af4, fp4, iq4nl, fp8, fp8e5m2, mxfp4, mxfp8 or nvfp4. Behind it, with hyphens between: \
g128 or 128x128 for groups or blocks that share a scale (otherwise a row does), zp for zero-points, offset for offsets in f16 in their place, \
f32, f16, bf16 or e8m0 for how scales are stored, is4 for scales that are integers of 4 bits, a8 for int8 and a16 for bfloat16 activations. \
Or a method of `compare`";

/// Names that stand for a method of any width.
pub(crate) const FAMILIES: &str = "rtn, gptq, awq, spqr or best";

/// Options that name a method.
#[derive(clap::Args)]
pub(crate) struct MethodOptions {
    /// rtn (to nearest), gptq, awq, spqr or best (GPTQ improved), with --bits and --group-size; or a
    /// method of `compare`, such as smoothquant; or a scheme to round to, such as int4-g128, nf4-g64,
    /// fp8-128x128, mxfp4
    #[arg(long, value_name = "NAME")]
    method: String,
    /// Bits of a weight [default: 4]
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<u8>::new().range(1..=8))]
    bits: Option<u8>,
    /// Weights that share a scale, -1 for a whole row [default: 128; 16 for spqr; 32 with --format gguf]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = group_size)]
    group_size: Option<Granularity>,
    /// A zero-point beside each scale; awq and best always have one
    #[arg(long)]
    zero_points: bool,
}

/// What the families store where the options do not say it, by the format that holds it.
#[derive(Clone, Copy)]
pub(crate) struct Defaults {
    /// Weights that share a scale.
    pub(crate) group_size: usize,
    /// How zero-points are stored.
    pub(crate) zero_points: ZeroFormat,
}

impl Default for Defaults {
    fn default() -> Self {
        Self { group_size: 128, zero_points: ZeroFormat::Int }
    }
}

fn group_size(text: &str) -> Result<Granularity, String> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(Granularity::PerChannel),
        Ok(size @ 1..) => {
            usize::try_from(size).map(Granularity::PerGroup).map_err(|e| e.to_string())
        }
        _ => Err("expected a number of weights, or -1 for a whole row".into()),
    }
}

impl MethodOptions {
    /// The method that is asked for.
    pub(crate) fn scheme(&self, defaults: Defaults) -> Result<Scheme> {
        let Self { method, bits, group_size, zero_points } = self;
        if let Some(family) = self.family(defaults) {
            return family;
        }
        let scheme: Scheme = method.parse().with_context(|| {
            format!("no method {method:?}: expected {FAMILIES}, a scheme or a preset, see --help")
        })?;
        if bits.is_none() && group_size.is_none() && !zero_points {
            return Ok(scheme);
        }
        let stored = scheme.example(16, 512)?.weight().scheme();
        for (same, option) in [
            (bits.is_none_or(|bits| bits == stored.dtype.bits()), "--bits"),
            (group_size.is_none_or(|size| size == stored.granularity), "--group-size"),
            (
                !zero_points || !matches!(stored.zero, ZeroFormat::None | ZeroFormat::Midpoint),
                "--zero-points",
            ),
        ] {
            ensure!(
                same,
                "{method} says itself how it stores weights: leave {option} out, or choose {FAMILIES}"
            );
        }
        Ok(scheme)
    }

    /// Is the method one of those with any bits and group size?
    pub(crate) fn is_family(&self) -> bool {
        self.family(Defaults::default()).is_some()
    }

    /// A method of a family; `None` if it is none.
    fn family(&self, defaults: Defaults) -> Option<Result<Scheme>> {
        let family = self.method.as_str();
        let always = matches!(family, "awq" | "best");
        let bits = self.bits.unwrap_or(4);
        let size = if family == "spqr" { 16 } else { defaults.group_size };
        let granularity = self.group_size.unwrap_or(Granularity::PerGroup(size));
        let zp = self.zero_points || always;
        let mut integers = QuantScheme::symmetric(bits, granularity);
        if zp {
            integers.zero = defaults.zero_points;
        }
        let recipe = match family {
            "rtn" => rounding(Rtn::new(integers)),
            "gptq" => rounding(Gptq::new(integers)),
            "best" => rounding(Gptq::improved(integers)),
            "awq" => {
                let Rtn { scheme, fit } = Rtn::new(integers);
                let scale = Some(ChannelScale::Awq(Awq { scheme, fit }));
                Recipe { scale, ..rounding(Rtn::new(integers)) }
            }
            "spqr" if self.zero_points => {
                let wrong = "spqr has zeros of its own: leave --zero-points out";
                return Some(Err(anyhow::anyhow!(wrong)));
            }
            "spqr" => {
                let mut spqr = Spqr { outliers: OutlierRule::Share(0.01), ..Spqr::new(bits) };
                spqr.rounding.scheme.granularity = granularity;
                rounding(spqr)
            }
            _ => return None,
        };
        let prefix = if family == "rtn" { String::new() } else { format!("{family}-") };
        let group = match granularity {
            Granularity::PerGroup(size) => format!("-g{size}"),
            _ => String::new(),
        };
        let zp = match integers.zero {
            ZeroFormat::Midpoint => "",
            ZeroFormat::Int => "-zp",
            _ => "-offset",
        };
        let name = format!("{prefix}int{bits}{group}{zp}");
        Some(Ok(Scheme { name, recipe: Box::new(recipe) }))
    }
}

/// Just `quantizer`, which lives as long as the program: names are read once, from the command line.
fn rounding(quantizer: impl Quantizer + 'static) -> Recipe<'static> {
    Recipe::rounding(Box::leak(Box::new(quantizer)))
}

impl Scheme {
    /// With activations of the given type, whatever the name says.
    pub(crate) fn with_activation(self, activation: Option<ActivationScheme>) -> Self {
        let recipe = Box::new(Recipe { activation, ..*self.recipe });
        Self { recipe, ..self }
    }

    /// Quantizes the `(out_features, in_features)` weight `w` without having seen its inputs.
    pub(crate) fn quantize(
        &self,
        w: MatRef<'_, f32>,
        ctx: &mut Context,
    ) -> lowbit::Result<QLinear> {
        Ok(self.recipe.quantize(w, &Calibration::new(w.cols()), ctx)?.layer)
    }

    /// A layer such as this makes of `rows` outputs and `cols` inputs, some of which are outliers. Scales
    /// of channels have vanished.
    pub(crate) fn example(&self, rows: usize, cols: usize) -> lowbit::Result<QLinear> {
        let noise = |r: usize, c: usize| ((r * 131 + c * 71) as f32 * 0.37).sin();
        let outlier = |c: usize| if c == 0 { 100.0 } else { 1.0 };
        let w = Mat::from_fn(rows, cols, noise);
        let mut calibration = match self.recipe.needs() {
            Needs::SecondMoment => Calibration::with_second_moment(cols)?,
            _ => Calibration::new(cols),
        };
        let x = Mat::from_fn(32, cols, |r, c| noise(c, r) * outlier(c));
        let ctx = &mut Context::new();
        calibration.observe(x.as_ref(), ctx)?;
        let recipe = Recipe { scale: None, ..*self.recipe };
        Ok(recipe.quantize(w.as_ref(), &calibration, ctx)?.layer)
    }
}

impl FromStr for Scheme {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        let recipe = match Method::named(name) {
            Some(method) => method.quantizer,
            None => {
                let (rtn, activation) = rtn(name)?;
                Recipe { activation, ..rounding(rtn) }
            }
        };
        Ok(Self { name: name.to_string(), recipe: Box::new(recipe) })
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
    let first = name.split('-').next().unwrap_or_default();
    let fixed = ["mx", "nv"].iter().any(|standard| first.starts_with(standard));
    let mut seen = Vec::new();
    for part in parts {
        let kind = match part {
            "zp" | "offset" => "zero-points",
            "a8" | "a16" => "activations",
            "f32" | "f16" | "bf16" | "e8m0" => "scales",
            _ if part.starts_with("is") => "scales",
            _ => "groups",
        };
        ensure!(!seen.contains(&kind), "scheme {name}: {part} says a second time what {kind} are");
        ensure!(
            !fixed || kind == "activations",
            "scheme {name}: {first} is a standard, which says itself what {kind} are"
        );
        seen.push(kind);
        let number = |digits: &str| {
            let number = digits.parse::<usize>().ok().filter(|&n| n > 0);
            number.with_context(|| format!("scheme {name}: {part:?} has no meaning, see --help"))
        };
        match part {
            "zp" | "offset" => {
                let is_int = matches!(scheme.dtype, QuantType::Int { .. });
                ensure!(is_int, "scheme {name}: only integers have zero-points or offsets");
                scheme.zero = match part {
                    "zp" => ZeroFormat::Int,
                    _ => ZeroFormat::Offset(ScaleFormat::F16),
                };
            }
            "f32" => scheme.scale_format = ScaleFormat::F32,
            "f16" => scheme.scale_format = ScaleFormat::F16,
            "bf16" => scheme.scale_format = ScaleFormat::Bf16,
            "e8m0" => scheme.scale_format = ScaleFormat::E8m0,
            "a8" => activation = Some(ActivationScheme::INT8_PER_TOKEN),
            "a16" => activation = Some(ActivationScheme::BF16),
            _ => match (part.strip_prefix("is"), part.strip_prefix('g'), part.split_once('x')) {
                (Some(bits), ..) => {
                    let bits = u8::try_from(number(bits)?).ok().filter(|bits| *bits <= 8);
                    let bits =
                        bits.with_context(|| format!("scheme {name}: {part} is not 1 to 8 bits"))?;
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
            ("mxfp4-a16", presets::mx(Format::F4E2M1).0, true),
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

    fn options(args: &str) -> Result<Scheme> {
        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            method: MethodOptions,
        }
        let args = ["lowbit", "--method"].into_iter().chain(args.split(' '));
        <Cli as clap::Parser>::try_parse_from(args)?.method.scheme(Defaults::default())
    }

    #[test]
    fn a_family_with_its_numbers_is_the_preset_of_that_name() {
        for (args, name) in [
            ("rtn", "int4-g128"),
            ("rtn --bits 8 --group-size -1", "int8"),
            ("rtn --bits 2 --group-size 32 --zero-points", "int2-g32-zp"),
            ("gptq --bits 4 --group-size 128", "gptq-int4-g128"),
            ("gptq --bits 3 --group-size 32 --zero-points", "gptq-int3-g32-zp"),
            ("best --bits 3 --group-size 32", "best-int3-g32-zp"),
            ("spqr --bits 3", "spqr-int3-g16"),
        ] {
            let (family, preset) = (options(args).unwrap(), Method::named(name).unwrap());
            assert_eq!(family.name, name);
            let preset = Scheme { name: name.into(), recipe: Box::new(preset.quantizer) };
            assert_eq!(family.example(16, 256), preset.example(16, 256), "{name}");
        }
        let awq = options("awq --group-size 32").unwrap();
        let preset = Method::named("awq-g32").unwrap().quantizer;
        assert_eq!((awq.name.as_str(), awq.recipe.scale), ("awq-int4-g32-zp", preset.scale));
    }

    #[test]
    fn a_preset_refuses_numbers_that_contradict_it() {
        assert!(options("gptq-int4-g128 --bits 4 --group-size 128").is_ok());
        assert!(options("smoothquant --bits 8 --group-size -1").is_ok());
        assert!(options("nf4-g64 --bits 4").is_ok());
        for (args, word) in [
            ("gptq-int4-g128 --bits 3", "leave --bits out"),
            ("int4-g32 --group-size 128", "leave --group-size out"),
            ("smoothquant --bits 4", "leave --bits out"),
            ("int4-g32 --zero-points", "leave --zero-points out"),
            ("spqr --zero-points", "leave --zero-points out"),
            ("gptq5", "no method \"gptq5\""),
            ("gptq --bits 9", "9"),
            ("gptq --group-size 0", "-1 for a whole row"),
        ] {
            let error = options(args).err().unwrap().to_string();
            assert!(error.contains(word), "{error}");
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
            ("int4-is257", "is257"),
            ("int4-g32-g64", "g64"),
            ("int4-f16-is4", "is4"),
            ("mxfp4-g64", "standard"),
        ] {
            let error = name.parse::<Scheme>().err().unwrap().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
