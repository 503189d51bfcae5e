use lowbit_core::{
    ActivationScales, ActivationScheme, ActivationType,
    Granularity::{PerChannel, PerGroup},
    QuantScheme, QuantType, ScaleFormat, TwoLevel, ZeroFormat,
};

use crate::{
    Alpha, Awq, ChannelScale, Gptq, LlmInt8, OutlierRule, Quantizer, Recipe, Rtn, SmoothQuant, Spqr,
};

/// A method under the name by which commands and reports know it.
#[derive(Clone, Copy)]
pub struct Method {
    /// Scheme first, then what is special about it: `int4-g32-zp`.
    pub name: &'static str,
    /// One line for people.
    pub about: &'static str,
    /// What it does.
    pub quantizer: Recipe<'static>,
}

impl Method {
    /// The method called `name`.
    ///
    /// # Example
    /// ```
    /// use lowbit_algorithms::Method;
    ///
    /// assert!(Method::named("int4-g32").is_some());
    /// assert!(Method::named("int9").is_none());
    /// ```
    pub fn named(name: &str) -> Option<&'static Self> {
        METHODS.iter().find(|method| method.name == name)
    }

    const fn new(
        name: &'static str,
        about: &'static str,
        quantizer: &'static dyn Quantizer,
    ) -> Self {
        Self::composed(name, about, Recipe::rounding(quantizer))
    }

    const fn composed(name: &'static str, about: &'static str, quantizer: Recipe<'static>) -> Self {
        Self { name, about, quantizer }
    }
}

/// Every method there is, in the order of tables. A new one registers itself by a line here.
pub const METHODS: &[Method] = &[
    Method::new("int8", "8 bits, a scale per channel", &symmetric(8, PerChannel)),
    Method::new("int8-zp", "8 bits, scale and zero-point per channel", &affine(8, PerChannel)),
    Method::composed("w8a8", "8 bits per channel, int8 activations per token", Recipe::W8A8),
    Method::composed("llm-int8", "as w8a8, features of 6 and more in f16", Recipe::LLM_INT8),
    Method::composed(
        "llm-int8-bnb",
        "as w8a8, inputs of 6 and more in f32 by int8 weights",
        Recipe { outliers: Some(LlmInt8::BITSANDBYTES), ..Recipe::W8A8 },
    ),
    Method::composed("smoothquant", "w8a8 behind scales, alpha 0.5", Recipe::SMOOTHQUANT),
    Method::composed(
        "smoothquant-auto",
        "w8a8 behind scales, alpha searched for each input",
        Recipe { scale: Some(SMOOTH_AUTO), ..Recipe::W8A8 },
    ),
    Method::composed(
        "smoothquant-rot",
        "w8a8 behind scales and a rotation",
        Recipe { rotation: Some(1), ..Recipe::SMOOTHQUANT },
    ),
    Method::composed(
        "smoothquant-rot-gptq",
        "smoothquant-rot with error feedback",
        SMOOTH_ROT_GPTQ,
    ),
    Method::composed(
        "smoothquant-rot-gptq-tensor",
        "the same, a scale for a whole text",
        tensor(SMOOTH_ROT_GPTQ),
    ),
    Method::composed(
        "w8a8-rot",
        "w8a8 behind a rotation",
        Recipe { rotation: Some(1), ..Recipe::W8A8 },
    ),
    Method::composed("w8a8-tensor", "as w8a8, a scale for a whole text", tensor(Recipe::W8A8)),
    Method::composed(
        "llm-int8-tensor",
        "llm-int8, a scale for a whole text",
        tensor(Recipe::LLM_INT8),
    ),
    Method::composed(
        "smoothquant-tensor",
        "smoothquant, a scale for a whole text",
        tensor(Recipe::SMOOTHQUANT),
    ),
    Method::new("int4", "4 bits, a scale per channel", &symmetric(4, PerChannel)),
    Method::new("int4-zp", "4 bits, scale and zero-point per channel", &affine(4, PerChannel)),
    Method::new("int4-g128", "4 bits, groups of 128", &symmetric(4, PerGroup(128))),
    Method::new("int4-g128-zp", "4 bits, groups of 128, zero-points", &affine(4, PerGroup(128))),
    Method::new("int4-g32", "4 bits, groups of 32", &symmetric(4, PerGroup(32))),
    Method::new("int4-g32-is4", "int4-g32, scales are integers of 4 bits", &INT4_G32_IS4),
    Method::new("int4-g32-zp", "4 bits, groups of 32, zero-points", &affine(4, PerGroup(32))),
    Method::composed(
        "w4a8-g32-is4",
        "int4-g32-is4, int8 activations per token",
        Recipe {
            activation: Some(ActivationScheme::INT8_PER_TOKEN),
            ..Recipe::rounding(&INT4_G32_IS4)
        },
    ),
    Method::composed(
        "awq-g32",
        "int4-g32-zp behind searched scales",
        Recipe { scale: Some(ChannelScale::Awq(AWQ)), ..Recipe::rounding(&INT4_G32_ZP) },
    ),
    Method::composed(
        "awq-clip-g32",
        "awq-g32, weights cut to searched bounds",
        Recipe {
            scale: Some(ChannelScale::Awq(AWQ)),
            clip: Some(AWQ),
            ..Recipe::rounding(&INT4_G32_ZP)
        },
    ),
    Method::composed(
        "smooth-int4-g32",
        "int4-g32-zp behind SmoothQuant's scales",
        Recipe { scale: Recipe::SMOOTHQUANT.scale, ..Recipe::rounding(&INT4_G32_ZP) },
    ),
    Method::composed(
        "awq-gptq-g32",
        "GPTQ, int4-g32-zp behind searched scales",
        Recipe {
            scale: Some(ChannelScale::Awq(AWQ)),
            ..Recipe::rounding(&Gptq::new(INT4_G32_ZP.scheme))
        },
    ),
    Method::new("int3-g32", "3 bits, groups of 32", &symmetric(3, PerGroup(32))),
    Method::new("int3-g32-zp", "3 bits, groups of 32, zero-points", &affine(3, PerGroup(32))),
    Method::new("int2-g32", "2 bits, groups of 32", &symmetric(2, PerGroup(32))),
    Method::new("int2-g32-zp", "2 bits, groups of 32, zero-points", &affine(2, PerGroup(32))),
    Method::new("gptq-int4-g128", "GPTQ, int4-g128", &gptq(symmetric(4, PerGroup(128)))),
    Method::new("gptq-int4-g128-zp", "GPTQ, int4-g128-zp", &gptq(affine(4, PerGroup(128)))),
    Method::new("gptq-int4-g32", "GPTQ, int4-g32", &gptq(symmetric(4, PerGroup(32)))),
    Method::new("gptq-int4-g32-is4", "GPTQ, int4-g32-is4", &gptq(INT4_G32_IS4)),
    Method::new("gptq-int4-g32-zp", "GPTQ, int4-g32-zp", &gptq(affine(4, PerGroup(32)))),
    Method::new("gptq-int3-g32-zp", "GPTQ, int3-g32-zp", &gptq(affine(3, PerGroup(32)))),
    Method::new("best-int4-g32-is4", "GPTQ improved, int4-g32-is4", &best(INT4_G32_IS4)),
    Method::new("best-int4-g32-zp", "GPTQ improved, int4-g32-zp", &best(affine(4, PerGroup(32)))),
    Method::new("best-int3-g32-zp", "GPTQ improved, int3-g32-zp", &best(affine(3, PerGroup(32)))),
    Method::new("best-int5-g24", "GPTQ improved, 5 bits, two-level g24", &two_level(5, 24)),
    Method::new("best-int4-g16", "GPTQ improved, 4 bits, two-level g16", &two_level(4, 16)),
    Method::new("best-int3-g16", "GPTQ improved, 3 bits, two-level g16", &two_level(3, 16)),
    Method::new("spqr-int4-g16", "SpQR, 4 bits, 1 % of outliers", &spqr(4)),
    Method::new("spqr-int3-g16", "SpQR, 3 bits, 1 % of outliers", &spqr(3)),
    Method::new(
        "best-l16",
        "GPTQ improved, 16 levels, two-level g32",
        &table(QuantType::LLOYD_MAX16),
    ),
    Method::new("best-l8", "GPTQ improved, 8 levels, two-level g32", &table(QuantType::LLOYD_MAX8)),
    Method::new("best-l4", "GPTQ improved, 4 levels, two-level g32", &table(QuantType::LLOYD_MAX4)),
];

