//! Integers of 1 to 16 bits in bytes.

use crate::simd::{Isa, Kernel, Simd};
use crate::{Error, Result};

mod sealed {
    pub trait Sealed {}
}

/// An integer that [`pack`] takes and [`unpack`] gives: `u8` and `i8` for widths up to 8 bits, `u16` and `i16` for
/// widths up to 16. Signed ones are two's complement at their width: 4-bit −1 is `0b1111`.
pub trait Packed: Copy + Eq + core::ops::BitOr<Output = Self> + sealed::Sealed {
    /// The widest field, in bits.
    const BITS: u32;
    #[doc(hidden)]
    fn to_i32(self) -> i32;
    #[doc(hidden)]
    fn from_field(field: u32, bits: u32) -> Self;
    /// Nothing but zeros from bit `bits` (of signed types, `bits - 1`) up, if the value fits `bits` bits.
    #[doc(hidden)]
    fn spare(self, bits: u32) -> Self;
    #[doc(hidden)]
    const ZERO: Self;
}

macro_rules! packed {
    ($($t:ident $signed:literal),*) => {$(
        impl sealed::Sealed for $t {}
        impl Packed for $t {
            const BITS: u32 = $t::BITS;
            #[inline(always)]
            fn to_i32(self) -> i32 {
                self.into()
            }
            #[inline(always)]
            fn from_field(field: u32, bits: u32) -> Self {
                // Up to the top and down again: copies the sign, or zeros.
                let shift = $t::BITS - bits;
                (field as $t) << shift >> shift
            }
            #[inline(always)]
            fn spare(self, bits: u32) -> Self {
                // v ^ sign(v) has ones where v differs from its sign; an unsigned number's sign is 0.
                let sign = if $signed { self >> ($t::BITS - 1) } else { 0 };
                let used = bits - u32::from($signed);
                if used < $t::BITS { (self ^ sign) >> used } else { 0 }
            }
            const ZERO: Self = 0;
        }
    )*};
}
packed!(u8 false, i8 true, u16 false, i16 true);

/// How many bytes `count` integers of `bits` bits take: `ceil(count · bits / 8)`.
///
/// ```
/// assert_eq!(lowbit_dtypes::packed_len(10, 3), 4);
/// ```
pub const fn packed_len(count: usize, bits: u32) -> usize {
    // In two parts, since count · bits may not fit.
    let bits = bits as usize;
    (count / 8).saturating_mul(bits).saturating_add((count % 8).saturating_mul(bits).div_ceil(8))
}

fn check_bits<T: Packed>(bits: u32) -> Result<()> {
    if (1..=T::BITS).contains(&bits) {
        Ok(())
    } else {
        Err(Error::BitWidth { max: T::BITS, got: bits })
    }
}

fn check_range<T: Packed>(isa: Isa, bits: u32, values: &[T]) -> Result<()> {
    let mut spare = T::ZERO;
    isa.run(Spare { bits, values, spare: &mut spare });
    if spare != T::ZERO
        && let Some(index) = values.iter().position(|v| v.spare(bits) != T::ZERO)
    {
        return Err(Error::Range { bits, value: values[index].to_i32(), index });
    }
    Ok(())
}

/// The bits that should be zero, of all values; without an exit on the way, so that it vectorizes.
struct Spare<'a, T> {
    bits: u32,
    values: &'a [T],
    spare: &'a mut T,
}

impl<T: Packed> Kernel for Spare<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let mut spare = T::ZERO;
        for v in self.values {
            spare = spare | v.spare(self.bits);
        }
        *self.spare = spare;
    }
}

/// Packs integers of `bits` bits one after the other, least significant bit first: integer i is bits
/// `bits·i .. bits·(i+1)` of `packed`, where bit b is bit `b % 8` of byte `b / 8`.
///
/// The unused bits of the last byte become zero. The order of GPTQ's `qweight` words read as little-endian bytes, of
/// ONNX's 4-bit tensors and of FP4 files (element 2i in the low nibble); for others see [`NibbleOrder`].
///
/// # Errors
/// Before anything is written: [`Error::BitWidth`], [`Error::Length`] unless `packed` has
/// [`packed_len`] bytes, [`Error::Range`] at the first integer that does not fit.
///
/// ```
/// let mut packed = [0; 2];
/// lowbit_dtypes::pack(3, &[1u8, 2, 3, 4], &mut packed)?;
/// assert_eq!(packed, [0b11_010_001, 0b0000_100_0]);
/// # Ok::<(), lowbit_dtypes::Error>(())
/// ```
pub fn pack<T: Packed>(bits: u32, values: &[T], packed: &mut [u8]) -> Result<()> {
    check_bits::<T>(bits)?;
    crate::error::same_length("packed", packed_len(values.len(), bits), packed.len())?;
    let isa = Isa::best();
    check_range(isa, bits, values)?;
    isa.run(Pack { bits, values, packed });
    Ok(())
}

