//! How a panel holds its codes.

use crate::tile::Isa;

/// How a panel holds its codes: fields of 8, 4, 2 or 1 bits, in the bytes of one or more words for each
/// row of a step.
///
/// Input features come in quads of four, which meet a word of four int8 activations: byte `i` of a
/// word belongs to feature `i` of each quad whose bits it holds.
///
/// | | bits | words of a step | quads of a step | |
/// |---|---|---|---|---|
/// | `Bytes` | 7, 8 | 1 | 1 | |
/// | `Bits6` | 6 | 3 | 4 | two words of low halves, one of the upper two bits |
/// | `Bits5` | 5 | 5 | 8 | four words of low halves, one of upper bits |
/// | `Nibbles` | 4 | 1 | 2 | |
/// | `Bits3` | 3 | 3 | 8 | two words of the lower two bits, one of upper bits |
/// | `Crumbs` | 1, 2 | 1 | 4 | |
/// | `Pairs` | 16 | 2 | 1 | bfloat16 numbers, two to a word; only what [`bf16::widen`](crate::bf16::widen) writes |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Storage {
    Bytes,
    Bits6,
    Bits5,
    Nibbles,
    Bits3,
    Crumbs,
    Pairs,
}

/// A field of a code: word and quad's place in its bytes, and the lowest bit and number of bits of the
/// code that it holds.
struct Field {
    word: usize,
    shift: usize,
    low: u32,
    bits: u32,
}

impl Storage {
    /// Those of packed weights.
    pub(crate) const ALL: [Self; 6] =
        [Self::Bytes, Self::Bits6, Self::Bits5, Self::Nibbles, Self::Bits3, Self::Crumbs];

    /// The smallest for codes of `bits` bits in groups of `group_size`, where short groups are padded;
    /// of equals that with the least padding. Tables are looked up with codes of 4 bits at most.
    pub(crate) fn for_groups(bits: u8, table: bool, group_size: usize, k: usize) -> Self {
        *(Self::ALL.iter())
            .filter(|storage| storage.code_bits() >= bits)
            .filter(|storage| !table || storage.code_bits() <= 4)
            .min_by_key(|storage| {
                let steps = storage.steps(group_size, k);
                (steps * storage.words(), steps * storage.quads())
            })
            .unwrap_or(&Self::Bytes)
    }

    const fn code_bits(self) -> u8 {
        match self {
            Self::Bytes => 8,
            Self::Bits6 => 6,
            Self::Bits5 => 5,
            Self::Nibbles => 4,
            Self::Bits3 => 3,
            Self::Crumbs => 2,
            Self::Pairs => 16,
        }
    }

    /// Words that a row has in a step.
    pub(crate) const fn words(self) -> usize {
        match self {
            Self::Bytes | Self::Nibbles | Self::Crumbs => 1,
            Self::Pairs => 2,
            Self::Bits6 | Self::Bits3 => 3,
            Self::Bits5 => 5,
        }
    }

    /// Quads of input features of a step.
    pub(crate) const fn quads(self) -> usize {
        match self {
            Self::Bytes | Self::Pairs => 1,
            Self::Nibbles => 2,
            Self::Bits6 | Self::Crumbs => 4,
            Self::Bits5 | Self::Bits3 => 8,
        }
    }

    /// Input features of a step.
    pub(crate) const fn k_per_step(self) -> usize {
        4 * self.quads()
    }

    /// Steps of a group of `group_size`, the last one padded.
    pub(crate) const fn steps_of_group(self, group_size: usize) -> usize {
        group_size.div_ceil(self.k_per_step())
    }

    /// Steps of a row of `k` in groups of `group_size`, the last group short or not.
    pub(crate) const fn steps(self, group_size: usize, k: usize) -> usize {
        k / group_size * self.steps_of_group(group_size) + self.steps_of_group(k % group_size)
    }

