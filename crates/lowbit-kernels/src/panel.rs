//! The packed weights of a few output features, and what their codes mean.

use lowbit_core::{IntegerLevels, QuantType, f16};

use crate::{storage::Storage, tile::Isa};

/// Output features of a panel. Two vectors of AVX-512, four of AVX2.
pub(crate) const NR: usize = 32;

/// The packed weights of [`NR`] output features.
#[derive(Clone, Copy)]
pub(crate) struct Panel<'a> {
    /// `[steps of all groups][words][NR][4]`
    pub(crate) codes: &'a [u8],
    pub(crate) storage: Storage,
    /// Steps of a full group.
    pub(crate) steps: usize,
    pub(crate) groups: usize,
    pub(crate) meaning: &'a Meaning,
    /// What an integer level is multiplied by.
    pub(crate) unit: f32,
    pub(crate) scales: Scales<'a>,
    pub(crate) zeros: Zeros<'a>,
    /// `Σ (level − zero)`, `[groups][NR]`; empty unless activations have zeros, or scales for each group.
    pub(crate) sums: &'a [[i32; NR]],
    /// Do totals become the bits of the integer sums of the only group? The panel has sums then.
    pub(crate) exact: bool,
    /// Codes that a later call reads, to be fetched into L2 meanwhile.
    pub(crate) next: &'a [u8],
    /// Do the products of a row have one sum, those of a group multiplied by its integer scale? See
    /// [`QuantScheme::has_integer_scales`](lowbit_core::QuantScheme::has_integer_scales). Rows of
    /// activations have one sum then, and so has the panel, if it has any.
    pub(crate) one_sum: bool,
}

/// What a byte of `(code − zero)·scale` counts from.
const SIGNED: i32 = 128;

impl<'a> Panel<'a> {
    /// Of a panel with one sum, what multiplies [scaled](crate::tile::widen) codes: one group.
    #[inline(always)]
    pub(crate) fn of_scaled(&self, codes: &'a [u8]) -> Self {
        let scales = match self.scales {
            Scales::TwoLevel(two) => Scales::F32(two.steps),
            scales => scales, // no panel with one sum has such
        };
        Panel {
            codes,
            storage: Storage::Bytes,
            steps: codes.len() / (4 * NR),
            groups: self.groups.min(1),
            meaning: &Meaning::Int,
            scales,
            zeros: Zeros::Constant(SIGNED),
            one_sum: false,
            ..*self
        }
    }

    /// Of a panel with one sum, the scales of group `g` and `128 − zero·scale`, in each half and in each
    /// byte of a lane: `code·scale` plus the latter is a byte that counts from 128.
    #[inline(always)]
    pub(crate) fn factors<V: Isa<L>, const NV: usize, const L: usize>(
        &self,
        isa: V,
        g: usize,
        (h, v): (usize, usize),
    ) -> (V::I32, V::I32) {
        let scale = match self.scales {
            Scales::TwoLevel(two) => isa.load_u8(part::<_, NV, L>(&two.codes[g], h, v)),
            _ => isa.zero_i32(), // no panel with one sum has such
        };
        let zero = match self.zeros {
            Zeros::Bytes(zeros) => isa.load_u8(part::<_, NV, L>(&zeros[g], h, v)),
            Zeros::Constant(zero) => isa.splat_i32(zero),
            Zeros::Offset(_) => isa.zero_i32(), // as above
        };
        let bias = isa.sub_i32(isa.splat_i32(SIGNED), isa.mul_u16(zero, scale));
        let bias = isa.or(bias, isa.shl(bias, 8));
        (isa.or(scale, isa.shl(scale, 16)), isa.or(bias, isa.shl(bias, 16)))
    }

