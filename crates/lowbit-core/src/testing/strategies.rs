//! proptest strategies: what quantization meets, and what it has been got wrong on.
//!
//! Matrices and problems shrink by being cut (to halves, then by single rows and columns), then by
//! having their numbers set to zero and to simple ones. They are not drawn again, so what made a test
//! fail stays. Everything else shrinks toward the simplest of its kind, which comes first in the tables.
//!
//! # Example
//! ```
//! use lowbit_core::testing::{proptest::prelude::*, strategies};
//! use lowbit_core::{Error, QMatrix};
//!
//! proptest! {
//!     fn quantizing_never_panics(
//!         w in strategies::matrices(0..=5, 0..=70),
//!         scheme in strategies::schemes(40),
//!     ) {
//!         match QMatrix::quantize(w.as_ref(), scheme) {
//!             Ok(q) => prop_assert!(q.dequantize().data().iter().all(|w| w.is_finite())),
//!             Err(Error::ScaleOverflow { .. } | Error::ZeroOverflow { .. }) => {}
//!             Err(error) => prop_assert!(false, "{error}"),
//!         }
//!     }
//! }
//! quantizing_never_panics();
//! ```

use alloc::{vec, vec::Vec};
use core::{fmt, ops::RangeInclusive};

use proptest::{
    prelude::{Just, any},
    prop_oneof,
    sample::select,
    strategy::{NewTree, Strategy, ValueTree},
    test_runner::TestRunner,
};

use super::{
    Family, Int8, Int8Problem, LinearProblem,
    int8::random_operands,
    shrink::{Operands, Shrink, ShrinkTree},
};
use lowbit_dtypes::Format;

use crate::{
    ActivationScales, ActivationScheme, ActivationType, Base, Division, Fit, Granularity, Levels,
    Mat, QLinear, QMatrix, QuantScheme, QuantType, Range, Rounding, ScaleFormat, StepFormat,
    SymmetricScale, TwoLevel, ZeroFormat,
};

/// Sizes in a range, mostly those at which tiles, steps and vectors begin and end: 0, 1, powers of two
/// and their neighbours, primes. (An empty range gives its start.)
///
/// # Example
/// ```
/// use lowbit_core::testing::{proptest::prelude::*, strategies};
///
/// proptest! {
///     fn sizes_are_in_the_range(size in strategies::sizes(1..=100)) {
///         prop_assert!((1..=100).contains(&size));
///     }
/// }
/// sizes_are_in_the_range();
/// ```
pub fn sizes(range: RangeInclusive<usize>) -> impl Strategy<Value = usize> {
    let least = *range.start();
    let most = least.max(*range.end());
    let edges = [
        0, 1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 37, 61, 63, 64, 65, 97, 127, 128,
        129, 191, 193, 255, 256, 257, 509, 511, 512, 513, 1021, 1023, 1024, 1025,
    ];
    let mut edges: Vec<usize> = edges.into_iter().filter(|size| range.contains(size)).collect();
    edges.push(most);
    prop_oneof![3 => select(edges), 1 => least..=most]
}

/// Matrices with so many rows and columns, of every [`Family`].
pub fn matrices(
    rows: RangeInclusive<usize>,
    cols: RangeInclusive<usize>,
) -> impl Strategy<Value = Mat<f32>> {
    matrices_of(&Family::ALL, rows, cols)
}

/// Matrices of some families; without any, of [`Family::Normal`].
///
/// # Example
/// ```
/// use lowbit_core::testing::{Family, proptest::prelude::*, strategies};
///
/// const FAMILIES: [Family; 2] = [Family::Positive, Family::Constant];
/// proptest! {
///     fn elements_are_not_zero(w in strategies::matrices_of(&FAMILIES, 3..=3, 0..=20)) {
///         prop_assert_eq!(w.rows(), 3);
///         prop_assert!(w.data().iter().all(|w| *w != 0.0));
///     }
/// }
/// elements_are_not_zero();
/// ```
pub fn matrices_of(
    families: &[Family],
    rows: RangeInclusive<usize>,
    cols: RangeInclusive<usize>,
) -> impl Strategy<Value = Mat<f32>> + use<> {
    let families = families.to_vec();
    Drawn {
        sizes: [rows, cols],
        draw: move |[rows, cols]: [usize; 2], seed| {
            family(&families, seed).matrix(rows, cols, seed)
        },
    }
}

