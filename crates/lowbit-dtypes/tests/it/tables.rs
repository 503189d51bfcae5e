//! Tables of 16 levels against the published values and against bitsandbytes' way to code with them.

use crate::reference::csv_values;
use lowbit_dtypes::*;
use proptest::prelude::*;

const TABLES: [(&str, Table16); 4] = [
    ("NF4", Table16::NF4),
    ("AF4", Table16::AF4),
    ("FP4", Table16::FP4_BNB),
    ("IQ4_NL", Table16::IQ4_NL),
];

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

#[test]
fn levels_are_the_published_ones() {
    for (table, csv) in [
        (Table16::NF4, include_str!("../data/tables/nf4.csv")),
        (Table16::AF4, include_str!("../data/tables/af4_block64.csv")),
        (Table16::FP4_BNB, include_str!("../data/tables/fp4_bitsandbytes.csv")),
        (Table16::IQ4_NL, include_str!("../data/tables/kvalues_iq4nl.csv")),
    ] {
        let values: Vec<f32> = csv_values(csv).iter().map(|&v| v as f32).collect();
        for (code, (level, value)) in table.levels().iter().zip(values).enumerate() {
            assert_eq!(level.to_bits(), value.to_bits(), "code {code}: {level} {value}");
        }
    }
}

#[test]
fn zero_has_a_code_where_the_definition_has_one() {
    assert_eq!(Table16::NF4.level(Table16::NF4.code(0.0)).to_bits(), 0);
    assert_eq!(Table16::AF4.level(Table16::AF4.code(0.0)).to_bits(), 0);
    assert_eq!((Table16::FP4_BNB.code(0.0), Table16::FP4_BNB.code(-0.0)), (0, 0));
    assert_eq!(Table16::FP4_BNB.code(-f32::from_bits(1)), 8);
    assert_eq!(Table16::IQ4_NL.level(Table16::IQ4_NL.code(0.0)), 1.0); // it has none
}

#[test]
fn nf4_thresholds_are_those_of_bitsandbytes_and_belong_to_the_lower_level() {
    let csv = include_str!("../data/tables/nf4.csv");
    for (code, line) in csv.lines().skip(1).take(15).enumerate() {
        // By way of f64: 17 digits tell the f64 midpoint, which may be a tie between two f32.
        let threshold = line.rsplit(',').next().unwrap().parse::<f64>().unwrap() as f32;
        assert_eq!(usize::from(Table16::NF4.code(threshold)), code);
        assert_eq!(usize::from(Table16::NF4.code(threshold.next_up())), code + 1);
    }
}

#[test]
fn nf4_from_quantiles_is_the_construction_and_differs_from_the_constants_as_documented() {
    let built = nf4_from_quantiles();
    let csv = include_str!("../data/tables/nf4.csv");
    for (code, line) in csv.lines().skip(1).enumerate() {
        let scipy: f64 = line.split(',').nth(2).unwrap().parse().unwrap();
        assert!((built[code] - scipy).abs() < 1e-14, "{code}: {} {scipy}", built[code]);
        let published = f64::from(Table16::NF4.levels()[code]);
        let difference = (built[code] - published).abs();
        assert!(difference < 1.1e-7, "{code}: {difference:e}");
        let same = built[code] as f32 == Table16::NF4.levels()[code];
        assert_eq!(same, [0, 2, 3, 5, 7, 15].contains(&code), "{code}");
        assert!(same || difference > 8e-9);
    }
}

#[test]
fn blocks_quantize_as_the_golden_vectors_do() {
    let w = f32s(include_bytes!("../data/nf4_w.f32"));
    let absmax = f32s(include_bytes!("../data/nf4_b64.absmax"));
    let mut scales = vec![0.0; absmax.len()];
    let mut codes = vec![0; w.len()];
    for isa in Isa::available() {
        let mut golden = |table: Table16, expected: &[u8], name: &str| {
            table.quantize_on(isa, 64, &w, &mut scales, &mut codes).unwrap();
            assert_eq!(scales, absmax);
            for (i, (got, expected)) in codes.iter().zip(expected).enumerate() {
                assert_eq!(got, expected, "{name} {i}: {}", w[i] / absmax[i / 64]);
            }
        };
        golden(Table16::FP4_BNB, include_bytes!("../data/fp4_b64.codes"), "FP4");
        golden(Table16::AF4, include_bytes!("../data/af4_b64.codes"), "AF4");
        golden(Table16::NF4, include_bytes!("../data/nf4_b64.codes"), "NF4");
        let mut packed = vec![0; codes.len() / 2];
        NibbleOrder::HighFirst.pack(&codes, &mut packed).unwrap();
        assert_eq!(packed, include_bytes!("../data/nf4_b64.packed"));
        let mut back = vec![0.0; w.len()];
        Table16::NF4.dequantize_on(isa, 64, &scales, &codes, &mut back).unwrap();
        assert_eq!(back[..2048], f32s(include_bytes!("../data/nf4_b64.deq")));
    }
}