struct Pack<'a, T> {
    bits: u32,
    values: &'a [T],
    packed: &'a mut [u8],
}

impl<T: Packed> Kernel for Pack<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { bits, values, packed } = self;
        match bits {
            1 => pack_width::<T, 1>(values, packed),
            2 => pack_width::<T, 2>(values, packed),
            3 => pack_width::<T, 3>(values, packed),
            4 => pack_width::<T, 4>(values, packed),
            5 => pack_width::<T, 5>(values, packed),
            6 => pack_width::<T, 6>(values, packed),
            7 => pack_width::<T, 7>(values, packed),
            8 => pack_width::<T, 8>(values, packed),
            _ => {
                for (values, bytes) in values.chunks(8).zip(packed.chunks_mut(bits as usize)) {
                    let word = fields::<T>(bits, values);
                    bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
                }
            }
        }
    }
}

/// Up to eight integers in a word; eight are `bits` whole bytes.
#[inline(always)]
fn fields<T: Packed>(bits: u32, values: &[T]) -> u128 {
    let mask = (1 << bits) - 1;
    let mut word = 0;
    for (i, &v) in values.iter().enumerate() {
        word |= u128::from(v.to_i32() as u32 & mask) << (i as u32 * bits);
    }
    word
}

/// [`pack`] for a width known to the compiler, which makes eight integers a few shifts.
#[inline(always)]
fn pack_width<T: Packed, const BITS: usize>(values: &[T], packed: &mut [u8]) {
    let (values, values_rest) = values.as_chunks::<8>();
    let (bytes, bytes_rest) = packed.split_at_mut(values.len() * BITS);
    for (values, bytes) in values.iter().zip(bytes.as_chunks_mut::<BITS>().0) {
        let word = (fields(BITS as u32, values) as u64).to_le_bytes();
        bytes.copy_from_slice(&word[..BITS]);
    }
    let word = fields(BITS as u32, values_rest).to_le_bytes();
    bytes_rest.copy_from_slice(&word[..bytes_rest.len()]);
}

/// The reverse of [`pack`]; the unused bits of the last byte are ignored.
///
/// # Errors
/// Before anything is written: [`Error::BitWidth`], [`Error::Length`] unless `packed` has [`packed_len`] bytes.
///
/// ```
/// let mut values = [0i8; 4];
/// lowbit_dtypes::unpack(3, &[0b11_010_001, 0b0000_100_0], &mut values)?;
/// assert_eq!(values, [1, 2, 3, -4]);
/// # Ok::<(), lowbit_dtypes::Error>(())
/// ```
pub fn unpack<T: Packed>(bits: u32, packed: &[u8], values: &mut [T]) -> Result<()> {
    check_bits::<T>(bits)?;
    crate::error::same_length("packed", packed_len(values.len(), bits), packed.len())?;
    Isa::best().run(Unpack { bits, packed, values });
    Ok(())
}

struct Unpack<'a, T> {
    bits: u32,
    packed: &'a [u8],
    values: &'a mut [T],
}

impl<T: Packed> Kernel for Unpack<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { bits, packed, values } = self;
        match bits {
            1 => unpack_width::<T, 1>(packed, values),
            2 => unpack_width::<T, 2>(packed, values),
            3 => unpack_width::<T, 3>(packed, values),
            4 => unpack_width::<T, 4>(packed, values),
            5 => unpack_width::<T, 5>(packed, values),
            6 => unpack_width::<T, 6>(packed, values),
            7 => unpack_width::<T, 7>(packed, values),
            8 => unpack_width::<T, 8>(packed, values),
            _ => {
                for (values, bytes) in values.chunks_mut(8).zip(packed.chunks(bits as usize)) {
                    from_fields(bits, bytes, values);
                }
            }
        }
    }
}

