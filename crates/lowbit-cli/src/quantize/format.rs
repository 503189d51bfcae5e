//! Which convention a layer is stored in.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use lowbit::{
    Granularity, Outliers, QLinear, QuantType, ScaleFormat, TwoLevel, ZeroFormat,
    dtypes::Format as Float,
    formats::{
        Error,
        conventions::{
            Awq, Bnb4, BnbInt8, CompressedInt, CompressedPacked, Convention, Fp8, Ggml, Gptq,
            Lowbit, Mxfp4, Nvfp4,
        },
    },
};

use crate::scheme::Scheme;

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
            (Self::Gguf, _) => Box::new(Ggml),
            (Self::CompressedTensors, QuantType::Int { bits: 8 }) => {
                Box::new(CompressedInt { dynamic: !plain })
            }
            (Self::CompressedTensors, QuantType::Float(Float::F4E2M1)) => {
                match scheme.scale_format == two_level {
                    true => Box::new(Nvfp4 { reciprocal: true }),
                    false => Box::new(Mxfp4),
                }
            }
            (Self::CompressedTensors, QuantType::Float(_)) => Box::new(Fp8::default()),
            (Self::CompressedTensors, _) => Box::new(CompressedPacked::default()),
        }
    }

    /// Can this hold a scale of a layer's input that no layer before it can take?
    pub(super) fn holds_scales(self) -> bool {
        self == Self::Lowbit
    }

    /// Refuses a method whose layers of these shapes cannot be stored, as a small layer shows.
    pub(super) fn check(self, scheme: &Scheme, shapes: BTreeSet<(usize, usize)>) -> Result<()> {
        /// Numbers of outputs and of inputs that fit every convention; what matters of others is what is
        /// left over, of whole groups too.
        const OUTPUTS: usize = 32;
        const INPUTS: usize = 512;
        let group_size = match scheme.example(OUTPUTS, INPUTS)?.weight().scheme().granularity {
            Granularity::PerGroup(size) => size,
            _ => INPUTS,
        };
        let (mut gcd, mut rest) = (INPUTS, group_size);
        while rest > 0 {
            (gcd, rest) = (rest, gcd % rest);
        }
        let whole = (INPUTS / gcd).saturating_mul(group_size);
        let outputs = |n: usize| if n.is_multiple_of(OUTPUTS) { n.min(OUTPUTS) } else { n };
        let inputs = |k: usize| if k / 2 < whole { k } else { whole + k % whole };
        let small = |(n, k)| (outputs(n), inputs(k));
        for (n, k) in shapes.into_iter().map(small).collect::<BTreeSet<_>>() {
            let layer = scheme.example(n, k)?;
            let Err(error) = self.convention(&layer).write(&layer, "a layer") else { continue };
            let reason = match error {
                Error::Unsupported { convention, what, .. } => {
                    format!("{convention} cannot hold {what}")
                }
                other => other.to_string(),
            };
            let (method, format) = (&scheme.name, self.name());
            bail!("--format {format} cannot hold what {method} makes: {reason}; lowbit can");
        }
        Ok(())
    }
}
