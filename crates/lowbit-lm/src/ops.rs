//! The arithmetic between the linear layers, on the context's threads. Work is split by shape
//! alone, so that results have the same bits for every thread count.

use lowbit::{Context, MatMut, MatRef};
use pulp::{Arch, NullaryFnOnce};
use rayon::prelude::*;

/// Elements of a piece of work: long enough to be worth a task.
const CHUNK: usize = 1 << 14;

/// Calls `f(i, piece)` for every piece of `chunk` elements.
pub(crate) fn for_chunks<T: Send>(
    ctx: &Context,
    data: &mut [T],
    chunk: usize,
    f: impl Fn(usize, &mut [T]) + Sync,
) {
    let chunk = chunk.max(1);
    match ctx.pool() {
        Some(pool) if data.len() > chunk && pool.current_num_threads() > 1 => {
            pool.install(|| {
                data.par_chunks_mut(chunk).enumerate().for_each(|(i, piece)| f(i, piece));
            });
        }
        _ => data.chunks_mut(chunk).enumerate().for_each(|(i, piece)| f(i, piece)),
    }
}

/// Calls `f(r, row)` for every row of `width` elements, many rows to a task.
pub(crate) fn for_rows(
    ctx: &Context,
    data: &mut [f32],
    width: usize,
    f: impl Fn(usize, &mut [f32]) + Sync,
) {
    let rows = (CHUNK / width.max(1)).max(1);
    for_chunks(ctx, data, rows * width, |i, piece| {
        for (r, row) in piece.chunks_exact_mut(width.max(1)).enumerate() {
            f(i * rows + r, row);
        }
    });
}

/// `y = gain · x / sqrt(mean(x²) + eps)`, row by row.
pub(crate) fn rms_norm(ctx: &Context, x: &[f32], gain: &[f32], eps: f32, y: &mut [f32]) {
    let width = gain.len();
    for_rows(ctx, y, width, |r, y| {
        let x = &x[r * width..][..width];
        let scale = 1.0 / (sum(x, |x| x * x) / width as f32 + eps).sqrt();
        for ((y, x), gain) in y.iter_mut().zip(x).zip(gain) {
            *y = gain * (x * scale);
        }
    });
}

/// `Σ f(x)`, in lanes so that it becomes vector instructions.
#[inline(always)]
fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let (chunks, rest) = x.as_chunks::<16>();
    let mut lanes = [0.0; 16];
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f(x);
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().map(|&x| f(x)).sum::<f32>()
}

/// `exp(x)` to 3e-7 relative, without branches so that it becomes vector instructions. Saturates
/// below −87 and above 88.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding 1.5·2^23 rounds to an integer n, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; n times the first, of 9 bits, is exact
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2[0] - n * LN2[1];
    // Σ r^i / i!, where |r| <= ln 2 / 2
    let tail = 1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0)));
    let fraction = 1.0 + r * (1.0 + r * (0.5 + r * tail));
    fraction * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23)) // · 2^n
}

/// `x += y`.
pub(crate) fn add(ctx: &Context, x: &mut [f32], y: &[f32]) {
    for_chunks(ctx, x, CHUNK, |i, x| {
        x.iter_mut().zip(&y[i * CHUNK..]).for_each(|(x, y)| *x += y);
    });
}

/// `gate = silu(gate) · up` with `silu(g) = g / (1 + exp(−g))`.
pub(crate) fn swiglu(ctx: &Context, gate: &mut [f32], up: &[f32]) {
    // A struct and not a closure, whose `call_once` stays a call compiled for the oldest CPU.
    struct Swiglu<'a>(&'a mut [f32], &'a [f32]);
    impl NullaryFnOnce for Swiglu<'_> {
        type Output = ();

        #[inline(always)]
        fn call(self) {
            for (g, up) in self.0.iter_mut().zip(self.1) {
                *g = *g / (1.0 + exp(-*g)) * up;
            }
        }
    }
    for_chunks(ctx, gate, CHUNK, |i, gate| {
        Arch::new().dispatch(Swiglu(gate, &up[i * CHUNK..]));
    });
}

/// Rotary embedding: in each head of `2·half` numbers the pair `(i, i + half)` of row `r` is turned
/// by the angle whose cosine and sine are `cos[r, i]` and `sin[r, i]`.
pub(crate) fn rope(
    ctx: &Context,
    x: &mut [f32],
    width: usize,
    half: usize,
    (cos, sin): (&[f32], &[f32]),
) {
    for_rows(ctx, x, width, |r, row| {
        let (cos, sin) = (&cos[r * half..][..half], &sin[r * half..][..half]);
        for head in row.chunks_exact_mut(2 * half) {
            let (a, b) = head.split_at_mut(half);
            for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    });
}

/// `x` becomes `exp(x·scale) / Σ exp(x·scale)`.
pub(crate) fn softmax(x: &mut [f32], scale: f32) {
    struct Softmax<'a>(&'a mut [f32], f32);
    impl NullaryFnOnce for Softmax<'_> {
        type Output = ();

        #[inline(always)]
        fn call(self) {
            let Self(x, scale) = self;
            // In lanes too; a maximum does not depend on the order.
            let mut lanes = [f32::NEG_INFINITY; 16];
            let (chunks, rest) = x.as_chunks::<16>();
            for chunk in chunks {
                for (lane, &x) in lanes.iter_mut().zip(chunk) {
                    *lane = if x > *lane { x } else { *lane };
                }
            }
            let max = rest.iter().chain(&lanes).copied().fold(f32::NEG_INFINITY, f32::max);
            for x in x.iter_mut() {
                *x = exp((*x - max) * scale);
            }
            let scale = 1.0 / sum(x, |x| x);
            x.iter_mut().for_each(|x| *x *= scale);
        }
    }
    Arch::new().dispatch(Softmax(x, scale));
}