    /// The fields of the codes of a quad.
    fn fields(self, quad: usize) -> impl Iterator<Item = Field> {
        let field = |word, shift, low, bits| Some(Field { word, shift, low, bits });
        let fields = match self {
            Self::Bytes => [field(0, 0, 0, 8), None],
            Self::Bits6 => [field(quad / 2, 4 * (quad % 2), 0, 4), field(2, 2 * quad, 4, 2)],
            Self::Bits5 => [field(quad / 2, 4 * (quad % 2), 0, 4), field(4, quad, 4, 1)],
            Self::Nibbles => [field(0, 4 * quad, 0, 4), None],
            Self::Bits3 => [field(quad / 4, 2 * (quad % 4), 0, 2), field(2, quad, 2, 1)],
            Self::Crumbs => [field(0, 2 * quad, 0, 2), None],
            Self::Pairs => [None, None], // no codes
        };
        fields.into_iter().flatten()
    }

    /// Writes the code of the `j`th input feature of a group to the words of a row, which are all 0 there;
    /// word `w` of step `s` is `words[(s·words() + w)·stride]`.
    pub(crate) fn put(self, code: u8, j: usize, words: &mut [[u8; 4]], stride: usize) {
        let (step, within) = (j / self.k_per_step(), j % self.k_per_step());
        for Field { word, shift, low, bits } in self.fields(within / 4) {
            let field = (u32::from(code) >> low & ((1 << bits) - 1)) as u8;
            words[(step * self.words() + word) * stride][within % 4] |= field << shift;
        }
    }

    /// The code that [`put`](Self::put) has written.
    pub(crate) fn get(self, j: usize, words: &[[u8; 4]], stride: usize) -> u8 {
        let (step, within) = (j / self.k_per_step(), j % self.k_per_step());
        let field = |Field { word, shift, low, bits }| {
            let byte = words[(step * self.words() + word) * stride][within % 4];
            (u32::from(byte) >> shift & ((1 << bits) - 1)) << low
        };
        self.fields(within / 4).map(field).sum::<u32>() as u8
    }
}

/// A [`Storage`] with `W` words and `Q` quads, known to the compiler.
pub(crate) trait Codes<const W: usize, const Q: usize> {
    /// The codes of each quad as bytes.
    fn quads<V: Isa<L>, const L: usize>(isa: V, words: [V::I32; W]) -> [V::I32; Q];
}

pub(crate) struct Bytes;
pub(crate) struct Bits6;
pub(crate) struct Bits5;
pub(crate) struct Nibbles;
pub(crate) struct Bits3;
pub(crate) struct Crumbs;

impl Codes<1, 1> for Bytes {
    #[inline(always)]
    fn quads<V: Isa<L>, const L: usize>(_: V, words: [V::I32; 1]) -> [V::I32; 1] {
        words
    }
}

impl Codes<1, 2> for Nibbles {
    #[inline(always)]
    fn quads<V: Isa<L>, const L: usize>(isa: V, [w]: [V::I32; 1]) -> [V::I32; 2] {
        [isa.field::<0, 0, 15>(w), isa.field::<4, 0, 15>(w)]
    }
}

impl Codes<1, 4> for Crumbs {
    #[inline(always)]
    fn quads<V: Isa<L>, const L: usize>(isa: V, [w]: [V::I32; 1]) -> [V::I32; 4] {
        [
            isa.field::<0, 0, 3>(w),
            isa.field::<2, 0, 3>(w),
            isa.field::<4, 0, 3>(w),
            isa.field::<6, 0, 3>(w),
        ]
    }
}

impl Codes<3, 4> for Bits6 {
    #[inline(always)]
    fn quads<V: Isa<L>, const L: usize>(isa: V, [a, b, upper]: [V::I32; 3]) -> [V::I32; 4] {
        [
            isa.or(isa.field::<0, 0, 15>(a), isa.field::<0, 4, 48>(upper)),
            isa.or(isa.field::<4, 0, 15>(a), isa.field::<0, 2, 48>(upper)),
            isa.or(isa.field::<0, 0, 15>(b), isa.field::<0, 0, 48>(upper)),
            isa.or(isa.field::<4, 0, 15>(b), isa.field::<2, 0, 48>(upper)),
        ]
    }
}

