//! The codec again, for many f32 at once: one lane is one number, without branches.
//!
//! `format.rs` is the plain statement; here every step works on the bits of an f32, and the tests compare the two.

use super::{Isa, Kernel, MAGNITUDE, Simd};
use crate::Rounding;
use crate::format::{Format, GOLDEN_GAMMA, Overflow, Parts, Specials, mix64, pow2, random_key};

/// Bits of positive infinity: larger magnitudes are NaN.
const INFINITY: u32 = 0x7f80_0000;

/// An unsigned integer that holds a code.
pub trait Code: Copy {
    fn from_bits(bits: u32) -> Self;
}

macro_rules! code {
    ($($t:ty)*) => {$(
        impl Code for $t {
            #[inline(always)]
            fn from_bits(bits: u32) -> Self {
                bits as $t
            }
        }
    )*};
}
code!(u8 u16 u32);

/// What a lane needs to know of a format and an overflow mode.
#[derive(Clone, Copy)]
pub(crate) struct Encoder {
    /// `23 - M`: how many fraction bits of an f32 a normal number loses.
    shift: u32,
    fraction_bits: u32,
    /// Bits of the smallest normal number.
    min_normal: u32,
    /// Bits of the magnitude that larger ones are cut to: the largest finite number, or the one that would come next.
    limit: u32,
    max: u32,
    overflow: u32,
    nan: u32,
    /// Keeps or drops the sign of NaN.
    nan_sign: u32,
    sign_bit: u32,
    /// Moves the sign of an f32 to `sign_bit`.
    sign_shift: u32,
    /// Smaller magnitudes have no sign: 1 where there is no negative zero.
    min_signed: u32,
    /// `2^shift`.
    magic: f32,
}

/// How to encode a slice of f32.
#[derive(Clone, Copy, PartialEq)]
enum Method {
    /// To nearest even, by adding a power of two that pushes the lost bits out of the significand.
    Add,
    /// By shifts, in any rounding.
    Shift,
    /// By one addition and one shift, as the exponents are those of f32 (bf16, TF32).
    Truncate,
    /// One by one.
    Scalar,
}

impl Encoder {
    pub(super) fn new(format: Format, overflow: Overflow) -> Self {
        let m = format.fraction_bits();
        let sign_bit = format.sign_bit();
        let nan = format.nan_bits();
        let overflow = match overflow {
            Overflow::Saturate => format.max_bits(),
            Overflow::Infinity => format.overflow_bits(),
        };
        let max = format.max_bits();
        // Without overflow codes numbers may be cut to max before they are rounded; else to what comes next.
        let limit_code = if overflow == max { max } else { max + 1 };
        let limit = if limit_code >> m == 0 {
            (limit_code as f32 * pow2(format.lowest_exponent() - m as i32) as f32).to_bits()
        } else {
            (limit_code << (23 - m)).wrapping_add(rebias(format))
        };
        Self {
            shift: 23 - m,
            fraction_bits: m,
            min_normal: (pow2(format.lowest_exponent()) as f32).to_bits(),
            limit,
            max,
            overflow,
            nan: nan.unwrap_or(0),
            nan_sign: if nan.is_some() { sign_bit } else { 0 },
            sign_bit,
            sign_shift: 31 - sign_bit.trailing_zeros(),
            min_signed: (format.specials() == Specials::NanIsNegativeZero) as u32,
            magic: pow2(23 - m as i32) as f32,
        }
    }
}

/// From the format's exponent field, where f32 has its own, to f32's.
fn rebias(format: Format) -> u32 {
    ((format.lowest_exponent() + 126) as u32) << 23
}

fn method(format: Format, rounding: Rounding) -> Method {
    let lowest = format.lowest_exponent();
    let f32_exponents = format.exponent_bits() == 8 && format.bias() == 127;
    // Add computes `next · 2^(23 - M)` on the way.
    let room = format.max_exponent() + 1 + 23 - format.fraction_bits() as i32 <= 127;
    if format.specials() == Specials::Scale || lowest < -126 {
        Method::Scalar
    } else if f32_exponents {
        Method::Truncate
    } else if rounding == Rounding::NearestEven && room {
        Method::Add
    } else {
        Method::Shift
    }
}