/// `y = a · bᵀ`, on the calling thread.
pub(crate) fn matmul_transposed(a: MatRef<'_, f32>, b: MatRef<'_, f32>, y: MatMut<'_, f32>) {
    debug_assert_eq!((a.cols(), y.shape()), (b.cols(), (a.rows(), b.rows())));
    let (m, n, k) = (a.rows().min(y.rows()), b.rows().min(y.cols()), a.cols().min(b.cols()));
    multiply((m, n, k), (a.data(), a.row_stride(), 1), (b.data(), 1, b.row_stride()), y);
}

/// `y = a · b`, on the calling thread.
pub(crate) fn matmul(a: MatRef<'_, f32>, b: MatRef<'_, f32>, y: MatMut<'_, f32>) {
    debug_assert_eq!((a.cols(), y.shape()), (b.rows(), (a.rows(), b.cols())));
    let (m, n, k) = (a.rows().min(y.rows()), b.cols().min(y.cols()), a.cols().min(b.rows()));
    multiply((m, n, k), (a.data(), a.row_stride(), 1), (b.data(), b.row_stride(), 1), y);
}

/// Factors are elements, row stride and column stride.
#[allow(unsafe_code, reason = "gemm takes pointers")]
fn multiply(
    (m, n, k): (usize, usize, usize),
    (a, a_row, a_col): (&[f32], usize, usize),
    (b, b_row, b_col): (&[f32], usize, usize),
    mut y: MatMut<'_, f32>,
) {
    if m == 0 || n == 0 || k == 0 {
        return y.iter_rows_mut().for_each(|row| row.fill(0.0));
    }
    let y_row = y.row_stride();
    let y = y.into_data();
    // The last element of each operand; products of its own lengths, so without overflow.
    assert!((m - 1) * a_row + (k - 1) * a_col < a.len());
    assert!((k - 1) * b_row + (n - 1) * b_col < b.len());
    assert!((m - 1) * y_row + (n - 1) < y.len());
    let gemm = gemm_f32::gemm::f32::get_gemm_fn();
    // It is written for column-major results: yᵀ (n, m) = bᵀ (n, k) · aᵀ (k, m).
    // SAFETY: gemm reads b[l·b_row + j·b_col] and a[i·a_row + l·a_col] and writes y[i·y_row + j]
    // for i < m, j < n, l < k: within the slices by the assertions. Rows of y do not overlap
    // because a view's row stride is at least its columns, and y is borrowed mutably, so it
    // overlaps neither a nor b. y is not read (`read_dst` is false).
    unsafe {
        gemm(
            n,
            m,
            k,
            y.as_mut_ptr(),
            y_row as isize, // column stride of yᵀ, then its row stride; so for all operands
            1,
            false,
            b.as_ptr(),
            b_row as isize,
            b_col as isize,
            a.as_ptr(),
            a_row as isize,
            a_col as isize,
            0.0, // y = 0·y + 1·product
            1.0,
            false, // no conjugation
            false,
            false,
            gemm_common::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowbit::Mat;

    #[test]
    fn products_are_right_in_every_shape_and_stride() {
        for (m, n, k) in [(1, 1, 1), (1, 70, 33), (5, 3, 2), (33, 40, 17), (2, 300, 300), (3, 2, 0)]
        {
            let a = Mat::from_fn(m, k + 3, |r, c| ((r * 7 + c * 3) % 11) as f32 - 5.0);
            let b = Mat::from_fn(n, k + 1, |r, c| ((r * 5 + c * 2) % 13) as f32 - 6.0);
            let at = Mat::from_fn(k, n, |r, c| b.as_ref().row(c).unwrap()[r]);
            let a = MatRef::with_row_stride(a.data(), m, k, k + 3).unwrap();
            let b = MatRef::with_row_stride(b.data(), n, k, k + 1).unwrap();
            let expected = Mat::from_fn(m, n, |r, c| {
                let (a, b) = (a.row(r).unwrap(), b.row(c).unwrap());
                a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>()
            });
            for transposed in [true, false] {
                let mut y = vec![f32::NAN; m * (n + 2)];
                let view = MatMut::with_row_stride(&mut y, m, n, n + 2).unwrap();
                match transposed {
                    true => matmul_transposed(a, b, view),
                    false => matmul(a, at.as_ref(), view),
                }
                let got: Vec<f32> = y.chunks(n + 2).flat_map(|y| y[..n].to_vec()).collect();
                assert_eq!(got, expected.data(), "{m} x {n} x {k}");
            }
        }
    }

    #[test]
    fn softmax_sums_to_one_and_survives_large_numbers() {
        let mut x = [1000.0, 1000.0, -1000.0];
        softmax(&mut x, 2.0);
        assert!(x[0] == 0.5 && x[1] == 0.5 && x[2] < 1e-37, "{x:?}");
    }

    #[test]
    fn exp_is_accurate_to_the_last_bits() {
        let mut worst = 0.0_f64;
        for i in -870_000..=880_000 {
            let x = i as f32 / 10_000.0;
            let expected = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / expected - 1.0).abs());
        }
        assert!(worst < 3e-7, "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1e30) < 2e-38 && exp(1e30) > 1e38 && exp(f32::NAN).is_nan());
    }
}
