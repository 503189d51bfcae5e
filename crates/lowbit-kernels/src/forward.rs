//! `PackedLinear::forward`: quantize or pad the activations once, then compute the tiles of the
//! output in any order on the caller's threads.

use std::ops::Range;

use lowbit_core::{
    ActivationScales, ActivationScheme, ActivationType, Context, Error, Linear, MatMut, MatRef,
    Outliers, Result, check_shapes, encode_row_int8, encode_row_uint8, group_sums,
    quantize_row_int8, quantize_row_uint8, range::min_max,
};
use rayon::prelude::*;

use crate::{
    packed::{PackedLinear, has_zeros_or_groups},
    tile::{Int8Row, MR, NR, Panel},
};

/// Multiplications below which handing out tasks costs more than it gains.
const PARALLEL_WORK: usize = if cfg!(test) { 1 } else { 1 << 19 };

/// Bytes of activations that a kernel keeps in L2 at most: half of what CPUs with AMX have.
const KEPT: usize = 1 << 20;

impl Linear for PackedLinear {
    fn in_features(&self) -> usize {
        self.shape().1
    }

    fn out_features(&self) -> usize {
        self.shape().0
    }

    fn forward(&self, x: MatRef<'_, f32>, mut y: MatMut<'_, f32>, ctx: &mut Context) -> Result<()> {
        check_shapes(self, x, &y)?;
        let (n, k) = self.shape();
        if x.rows() == 0 || n == 0 {
            return Ok(());
        }
        let work = x.rows().saturating_mul(n).saturating_mul(k);
        let pool = ctx.pool().filter(|_| work >= PARALLEL_WORK).cloned();
        let threads = Threads(pool.as_deref());
        if self.transforms().is_empty() {
            self.multiply(x, y.reborrow(), ctx, threads)?;
        } else {
            // [T(x); m, k][spare; m, k], or pairs of rows
            let mut rows = ctx.take_rows(2 * x.rows() * k);
            let result = self.transform(x, &mut rows, threads).and_then(|()| {
                let transformed = MatRef::with_row_stride(&rows, x.rows(), k, 2 * k)?;
                self.multiply(transformed, y.reborrow(), ctx, threads)
            });
            ctx.give_back_rows(rows);
            result?;
        }
        match self.adapter() {
            Some(adapter) => add_rows(x, y, threads, |x, y| adapter.add(x, y)),
            None => Ok(()),
        }
    }
}

impl PackedLinear {
    /// Writes `T(x)` to the first half of each `2·k` numbers of `to`.
    fn transform(&self, x: MatRef<'_, f32>, to: &mut [f32], threads: Threads<'_>) -> Result<()> {
        for (row, x) in x.iter_rows().enumerate().filter(|_| self.activation().is_some()) {
            // Behind a transform, its place in the input would be unknown.
            if let Some(col) = x.iter().position(|x| !x.is_finite()) {
                return Err(Error::NotFinite { what: "activation", row, col });
            }
        }
        threads.chunks(to, 2 * x.cols(), |row, to| {
            let (to, spare) = to.split_at_mut(x.cols());
            to.copy_from_slice(x.row(row).unwrap_or(&[]));
            for transform in self.transforms() {
                // Packing has seen that it is of this width.
                let _ = transform.apply(to, spare);
            }
        });
        Ok(())
    }

    /// `y = Q·x + S·x + bias`.
    fn multiply(
        &self,
        x: MatRef<'_, f32>,
        mut y: MatMut<'_, f32>,
        ctx: &mut Context,
        threads: Threads<'_>,
    ) -> Result<()> {
        match self.activation() {
            None => self.forward_f32(x, y.reborrow(), ctx, threads)?,
            Some(scheme) => {
                let known = match scheme.scales {
                    ActivationScales::Static { scale, zero_point } => Some((scale, zero_point)),
                    ActivationScales::PerTensor => {
                        Some(tensor_params(scheme.dtype, x, self.outlier_features())?)
                    }
                    _ => None,
                };
                self.forward_int8(x, y.reborrow(), ctx, threads, Quantizer { scheme, known })?;
            }
        }
        match self.sparse() {
            Some(sparse) => add_rows(x, y, threads, |x, y| sparse.add(x, y)),
            None => Ok(()),
        }
    }