/// Encodes `src`; both slices have the same length. The same codes as [`Format::encode_with`].
pub(crate) fn encode<C: Code>(
    isa: Isa,
    format: Format,
    src: &[f32],
    dst: &mut [C],
    rounding: Rounding,
    overflow: Overflow,
) {
    let method = method(format, rounding);
    if method == Method::Scalar {
        for (i, (code, &x)) in dst.iter_mut().zip(src).enumerate() {
            let parts = Parts::of_f32(x);
            *code = C::from_bits(format.encode_parts(parts, rounding.at(i), overflow));
        }
        return;
    }
    let e = Encoder::new(format, overflow);
    if method == Method::Add {
        if e.overflow == e.max && e.min_signed == 0 {
            isa.run(Add::<C, true> { e, src, dst });
        } else {
            isa.run(Add::<C, false> { e, src, dst });
        }
        return;
    }
    fn run<C: Code, R: Round>(
        isa: Isa,
        method: Method,
        round: R,
        (e, src, dst): (Encoder, &[f32], &mut [C]),
    ) {
        match method {
            Method::Truncate => isa.run(Truncate { e, round, src, dst }),
            _ => isa.run(Shift { e, round, src, dst }),
        }
    }
    let operands = (e, src, dst);
    match rounding {
        Rounding::NearestEven => run(isa, method, NearestEven, operands),
        Rounding::NearestAway => run(isa, method, NearestAway, operands),
        Rounding::TowardZero => run(isa, method, TowardZero, operands),
        Rounding::Stochastic { seed, index } => {
            run(isa, method, Stochastic::new(seed, index), operands);
        }
    }
}

struct Add<'a, C, const PLAIN: bool> {
    e: Encoder,
    src: &'a [f32],
    dst: &'a mut [C],
}

/// Numbers that are searched for NaN together.
const AT_ONCE: usize = 512;

impl<C: Code, const PLAIN: bool> Kernel for Add<'_, C, PLAIN> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let e = self.e;
        let (x, x_rest) = self.src.as_chunks::<AT_ONCE>();
        let (codes, codes_rest) = self.dst.as_chunks_mut::<AT_ONCE>();
        for (codes, x) in codes.iter_mut().zip(x) {
            // As though there were no NaN, and again if there was one.
            let mut largest = 0;
            for (code, x) in codes.iter_mut().zip(x) {
                let bits = x.to_bits();
                largest = largest.max(bits & MAGNITUDE);
                *code = C::from_bits(e.signed::<PLAIN>(e.add_magnitude::<PLAIN>(bits), bits));
            }
            if largest > INFINITY {
                add_slice::<C, PLAIN>(e, x, codes);
            }
        }
        add_slice::<C, PLAIN>(e, x_rest, codes_rest);
    }
}

#[inline(always)]
fn add_slice<C: Code, const PLAIN: bool>(e: Encoder, src: &[f32], dst: &mut [C]) {
    for (code, x) in dst.iter_mut().zip(src) {
        *code = C::from_bits(e.add::<PLAIN>(x.to_bits()));
    }
}

struct Shift<'a, C, R> {
    e: Encoder,
    round: R,
    src: &'a [f32],
    dst: &'a mut [C],
}

impl<C: Code, R: Round> Kernel for Shift<'_, C, R> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (e, mut round) = (self.e, self.round);
        for (code, x) in self.dst.iter_mut().zip(self.src) {
            *code = C::from_bits(e.shift(x.to_bits(), &round));
            round.next();
        }
    }
}

struct Truncate<'a, C, R> {
    e: Encoder,
    round: R,
    src: &'a [f32],
    dst: &'a mut [C],
}

impl<C: Code, R: Round> Kernel for Truncate<'_, C, R> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (e, mut round) = (self.e, self.round);
        for (code, x) in self.dst.iter_mut().zip(self.src) {
            let bits = x.to_bits();
            // The code of a number with f32's exponents is the front of its f32; a carry raises the exponent.
            let magnitude = round.round(bits & MAGNITUDE, e.shift);
            *code = C::from_bits(e.finish::<false>(magnitude, bits));
            round.next();
        }
    }
}

impl Encoder {
    /// To nearest even, by an addition.
    ///
    /// `p` is the power of two at the head of x's binade (of the lowest, for subnormals). In `|x| + p·2^(23-M)` the last
    /// bit is worth `p/2^M`, as in the target, so the addition rounds as the target does, and leaves x's significand in
    /// the low bits: 0 .. 2^(M+1). Adding p's exponent counts it in; the hidden bit in the significand is one of it.
    #[inline(always)]
    fn add<const PLAIN: bool>(&self, bits: u32) -> u32 {
        self.finish::<PLAIN>(self.add_magnitude::<PLAIN>(bits), bits)
    }

