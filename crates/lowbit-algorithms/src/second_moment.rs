//! `H += xᵀx` on one triangle: products in f32, sums in f64.
//!
//! ```text
//! packed  x of up to 512 tokens as [k/32][tokens][32], zero-padded at the right edge
//! tile    8 x 32 of H (4 x 16 where there are 16 registers): f32 sums of 128 tokens stay in
//!         registers, then each is added to its f64
//! ```
//!
//! Every element is the same chain of fused multiply-adds in the order of the tokens, whatever the
//! vector length: all machines and thread counts give the same bits.

use lowbit_core::{Context, MatRef};
use pulp::{Arch, Simd, WithSimd, bytemuck};
use rayon::prelude::*;

/// Channels of a panel and of a band: a multiple of two vectors of any length.
const PANEL: usize = 32;
/// Tokens that are added in f32 before the sum goes to f64: the error bound is proportional to it.
pub(crate) const CHUNK: usize = 128;
/// Tokens packed at a time, a multiple of [`CHUNK`]: H is read and written once for each of them.
const PACKED: usize = 4 * CHUNK;

/// Where row `r` of a lower triangle begins, which is also how many elements `r` rows have; `None`
/// if that is beyond `usize`.
pub(crate) fn row_start(r: usize) -> Option<usize> {
    // One of r and r + 1 is even.
    let (a, b) = if r.is_multiple_of(2) { (r / 2, r.checked_add(1)?) } else { (r / 2 + 1, r) };
    a.checked_mul(b)
}

/// Adds `xᵀx` to `triangle`, the rows of H up to the diagonal, back to back.
///
/// `x` must be finite, and no sum of [`CHUNK`] squares may overflow f32.
pub(crate) fn add(x: MatRef<'_, f32>, triangle: &mut [f64], ctx: &mut Context) {
    let k = x.cols();
    let pool = ctx.pool().filter(|pool| pool.current_num_threads() > 1).cloned();
    for start in (0..x.rows()).step_by(PACKED) {
        let Some(x) = x.sub_rows(start..x.rows().min(start + PACKED)) else { return };
        let panel = x.rows() * PANEL;
        // Scratch memory is aligned to 64 bytes.
        let scratch = ctx.scratch(k.div_ceil(PANEL) * panel * size_of::<f32>());
        let packed: &mut [f32] = bytemuck::cast_slice_mut(scratch);
        let panels: Vec<_> = packed.chunks_exact_mut(panel).enumerate().collect();
        for_each(pool.as_deref(), panels, |(p, panel)| pack(x, p * PANEL, panel));

        // Bands of rows are contiguous in the triangle. The lowest are the longest: they come first.
        let (packed, mut rest, mut bands) = (&*packed, &mut *triangle, Vec::new());
        for first in (0..k).step_by(PANEL) {
            let rows = rows_of_band(first, k);
            let Some((band, behind)) = rest.split_at_mut_checked(rows) else { return };
            bands.push(Band { packed, panel, first, rows: band });
            rest = behind;
        }
        bands.reverse();
        for_each(pool.as_deref(), bands, |band| Arch::new().dispatch(band));
    }
}

/// Elements of the triangle in the rows from `first` up to the next band, or to the last row.
fn rows_of_band(first: usize, k: usize) -> usize {
    (first..k.min(first + PANEL)).map(|r| r + 1).sum()
}

/// Calls `f` for each task, on the pool if there is one. Tasks share nothing that is written.
fn for_each<T: Send>(pool: Option<&rayon::ThreadPool>, tasks: Vec<T>, f: impl Fn(T) + Sync + Send) {
    match pool {
        Some(pool) => pool.install(|| tasks.into_par_iter().with_max_len(1).for_each(f)),
        None => tasks.into_iter().for_each(f),
    }
}

/// Copies the channels from `first` on; those behind the last are zeros.
fn pack(x: MatRef<'_, f32>, first: usize, panel: &mut [f32]) {
    for (x, to) in x.iter_rows().zip(panel.chunks_exact_mut(PANEL)) {
        let x = x.get(first..).unwrap_or(&[]);
        let (from, rest) = to.split_at_mut(x.len().min(PANEL));
        from.copy_from_slice(&x[..from.len()]);
        rest.fill(0.0);
    }
}

/// The rows `first..first + PANEL` of H, up to the diagonal.
struct Band<'a> {
    packed: &'a [f32],
    /// Elements of a panel.
    panel: usize,
    first: usize,
    rows: &'a mut [f64],
}

impl WithSimd for Band<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Two vectors a row; as many rows as leave registers for the factors.
        if S::REGISTER_COUNT >= 32 { self.add::<S, 8>(simd) } else { self.add::<S, 4>(simd) }
    }
}