impl Codes<5, 8> for Bits5 {
    #[inline(always)]
    fn quads<V: Isa<L>, const L: usize>(isa: V, [a, b, c, d, upper]: [V::I32; 5]) -> [V::I32; 8] {
        [
            isa.or(isa.field::<0, 0, 15>(a), isa.field::<0, 4, 16>(upper)),
            isa.or(isa.field::<4, 0, 15>(a), isa.field::<0, 3, 16>(upper)),
            isa.or(isa.field::<0, 0, 15>(b), isa.field::<0, 2, 16>(upper)),
            isa.or(isa.field::<4, 0, 15>(b), isa.field::<0, 1, 16>(upper)),
            isa.or(isa.field::<0, 0, 15>(c), isa.field::<0, 0, 16>(upper)),
            isa.or(isa.field::<4, 0, 15>(c), isa.field::<1, 0, 16>(upper)),
            isa.or(isa.field::<0, 0, 15>(d), isa.field::<2, 0, 16>(upper)),
            isa.or(isa.field::<4, 0, 15>(d), isa.field::<3, 0, 16>(upper)),
        ]
    }
}

impl Codes<3, 8> for Bits3 {
    #[inline(always)]
    fn quads<V: Isa<L>, const L: usize>(isa: V, [a, b, upper]: [V::I32; 3]) -> [V::I32; 8] {
        [
            isa.or(isa.field::<0, 0, 3>(a), isa.field::<0, 2, 4>(upper)),
            isa.or(isa.field::<2, 0, 3>(a), isa.field::<0, 1, 4>(upper)),
            isa.or(isa.field::<4, 0, 3>(a), isa.field::<0, 0, 4>(upper)),
            isa.or(isa.field::<6, 0, 3>(a), isa.field::<1, 0, 4>(upper)),
            isa.or(isa.field::<0, 0, 3>(b), isa.field::<2, 0, 4>(upper)),
            isa.or(isa.field::<2, 0, 3>(b), isa.field::<3, 0, 4>(upper)),
            isa.or(isa.field::<4, 0, 3>(b), isa.field::<4, 0, 4>(upper)),
            isa.or(isa.field::<6, 0, 3>(b), isa.field::<5, 0, 4>(upper)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_read_as_it_was_written() {
        for storage in Storage::ALL {
            let mask = ((1_u16 << storage.code_bits()) - 1) as u8;
            let code = |j: usize| (j * 37 + 11) as u8 & mask;
            let k = 3 * storage.k_per_step();
            let mut words = vec![[0; 4]; storage.steps_of_group(k) * storage.words() * 2];
            for j in 0..k {
                storage.put(code(j), j, &mut words[1..], 2);
            }
            assert!((0..k).all(|j| storage.get(j, &words[1..], 2) == code(j)), "{storage:?}");
            assert!(words.iter().step_by(2).all(|word| *word == [0; 4]));
        }
    }

    #[test]
    fn the_smallest_storage_is_taken() {
        let storage = |bits, group_size| Storage::for_groups(bits, false, group_size, 4096);
        assert_eq!(storage(1, 128), Storage::Crumbs);
        assert_eq!(storage(2, 16), Storage::Crumbs);
        assert_eq!(storage(2, 8), Storage::Nibbles);
        assert_eq!(storage(3, 32), Storage::Bits3);
        assert_eq!(storage(3, 16), Storage::Nibbles); // half of each step of Bits3 would be padding
        assert_eq!(storage(4, 32), Storage::Nibbles);
        assert_eq!(storage(5, 64), Storage::Bits5);
        assert_eq!(storage(6, 16), Storage::Bits6);
        assert_eq!(storage(7, 16), Storage::Bytes);
        assert_eq!(storage(4, 1), Storage::Bytes);
        assert_eq!(Storage::for_groups(4, true, 1, 4096), Storage::Nibbles);
    }
}