const fn gptq(rtn: Rtn) -> Gptq {
    Gptq::new(rtn.scheme)
}

const fn best(rtn: Rtn) -> Gptq {
    Gptq::improved(rtn.scheme)
}

/// Scales, and zeros, of 4 bits over an f16 step and minimum of 16 rows.
const BILEVEL: ScaleFormat = ScaleFormat::TwoLevel(TwoLevel::BILEVEL4);

/// Integers with real zeros.
const fn two_level(bits: u8, group_size: usize) -> Gptq {
    Gptq::improved(QuantScheme {
        zero: ZeroFormat::Real(BILEVEL),
        scale_format: BILEVEL,
        ..QuantScheme::affine(bits, PerGroup(group_size))
    })
}

const fn spqr(bits: u8) -> Spqr {
    Spqr { outliers: OutlierRule::Share(0.01), ..Spqr::new(bits) }
}

const fn table(levels: QuantType) -> Gptq {
    Gptq::improved(QuantScheme {
        scale_format: BILEVEL,
        ..QuantScheme::levels(levels, PerGroup(32))
    })
}

/// Products of codes and scales fit int8: [`QuantScheme::has_integer_scales`].
const INT4_G32_IS4: Rtn = Rtn::new(QuantScheme {
    scale_format: ScaleFormat::TwoLevel(TwoLevel::integer(4)),
    ..QuantScheme::symmetric(4, PerGroup(32))
});
const INT4_G32_ZP: Rtn = affine(4, PerGroup(32));
const AWQ: Awq = Awq { scheme: INT4_G32_ZP.scheme, fit: INT4_G32_ZP.fit };
const SMOOTH_AUTO: ChannelScale = ChannelScale::SmoothQuant(SmoothQuant { alpha: Alpha::Searched });

const SMOOTH_ROT_GPTQ: Recipe<'static> = Recipe {
    rotation: Some(1),
    rounding: &Gptq { fit: Recipe::INT8.fit, ..Gptq::new(Recipe::INT8.scheme) },
    ..Recipe::SMOOTHQUANT
};

/// With a scale for activations that the whole input of a layer shares.
const fn tensor(recipe: Recipe<'static>) -> Recipe<'static> {
    Recipe {
        activation: Some(ActivationScheme {
            dtype: ActivationType::Int8,
            scales: ActivationScales::PerTensor,
        }),
        ..recipe
    }
}

const fn symmetric(bits: u8, granularity: lowbit_core::Granularity) -> Rtn {
    Rtn::new(QuantScheme::symmetric(bits, granularity))
}

const fn affine(bits: u8, granularity: lowbit_core::Granularity) -> Rtn {
    Rtn::new(QuantScheme::affine(bits, granularity))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        for (i, method) in METHODS.iter().enumerate() {
            assert!(METHODS[..i].iter().all(|other| other.name != method.name), "{}", method.name);
        }
    }
}