    fn forward_f32(
        &self,
        x: MatRef<'_, f32>,
        y: MatMut<'_, f32>,
        ctx: &mut Context,
        threads: Threads<'_>,
    ) -> Result<()> {
        let (m, width) = (x.rows(), self.padded_k());
        let padded: &mut [f32] = bytemuck::cast_slice_mut(ctx.scratch(m * width * 4));
        threads.chunks(padded, width, |row, to| {
            pad(x.row(row).unwrap_or(&[]), to, self.group().0, self.padded_group());
        });
        let padded = &*padded;
        self.tiles(y, threads, |panel, rows, out| {
            let mut x = [&[][..]; MR];
            for (x, row) in x.iter_mut().zip(rows.clone()) {
                *x = &padded[row * width..][..width];
            }
            self.microkernel().f32(panel, &x[..rows.len()], out);
        });
        Ok(())
    }

    fn forward_int8(
        &self,
        x: MatRef<'_, f32>,
        mut y: MatMut<'_, f32>,
        ctx: &mut Context,
        threads: Threads<'_>,
        quantizer: Quantizer,
    ) -> Result<()> {
        let m = x.rows();
        let layout = RowLayout {
            width: self.padded_k(),
            groups: self.group().1,
            affine: has_zeros_or_groups(quantizer.scheme),
        };
        // A row of scratch: its quantized form and, with outliers, [x without them f32; k].
        let quantized = layout.bytes();
        let rest = if self.outlier_features().is_some() { 4 * x.cols() } else { 0 };
        let stride = quantized + rest.next_multiple_of(64);
        let scratch = ctx.scratch(m * stride);
        let quantize = |row: usize, to: &mut [u8]| {
            let (to, rest) = to.split_at_mut(quantized);
            let mut to = layout.split_mut(to);
            // NaN marks a row that could not be quantized.
            let x = x.row(row).unwrap_or(&[]);
            let x = match self.outlier_features() {
                None => x,
                Some(outliers) => {
                    let rest = bytemuck::cast_slice_mut(&mut rest[..4 * x.len()]);
                    without(outliers, x, rest);
                    rest
                }
            };
            *to.scale = self.quantize_row(x, quantizer, &mut to).unwrap_or(f32::NAN);
        };
        threads.chunks(scratch, stride, quantize);

        let row = |row: usize| layout.split(&scratch[row * stride..][..quantized]);
        for (r, x) in x.iter_rows().enumerate() {
            if row(r).0.is_nan() {
                let col = x.iter().position(|x| !x.is_finite()).unwrap_or(0);
                return Err(Error::NotFinite { what: "activation", row: r, col });
            }
        }
        self.tiles(y.reborrow(), threads, |panel, rows, out| {
            let mut a = [Int8Row::default(); MR];
            let mut scales = [0.0; MR];
            for ((a, scale), r) in a.iter_mut().zip(&mut scales).zip(rows.clone()) {
                (*scale, *a) = row(r);
            }
            self.microkernel().int8(panel, &a[..rows.len()], out);
            for (out, scale) in out.iter_mut().zip(scales) {
                for y in out {
                    *y *= scale;
                }
            }
        });
        if let Some(outliers) = self.outlier_features() {
            self.add_outliers(outliers, x, y, ctx, threads);
        }
        Ok(())
    }