impl Band<'_> {
    #[inline(always)]
    fn add<S: Simd, const ROWS: usize>(self, simd: S) {
        let Self { packed, panel, first, rows: h } = self;
        let a = packed.get(first / PANEL * panel..).unwrap_or(&[]);
        for (j, b) in packed.chunks_exact(panel).take(first / PANEL + 1).enumerate() {
            // Chunks of tokens: both lie in the first cache then, and so does the tile of H.
            for (a, b) in a.chunks(CHUNK * PANEL).zip(b.chunks(CHUNK * PANEL)) {
                for r in (0..PANEL).step_by(ROWS) {
                    for c in (0..PANEL).step_by(2 * S::F32_LANES) {
                        let sums = products::<S, ROWS>(simd, a, b, r, c);
                        for (r, sums) in (r..).zip(&sums) {
                            let start = r * first + (1..=r).sum::<usize>();
                            // Behind the last channel there is no row.
                            let Some(row) = h.get_mut(start..start + first + r + 1) else { break };
                            // Beyond the diagonal there is no column.
                            let Some(row) = row.get_mut(j * PANEL + c..) else { continue };
                            let sums: &[f32] = bytemuck::cast_slice(sums);
                            for (h, &sum) in row.iter_mut().zip(sums) {
                                *h += f64::from(sum);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// `Σ_t a[t, r..r + ROWS]ᵀ · b[t, c..c + two vectors]` in f32, tokens in order.
#[inline(always)]
fn products<S: Simd, const ROWS: usize>(
    simd: S,
    a: &[f32],
    b: &[f32],
    r: usize,
    c: usize,
) -> [[S::f32s; 2]; ROWS] {
    let mut sums = [[simd.splat_f32s(0.0); 2]; ROWS];
    for (a, b) in a.as_chunks::<PANEL>().0.iter().zip(b.as_chunks::<PANEL>().0) {
        let (Some(a), [b0, b1, ..]) = (a[r..].first_chunk::<ROWS>(), S::as_simd_f32s(&b[c..]).0)
        else {
            break; // never: r + ROWS and c + two vectors are at most PANEL
        };
        for (sums, &a) in sums.iter_mut().zip(a) {
            let a = simd.splat_f32s(a);
            sums[0] = simd.mul_add_f32s(a, *b0, sums[0]);
            sums[1] = simd.mul_add_f32s(a, *b1, sums[1]);
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowbit_core::Mat;

    #[test]
    fn rows_begin_where_triangles_end() {
        assert_eq!([0, 1, 2, 3, 4].map(row_start), [0, 1, 3, 6, 10].map(Some));
        for first in [0, PANEL, 7 * PANEL] {
            for k in first + 1..first + 40 {
                let end = k.min(first + PANEL);
                let rows = row_start(end).unwrap() - row_start(first).unwrap();
                assert_eq!(rows_of_band(first, k), rows);
            }
        }
        assert_eq!(row_start(usize::MAX), None);
        assert!(row_start(1 << (usize::BITS / 2)).is_some());
    }

    #[test]
    fn every_vector_length_gives_the_same_bits() {
        let (tokens, k) = (2 * CHUNK + 7, 3 * PANEL);
        let x = Mat::from_fn(tokens, k, |r, c| ((r * 37 + c * 101) as f32).sin() * 0.3);
        let mut expected = vec![0.0; row_start(k).unwrap()];
        for (i, h) in expected.iter_mut().enumerate() {
            let r = (0..k).find(|r| i < row_start(r + 1).unwrap()).unwrap();
            let c = i - row_start(r).unwrap();
            for rows in x.data().chunks(CHUNK * k) {
                let products = rows.chunks(k).fold(0.0_f32, |sum, x| x[r].mul_add(x[c], sum));
                *h += f64::from(products);
            }
        }
        let panel = tokens * PANEL;
        let mut packed = vec![0.0; panel * k / PANEL];
        for (p, panel) in packed.chunks_mut(panel).enumerate() {
            pack(x.as_ref(), p * PANEL, panel);
        }
        let run = |name: &str, f: &dyn Fn(Band<'_>)| {
            let mut h = vec![0.0; expected.len()];
            for first in (0..k).step_by(PANEL) {
                let rows = row_start(first).unwrap()..row_start(first + PANEL).unwrap();
                f(Band { packed: &packed, panel, first, rows: &mut h[rows] });
            }
            assert!(h == expected, "{name}");
        };
        run("best", &|band| Arch::new().dispatch(band));
        run("scalar", &|band| band.with_simd(pulp::Scalar::new()));
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(simd) = pulp::x86::V2::try_new() {
                run("v2", &|band| Simd::vectorize(simd, band));
            }
            if let Some(simd) = pulp::x86::V3::try_new() {
                run("v3", &|band| Simd::vectorize(simd, band));
            }
            if let Some(simd) = pulp::x86::V4::try_new() {
                run("v4", &|band| Simd::vectorize(simd, band));
            }
        }
        let mut h = vec![0.0; expected.len()];
        add(x.as_ref(), &mut h, &mut Context::new());
        assert!(h == expected);
    }
}