/// Every f16 as input, and both neighbours of every point halfway between two levels.
#[test]
fn every_set_finds_the_nearest_level() {
    for (name, table) in TABLES {
        let mut x: Vec<f32> = (0..=u16::MAX).map(|b| f16::from_bits(b).to_f32()).collect();
        for a in table.levels() {
            for b in table.levels() {
                let middle = (a + b) / 2.0;
                x.extend([middle, middle.next_up(), middle.next_down()]);
            }
        }
        let mut codes = vec![0; x.len()];
        for isa in Isa::available() {
            table.encode_slice_on(isa, &x, &mut codes).unwrap();
            for (&x, &code) in x.iter().zip(&codes) {
                if x.is_nan() {
                    let lowest = table.levels().iter().position(|&l| l == -table.reach());
                    assert_eq!(Some(usize::from(code)), lowest);
                    continue;
                }
                let distance = |l: f32| (f64::from(l) - f64::from(x)).abs();
                let got = distance(table.level(code));
                let best =
                    table.levels().iter().map(|&l| distance(l)).fold(f64::INFINITY, f64::min);
                // The decimals of bitsandbytes' FP4 thresholds are off by up to 4e-7.
                let slack = if name == "FP4" { 1e-6 } else { 1e-7 * f64::from(table.reach()) };
                assert!(got <= best + slack, "{name} {x} {code} {}", isa.name());
            }
        }
    }
}

#[test]
fn a_table_of_ones_own_may_be_in_any_order_but_must_be_finite() {
    let mut levels: [f32; 16] = core::array::from_fn(|i| ((i * 7) % 16) as f32);
    let table = Table16::new(levels).unwrap();
    for code in 0..16 {
        assert_eq!(table.code(table.level(code)), code);
    }
    assert_eq!(table.level(table.code(3.5)), 3.0); // a tie goes down
    assert_eq!(table.reach(), 15.0);
    levels[3] = f32::NAN;
    assert!(matches!(Table16::new(levels), Err(Error::Level { code: 3, value }) if value.is_nan()));
    let same = Table16::new([2.0; 16]).unwrap();
    assert_eq!(same.code(5.0), 0);
    let zero = Table16::new([0.0; 16]).unwrap();
    let (mut scales, mut codes) = ([9.0; 1], [9; 2]);
    zero.quantize(2, &[1.0, -1.0], &mut scales, &mut codes).unwrap();
    assert!(scales[0].is_finite());
}

#[test]
fn blocks_that_cannot_be_quantized_are_errors() {
    let table = Table16::NF4;
    let mut scales = [5.0; 2];
    let mut codes = [5; 6];
    assert_eq!(
        table.quantize(0, &[1.0; 6], &mut scales, &mut codes),
        Err(Error::Block { block: 0, got: 6 })
    );
    assert_eq!(
        table.quantize(4, &[1.0; 9], &mut scales, &mut codes),
        Err(Error::Length { what: "scales", expected: 3, got: 2 })
    );
    assert_eq!(
        table.quantize(4, &[1.0; 7], &mut scales, &mut codes),
        Err(Error::Length { what: "codes", expected: 7, got: 6 })
    );
    assert_eq!((scales, codes), ([5.0; 2], [5; 6]));
    let x = [1.0, 2.0, 3.0, 4.0, f32::INFINITY, f32::NAN];
    assert_eq!(
        table.quantize(4, &x, &mut scales, &mut codes),
        Err(Error::NotFinite { value: f32::INFINITY, index: 4 })
    );
    assert_eq!(
        table.dequantize(4, &[1.0], &codes, &mut [0.0; 6]),
        Err(Error::Length { what: "scales", expected: 2, got: 1 })
    );
}

