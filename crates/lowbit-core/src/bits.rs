//! Codes of 1 to 8 bits back to back, the first in the lowest bits of the first byte.
//!
//! Widths and lengths are checked by the callers, which own the shapes.

/// Bytes of `len` codes.
pub(crate) const fn packed_len(len: usize, bits: u8) -> usize {
    (len * bits as usize).div_ceil(8)
}

/// Packs `codes` into exactly `packed_len(codes.len(), bits)` bytes.
pub(crate) fn pack(codes: &[u8], bits: u8, to: &mut [u8]) {
    let (mut buffer, mut filled) = (0_u32, 0);
    let mut to = to.iter_mut();
    for &code in codes {
        buffer |= u32::from(code) << filled;
        filled += bits;
        if filled >= 8 {
            if let Some(byte) = to.next() {
                *byte = buffer as u8;
            }
            buffer >>= 8;
            filled -= 8;
        }
    }
    if let Some(byte) = to.next() {
        *byte = buffer as u8;
    }
}

/// Unpacks as many codes as `to` is long.
pub(crate) fn unpack(packed: &[u8], bits: u8, to: &mut [u8]) {
    let mask = ((1_u16 << bits) - 1) as u8;
    let (mut buffer, mut filled) = (0_u32, 0);
    let mut packed = packed.iter();
    for code in to {
        if filled < bits {
            buffer |= u32::from(packed.next().copied().unwrap_or(0)) << filled;
            filled += 8;
        }
        *code = buffer as u8 & mask;
        buffer >>= bits;
        filled -= bits;
    }
}

/// The code at `index`.
pub(crate) fn get(packed: &[u8], bits: u8, index: usize) -> u8 {
    let bit = index * usize::from(bits);
    let byte = |i: usize| u16::from(packed.get(i).copied().unwrap_or(0));
    let word = byte(bit / 8) | byte(bit / 8 + 1) << 8;
    (word >> (bit % 8)) as u8 & ((1_u16 << bits) - 1) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{vec, vec::Vec};

    #[test]
    fn packing_round_trips_at_every_width_and_length() {
        for bits in 1..=8_u8 {
            for len in 0..40 {
                let mask = ((1_u16 << bits) - 1) as u8;
                let codes: Vec<u8> = (0..len).map(|i| (i * 37 + 11) as u8 & mask).collect();
                let mut packed = vec![0xff; packed_len(len, bits)];
                pack(&codes, bits, &mut packed);
                let mut back = vec![0xff; len];
                unpack(&packed, bits, &mut back);
                assert_eq!(back, codes, "{bits} bits");
                assert!((0..len).all(|i| get(&packed, bits, i) == codes[i]), "{bits} bits");
            }
        }
    }

    #[test]
    fn the_first_code_is_in_the_lowest_bits() {
        let mut packed = [0; 2];
        pack(&[0b001, 0b010, 0b111, 0b100], 3, &mut packed);
        assert_eq!(packed, [0b11_010_001, 0b1001]); // 100_1 11_010_001, read from the right
    }
}
