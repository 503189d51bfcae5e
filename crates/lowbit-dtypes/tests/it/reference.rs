//! A slow exact model of rounding to a small float. It shares nothing with the codec: it knows a format as the list
//! of its non-negative finite numbers, and decides by comparing with exact midpoints in f64.

#![allow(dead_code, reason = "the tests and the sweep each use a part")]

use lowbit_dtypes::{Overflow, Rounding};

/// Codes are u32 here so that the same model serves f16, bf16 and TF32.
pub(crate) struct Reference {
    pub(crate) name: &'static str,
    /// The numbers of codes 0, 1, 2, …, ascending.
    pub(crate) values: Vec<f64>,
    /// The number that would come next.
    pub(crate) next: f64,
    /// Ties go up where there is no fraction bit to be even.
    pub(crate) has_fraction: bool,
    pub(crate) sign_bit: u32,
    pub(crate) overflow: u32,
    pub(crate) nan: [u32; 2],
    pub(crate) kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Kind {
    Signed,
    UnsignedZero,
    Scale,
}

impl Reference {
    /// The formats of 8 bits and fewer, from the tables of ml_dtypes (E3M0: of this project).
    pub(crate) fn small() -> Vec<Self> {
        let none = 0;
        let table = |name, csv: &str, sign_bit: u32, overflow, nan: [u32; 2], kind| {
            let all: Vec<f64> = csv_values(csv);
            let values: Vec<f64> =
                all.iter().take_while(|v| v.is_finite()).take(sign_bit as usize).copied().collect();
            assert!(values.is_sorted_by(|a, b| a < b), "{name}");
            let n = values.len();
            // Within a binade numbers are evenly spaced; powers of two double.
            let has_fraction = values[n - 1] != 2.0 * values[n - 2];
            let next = if has_fraction {
                2.0 * values[n - 1] - values[n - 2]
            } else {
                2.0 * values[n - 1]
            };
            Self { name, values, next, has_fraction, sign_bit, overflow, nan, kind }
        };
        use Kind::*;
        macro_rules! csv {
            ($name:literal) => {
                include_str!(concat!("../data/tables/", $name, ".csv"))
            };
        }
        vec![
            table("float8_e4m3fn", csv!("float8_e4m3fn"), 128, 0x7f, [0x7f, 0xff], Signed),
            table("float8_e4m3", csv!("float8_e4m3"), 128, 0x78, [0x7c, 0xfc], Signed),
            table("float8_e5m2", csv!("float8_e5m2"), 128, 0x7c, [0x7e, 0xfe], Signed),
            table("float8_e4m3fnuz", csv!("float8_e4m3fnuz"), 128, 0x80, [0x80; 2], UnsignedZero),
            table("float8_e5m2fnuz", csv!("float8_e5m2fnuz"), 128, 0x80, [0x80; 2], UnsignedZero),
            table(
                "float8_e4m3b11fnuz",
                csv!("float8_e4m3b11fnuz"),
                128,
                0x80,
                [0x80; 2],
                UnsignedZero,
            ),
            table("float8_e3m4", csv!("float8_e3m4"), 128, 0x70, [0x78, 0xf8], Signed),
            table("float8_e8m0fnu", csv!("float8_e8m0fnu"), 256, 0xff, [0xff; 2], Scale),
            table("float6_e2m3fn", csv!("float6_e2m3fn"), 32, 0x1f, [none; 2], Signed),
            table("float6_e3m2fn", csv!("float6_e3m2fn"), 32, 0x1f, [none; 2], Signed),
            table("float4_e2m1fn", csv!("float4_e2m1fn"), 8, 7, [none; 2], Signed),
            table("float4_e3m0", csv!("fp4_e3m0_convention"), 8, 7, [none; 2], Signed),
        ]
    }

    /// f16, bf16 and TF32 by the formula of IEEE 754.
    pub(crate) fn ieee(name: &'static str, exponent_bits: u32, fraction_bits: u32) -> Self {
        let bias = (1 << (exponent_bits - 1)) - 1;
        let infinity = ((1u32 << exponent_bits) - 1) << fraction_bits;
        let one = f64::from(1u32 << fraction_bits);
        let value = |code: u32| {
            let (e, f) = (code >> fraction_bits, f64::from(code & ((1 << fraction_bits) - 1)));
            if e == 0 {
                f / one * 2f64.powi(1 - bias)
            } else {
                (1.0 + f / one) * 2f64.powi(e as i32 - bias)
            }
        };
        let nan = infinity | 1 << (fraction_bits - 1);
        let sign_bit = 1 << (exponent_bits + fraction_bits);
        Self {
            name,
            values: (0..infinity).map(value).collect(),
            next: value(infinity),
            has_fraction: true,
            sign_bit,
            overflow: infinity,
            nan: [nan, nan | sign_bit],
            kind: Kind::Signed,
        }
    }

