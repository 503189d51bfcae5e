use lowbit_core::{
    ActivationScheme,
    Granularity::{PerChannel, PerGroup},
    QuantScheme,
};

use crate::{LlmInt8, Quantizer, Rtn};

/// A method under the name by which commands and reports know it.
#[derive(Clone, Copy)]
pub struct Method {
    /// Scheme first, then what is special about it: `int4-g32-zp`.
    pub name: &'static str,
    /// One line for people.
    pub about: &'static str,
    /// The quantizer with its default settings.
    pub quantizer: &'static dyn Quantizer,
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
        Self { name, about, quantizer }
    }
}

/// Every method there is, in the order of tables. A new one registers itself by a line here.
pub const METHODS: &[Method] = &[
    Method::new("int8", "8 bits, a scale per channel", &symmetric(8, PerChannel)),
    Method::new("int8-zp", "8 bits, scale and zero-point per channel", &affine(8, PerChannel)),
    Method::new("w8a8", "8 bits per channel, int8 activations per token", &W8A8),
    Method::new("llm-int8", "as w8a8, outliers of 6 and more in f32", &LlmInt8::PAPER),
    Method::new("int4", "4 bits, a scale per channel", &symmetric(4, PerChannel)),
    Method::new("int4-zp", "4 bits, scale and zero-point per channel", &affine(4, PerChannel)),
    Method::new("int4-g128", "4 bits, groups of 128", &symmetric(4, PerGroup(128))),
    Method::new("int4-g128-zp", "4 bits, groups of 128, zero-points", &affine(4, PerGroup(128))),
    Method::new("int4-g32", "4 bits, groups of 32", &symmetric(4, PerGroup(32))),
    Method::new("int4-g32-zp", "4 bits, groups of 32, zero-points", &affine(4, PerGroup(32))),
    Method::new("int3-g32", "3 bits, groups of 32", &symmetric(3, PerGroup(32))),
    Method::new("int3-g32-zp", "3 bits, groups of 32, zero-points", &affine(3, PerGroup(32))),
    Method::new("int2-g32", "2 bits, groups of 32", &symmetric(2, PerGroup(32))),
    Method::new("int2-g32-zp", "2 bits, groups of 32, zero-points", &affine(2, PerGroup(32))),
];

const W8A8: Rtn =
    Rtn { activation: Some(ActivationScheme::INT8_PER_TOKEN), ..symmetric(8, PerChannel) };

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
