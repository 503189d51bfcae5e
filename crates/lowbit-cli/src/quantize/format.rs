//! Which convention a layer is stored in.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use lowbit::{
    Granularity, Mat, Outliers, QLinear, QMatrix, QuantScheme, QuantType, ScaleFormat, TwoLevel,
    ZeroFormat,
    dtypes::Format as Float,
    formats::{
        Error,
        conventions::{
            Awq, Bnb4, BnbInt8, CompressedFloat, CompressedInt, CompressedPacked, Convention, Fp8,
            Ggml, Gptq, Lowbit, Mxfp4, Nvfp4,
        },
    },
};

use crate::{
    scheme::{FAMILIES, Scheme},
    text,
};

/// A family of conventions; which of them a layer is stored in depends on its scheme.
#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
pub(super) enum Format {
    /// Our own, which holds every layer
    Lowbit,
    /// GPTQ: 2, 3, 4 or 8 bits
    Gptq,
    /// AWQ: 4 bits
    Awq,
    /// bitsandbytes: int8, NF4
    Bnb,
    /// compressed-tensors of vLLM: integers, FP8, FP4
    CompressedTensors,
    /// FP8 of DeepSeek: blocks of 128 x 128
    Fp8,
    /// GGUF of llama.cpp: groups of 32
    Gguf,
}

impl Format {
    pub(super) fn name(self) -> String {
        let value = clap::ValueEnum::to_possible_value(&self);
        value.map_or_else(String::new, |value| value.get_name().into())
    }

    pub(super) fn convention(self, layer: &QLinear) -> Box<dyn Convention> {
        let scheme = layer.weight().scheme();
        let affine = scheme.zero == ZeroFormat::Int;
        let plain = layer.activation().is_none() && layer.outliers().is_none();
        let two_level = ScaleFormat::TwoLevel(TwoLevel::NVFP4);
        let block = match scheme.granularity {
            Granularity::PerBlock(rows, cols) => (rows, cols),
            _ => Fp8::default().block,
        };
        match (self, scheme.dtype) {
            (Self::Lowbit, _) => Box::new(Lowbit),
            (Self::Gptq, _) => Box::new(Gptq { v2: affine, symmetric: !affine, ..Gptq::default() }),
            (Self::Awq, _) => Box::new(Awq::default()),
            (Self::Bnb, QuantType::Int { .. }) => {
                // A threshold of 0 quantizes all features.
                let threshold = match layer.outliers() {
                    Some(Outliers::Threshold(threshold)) => *threshold,
                    _ => 0.0,
                };
                Box::new(BnbInt8 { threshold: (!plain).then_some(threshold) })
            }
            (Self::Bnb, _) => Box::new(Bnb4),
            (Self::Fp8, _) => Box::new(Fp8 { block, divides: false }),
            (Self::Gguf, _) => Box::new(Ggml),
            (Self::CompressedTensors, QuantType::Int { bits: 8 }) if !plain => {
                Box::new(CompressedInt { dynamic: true })
            }
            (Self::CompressedTensors, QuantType::Float(Float::F4E2M1)) => {
                match scheme.scale_format == two_level {
                    true => Box::new(Nvfp4 { reciprocal: true }),
                    false => Box::new(Mxfp4),
                }
            }
            (Self::CompressedTensors, QuantType::Float(_)) => Box::new(CompressedFloat { block }),
            (Self::CompressedTensors, _) => Box::new(CompressedPacked::default()),
        }
    }

    /// Can this hold a scale of a layer's input that no layer before it can take?
    pub(super) fn holds_scales(self) -> bool {
        self == Self::Lowbit
    }

    /// Refuses a method whose layers of these shapes cannot be stored, as a small layer shows. `family`: can
    /// bits, group size and zero-points be chosen?
    pub(super) fn check(self, scheme: &Scheme, family: bool, shapes: &Shapes) -> Result<()> {
        let stored = scheme.example(OUTPUTS, INPUTS)?.weight().scheme();
        for (n, k) in small(shapes, stored.granularity) {
            let layer = scheme.example(n, k)?;
            let Err(error) = self.convention(&layer).write(&layer, "a layer") else { continue };
            let reason = match error {
                Error::Unsupported { what, .. } => what,
                other => other.to_string(),
            };
            let (method, format) = (&scheme.name, self.name());
            let instead = match self.instead(&layer, shapes) {
                Some(options) if family => format!("{options} would do, or --format lowbit"),
                Some(options) => format!("{FAMILIES} with {options} would do, or --format lowbit"),
                None if self == Self::Fp8 => "--method fp8-128x128 would do".into(),
                None => "--format lowbit can".into(),
            };
            bail!("--format {format} cannot hold what {method} makes: {reason}; {instead}");
        }
        Ok(())
    }

