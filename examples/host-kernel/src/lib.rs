//! A host with a kernel of its own: `c = a·bᵀ` of u8 activations and i8 weights, the way AVX2 does it.
//!
//! There are two versions. [`gemm_fast`] has the bug that nearly every AVX2 kernel had at first;
//! [`gemm`] is right. `tests/kernel.rs` holds both against the reference of `lowbit`.
//!
//! The instructions are emulated in plain Rust, so that the bug is there on every machine.

/// `vpmaddubsw`: products of 32 unsigned and 32 signed bytes, neighbours added in 16 bits with
/// saturation.
fn maddubs(a: &[u8; STEP], b: &[i8; STEP]) -> [i16; STEP / 2] {
    std::array::from_fn(|i| {
        let product = |i: usize| i32::from(a[i]) * i32::from(b[i]);
        let sum = product(2 * i) + product(2 * i + 1);
        sum.clamp(i16::MIN.into(), i16::MAX.into()) as i16
    })
}

/// `vpmaddwd` by ones: neighbours added in 32 bits.
fn widen(x: [i16; STEP / 2]) -> [i32; STEP / 4] {
    std::array::from_fn(|i| i32::from(x[2 * i]) + i32::from(x[2 * i + 1]))
}

/// Bytes of a vector register.
const STEP: usize = 32;

/// The next step of a row, padded with zeros.
fn load<T: Copy + Default>(row: &[T]) -> [T; STEP] {
    std::array::from_fn(|i| row.get(i).copied().unwrap_or_default())
}

/// A step's 32 products, in eight sums.
type Dot = fn(&[u8; STEP], &[i8; STEP]) -> [i32; STEP / 4];

/// `c[i][j] = Σ a[i][l]·b[j][l]`: `a` has rows of `k`, `b` too, `c` has rows of as many as `b` has.
fn gemm_with(dot: Dot, a: &[u8], b: &[i8], c: &mut [i32], k: usize) {
    let n = b.len().checked_div(k).unwrap_or(0);
    if n == 0 {
        c.fill(0);
        return;
    }
    for (a, c) in a.chunks(k).zip(c.chunks_mut(n)) {
        for (b, c) in b.chunks(k).zip(c) {
            let mut sums = [0; STEP / 4];
            for (a, b) in a.chunks(STEP).zip(b.chunks(STEP)) {
                for (sum, dot) in sums.iter_mut().zip(dot(&load(a), &load(b))) {
                    *sum += dot;
                }
            }
            *c = sums.iter().sum();
        }
    }
}

/// The kernel with the bug: 255·127 + 255·127 = 64770 does not fit 16 bits.
pub fn gemm_fast(a: &[u8], b: &[i8], c: &mut [i32], k: usize) {
    gemm_with(|a, b| widen(maddubs(a, b)), a, b, c, k);
}

/// The kernel without it: the low seven bits and the high one on their own.
///
/// 127·127 + 127·127 = 32258 and 128·−128 + 128·−128 = −32768 fit.
pub fn gemm(a: &[u8], b: &[i8], c: &mut [i32], k: usize) {
    let dot: Dot = |a, b| {
        let (low, high) =
            (widen(maddubs(&a.map(|a| a & 127), b)), widen(maddubs(&a.map(|a| a & 128), b)));
        std::array::from_fn(|i| low[i] + high[i])
    };
    gemm_with(dot, a, b, c, k);
}
