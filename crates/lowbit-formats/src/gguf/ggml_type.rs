use std::fmt;

use crate::Dtype;

/// A tensor type of ggml by its number in the file: the block formats, and those that this crate
/// does not know.
///
/// Plain types such as F16 are [`Dtype`]s of their own.
///
/// # Example
/// ```
/// use lowbit_formats::gguf::GgmlType;
///
/// assert_eq!(GgmlType::Q4_K.to_string(), "Q4_K");
/// assert_eq!(GgmlType::Q4_K.block(), Some((256, 144))); // weights, bytes
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GgmlType(u32);

macro_rules! types {
    ($($name:ident $id:literal $weights:literal $bytes:literal;)+) => {
        #[allow(missing_docs, reason = "their names say it all")]
        impl GgmlType {
            $(pub const $name: Self = Self($id);)+
        }

        /// Number, name, weights and bytes of a block.
        const TYPES: &[(u32, &str, usize, usize)] = &[$(($id, stringify!($name), $weights, $bytes)),+];
    };
}

types! {
    Q4_0 2 32 18;
    Q4_1 3 32 20;
    Q5_0 6 32 22;
    Q5_1 7 32 24;
    Q8_0 8 32 34;
    Q8_1 9 32 36;
    Q2_K 10 256 84;
    Q3_K 11 256 110;
    Q4_K 12 256 144;
    Q5_K 13 256 176;
    Q6_K 14 256 210;
    Q8_K 15 256 292;
    IQ2_XXS 16 256 66;
    IQ2_XS 17 256 74;
    IQ3_XXS 18 256 98;
    IQ1_S 19 256 50;
    IQ4_NL 20 32 18;
    IQ3_S 21 256 110;
    IQ2_S 22 256 82;
    IQ4_XS 23 256 136;
    IQ1_M 29 256 56;
    TQ1_0 34 256 54;
    TQ2_0 35 256 66;
    MXFP4 39 32 17;
    NVFP4 40 64 36;
    Q1_0 41 128 18;
    Q2_0 42 64 18;
}

/// Types that ggml once had; their numbers are not given again.
const REMOVED: &[(u32, &str)] = &[
    (4, "Q4_2"),
    (5, "Q4_3"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (36, "IQ4_NL_4_4"),
    (37, "IQ4_NL_4_8"),
    (38, "IQ4_NL_8_8"),
];

impl GgmlType {
    /// The number in the file.
    pub const fn id(self) -> u32 {
        self.0
    }

    /// The weights of a block and its bytes; `None` for a type that this crate does not know.
    pub fn block(self) -> Option<(usize, usize)> {
        TYPES.iter().find(|t| t.0 == self.0).map(|t| (t.2, t.3))
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = self.0;
        if let Some((_, name, ..)) = TYPES.iter().find(|t| t.0 == id) {
            return f.write_str(name);
        }
        match REMOVED.iter().find(|(removed, _)| *removed == id) {
            Some((_, name)) => write!(f, "{name} (ggml type {id}, removed from ggml)"),
            None => write!(f, "of the unknown ggml type {id}"),
        }
    }
}

/// The plain types.
const PLAIN: &[(u32, Dtype)] = &[
    (0, Dtype::F32),
    (1, Dtype::F16),
    (24, Dtype::I8),
    (25, Dtype::Other("I16")),
    (26, Dtype::I32),
    (27, Dtype::I64),
    (28, Dtype::Other("F64")),
    (30, Dtype::Bf16),
];

pub(super) fn dtype(id: u32) -> Dtype {
    let plain = PLAIN.iter().find(|(plain, _)| *plain == id);
    plain.map_or(Dtype::Ggml(GgmlType(id)), |&(_, dtype)| dtype)
}

/// The number of `dtype` in a GGUF file, if it has one.
pub(super) fn id(dtype: Dtype) -> Option<u32> {
    match dtype {
        Dtype::Ggml(GgmlType(id)) => Some(id),
        _ => PLAIN.iter().find(|(_, plain)| *plain == dtype).map(|(id, _)| *id),
    }
}