    /// Puts the rows of `out` right whose input is not finite, where there are offsets: an infinite x
    /// times a weight is not `inf·code·scale + inf·offset`, which may be inf − inf. `rows` are padded to
    /// whole steps.
    pub(crate) fn multiply_infinite(&self, rows: &[&[f32]], out: &mut [[f32; NR]]) {
        let Zeros::Offset(offsets) = self.zeros else { return };
        let is_finite = |x: &[f32]| x.iter().all(|x| x.is_finite());
        // Such a row has no finite result.
        let infinite = |(x, out): &(&&[f32], &mut [f32; NR])| !is_finite(&out[..]) && !is_finite(x);
        for (x, out) in rows.iter().zip(out).filter(infinite) {
            for (lane, y) in out.iter_mut().enumerate() {
                let mut sum = 0.0;
                for (g, x) in x.chunks(self.padded_group().max(1)).enumerate() {
                    let words: &[[u8; 4]] = bytemuck::cast_slice(self.codes_of(g));
                    let (scale, offset) = (self.scales.get(g, lane), offsets[g][lane]);
                    for (j, &x) in x.iter().enumerate() {
                        // Only integers have offsets.
                        let code = f32::from(self.storage.get(j, &words[lane..], NR));
                        sum += f64::from(scale * code + offset) * f64::from(x);
                    }
                }
                *y = sum as f32;
            }
        }
    }

    /// Input features of a full group, padded to whole steps.
    #[inline(always)]
    pub(crate) fn padded_group(&self) -> usize {
        self.steps * self.storage.k_per_step()
    }

    /// The codes of group `g`; the last group may be shorter.
    #[inline(always)]
    pub(crate) fn codes_of(&self, g: usize) -> &[u8] {
        let full = self.steps * self.storage.words() * 4 * NR;
        let rest = &self.codes[g * full..];
        &rest[..if rest.len() < full { rest.len() } else { full }]
    }
}

/// What a code stands for.
#[derive(Clone, Debug)]
pub(crate) enum Meaning {
    /// Itself.
    Int,
    Table(Table),
    Float(Float),
}

/// Up to 16 levels.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    pub(crate) levels: [f32; 16],
    /// `level = unit · (256·high + low − offset)`, where `high` is 0 if there is none.
    pub(crate) low: [u8; 16],
    pub(crate) high: Option<[u8; 16]>,
    pub(crate) offset: i32,
}

/// Floats of at most 8 bits, decoded by moving their fields into those of an f32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Float {
    /// Bits of exponent and fraction, and how far to move them.
    pub(crate) magnitude: i32,
    pub(crate) shift: u32,
    /// How far to move the bit above them.
    pub(crate) sign_shift: u32,
    /// `2^(127 − bias)`
    pub(crate) scale: f32,
}

impl Meaning {
    pub(crate) fn of(dtype: QuantType) -> Option<Self> {
        match dtype {
            QuantType::Int { .. } => Some(Self::Int),
            // Without a sign, the highest of 8 bits would belong to the exponent, and code 0 of E8M0 is not 0.
            QuantType::Float(format) if dtype.bits() > 4 && !format.is_signed() => None,
            QuantType::Float(format) if dtype.bits() > 4 => {
                let fraction = format.fraction_bits();
                let magnitude = fraction + format.exponent_bits();
                let (shift, sign_shift) = (23 - fraction, 31 - magnitude);
                let scale = f32::from_bits(u32::try_from(254 - format.bias()).ok()? << 23);
                // A sign that is not there is never set.
                let magnitude = (1 << magnitude) - 1;
                (1..255).contains(&(254 - format.bias())).then_some(Self::Float(Float {
                    magnitude,
                    shift,
                    sign_shift,
                    scale,
                }))
            }
            _ if dtype.bits() <= 4 => {
                let levels = core::array::from_fn(|code| dtype.level(code as u8));
                let IntegerLevels { integers, .. } = dtype.integer_levels()?;
                let integers: [i32; 16] = core::array::from_fn(|code| {
                    i32::from(integers[code & usize::from(dtype.max_code())])
                });
                let (lo, hi) = integers.iter().fold((0, 0), |(lo, hi), &x| (x.min(lo), x.max(hi)));
                let bytes = hi - lo < 256;
                let offset = if bytes { -lo } else { 32768 };
                let (low, high) = (
                    integers.map(|x| (x + offset) as u8),
                    integers.map(|x| ((x + offset) >> 8) as u8),
                );
                let high = (!bytes).then_some(high);
                Some(Self::Table(Table { levels, low, high, offset }))
            }
            _ => None,
        }
    }
}