    /// `y += x_j·w_j` for every outlier, feature by feature in ascending order.
    fn add_outliers(
        &self,
        outliers: &Outliers,
        x: MatRef<'_, f32>,
        mut y: MatMut<'_, f32>,
        ctx: &mut Context,
        threads: Threads<'_>,
    ) {
        /// Features whose weights are dequantized at a time.
        const BATCH: usize = 16;
        let ((m, n), k) = (y.shape(), x.cols());
        // [is a feature an outlier in some row u8; k][weights f32; BATCH, n]
        let scratch = ctx.scratch(k.next_multiple_of(64) + 4 * BATCH * n);
        let (marks, w) = scratch.split_at_mut(k.next_multiple_of(64));
        let (marks, w) = (&mut marks[..k], bytemuck::cast_slice_mut::<_, f32>(w));
        marks.fill(0);
        match outliers {
            Outliers::Columns(known) => known.columns().iter().for_each(|&j| marks[j] = 1),
            Outliers::Threshold(threshold) => {
                for x in x.iter_rows() {
                    pulp::Arch::new().dispatch(Mark { x, threshold: *threshold, marks });
                }
            }
            _ => return, // packing refuses what it does not know
        }
        let mut marked = (0..k).filter(|&j| marks[j] != 0).peekable();
        let mut index = 0;
        while marked.peek().is_some() {
            let mut batch = [0; BATCH];
            let mut count = 0;
            for (j, w) in marked.by_ref().take(BATCH).zip(w.chunks_mut(n)) {
                match outliers {
                    Outliers::Columns(known) => {
                        let row = known.weight().as_ref().row(index).unwrap_or(&[]);
                        w.iter_mut().zip(row).for_each(|(w, value)| *w = value.to_f32());
                    }
                    _ => self.column(j, w),
                }
                batch[count] = j;
                count += 1;
                index += 1;
            }
            let (w, stride) = (&*w, y.row_stride());
            threads.chunks(y.reborrow().into_data(), stride, |row, y| {
                let Some(x) = x.row(row).filter(|_| row < m) else { return };
                for (&j, w) in batch[..count].iter().zip(w.chunks(n)) {
                    if outliers.contains(j, x[j]) {
                        pulp::Arch::new().dispatch(Add { x: x[j], w, y: &mut y[..n] });
                    }
                }
            });
        }
    }

    /// Quantizes a row and spreads its groups to whole steps. Gives the scale of the row, which is 1 if
    /// each group has its own.
    fn quantize_row(&self, x: &[f32], quantizer: Quantizer, to: &mut RowMut<'_>) -> Result<f32> {
        let ((group_size, groups), padded) = (self.group(), self.padded_group());
        let shared = match quantizer.scheme.scales {
            ActivationScales::PerTokenGroup(shared) => Some(shared),
            _ => None,
        };
        let chunk = shared.unwrap_or(x.len()).max(1);
        let chunk_groups = chunk.div_ceil(group_size);
        let (codes, rest) = to.codes.split_at_mut(x.len());
        rest.fill(0);
        let mut row_scale = 1.0;
        for (i, (x, codes)) in x.chunks(chunk).zip(codes.chunks_mut(chunk)).enumerate() {
            let (scale, zero) = quantizer.encode(x, codes)?;
            let group_scale = match shared {
                Some(_) => scale,
                None => std::mem::replace(&mut row_scale, scale),
            };
            if !to.zeros.is_empty() {
                let these = i * chunk_groups..groups.min((i + 1) * chunk_groups);
                to.zeros[these.clone()].fill(zero);
                to.scales[these].fill(group_scale);
            }
        }
        group_sums(codes, group_size, to.sums);
        if padded != group_size {
            // From the last group backwards, so that none is overwritten before it has moved.
            for g in (0..groups).rev() {
                let (from, start) = (g * group_size, g * padded);
                let len = group_size.min(x.len() - from);
                to.codes.copy_within(from..from + len, start);
                let end = to.codes.len().min(start + padded);
                to.codes[start + len..end].fill(0);
            }
        }
        Ok(row_scale)
    }

    /// Rows of a task: equal parts of `m`, as near as calls of the kernel's rows allow.
    fn task_rows(&self, m: usize) -> usize {
        let kernel = self.microkernel();
        let mut most = kernel.task_rows;
        if kernel.keeps_rows {
            let bytes = if self.activation().is_some() { 1 } else { 4 };
            most = (KEPT / (bytes * self.padded_k()).max(1)).clamp(kernel.rows, most);
        }
        m.div_ceil(m.div_ceil(most).max(1)).max(1).next_multiple_of(kernel.rows)
    }