    pub(crate) fn encode(&self, x: f64, rounding: Rounding, overflow: Overflow) -> u32 {
        if x.is_nan() {
            return self.nan[usize::from(x.is_sign_negative())];
        }
        let negative = x.is_sign_negative();
        let max = self.values.len() - 1;
        if self.kind == Kind::Scale && (x <= 0.0) {
            return if overflow == Overflow::Saturate { 0 } else { self.overflow };
        }
        let a = x.abs();
        let code = if a == f64::INFINITY { max + 1 } else { self.magnitude(a, rounding) };
        let code = match overflow {
            _ if code <= max => code as u32,
            Overflow::Saturate => max as u32,
            Overflow::Infinity => self.overflow,
        };
        match self.kind {
            Kind::Signed if negative => code | self.sign_bit,
            Kind::UnsignedZero if negative && code != 0 => code | self.sign_bit,
            _ => code,
        }
    }

    /// The number of a finite code; infinity for the others.
    pub(crate) fn value(&self, code: u32) -> f64 {
        let sign = if code & self.sign_bit != 0 && self.kind != Kind::Scale { -1.0 } else { 1.0 };
        let magnitude = if self.kind == Kind::Scale { code } else { code & !self.sign_bit };
        self.values.get(magnitude as usize).map_or(f64::INFINITY, |v| sign * v)
    }

    /// May be one more than the largest code, or any other larger number.
    fn magnitude(&self, a: f64, rounding: Rounding) -> usize {
        let n = self.values.len();
        let low = self.values.partition_point(|&v| v <= a);
        if low == 0 {
            return 0; // below the smallest scale
        }
        let low = low - 1;
        let v = self.values[low];
        let w = if low + 1 < n { self.values[low + 1] } else { self.next };
        if v == a {
            return low;
        }
        if a >= w {
            return n + 1;
        }
        let middle = v + (w - v) / 2.0;
        let up = match rounding {
            Rounding::TowardZero => false,
            Rounding::NearestAway => a >= middle,
            // Where no code is even both significands are 1: up, but zero's is 0.
            Rounding::NearestEven if a == middle && !self.has_fraction => {
                low > 0 || self.kind == Kind::Scale
            }
            Rounding::NearestEven if a == middle => low % 2 == 1,
            Rounding::NearestEven => a > middle,
            Rounding::Stochastic { seed, index } => {
                let chance = ((a - v) / (w - v) * 4294967296.0).floor() as u64;
                chance + u64::from(draw(seed, index)) >= 1 << 32
            }
        };
        low + usize::from(up)
    }
}

/// The upper 32 bits of output number `index` of SplitMix64 seeded with its own first output for `seed`.
pub(crate) fn draw(seed: u64, index: u64) -> u32 {
    let next = |state: &mut u128| {
        *state = (*state + 0x9e3779b97f4a7c15) % (1 << 64);
        let mut z = *state;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9 % (1 << 64);
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb % (1 << 64);
        z ^ (z >> 31)
    };
    let mut state = u128::from(seed);
    let first = next(&mut state);
    // `next` steps before it mixes: start one step early to get number `index`, counted from 0.
    let start = first + u128::from(index) * 0x9e3779b97f4a7c15 + (1 << 64) - 0x9e3779b97f4a7c15;
    (next(&mut (start % (1 << 64))) >> 32) as u32
}

/// The numbers of a table: from the bits of an f32 where the column says so, else in decimal.
pub(crate) fn csv_values(csv: &str) -> Vec<f64> {
    let mut lines = csv.lines();
    let header = lines.next().unwrap();
    let last = header.split(',').count() - 1;
    let hex = header.ends_with("f32_bits_hex");
    lines
        .enumerate()
        .map(|(code, line)| {
            let fields: Vec<_> = line.split(',').collect();
            assert_eq!(fields[0], code.to_string());
            if hex {
                f64::from(f32::from_bits(u32::from_str_radix(fields[last], 16).unwrap()))
            } else {
                fields[1].parse().unwrap()
            }
        })
        .collect()
}

/// The f64 of an f32; a cast may drop the sign of NaN.
pub(crate) fn widen(x: f32) -> f64 {
    let sign = if x.is_sign_negative() { -1.0 } else { 1.0 };
    if x.is_nan() { f64::NAN.copysign(sign) } else { f64::from(x) }
}