/// One of `families`, as `seed` has it.
fn family(families: &[Family], seed: u64) -> Family {
    let index = seed as usize % families.len().max(1);
    families.get(index).copied().unwrap_or(Family::Normal)
}

/// Integer products with so many rows of `a`, rows of `b`, and columns of both (at most 65793, as
/// [`Int8Problem::new`] wants it).
pub fn int8_problems<A: Int8>(
    m: RangeInclusive<usize>,
    n: RangeInclusive<usize>,
    k: RangeInclusive<usize>,
) -> impl Strategy<Value = Int8Problem<A>> {
    let k = (*k.start()).min(super::int8::MAX_K)..=(*k.end()).min(super::int8::MAX_K);
    let operands = Drawn {
        sizes: [m, n, k],
        draw: |[m, n, k]: [usize; 3], seed| random_operands(m, n, k, seed),
    };
    operands.prop_map(Int8Problem::from_operands)
}

/// Layers and inputs with so many tokens, out_features and in_features: every [`schemes`], with f32 or
/// other activations, with and without a bias. Numbers are such that scales do not overflow.
pub fn linear_problems(
    m: RangeInclusive<usize>,
    n: RangeInclusive<usize>,
    k: RangeInclusive<usize>,
) -> impl Strategy<Value = LinearProblem> {
    let families: Vec<Family> =
        Family::ALL.into_iter().filter(|family| *family != Family::HugeRange).collect();
    let operands = Drawn {
        sizes: [m, n, k],
        draw: move |[m, n, k]: [usize; 3], seed| Operands {
            a: family(&families, seed).matrix(m, k, seed),
            b: family(&families, seed >> 32).matrix(n, k, seed >> 32),
        },
    };
    let activation = proptest::option::of(activation_schemes());
    (operands, schemes(70), activation, any::<bool>()).prop_filter_map(
        "a scale overflows",
        |(Operands { a: x, b: w }, scheme, activation, bias)| {
            let weight = QMatrix::quantize(w.as_ref(), scheme).ok()?;
            let bias = bias.then(|| Family::Extremes.matrix(1, weight.rows(), 1).data().to_vec());
            let layer = QLinear::new(weight).with_activation(activation).with_bias(bias).ok()?;
            LinearProblem::new(layer, x).ok()
        },
    )
}

/// Every granularity, with groups and blocks of at most `most` (and at least one) rows and columns.
pub fn granularities(most: usize) -> impl Strategy<Value = Granularity> {
    let most = most.max(1);
    prop_oneof![
        Just(Granularity::PerTensor),
        Just(Granularity::PerChannel),
        Just(Granularity::PerColumn),
        sizes(1..=most).prop_map(Granularity::PerGroup),
        (sizes(1..=most), sizes(1..=most)).prop_map(|(r, c)| Granularity::PerBlock(r, c)),
    ]
}

/// Every format of a scale.
pub fn scale_formats() -> impl Strategy<Value = ScaleFormat> {
    select(vec![ScaleFormat::F32, ScaleFormat::F16, ScaleFormat::Bf16])
}

/// Every kind of zero.
pub fn zero_formats() -> impl Strategy<Value = ZeroFormat> {
    prop_oneof![
        Just(ZeroFormat::Midpoint),
        Just(ZeroFormat::Int),
        scale_formats().prop_map(ZeroFormat::Real),
        scale_formats().prop_map(ZeroFormat::Offset),
    ]
}

/// Every scheme of integers: 1 to 8 bits, [`granularities`], [`zero_formats`], [`scale_formats`].
pub fn schemes(most: usize) -> impl Strategy<Value = QuantScheme> {
    (1..=8_u8, granularities(most), zero_formats(), scale_formats()).prop_map(
        |(bits, granularity, zero, scale_format)| QuantScheme {
            zero,
            scale_format,
            ..QuantScheme::symmetric(bits, granularity)
        },
    )
}

/// Floats and tables, [`granularities`], and scales in every format, two-level ones included.
pub fn level_schemes(most: usize) -> impl Strategy<Value = QuantScheme> {
    let own = [-3.0, -1.0, 0.0, 0.25, 0.5, 1.0, 2.0, 2.5];
    let mut types = vec![QuantType::NF4, QuantType::AF4, QuantType::FP4_BNB, QuantType::IQ4_NL];
    for count in [2, 4, 8] {
        types.extend(Levels::new(&own[..count]).map(QuantType::Table));
    }
    let small = Format::ALL.iter().filter(|f| f.bits() <= 8 && f.is_signed());
    types.extend(small.map(|format| QuantType::Float(*format)));
    (select(types), granularities(most), all_scale_formats(most)).prop_map(
        |(dtype, granularity, scale_format)| QuantScheme {
            scale_format,
            ..QuantScheme::levels(dtype, granularity)
        },
    )
}