/// Tables with levels far apart, close together, next to each other and equal, in any order and of any size.
fn any_table() -> impl Strategy<Value = Table16> {
    let level = prop_oneof![-1f32..1.0, -1e-3f32..1e-3, (-4i32..4).prop_map(|i| i as f32 / 4.0)];
    let unit = prop_oneof![Just(1f32), Just(127.0), Just(1e-42), Just(1e-38), Just(f32::MAX)];
    let neighbours = proptest::collection::vec(any::<bool>(), 16);
    (proptest::array::uniform16(level), unit, neighbours).prop_map(|(mut levels, unit, next)| {
        for i in 0..16 {
            levels[i] = if next[i] && i > 0 { levels[i - 1].next_up() } else { levels[i] * unit };
        }
        Table16::new(levels).unwrap()
    })
}

proptest! {
    #[test]
    fn any_table_finds_the_nearest_level_on_every_set(
        table in any_table(), bits in proptest::collection::vec(any::<u32>(), 100),
    ) {
        let mut x: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
        for a in table.levels() {
            for b in table.levels() {
                let middle = ((f64::from(*a) + f64::from(*b)) / 2.0) as f32;
                x.extend([middle, middle.next_up(), middle.next_down()]);
            }
        }
        let alone: Vec<u8> = x.iter().map(|&x| table.code(x)).collect();
        for (&x, &code) in x.iter().zip(&alone) {
            if x.is_nan() {
                continue;
            }
            let distance = |l: f32| (f64::from(l) - f64::from(x)).abs();
            let levels = table.levels().iter();
            let best = levels.clone().map(|&l| distance(l)).fold(f64::INFINITY, f64::min);
            // A threshold is half a unit of its last place from the middle at most.
            let slack = f64::from(x.abs()) * 2f64.powi(-23) + 2f64.powi(-149);
            let got = distance(table.level(code));
            prop_assert!(got == best || got <= best + slack, "{} {} {:?}", x, code, table);
            if best == 0.0 {
                prop_assert_eq!(table.level(code), x);
            }
            let first = levels.clone().position(|&l| l == table.level(code));
            prop_assert_eq!(Some(usize::from(code)), first);
        }
        let max = x.iter().filter(|x| x.is_finite()).fold(0f32, |m, x| m.max(x.abs()));
        let finite: Vec<f32> = x.iter().map(|x| if x.is_finite() { *x } else { max }).collect();
        let mut expected = (vec![0.0; x.len().div_ceil(24)], vec![0; x.len()]);
        for isa in Isa::available() {
            let mut codes = vec![0; x.len()];
            table.encode_slice_on(isa, &x, &mut codes).unwrap();
            prop_assert_eq!(&codes, &alone, "{}", isa.name());
            let mut got = expected.clone();
            table.quantize_on(isa, 24, &finite, &mut got.0, &mut got.1).unwrap();
            if Some(isa) == Isa::available().next() {
                expected = got;
            } else {
                prop_assert_eq!(&got, &expected, "{}", isa.name());
            }
        }
    }

    #[test]
    fn a_quantized_block_is_within_half_a_gap_of_its_maximum(
        x in proptest::collection::vec(-1e30f32..1e30, 1..200), block in 1usize..100,
    ) {
        let mut scales = vec![0.0; x.len().div_ceil(block)];
        let mut codes = vec![0; x.len()];
        let mut back = vec![0.0; x.len()];
        for (name, table) in TABLES {
            table.quantize(block, &x, &mut scales, &mut codes).unwrap();
            table.dequantize(block, &scales, &codes, &mut back).unwrap();
            let mut sorted = *table.levels();
            sorted.sort_by(f32::total_cmp);
            let gap = sorted.windows(2).map(|p| p[1] - p[0]).fold(table.reach() - sorted[15], f32::max);
            for (i, (&x, &y)) in x.iter().zip(&back).enumerate() {
                let scale = scales[i / block];
                prop_assert!((x - y).abs() <= scale * gap * 1.001, "{} {} {}", name, x, y);
            }
        }
    }
}