/// The reverse of [`fields`].
#[inline(always)]
fn from_fields<T: Packed>(bits: u32, bytes: &[u8], values: &mut [T]) {
    let mask = (1 << bits) - 1;
    let mut word = [0; 16];
    word[..bytes.len()].copy_from_slice(bytes);
    let word = u128::from_le_bytes(word);
    for (i, v) in values.iter_mut().enumerate() {
        *v = T::from_field((word >> (i as u32 * bits)) as u32 & mask, bits);
    }
}

/// [`unpack`] for a width known to the compiler.
#[inline(always)]
fn unpack_width<T: Packed, const BITS: usize>(packed: &[u8], values: &mut [T]) {
    let (values, values_rest) = values.as_chunks_mut::<8>();
    let (bytes, bytes_rest) = packed.split_at(values.len() * BITS);
    for (values, bytes) in values.iter_mut().zip(bytes.as_chunks::<BITS>().0) {
        from_fields(BITS as u32, bytes, values);
    }
    from_fields(BITS as u32, bytes_rest, values_rest);
}

/// Where the files of other libraries keep the two halves of a byte.
///
/// The slices of [`pack`](Self::pack) hold one code below 16 a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NibbleOrder {
    /// Byte i: element 2i low, 2i+1 high. ONNX, GPTQ, FP4 of NVIDIA, torchao and OCP. The same as [`pack`].
    LowFirst,
    /// Byte i: element 2i high, 2i+1 low. bitsandbytes.
    HighFirst,
    /// In every block of elements, byte j: element j low, j + block/2 high. ggml, with blocks of 32 (or 16: NVFP4).
    Halves {
        /// Elements in a block; even.
        block: usize,
    },
    /// As `Halves`, the nibbles exchanged. HQQ, with the whole matrix as one block.
    HalvesHighFirst {
        /// Elements in a block; even.
        block: usize,
    },
    /// In every 4 bytes (a little-endian word), nibble i holds element `[0, 2, 4, 6, 1, 3, 5, 7][i]`. AWQ GEMM.
    Awq,
}

impl NibbleOrder {
    /// Elements that the order mixes.
    const fn block(self) -> usize {
        match self {
            Self::LowFirst | Self::HighFirst => 2,
            Self::Halves { block } | Self::HalvesHighFirst { block } => block,
            Self::Awq => 8,
        }
    }

    fn check(self, count: usize, bytes: usize) -> Result<()> {
        let block = self.block();
        let pads = matches!(self, Self::LowFirst | Self::HighFirst);
        if block == 0 || !block.is_multiple_of(2) || (!pads && !count.is_multiple_of(block)) {
            return Err(Error::Block { block, got: count });
        }
        crate::error::same_length("packed", count.div_ceil(2), bytes)
    }

    /// Packs codes below 16 two a byte. A last byte that holds one element has zeros for the other.
    ///
    /// # Errors
    /// Before anything is written: [`Error::Block`] if the elements are not whole blocks (an odd count is fine for
    /// the first two orders) or a block is odd or empty, [`Error::Length`] unless `packed` has half as many bytes as
    /// there are codes, rounded up, [`Error::Range`] at the first code above 15.
    ///
    /// ```
    /// use lowbit_dtypes::NibbleOrder;
    /// let mut packed = [0; 2];
    /// NibbleOrder::HighFirst.pack(&[1, 2, 3], &mut packed)?;
    /// assert_eq!(packed, [0x12, 0x30]);
    /// # Ok::<(), lowbit_dtypes::Error>(())
    /// ```
    pub fn pack(self, codes: &[u8], packed: &mut [u8]) -> Result<()> {
        self.check(codes.len(), packed.len())?;
        let isa = Isa::best();
        check_range(isa, 4, codes)?;
        isa.run(PackNibbles { order: self, codes, packed });
        Ok(())
    }

    /// Where a byte holds the first and the second of its two elements.
    const fn shifts(self) -> (u32, u32) {
        match self {
            Self::LowFirst | Self::Halves { .. } | Self::Awq => (0, 4),
            Self::HighFirst | Self::HalvesHighFirst { .. } => (4, 0),
        }
    }