    /// Computes every tile of `y`: `tile(panel, rows, out)` fills `out`, to which the bias is added.
    fn tiles(
        &self,
        y: MatMut<'_, f32>,
        threads: Threads<'_>,
        tile: impl Fn(&Panel<'_>, Range<usize>, &mut [[f32; NR]]) + Sync,
    ) {
        let ((m, n), stride) = (y.shape(), y.row_stride());
        let y = Columns { start: y.into_data().as_mut_ptr(), stride, m, n };
        let kernel = self.microkernel();
        let task_rows = self.task_rows(m);
        let (panels, row_tasks) = (n.div_ceil(NR), m.div_ceil(task_rows));
        threads.each(panels * row_tasks, |task| {
            let (panel, row_task) = if kernel.keeps_rows {
                (task % panels, task / panels)
            } else {
                (task / row_tasks, task % row_tasks)
            };
            let first = row_task * task_rows;
            let cols = panel * NR..n.min(panel * NR + NR);
            let bias = self.bias().map(|bias| &bias[cols.clone()]);
            let last = m.min(first + task_rows);
            let mut codes = self.panel(panel);
            let next: &[u8] = if kernel.keeps_rows && panel + 1 < panels {
                self.panel(panel + 1).codes
            } else {
                &[]
            };
            for row in (first..last).step_by(kernel.rows) {
                let rows = row..last.min(row + kernel.rows);
                let mut out = [[0.0; NR]; MR];
                let part = |row: usize| next.len() * (row - first) / (last - first);
                codes.next = &next[part(rows.start)..part(rows.end)];
                tile(&codes, rows.clone(), &mut out[..rows.len()]);
                for (row, out) in rows.zip(&out) {
                    #[allow(
                        unsafe_code,
                        reason = "tasks write to interleaved columns of the same rows"
                    )]
                    // SAFETY: row < m and cols.end <= n; no other task has this panel's columns of
                    // these rows.
                    let y = unsafe { y.part(row, cols.clone()) };
                    match bias {
                        Some(bias) => {
                            for ((y, out), bias) in y.iter_mut().zip(out).zip(bias) {
                                *y = out + bias;
                            }
                        }
                        None => y.copy_from_slice(&out[..y.len()]),
                    }
                }
            }
        });
    }
}

/// Calls `add` with each row of `x` and of `y`.
fn add_rows(
    x: MatRef<'_, f32>,
    y: MatMut<'_, f32>,
    threads: Threads<'_>,
    add: impl Fn(MatRef<'_, f32>, MatMut<'_, f32>) -> Result<()> + Sync,
) -> Result<()> {
    let ((m, n), stride) = (y.shape(), y.row_stride());
    threads.chunks(y.into_data(), stride, |row, y| {
        let Some(x) = x.sub_rows(row..row + 1).filter(|_| row < m) else { return };
        if let Ok(y) = MatMut::new(&mut y[..n], 1, n) {
            let _ = add(x, y); // shapes have been checked
        }
    });
    Ok(())
}

/// How rows become integers.
#[derive(Clone, Copy)]
struct Quantizer {
    scheme: ActivationScheme,
    /// Scale and zero-point, where they do not depend on the row.
    known: Option<(f32, u8)>,
}