    /// The magnitude of [`add`](Self::add); if plain, with anything above its low 16 bits.
    #[inline(always)]
    fn add_magnitude<const PLAIN: bool>(&self, bits: u32) -> u32 {
        let a = (bits & MAGNITUDE).min(self.limit);
        let p = a.max(self.min_normal) & INFINITY;
        let sum = (f32::from_bits(a) + f32::from_bits(p) * self.magic).to_bits();
        let significand = if PLAIN { sum } else { sum & 0x7f_ffff };
        significand.wrapping_add((p - (self.min_normal & INFINITY)) >> self.shift)
    }

    /// In any rounding, by shifts: see `Format::round`.
    #[inline(always)]
    fn shift(&self, bits: u32, round: &impl Round) -> u32 {
        let a = bits & MAGNITUDE;
        let field = a >> 23;
        let significand = a & 0x7f_ffff | if field > 0 { 0x80_0000 } else { 0 };
        let field = field.max(1);
        let lowest = self.min_normal >> 23;
        let binade = field.saturating_sub(lowest);
        let shift = self.shift + lowest.saturating_sub(field);
        let magnitude = round.round(significand, shift) + (binade << self.fraction_bits);
        self.finish::<false>(magnitude, bits)
    }

    /// Overflow, NaN and sign.
    #[inline(always)]
    fn finish<const PLAIN: bool>(&self, magnitude: u32, bits: u32) -> u32 {
        let sign = bits >> self.sign_shift & self.sign_bit;
        let nan = self.nan | sign & self.nan_sign;
        let code = self.signed::<PLAIN>(magnitude, bits);
        if bits & MAGNITUDE > INFINITY { nan } else { code }
    }

    /// Overflow and sign; plain where neither can be wrong.
    #[inline(always)]
    fn signed<const PLAIN: bool>(&self, magnitude: u32, bits: u32) -> u32 {
        let mut magnitude = magnitude;
        let mut sign = bits >> self.sign_shift & self.sign_bit;
        if !PLAIN {
            magnitude = if magnitude > self.max { self.overflow } else { magnitude };
            sign = if magnitude < self.min_signed { 0 } else { sign };
        }
        magnitude | sign
    }
}

/// `significand / 2^shift` as an integer; `1 <= shift`. The rules of `format::shift_right`, with 32 bits.
pub(crate) trait Round: Copy {
    fn round(&self, significand: u32, shift: u32) -> u32;

    /// To the next element.
    #[inline(always)]
    fn next(&mut self) {}

    /// The code of an f32 in a saturating format with a negative zero.
    #[inline(always)]
    fn float(&self, e: &Encoder, x: f32) -> u32 {
        e.shift(x.to_bits(), self)
    }

    /// The integer in two's complement; |x| is below 2^22.
    #[inline(always)]
    fn integer(&self, x: f32) -> u32 {
        let bits = x.to_bits();
        let field = bits >> 23 & 0xff;
        // Subnormals are as good as zero.
        let significand = bits & 0x7f_ffff | if field > 0 { 0x80_0000 } else { 0 };
        let magnitude = self.round(significand, 150 - field);
        if bits > MAGNITUDE { magnitude.wrapping_neg() } else { magnitude }
    }
}

#[derive(Clone, Copy)]
pub(super) struct NearestEven;
#[derive(Clone, Copy)]
pub(super) struct NearestAway;
#[derive(Clone, Copy)]
pub(super) struct TowardZero;
#[derive(Clone, Copy)]
pub(super) struct Stochastic {
    counter: u64,
}

impl Stochastic {
    pub(super) fn new(seed: u64, index: u64) -> Self {
        Self { counter: random_key(seed).wrapping_add(index.wrapping_mul(GOLDEN_GAMMA)) }
    }
}

/// A significand has 24 bits: beyond this shift a half is never reached.
const MAX_SHIFT: u32 = 25;

impl Round for NearestEven {
    #[inline(always)]
    fn round(&self, significand: u32, shift: u32) -> u32 {
        let shift = shift.min(MAX_SHIFT);
        (significand + (1 << (shift - 1)) - 1 + (significand >> shift & 1)) >> shift
    }

    #[inline(always)]
    fn float(&self, e: &Encoder, x: f32) -> u32 {
        e.add::<true>(x.to_bits())
    }

    #[inline(always)]
    fn integer(&self, x: f32) -> u32 {
        // At 1.5·2^23 the last bit is worth 1, and the low bits are the integer in two's complement.
        (x + 12_582_912.0).to_bits()
    }
}

impl Round for NearestAway {
    #[inline(always)]
    fn round(&self, significand: u32, shift: u32) -> u32 {
        let shift = shift.min(MAX_SHIFT);
        (significand + (1 << (shift - 1))) >> shift
    }
}