    /// What of bits, group size and zero-points can be held for layers of these shapes; `None` where that is
    /// not what stands in the way.
    fn instead(self, layer: &QLinear, shapes: &Shapes) -> Option<String> {
        let plain = layer.transforms().is_empty() && layer.outliers().is_none();
        let scheme = layer.weight().scheme();
        let QuantType::Int { bits } = scheme.dtype else { return None };
        if !plain || layer.adapter().is_some() {
            return None;
        }
        let zeros = match scheme.zero {
            ZeroFormat::Midpoint => [ZeroFormat::Midpoint, ZeroFormat::Int],
            other => [other, ZeroFormat::Midpoint],
        };
        let widths = [bits, 4, 8, 3, 2];
        let mut sizes = vec![scheme.granularity];
        sizes.extend(group_sizes(shapes));
        for (zero, bits) in zeros.iter().flat_map(|&zero| widths.map(|bits| (zero, bits))) {
            let dtype = QuantType::Int { bits };
            let holds = |granularity: &Granularity| {
                let scheme = QuantScheme { dtype, granularity: *granularity, zero, ..scheme };
                self.holds(layer, scheme, shapes)
            };
            let sizes: Vec<_> = match holds(&scheme.granularity) {
                true => vec![scheme.granularity],
                false => sizes.iter().copied().filter(holds).collect(),
            };
            if sizes.is_empty() {
                continue;
            }
            let mut options = Vec::new();
            if scheme.dtype != dtype {
                options.push(format!("--bits {bits}"));
            }
            if sizes != [scheme.granularity] {
                let sizes = sizes.iter().map(|size| match size {
                    Granularity::PerGroup(size) => size.to_string(),
                    _ => "-1 (whole rows)".into(),
                });
                let sizes = text::alternatives(&sizes.collect::<Vec<_>>());
                options.push(format!("--group-size {sizes}"));
            }
            match (scheme.zero == zero, zero) {
                (true, _) => {}
                (_, ZeroFormat::Int) => options.push("--zero-points".into()),
                _ => options.push("no zero-points".into()),
            }
            return Some(options.join(" and "));
        }
        None
    }

    /// Can layers of these shapes be held that are stored by `scheme`, with inputs as those of `like`?
    fn holds(self, like: &QLinear, scheme: QuantScheme, shapes: &Shapes) -> bool {
        small(shapes, scheme.granularity).into_iter().all(|(n, k)| {
            let w = Mat::from_fn(n, k, |r, c| ((r * 131 + c * 71) as f32 * 0.37).sin());
            let Ok(weight) = QMatrix::quantize(w.as_ref(), scheme) else { return false };
            let layer = QLinear::new(weight).with_activation(like.activation());
            self.convention(&layer).write(&layer, "a layer").is_ok()
        })
    }
}

/// The `(out_features, in_features)` of the layers of a model.
pub(super) type Shapes = BTreeSet<(usize, usize)>;

/// Numbers of outputs and of inputs that fit every convention.
const OUTPUTS: usize = 32;
const INPUTS: usize = 512;

/// Shapes of small layers that a convention holds if it holds the large ones: what matters is what is left
/// over, of whole groups too.
fn small(shapes: &Shapes, granularity: Granularity) -> Shapes {
    let group_size = match granularity {
        Granularity::PerGroup(size) => size.max(1),
        _ => INPUTS,
    };
    let whole = (INPUTS / gcd(INPUTS, group_size)).saturating_mul(group_size);
    let outputs = |n: usize| if n.is_multiple_of(OUTPUTS) { n.min(OUTPUTS) } else { n };
    let inputs = |k: usize| if k / 2 < whole { k } else { whole + k % whole };
    shapes.iter().map(|&(n, k)| (outputs(n), inputs(k))).collect()
}

/// Group sizes that divide the rows of all layers, and whole rows: from 16 on, if there are such.
fn group_sizes(shapes: &Shapes) -> Vec<Granularity> {
    let common = shapes.iter().fold(0, |common, (_, k)| gcd(*k, common));
    let divisors = |least: usize| (least..=common).filter(|size| common.is_multiple_of(*size));
    let mut sizes: Vec<_> = divisors(16).collect();
    if sizes.is_empty() {
        sizes = divisors(2).collect();
    }
    sizes.into_iter().map(Granularity::PerGroup).chain([Granularity::PerChannel]).collect()
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
