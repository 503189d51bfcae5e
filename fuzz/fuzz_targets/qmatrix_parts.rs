//! Any bytes either make a matrix whose every accessor works, or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lowbit::{Granularity, QMatrix, QuantScheme};

type Input<'a> = (u16, u16, u8, u8, u8, u8, &'a [u8], &'a [u8], Option<&'a [u8]>);

fuzz_target!(|input: Input<'_>| {
    let (rows, cols, bits, granularity, a, b, codes, scales, zeros) = input;
    let granularity = match granularity % 5 {
        0 => Granularity::PerTensor,
        1 => Granularity::PerChannel,
        2 => Granularity::PerColumn,
        3 => Granularity::PerGroup(a.into()),
        _ => Granularity::PerBlock(a.into(), b.into()),
    };
    let scheme = match zeros {
        None => QuantScheme::symmetric(bits, granularity),
        Some(_) => QuantScheme::affine(bits, granularity),
    };
    if let Ok(q) = QMatrix::from_parts(rows.into(), cols.into(), scheme, codes, scales, zeros) {
        assert_eq!(q.dequantize().rows(), q.rows());
        assert_eq!(q.bytes(), codes.len() + scales.len() + zeros.map_or(0, <[u8]>::len));
    }
});