/// [`scale_formats`], E8M0, and two-level scales.
pub fn all_scale_formats(most: usize) -> impl Strategy<Value = ScaleFormat> {
    let codes = prop_oneof![
        (1..=8_u8).prop_map(|bits| QuantType::Int { bits }),
        Just(QuantType::Float(Format::F8E4M3)),
    ];
    let base = select(vec![Base::Zero, Base::Midpoint, Base::Minimum]);
    let format = select(vec![StepFormat::F32, StepFormat::F16, StepFormat::Bf16]);
    let two_level = (codes, granularities(most), base, format).prop_map(
        |(dtype, granularity, base, format)| {
            let base = if matches!(dtype, QuantType::Int { .. }) { base } else { Base::Zero };
            ScaleFormat::TwoLevel(TwoLevel { dtype, granularity, base, format })
        },
    );
    prop_oneof![2 => scale_formats(), 1 => Just(ScaleFormat::E8m0), 2 => two_level]
}

/// Every rounding; those to nearest come first.
pub fn roundings() -> impl Strategy<Value = Rounding> {
    prop_oneof![
        Just(Rounding::NearestEven),
        Just(Rounding::NearestAway),
        Just(Rounding::NearestUp),
        Just(Rounding::Floor),
        Just(Rounding::TowardZero),
        any::<u64>().prop_map(|seed| Rounding::Stochastic { seed }),
    ]
}

/// Every fit: min-max, percentiles of 50 and more, short searches; each with every symmetric scale,
/// [`roundings`] and division.
pub fn fits() -> impl Strategy<Value = Fit> {
    let range = prop_oneof![
        2 => Just(Range::MinMax),
        1 => (50.0..=100.0_f64).prop_map(Range::Percentile),
        1 => (1..=12_u32, 0..12_u32, 0.5..3.0_f32).prop_map(|(grid, left_out, norm)| {
            Range::Search { grid, candidates: grid - left_out.min(grid - 1), norm }
        }),
    ];
    let symmetric = vec![
        SymmetricScale::HalfStep,
        SymmetricScale::Restricted,
        SymmetricScale::Full,
        SymmetricScale::SignedExtreme,
    ];
    let division = vec![Division::Stored, Division::ExactReciprocal];
    (range, select(symmetric), roundings(), select(division)).prop_map(
        |(range, symmetric, rounding, division)| Fit { range, symmetric, rounding, division },
    )
}

/// Dynamic activations: int8, uint8, int16 and E4M3, per token, per group of a token, per tensor.
pub fn activation_schemes() -> impl Strategy<Value = ActivationScheme> {
    let dtypes = vec![
        ActivationType::Int8,
        ActivationType::UInt8,
        ActivationType::Int16,
        ActivationType::Float(lowbit_dtypes::Format::F8E4M3),
    ];
    let scales = prop_oneof![
        Just(ActivationScales::PerToken),
        Just(ActivationScales::PerTensor),
        sizes(1..=70).prop_map(ActivationScales::PerTokenGroup),
    ];
    (select(dtypes), scales).prop_map(|(dtype, scales)| ActivationScheme { dtype, scales })
}

/// Draws sizes, then a value that has them, which shrinks by itself.
#[derive(Clone)]
struct Drawn<const N: usize, F> {
    sizes: [RangeInclusive<usize>; N],
    draw: F,
}

impl<const N: usize, F> fmt::Debug for Drawn<N, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Drawn").field("sizes", &self.sizes).finish_non_exhaustive()
    }
}

impl<T: Shrink, const N: usize, F: Fn([usize; N], u64) -> T> Strategy for Drawn<N, F> {
    type Tree = ShrinkTree<T>;
    type Value = T;

    fn new_tree(&self, runner: &mut TestRunner) -> NewTree<Self> {
        let mut drawn = [0; N];
        for (drawn, range) in drawn.iter_mut().zip(&self.sizes) {
            *drawn = sizes(range.clone()).new_tree(runner)?.current();
        }
        let least = self.sizes.iter().map(|range| *range.start()).collect();
        let seed = any::<u64>().new_tree(runner)?.current();
        Ok(ShrinkTree::new((self.draw)(drawn, seed), least))
    }
}