impl Round for TowardZero {
    #[inline(always)]
    fn round(&self, significand: u32, shift: u32) -> u32 {
        significand >> shift.min(MAX_SHIFT)
    }
}

impl Round for Stochastic {
    #[inline(always)]
    fn round(&self, significand: u32, shift: u32) -> u32 {
        let draw = (mix64(self.counter) >> 32) as u32;
        let whole = significand.checked_shr(shift).unwrap_or(0);
        let fraction = if shift <= 32 {
            significand.checked_shl(32 - shift).unwrap_or(0)
        } else {
            significand.checked_shr(shift - 32).unwrap_or(0)
        };
        // fraction + draw carries
        whole + u32::from(draw > !fraction)
    }

    #[inline(always)]
    fn next(&mut self) {
        self.counter = self.counter.wrapping_add(GOLDEN_GAMMA);
    }
}

/// Decodes `codes`; both slices have the same length. The same numbers as [`Format::decode`].
pub(crate) fn decode(isa: Isa, format: Format, codes: &[u8], dst: &mut [f32]) {
    if format.specials() == Specials::Scale || format.lowest_exponent() < -126 {
        for (x, &code) in dst.iter_mut().zip(codes) {
            *x = format.decode(code);
        }
        return;
    }
    isa.run(Decode { d: Decoder::new(format), codes, dst });
}

/// What a lane needs to know of a format.
#[derive(Clone, Copy)]
pub(super) struct Decoder {
    /// `23 - M`.
    shift: u32,
    /// See [`rebias`].
    rebias: u32,
    /// The smallest normal number.
    min_normal: f32,
    max: u32,
    infinity: u32,
    /// The code that is NaN instead.
    negative_zero: u32,
    sign_bit: u32,
    sign_shift: u32,
}

impl Decoder {
    /// Not for [`Method::Scalar`] formats.
    pub(super) fn new(format: Format) -> Self {
        let sign_bit = format.sign_bit();
        Self {
            shift: 23 - format.fraction_bits(),
            rebias: rebias(format),
            min_normal: format.min_positive(),
            max: format.max_bits(),
            infinity: format.infinity_code().map_or(u32::MAX, u32::from),
            negative_zero: match format.specials() {
                Specials::NanIsNegativeZero => sign_bit,
                _ => u32::MAX,
            },
            sign_bit,
            sign_shift: 31 - sign_bit.trailing_zeros(),
        }
    }

    /// Whether all codes are finite. Infinities and NaN are rare, and looking for them first, 16 to 64 codes in an
    /// instruction, is cheaper than minding them in every lane.
    #[inline(always)]
    pub(super) fn are_finite(&self, codes: &[u8]) -> bool {
        let (sign_bit, max) = (self.sign_bit as u8, self.max as u8);
        let mut special = false;
        if self.negative_zero == self.sign_bit {
            for &code in codes {
                special |= code << (self.sign_shift - 24) == 0x80;
            }
        } else if self.max < self.sign_bit - 1 {
            for &code in codes {
                special |= code & (sign_bit - 1) > max;
            }
        }
        !special
    }

    /// With `FINITE` the code must be finite, or the result is anything.
    #[inline(always)]
    pub(super) fn lane<const FINITE: bool>(&self, code: u8) -> f32 {
        // Read as a normal number a code is right or, if it is subnormal, too large: it has a hidden bit and half the
        // unit. Doubled and without the hidden bit subnormals are right and normal numbers too large, or even NaN.
        let code = u32::from(code);
        let magnitude = code & (self.sign_bit - 1);
        let bits = (magnitude << self.shift).wrapping_add(self.rebias);
        let normal = f32::from_bits(bits);
        let subnormal = f32::from_bits(bits.wrapping_add(1 << 23)) - self.min_normal;
        let mut bits = if subnormal < normal { subnormal } else { normal }.to_bits();
        let sign = code << self.sign_shift & !MAGNITUDE;
        if !FINITE {
            let signed = code & (2 * self.sign_bit - 1);
            let nan = (magnitude > self.max) | (signed == self.negative_zero);
            bits = if nan { 0x7fc0_0000 } else { bits };
            bits = if magnitude == self.infinity { INFINITY } else { bits };
        }
        f32::from_bits(bits | sign)
    }
}

struct Decode<'a> {
    d: Decoder,
    codes: &'a [u8],
    dst: &'a mut [f32],
}