    /// The reverse of [`pack`](Self::pack).
    ///
    /// # Errors
    /// Before anything is written: [`Error::Block`] and [`Error::Length`], as for [`pack`](Self::pack).
    ///
    /// ```
    /// use lowbit_dtypes::NibbleOrder;
    /// let mut codes = [0; 8];
    /// NibbleOrder::Awq.unpack(&[0x20, 0x64, 0x31, 0x75], &mut codes)?;
    /// assert_eq!(codes, [0, 1, 2, 3, 4, 5, 6, 7]);
    /// # Ok::<(), lowbit_dtypes::Error>(())
    /// ```
    pub fn unpack(self, packed: &[u8], codes: &mut [u8]) -> Result<()> {
        self.check(codes.len(), packed.len())?;
        Isa::best().run(UnpackNibbles { order: self, packed, codes });
        Ok(())
    }
}

struct PackNibbles<'a> {
    order: NibbleOrder,
    codes: &'a [u8],
    packed: &'a mut [u8],
}

impl Kernel for PackNibbles<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { order, codes, packed } = self;
        let (low, high) = order.shifts();
        match order {
            NibbleOrder::LowFirst | NibbleOrder::HighFirst => {
                let (pairs, rest) = codes.as_chunks::<2>();
                for (byte, &[a, b]) in packed.iter_mut().zip(pairs) {
                    *byte = a << low | b << high;
                }
                if let [last] = rest {
                    packed[pairs.len()] = last << low;
                }
            }
            NibbleOrder::Halves { block } | NibbleOrder::HalvesHighFirst { block } => {
                for (codes, bytes) in codes.chunks(block).zip(packed.chunks_mut(block / 2)) {
                    let (a, b) = codes.split_at(block / 2);
                    for ((byte, a), b) in bytes.iter_mut().zip(a).zip(b) {
                        *byte = a << low | b << high;
                    }
                }
            }
            NibbleOrder::Awq => {
                let bytes = packed.as_chunks_mut::<4>().0;
                for (&[a, b, c, d, e, f, g, h], bytes) in codes.as_chunks::<8>().0.iter().zip(bytes)
                {
                    *bytes = [a | c << 4, e | g << 4, b | d << 4, f | h << 4];
                }
            }
        }
    }
}

struct UnpackNibbles<'a> {
    order: NibbleOrder,
    packed: &'a [u8],
    codes: &'a mut [u8],
}