impl Quantizer {
    /// Quantizes numbers that share a scale. Gives it, and what the codes count from.
    ///
    /// Codes of uint8 are stored as `code − 128`, which kernels multiply as they do those of int8.
    fn encode(self, x: &[f32], codes: &mut [i8]) -> Result<(f32, i32)> {
        match (self.scheme.dtype, self.known) {
            (ActivationType::UInt8, known) => {
                let unsigned: &mut [u8] = bytemuck::cast_slice_mut(codes);
                let (scale, zero) = match known {
                    None => quantize_row_uint8(x, unsigned)?,
                    Some((scale, zero)) => {
                        encode_row_uint8(x, scale, zero, unsigned)?;
                        (scale, zero)
                    }
                };
                for code in unsigned {
                    *code ^= 128;
                }
                Ok((scale, i32::from(zero) - 128))
            }
            (_, None) => Ok((quantize_row_int8(x, codes)?, 0)),
            (_, Some((scale, _))) => {
                encode_row_int8(x, scale, codes)?;
                Ok((scale, 0))
            }
        }
    }
}

/// A quantized row in scratch memory:
/// `[codes i8; width][scale f32][sums i32; groups][zeros i32; groups][scales f32; groups]`, zeros and
/// scales only if `affine`. The codes begin with a cache line.
#[derive(Clone, Copy)]
struct RowLayout {
    width: usize,
    groups: usize,
    affine: bool,
}

struct RowMut<'a> {
    codes: &'a mut [i8],
    scale: &'a mut f32,
    sums: &'a mut [i32],
    zeros: &'a mut [i32],
    scales: &'a mut [f32],
}

impl RowLayout {
    /// A multiple of a cache line.
    fn bytes(self) -> usize {
        (self.width + 4 + 4 * (self.groups + 2 * self.extra())).next_multiple_of(64)
    }

    fn extra(self) -> usize {
        if self.affine { self.groups } else { 0 }
    }

    fn split_mut(self, row: &mut [u8]) -> RowMut<'_> {
        let (codes, row) = row.split_at_mut(self.width);
        let (scale, row) = row.split_at_mut(4);
        let (sums, row) = row.split_at_mut(4 * self.groups);
        let (zeros, row) = row.split_at_mut(4 * self.extra());
        RowMut {
            codes: bytemuck::cast_slice_mut(codes),
            scale: bytemuck::from_bytes_mut(scale),
            sums: bytemuck::cast_slice_mut(sums),
            zeros: bytemuck::cast_slice_mut(zeros),
            scales: bytemuck::cast_slice_mut(&mut row[..4 * self.extra()]),
        }
    }

    /// The scale of the row, and the rest.
    fn split(self, row: &[u8]) -> (f32, Int8Row<'_>) {
        let (codes, row) = row.split_at(self.width);
        let (scale, row) = row.split_at(4);
        let (sums, row) = row.split_at(4 * self.groups);
        let (zeros, row) = row.split_at(4 * self.extra());
        let row = Int8Row {
            codes: bytemuck::cast_slice(codes),
            sums: bytemuck::cast_slice(sums),
            zeros: bytemuck::cast_slice(zeros),
            scales: bytemuck::cast_slice(&row[..4 * self.extra()]),
        };
        (*bytemuck::from_bytes(scale), row)
    }
}

/// Scale and zero-point that all rows share, known outlier features left out. (Packing has refused a
/// threshold beside them.)
fn tensor_params(
    dtype: ActivationType,
    x: MatRef<'_, f32>,
    outliers: Option<&Outliers>,
) -> Result<(f32, u8)> {
    let known = match outliers {
        Some(Outliers::Columns(known)) => known.columns(),
        _ => &[],
    };
    let mut all = (0.0_f32, 0.0_f32);
    for (row, x) in x.iter_rows().enumerate() {
        // What lies between one of them and the next; they too must be finite.
        let mut start = 0;
        for end in known.iter().copied().chain([x.len()]) {
            let outlier = x.get(end).is_none_or(|x| x.is_finite());
            let between = x.get(start..end).filter(|between| !between.is_empty());
            match between.map(min_max).transpose() {
                Ok(range) if outlier => {
                    let (lo, hi) = range.unwrap_or_default();
                    all = (all.0.min(lo), all.1.max(hi));
                }
                _ => {
                    let col = x.iter().position(|x| !x.is_finite()).unwrap_or(0);
                    return Err(Error::NotFinite { what: "activation", row, col });
                }
            }
            start = end + 1;
        }
    }
    dtype.params(all)
}