impl Kernel for Decode<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let d = self.d;
        let (codes, codes_rest) = self.codes.as_chunks::<AT_ONCE>();
        let (dst, dst_rest) = self.dst.as_chunks_mut::<AT_ONCE>();
        for (dst, codes) in dst.iter_mut().zip(codes) {
            decode_slice(d, codes, dst);
        }
        decode_slice(d, codes_rest, dst_rest);
    }
}

#[inline(always)]
fn decode_slice(d: Decoder, codes: &[u8], dst: &mut [f32]) {
    if d.are_finite(codes) {
        for (x, &code) in dst.iter_mut().zip(codes) {
            *x = d.lane::<true>(code);
        }
    } else {
        for (x, &code) in dst.iter_mut().zip(codes) {
            *x = d.lane::<false>(code);
        }
    }
}

/// Encodes `src` at random, each f64 rounded once. The same codes as [`Format::encode_f64`].
pub(crate) fn encode_f64_stochastic<C: Code>(
    isa: Isa,
    format: Format,
    src: &[f64],
    dst: &mut [C],
    (seed, index): (u64, u64),
    overflow: Overflow,
) {
    if method(format, Rounding::Stochastic { seed, index }) == Method::Scalar {
        for (i, (code, &x)) in dst.iter_mut().zip(src).enumerate() {
            let rounding = Rounding::Stochastic { seed, index }.at(i);
            *code = C::from_bits(format.encode_parts(Parts::of_f64(x), rounding, overflow));
        }
        return;
    }
    let Stochastic { counter } = Stochastic::new(seed, index);
    let lowest = (format.lowest_exponent() + 1023) as u64;
    isa.run(StochasticF64 { e: Encoder::new(format, overflow), lowest, counter, src, dst });
}

struct StochasticF64<'a, C> {
    e: Encoder,
    /// f64's exponent field in the lowest binade.
    lowest: u64,
    counter: u64,
    src: &'a [f64],
    dst: &'a mut [C],
}

impl<C: Code> Kernel for StochasticF64<'_, C> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (e, lowest, mut counter) = (self.e, self.lowest, self.counter);
        for (code, x) in self.dst.iter_mut().zip(self.src) {
            let bits = x.to_bits();
            let field = bits >> 52 & 0x7ff;
            let significand = bits & ((1 << 52) - 1) | if field > 0 { 1 << 52 } else { 0 };
            let field = field.max(1);
            // Subnormal in f64 is far below a unit of any format; the field being 1 too large does not matter.
            let binade = field.saturating_sub(lowest);
            let shift = u64::from(e.shift + 29) + lowest.saturating_sub(field);
            // The quotient with 32 bits behind the point; shift is more than 32.
            let fixed = significand >> (shift - 32).min(63);
            let whole = ((fixed + (mix64(counter) >> 32)) >> 32) as u32;
            let magnitude = whole + ((binade as u32) << e.fraction_bits);
            // finish() wants the sign, and a NaN if it is one, of an f32.
            let sign = (bits >> 32) as u32 & !MAGNITUDE;
            let nan = if bits & !(1 << 63) > 0x7ff << 52 { MAGNITUDE } else { 0 };
            *code = C::from_bits(e.finish::<false>(magnitude, sign | nan));
            counter = counter.wrapping_add(GOLDEN_GAMMA);
        }
    }
}

/// f64 to f32, where a result that is not exact is the neighbour whose last bit is 1 ("round to odd"). Rounding that
/// to fewer than 23 bits gives what rounding the f64 would (Boldo and Melquiond, "Emulation of FMA and correctly
/// rounded sums", IEEE Transactions on Computers 57, 2008), except at random, where 2^-32 of a step may matter.
pub(crate) struct ToOdd<'a> {
    pub(crate) src: &'a [f64],
    pub(crate) dst: &'a mut [f32],
}

impl Kernel for ToOdd<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (y, &x) in self.dst.iter_mut().zip(self.src) {
            let nearest = x as f32;
            let back = f64::from(nearest);
            // From 2^128 on infinity stands for all, as it is beyond every format's reach.
            let fits = x.abs() < 340_282_366_920_938_463_463_374_607_431_768_211_456.0;
            // Toward zero first: one less where the cast went away from zero (f32::MAX if it went to infinity).
            let away = u32::from(fits & (back.abs() > x.abs()));
            let inexact = u32::from(fits & (back != x));
            let bits = (nearest.to_bits() - away) | inexact;
            // The sign of NaN does not survive every cast.
            let sign = (x.to_bits() >> 32) as u32 & !MAGNITUDE;
            *y = f32::from_bits(bits & MAGNITUDE | sign);
        }
    }
}