/// The zeros of a panel.
#[derive(Clone, Copy)]
pub(crate) enum Zeros<'a> {
    /// The same everywhere.
    Constant(i32),
    /// `[groups][NR]`
    Bytes(&'a [[u8; NR]]),
    /// What is added to scaled levels, real zeros included: `[groups][NR]`
    Offset(&'a [[f32; NR]]),
}

/// The scales of a panel, decoded when they are used; each `[groups][NR]` unless it says otherwise.
#[derive(Clone, Copy)]
pub(crate) enum Scales<'a> {
    F32(&'a [[f32; NR]]),
    F16(&'a [[u16; NR]]),
    Bf16(&'a [[u16; NR]]),
    /// Powers of two, none of them 2^-127.
    E8m0(&'a [[u8; NR]]),
    TwoLevel(TwoLevel<'a>),
}

/// `scale = step · (level(code) − zero) + minimum`
#[derive(Clone, Copy)]
pub(crate) struct TwoLevel<'a> {
    pub(crate) codes: &'a [[u8; NR]],
    /// Codes are FP8 E4M3 instead of integers.
    pub(crate) e4m3: bool,
    pub(crate) zero: i32,
    /// How many groups share a step.
    pub(crate) groups: usize,
    /// `[steps][NR]`
    pub(crate) steps: &'a [[f32; NR]],
    /// As `steps`, or none.
    pub(crate) minima: &'a [[f32; NR]],
}

/// 2^(127 − 7)
const E4M3_SCALE: f32 = f32::from_bits((254 - 7) << 23);

impl Scales<'_> {
    /// The scale of output feature `lane` in group `g`.
    pub(crate) fn get(&self, g: usize, lane: usize) -> f32 {
        match self {
            Self::F32(scales) => scales[g][lane],
            Self::F16(scales) => f16::from_bits(scales[g][lane]).to_f32(),
            Self::Bf16(scales) => f32::from_bits(u32::from(scales[g][lane]) << 16),
            Self::E8m0(scales) => f32::from_bits(u32::from(scales[g][lane]) << 23),
            Self::TwoLevel(two) => {
                let (code, step) = (two.codes[g][lane], g / two.groups);
                let level = match two.e4m3 {
                    true => f32::from_bits(u32::from(code) << 20) * E4M3_SCALE,
                    false => (i32::from(code) - two.zero) as f32,
                };
                two.steps[step][lane] * level + two.minima.get(step).map_or(0.0, |row| row[lane])
            }
        }
    }

    /// The scales of the `v`th vector of the `h`th part of a panel.
    #[inline(always)]
    pub(crate) fn load<V: Isa<L>, const NV: usize, const L: usize>(
        &self,
        isa: V,
        g: usize,
        (h, v): (usize, usize),
    ) -> V::F32 {
        match self {
            Self::F32(scales) => isa.load_f32(part::<_, NV, L>(&scales[g], h, v)),
            Self::F16(scales) => isa.load_f16(part::<_, NV, L>(&scales[g], h, v)),
            Self::Bf16(scales) => {
                let bits = isa.load_u16(part::<_, NV, L>(&scales[g], h, v));
                isa.reinterpret(isa.shl(bits, 16))
            }
            Self::E8m0(scales) => {
                let bits = isa.load_u8(part::<_, NV, L>(&scales[g], h, v));
                isa.reinterpret(isa.shl(bits, 23))
            }
            Self::TwoLevel(two) => {
                let code = isa.load_u8(part::<_, NV, L>(&two.codes[g], h, v));
                let level = if two.e4m3 {
                    isa.mul(isa.reinterpret(isa.shl(code, 20)), isa.splat_f32(E4M3_SCALE))
                } else {
                    isa.to_f32(isa.sub_i32(code, isa.splat_i32(two.zero)))
                };
                let step = g / two.groups;
                let scale = isa.mul(isa.load_f32(part::<_, NV, L>(&two.steps[step], h, v)), level);
                if two.minima.is_empty() {
                    return scale;
                }
                isa.add(scale, isa.load_f32(part::<_, NV, L>(&two.minima[step], h, v)))
            }
        }
    }
}

/// The `v`th vector of the `h`th part of a panel's row.
#[inline(always)]
pub(crate) fn part<T: bytemuck::Pod, const NV: usize, const L: usize>(
    row: &[T; NR],
    h: usize,
    v: usize,
) -> &[T; L] {
    let parts: &[[[T; L]; NV]] = bytemuck::cast_slice(row);
    &parts[h][v]
}