/// `y += x·w`, product and sum each rounded.
struct Add<'a> {
    x: f32,
    w: &'a [f32],
    y: &'a mut [f32],
}

impl pulp::NullaryFnOnce for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (y, w) in self.y.iter_mut().zip(self.w) {
            *y += self.x * w;
        }
    }
}

/// Marks the features of `x` that are outliers.
struct Mark<'a> {
    x: &'a [f32],
    threshold: f32,
    marks: &'a mut [u8],
}

impl pulp::NullaryFnOnce for Mark<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (mark, x) in self.marks.iter_mut().zip(self.x) {
            *mark |= u8::from(x.abs() >= self.threshold);
        }
    }
}

/// Copies a row with zeros in place of its outliers. What is not finite stays, to be refused.
fn without(outliers: &Outliers, x: &[f32], to: &mut [f32]) {
    match outliers {
        Outliers::Threshold(threshold) => {
            pulp::Arch::new().dispatch(Without { x, threshold: *threshold, to });
        }
        Outliers::Columns(known) => {
            to.copy_from_slice(x);
            for &j in known.columns() {
                if x[j].is_finite() {
                    to[j] = 0.0;
                }
            }
        }
        _ => to.copy_from_slice(x),
    }
}

struct Without<'a> {
    x: &'a [f32],
    threshold: f32,
    to: &'a mut [f32],
}

impl pulp::NullaryFnOnce for Without<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (to, &x) in self.to.iter_mut().zip(self.x) {
            let outlier = x.abs() >= self.threshold && x.abs() < f32::INFINITY;
            *to = if outlier { 0.0 } else { x };
        }
    }
}

/// Copies a row so that each group starts at a multiple of `padded`, with zeros between.
fn pad(x: &[f32], to: &mut [f32], group_size: usize, padded: usize) {
    for (x, to) in x.chunks(group_size).zip(to.chunks_mut(padded)) {
        let (values, rest) = to.split_at_mut(x.len());
        values.copy_from_slice(x);
        rest.fill(0.0);
    }
}

/// The caller's threads, or none.
#[derive(Clone, Copy)]
struct Threads<'a>(Option<&'a rayon::ThreadPool>);

impl Threads<'_> {
    fn each(self, tasks: usize, f: impl Fn(usize) + Sync) {
        match self.0 {
            Some(pool) => pool.install(|| (0..tasks).into_par_iter().for_each(&f)),
            None => (0..tasks).for_each(f),
        }
    }

    fn chunks<T: Send>(self, data: &mut [T], len: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        match self.0 {
            Some(pool) => pool.install(|| {
                data.par_chunks_mut(len.max(1)).enumerate().for_each(|(i, chunk)| f(i, chunk));
            }),
            None => data.chunks_mut(len.max(1)).enumerate().for_each(|(i, chunk)| f(i, chunk)),
        }
    }
}

/// A matrix whose parts different tasks write.
struct Columns {
    start: *mut f32,
    stride: usize,
    m: usize,
    n: usize,
}

#[allow(unsafe_code, reason = "tasks write to interleaved columns of the same rows")]
// SAFETY: `part` asks its callers to keep the parts apart.
unsafe impl Sync for Columns {}

impl Columns {
    /// Columns `cols` of `row`.
    ///
    /// # Safety
    /// `row < m`, `cols.end <= n`, and nobody else uses these elements meanwhile.
    #[allow(unsafe_code, reason = "tasks write to interleaved columns of the same rows")]
    #[allow(clippy::mut_from_ref, reason = "the caller keeps the parts apart")]
    unsafe fn part(&self, row: usize, cols: Range<usize>) -> &mut [f32] {
        debug_assert!(row < self.m && cols.end <= self.n);
        // SAFETY: MatMut has checked that `m` rows of `n` elements at this stride are in bounds.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.start.add(row * self.stride + cols.start),
                cols.len(),
            )
        }
    }
}