impl Kernel for UnpackNibbles<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { order, packed, codes } = self;
        let (low, high) = order.shifts();
        match order {
            NibbleOrder::LowFirst | NibbleOrder::HighFirst => {
                let (pairs, rest) = codes.as_chunks_mut::<2>();
                for (pair, byte) in pairs.iter_mut().zip(packed) {
                    *pair = [byte >> low & 15, byte >> high & 15];
                }
                if let [last] = rest {
                    *last = packed[pairs.len()] >> low & 15;
                }
            }
            NibbleOrder::Halves { block } | NibbleOrder::HalvesHighFirst { block } => {
                for (codes, bytes) in codes.chunks_mut(block).zip(packed.chunks(block / 2)) {
                    let (a, b) = codes.split_at_mut(block / 2);
                    for ((byte, a), b) in bytes.iter().zip(a).zip(b) {
                        *a = byte >> low & 15;
                        *b = byte >> high & 15;
                    }
                }
            }
            NibbleOrder::Awq => {
                let codes = codes.as_chunks_mut::<8>().0;
                for (codes, &[p, q, r, s]) in codes.iter_mut().zip(packed.as_chunks::<4>().0) {
                    *codes = [p & 15, r & 15, p >> 4, r >> 4, q & 15, s & 15, q >> 4, s >> 4];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_width_packs_bit_by_bit() {
        for bits in 1..=16u32 {
            for count in 0..40usize {
                let values: Vec<u16> = (0..count)
                    .map(|i| {
                        ((i as u32).wrapping_mul(0x9e37_79b9) >> 7) as u16
                            & ((1u32 << bits) - 1) as u16
                    })
                    .collect();
                let mut expected = vec![0u8; (count * bits as usize).div_ceil(8)];
                for (i, v) in values.iter().enumerate() {
                    for b in 0..bits as usize {
                        let at = i * bits as usize + b;
                        expected[at / 8] |= ((v >> b & 1) as u8) << (at % 8);
                    }
                }
                let mut packed = vec![0xff; packed_len(count, bits)];
                pack(bits, &values, &mut packed).unwrap();
                assert_eq!(packed, expected, "{bits} bits, {count} values");
                let mut back = vec![0u16; count];
                unpack(bits, &packed, &mut back).unwrap();
                assert_eq!(back, values);
                if bits <= 8 {
                    let bytes: Vec<u8> = values.iter().map(|&v| v as u8).collect();
                    let mut packed8 = vec![0xff; packed.len()];
                    pack(bits, &bytes, &mut packed8).unwrap();
                    assert_eq!(packed8, packed);
                }
            }
        }
    }

    #[test]
    fn every_signed_value_of_every_width_comes_back() {
        for bits in 1..=16u32 {
            let values: Vec<i16> =
                (-(1i32 << (bits - 1))..1 << (bits - 1)).map(|v| v as i16).collect();
            let mut packed = vec![0; packed_len(values.len(), bits)];
            pack(bits, &values, &mut packed).unwrap();
            let mut back = vec![0i16; values.len()];
            unpack(bits, &packed, &mut back).unwrap();
            assert_eq!(back, values);
        }
        let mut packed = [0];
        pack(4, &[-1i8, -8], &mut packed).unwrap();
        assert_eq!(packed, [0x8f]);
    }

    #[test]
    fn errors_say_what_was_expected_and_write_nothing() {
        let mut out = [7u8; 3];
        assert_eq!(pack(9, &[0u8; 3], &mut out), Err(Error::BitWidth { max: 8, got: 9 }));
        assert_eq!(pack(0, &[0i16; 3], &mut out), Err(Error::BitWidth { max: 16, got: 0 }));
        assert_eq!(
            pack(4, &[0u8; 3], &mut out),
            Err(Error::Length { what: "packed", expected: 2, got: 3 })
        );
        assert_eq!(
            pack(3, &[1u8, 2, 8, 9, 0, 0, 0, 0], &mut out),
            Err(Error::Range { bits: 3, value: 8, index: 2 })
        );
        assert_eq!(
            pack(4, &[0i8, 0, 0, -9, 0], &mut out),
            Err(Error::Range { bits: 4, value: -9, index: 3 })
        );
        assert_eq!(
            NibbleOrder::Awq.pack(&[0; 6], &mut out),
            Err(Error::Block { block: 8, got: 6 })
        );
        assert_eq!(
            NibbleOrder::Halves { block: 0 }.unpack(&[], &mut []),
            Err(Error::Block { block: 0, got: 0 })
        );
        assert_eq!(
            NibbleOrder::HighFirst.pack(&[1, 2, 3, 4, 16, 6], &mut out),
            Err(Error::Range { bits: 4, value: 16, index: 4 })
        );
        assert_eq!(out, [7; 3]);
        assert_eq!(
            Error::BitWidth { max: 8, got: 9 }.to_string(),
            "expected a width of 1 to 8 bits, got 9"
        );
    }

    #[test]
    fn nibble_orders_put_elements_where_their_files_do() {
        let codes: [u8; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
        for (order, expected) in [
            (NibbleOrder::LowFirst, [0x10, 0x32, 0x54, 0x76]),
            (NibbleOrder::HighFirst, [0x01, 0x23, 0x45, 0x67]),
            (NibbleOrder::Halves { block: 8 }, [0x40, 0x51, 0x62, 0x73]),
            (NibbleOrder::Halves { block: 4 }, [0x20, 0x31, 0x64, 0x75]),
            (NibbleOrder::HalvesHighFirst { block: 8 }, [0x04, 0x15, 0x26, 0x37]),
            (NibbleOrder::Awq, [0x20, 0x64, 0x31, 0x75]),
        ] {
            let mut packed = [0xff; 4];
            order.pack(&codes, &mut packed).unwrap();
            assert_eq!(packed, expected, "{order:?}");
            let mut back = [0xff; 8];
            order.unpack(&packed, &mut back).unwrap();
            assert_eq!(back, codes, "{order:?}");
        }
    }

    proptest! {
        #[test]
        fn packing_never_panics_and_what_it_takes_comes_back(
            bits in 0u32..20,
            values in proptest::collection::vec(any::<i8>(), 0..100),
            extra in 0usize..3,
        ) {
            let mut packed = vec![0; packed_len(values.len(), bits) + extra];
            if pack(bits, &values, &mut packed).is_ok() {
                let mut back = vec![0; values.len()];
                unpack(bits, &packed, &mut back).unwrap();
                prop_assert_eq!(values, back);
            }
        }
    }
}
