//! `PackedLinear::forward_to`: quantize or pad the activations once, then compute the tiles of the
//! output in any order on the caller's threads.

use std::{ops::Range, sync::Arc};

use lowbit_core::{
    ActivationScales, ActivationScheme, Context, Error, Linear, MatMut, MatRef, Outliers, Result,
};
use lowbit_dtypes::{Overflow, Rounding, SmallFloat, bf16, encode_slice, f16};
use rayon::{ThreadPool, prelude::*};

use crate::{
    io::{Input, Output},
    isa::Bf16Kernel,
    packed::{Compute, PackedLinear, has_zeros_or_groups},
    panel::{NR, Panel},
    rows::{Quantizer, RowLayout, tensor_params},
    tile::{Int8Row, MR},
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

    fn forward(&self, x: MatRef<'_, f32>, y: MatMut<'_, f32>, ctx: &mut Context) -> Result<()> {
        self.forward_to(x, y, ctx)
    }

    fn as_any(&self) -> Option<&dyn std::any::Any> {
        Some(self)
    }
}

impl PackedLinear {
    /// As [`forward`](Linear::forward), for activations that are in 8 bits already and for results in
    /// other types: see [`Input`] and [`Output`]. Each number is computed as there and then rounded once,
    /// on its way out of the kernel.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::Length`] if operands do not fit, [`Error::Parameter`] for a scale that
    /// is no positive finite number, [`Error::OutOfRange`] for a code of −128 in an int8 activation,
    /// [`Error::Unsupported`] for codes of another type than the layer quantizes to, for codes beside
    /// what is multiplied in f32 (transforms, outliers, adapters), for results other than f32 beside
    /// outliers and adapters, and for [`Output::I32`] of a layer with f32 or bfloat16 activations, with
    /// integer scales, or with more than one group in a row. Otherwise as [`forward`](Linear::forward).
    ///
    /// # Example
    /// Two layers, with int8 between them:
    /// ```
    /// use lowbit_core::{
    ///     ActivationScales, ActivationScheme, ActivationType, Context, Granularity, Linear, Mat,
    ///     QLinear, QMatrix, QuantScheme,
    /// };
    /// use lowbit_kernels::{Input, Output, PackedLinear};
    ///
    /// let layer = |scale| {
    ///     let w = Mat::from_fn(16, 16, |r, c| ((r * 16 + c) as f32).sin());
    ///     let q = QMatrix::quantize(w.as_ref(), QuantScheme::symmetric(8, Granularity::PerChannel))?;
    ///     let scales = ActivationScales::Static { scale, zero_point: 0 };
    ///     let scheme = ActivationScheme { dtype: ActivationType::Int8, scales };
    ///     PackedLinear::new(&QLinear::new(q).with_activation(Some(scheme)))
    /// };
    /// let (first, second) = (layer(0.01)?, layer(0.05)?);
    /// let x = Mat::from_fn(2, 16, |r, c| ((r + c) as f32).cos());
    /// let ctx = &mut Context::new();
    ///
    /// let mut codes = Mat::zeros(2, 16);
    /// first.forward_to(x.as_ref(), Output::Int8 { codes: codes.as_mut(), scale: 0.05 }, ctx)?;
    /// let mut y = Mat::zeros(2, 16);
    /// second.forward_to(Input::Int8 { codes: codes.as_ref(), scales: &[0.05] }, y.as_mut(), ctx)?;
    ///
    /// // As by way of f32.
    /// let (mut between, mut expected) = (Mat::zeros(2, 16), Mat::zeros(2, 16));
    /// first.forward(x.as_ref(), between.as_mut(), ctx)?;
    /// second.forward(between.as_ref(), expected.as_mut(), ctx)?;
    /// assert_eq!(y, expected);
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub fn forward_to<'x, 'y>(
        &self,
        x: impl Into<Input<'x>>,
        y: impl Into<Output<'y>>,
        ctx: &mut Context,
    ) -> Result<()> {
        let (x, y) = (x.into(), y.into());
        self.check(x, &y)?;
        let ((m, k), n) = (x.shape(), self.out_features());
        if m == 0 || n == 0 {
            return Ok(());
        }
        let pool = pool_for(ctx, m.saturating_mul(n).saturating_mul(k));
        let threads = Threads(pool.as_deref());
        match y {
            Output::F32(y) => Self::forward_f32(&[self], x, &mut [y], ctx, threads),
            Output::Bf16(y) => self.transformed(x, ctx, threads, |x, ctx| {
                Self::multiply(&[self], x, &mut [y], ctx, threads, false, round::<bf16>)
            }),
            Output::F16(y) => self.transformed(x, ctx, threads, |x, ctx| {
                Self::multiply(&[self], x, &mut [y], ctx, threads, false, round::<f16>)
            }),
            Output::Int8 { codes, scale } => self.transformed(x, ctx, threads, |x, ctx| {
                Self::multiply(&[self], x, &mut [codes], ctx, threads, false, |y, to| {
                    pulp::Arch::new().dispatch(EncodeInt8 { y, scale, to });
                })
            }),
            Output::UInt8 { codes, scale, zero_point } => {
                self.transformed(x, ctx, threads, |x, ctx| {
                    Self::multiply(&[self], x, &mut [codes], ctx, threads, false, |y, to| {
                        pulp::Arch::new().dispatch(EncodeUint8 { y, scale, zero_point, to });
                    })
                })
            }
            Output::I32(y) => self.transformed(x, ctx, threads, |x, ctx| {
                let copy = |from: &[f32], to: &mut [i32]| {
                    to.copy_from_slice(bytemuck::cast_slice(from));
                };
                Self::multiply(&[self], x, &mut [y], ctx, threads, true, copy)
            }),
        }
    }

    /// Writes what each of `layers` makes of the input that they share. How that is transformed and
    /// quantized is said by the first, and must be the same for all.
    pub(crate) fn forward_f32(
        layers: &[&Self],
        x: Input<'_>,
        outputs: &mut [MatMut<'_, f32>],
        ctx: &mut Context,
        threads: Threads<'_>,
    ) -> Result<()> {
        let Some(first) = layers.first() else { return Ok(()) };
        first.transformed(x, ctx, threads, |x, ctx| {
            let copy = |from: &[f32], to: &mut [f32]| to.copy_from_slice(from);
            Self::multiply(layers, x, outputs, ctx, threads, false, copy)?;
            let mut each = layers.iter().zip(&mut *outputs);
            each.try_for_each(|(layer, y)| layer.add_f32_terms(x, y.reborrow(), ctx, threads))
        })?;
        for (layer, y) in layers.iter().zip(outputs) {
            if let (Some(adapter), Input::F32(x)) = (layer.adapter(), x) {
                add_rows(x, y.reborrow(), threads, |x, y| adapter.add(x, y))?;
            }
        }
        Ok(())
    }

    /// Refuses operands that do not fit.
    fn check(&self, x: Input<'_>, y: &Output<'_>) -> Result<()> {
        let refuse = |what: String| Err(Error::Unsupported { by: "PackedLinear", what });
        let (n, k) = self.shape();
        let m = x.shape().0;
        for (what, expected, got) in [("input", (m, k), x.shape()), ("output", (m, n), y.shape())] {
            if expected != got {
                return Err(Error::Shape { what, expected, got });
            }
        }
        let features = self.outlier_features().is_some() || self.sparse().is_some();
        let added_in_f32 = features || self.adapter().is_some();
        if let Some((dtype, scales, zeros)) = x.codes() {
            if self.activation().map(|scheme| scheme.dtype) != Some(dtype) {
                return refuse(format!(
                    "{dtype:?} codes for activations of {:?}",
                    self.activation()
                ));
            }
            if let Some(ActivationScales::PerTokenGroup(_)) = self.activation().map(|s| s.scales) {
                return refuse("codes for activations with a scale for each group".to_string());
            }
            if added_in_f32 || !self.transforms().is_empty() {
                return refuse("codes beside transforms, outliers or an adapter".to_string());
            }
            for (what, got) in [("activation scales", scales.len()), ("zero-points", zeros)] {
                if got != 1 && got != m {
                    return Err(Error::Length { what, expected: m, got });
                }
            }
            scales.iter().try_for_each(|&scale| check_scale("activation scale", scale))?;
        }
        if added_in_f32 && !matches!(y, Output::F32(_)) {
            return refuse("results other than f32 beside outliers or an adapter".to_string());
        }
        match *y {
            Output::Int8 { scale, .. } | Output::UInt8 { scale, .. } => {
                check_scale("output scale", scale)
            }
            Output::I32(_) if !matches!(self.compute(), Compute::Int8) => {
                refuse("i32 results of f32 or bfloat16 activations".to_string())
            }
            Output::I32(_) if self.one_sum() => refuse(
                "i32 results of weights with integer scales, which would be among them".into(),
            ),
            Output::I32(_) if self.group().1 > 1 => refuse(format!(
                "i32 results of {} groups in a row, each with a scale of its own",
                self.group().1
            )),
            _ => Ok(()),
        }
    }

    /// Calls `then` with `T(x)`.
    fn transformed(
        &self,
        x: Input<'_>,
        ctx: &mut Context,
        threads: Threads<'_>,
        then: impl FnOnce(Input<'_>, &mut Context) -> Result<()>,
    ) -> Result<()> {
        let x = match x {
            Input::F32(x) if !self.transforms().is_empty() => x,
            x => return then(x, ctx),
        };
        let (m, k) = x.shape();
        // [T(x); m, k][spare; m, k], or pairs of rows
        let mut rows = ctx.take_rows(2 * m * k);
        let result = self
            .transform(x, &mut rows, threads)
            .and_then(|()| then(Input::F32(MatRef::with_row_stride(&rows, m, k, 2 * k)?), ctx));
        ctx.give_back_rows(rows);
        result
    }

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

    /// Stores `Q·x + bias` of each of `layers`, or the integers of `Q·x` if `exact` (as bits of f32).
    fn multiply<T: Send>(
        layers: &[&Self],
        x: Input<'_>,
        outputs: &mut [MatMut<'_, T>],
        ctx: &mut Context,
        threads: Threads<'_>,
        exact: bool,
        store: impl Fn(&[f32], &mut [T]) + Sync,
    ) -> Result<()> {
        let Some(first) = layers.first() else { return Ok(()) };
        match (first.activation(), x) {
            (None, Input::F32(x)) => {
                first.multiply_f32(
                    layers,
                    x,
                    outputs,
                    ctx,
                    threads,
                    store,
                    <[f32]>::copy_from_slice,
                );
                Ok(())
            }
            (Some(ActivationScheme::BF16), Input::F32(x)) => {
                for (row, x) in x.iter_rows().enumerate() {
                    if let Some(col) = x.iter().position(|x| !x.is_finite()) {
                        return Err(Error::NotFinite { what: "activation", row, col });
                    }
                }
                if let Compute::Bf16(kernel) = first.compute() {
                    first.multiply_bf16(kernel, layers, x, outputs, ctx, threads, store);
                } else {
                    first.multiply_f32(layers, x, outputs, ctx, threads, store, |to, x| {
                        for (to, x) in to.iter_mut().zip(x) {
                            let rounded =
                                bf16::from_f32_with(*x, Rounding::NearestEven, Overflow::Saturate);
                            *to = rounded.to_f32();
                        }
                    });
                }
                Ok(())
            }
            (Some(scheme), x) => {
                let known = match (scheme.scales, x) {
                    (ActivationScales::Static { scale, zero_point }, _) => {
                        Some((scale, zero_point))
                    }
                    (ActivationScales::PerTensor, Input::F32(x)) => {
                        Some(tensor_params(scheme.dtype, x, first.outlier_features())?)
                    }
                    _ => None,
                };
                let quantizer = Quantizer { scheme, known };
                first.multiply_int8(layers, x, outputs, ctx, threads, quantizer, exact, store)
            }
            (None, _) => Ok(()), // `check` has refused it
        }
    }

    /// With activations as `copy` writes them, to its first argument.
    #[allow(clippy::too_many_arguments, reason = "one call")]
    fn multiply_f32<T: Send>(
        &self,
        layers: &[&Self],
        x: MatRef<'_, f32>,
        outputs: &mut [MatMut<'_, T>],
        ctx: &mut Context,
        threads: Threads<'_>,
        store: impl Fn(&[f32], &mut [T]) + Sync,
        copy: impl Fn(&mut [f32], &[f32]) + Sync,
    ) {
        let (m, width) = (x.rows(), self.padded_k());
        let widened = widened_bytes(layers, m);
        let scratch = ctx.scratch(threads.count() * widened + m * width * 4);
        let (spare, padded) = scratch.split_at_mut(threads.count() * widened);
        let padded: &mut [f32] = bytemuck::cast_slice_mut(padded);
        threads.chunks(padded, width, |row, to| {
            pad(x.row(row).unwrap_or(&[]), to, self.group().0, self.padded_group(), &copy);
        });
        let padded = &*padded;
        let tile = |panel: &Panel<'_>, rows: Range<usize>, out: &mut [[f32; NR]]| {
            let mut x = [&[][..]; MR];
            for (x, row) in x.iter_mut().zip(rows.clone()) {
                *x = &padded[row * width..][..width];
            }
            let x = &x[..rows.len()];
            self.microkernel().f32(panel, x, out);
            panel.multiply_infinite(x, out);
        };
        for (layer, y) in layers.iter().zip(outputs) {
            layer.tiles(y.reborrow(), threads, layer.bias(), &mut *spare, tile, &store);
        }
    }

    #[allow(clippy::too_many_arguments, reason = "one call")]
    fn multiply_bf16<T: Send>(
        &self,
        kernel: &Bf16Kernel,
        layers: &[&Self],
        x: MatRef<'_, f32>,
        outputs: &mut [MatMut<'_, T>],
        ctx: &mut Context,
        threads: Threads<'_>,
        store: impl Fn(&[f32], &mut [T]) + Sync,
    ) {
        let (m, width) = (x.rows(), self.padded_k());
        let widened = widened_bytes(layers, m);
        let scratch = ctx.scratch(threads.count() * widened + m * width * 2);
        let (spare, padded) = scratch.split_at_mut(threads.count() * widened);
        threads.chunks(padded, 2 * width, |row, to| {
            let to: &mut [bf16] = bytemuck::cast_slice_mut(to);
            let x = x.row(row).unwrap_or(&[]);
            pad(x, to, self.group().0, self.padded_group(), &|to: &mut [bf16], x: &[f32]| {
                // Fails only on unequal lengths.
                let _ = encode_slice(x, to, Rounding::NearestEven, Overflow::Saturate);
            });
        });
        let padded: &[i32] = bytemuck::cast_slice(padded);
        let words = width / 2;
        for (layer, y) in layers.iter().zip(outputs) {
            let tile = |panel: &Panel<'_>, rows: Range<usize>, out: &mut [[f32; NR]]| {
                let mut x = [&[][..]; MR];
                for (x, row) in x.iter_mut().zip(rows.clone()) {
                    *x = &padded[row * words..][..words];
                }
                kernel.product(panel, layer.numbers(), &x[..rows.len()], out);
            };
            layer.tiles(y.reborrow(), threads, layer.bias(), &mut *spare, tile, &store);
        }
    }

    #[allow(clippy::too_many_arguments, reason = "one call")]
    fn multiply_int8<T: Send>(
        &self,
        layers: &[&Self],
        x: Input<'_>,
        outputs: &mut [MatMut<'_, T>],
        ctx: &mut Context,
        threads: Threads<'_>,
        quantizer: Quantizer,
        exact: bool,
        store: impl Fn(&[f32], &mut [T]) + Sync,
    ) -> Result<()> {
        let (m, k) = x.shape();
        let layout = RowLayout {
            width: self.padded_k(),
            groups: self.sums_of_row(),
            affine: has_zeros_or_groups(quantizer.scheme),
        };
        // A row of scratch: its quantized form and, with outliers, [x without them f32; k].
        let quantized = layout.bytes();
        let rest = if self.outlier_features().is_some() { 4 * k } else { 0 };
        let stride = quantized + rest.next_multiple_of(64);
        let widened = threads.count() * widened_bytes(layers, m);
        let (spare, scratch) = ctx.scratch(widened + m * stride).split_at_mut(widened);
        threads.chunks(scratch, stride, |row, to| {
            let (to, rest) = to.split_at_mut(quantized);
            let mut to = layout.split_mut(to);
            let result = match x {
                Input::F32(x) => {
                    let x = x.row(row).unwrap_or(&[]);
                    let x = match self.outlier_features() {
                        None => x,
                        Some(outliers) => {
                            let rest = bytemuck::cast_slice_mut(&mut rest[..4 * x.len()]);
                            without(outliers, x, rest);
                            rest
                        }
                    };
                    self.quantize_row(x, quantizer, &mut to)
                }
                Input::Int8 { codes, scales } => {
                    self.load_int8(codes.row(row).unwrap_or(&[]), shared(scales, row), &mut to)
                }
                Input::UInt8 { codes, scales, zero_points } => {
                    let (scale, zero) = (shared(scales, row), shared(zero_points, row));
                    self.load_uint8(codes.row(row).unwrap_or(&[]), scale, zero, &mut to);
                    Ok(())
                }
            };
            if result.is_err() {
                *to.scale = f32::NAN; // looked for below
            }
        });

        let row = |row: usize| layout.split(&scratch[row * stride..][..quantized]);
        if let Some(row) = (0..m).find(|&r| row(r).0.is_nan()) {
            return Err(match x {
                Input::F32(x) => {
                    let x = x.row(row).unwrap_or(&[]);
                    let col = x.iter().position(|x| !x.is_finite()).unwrap_or(0);
                    Error::NotFinite { what: "activation", row, col }
                }
                _ => {
                    let what = "int8 code of an activation";
                    Error::OutOfRange { what, min: -127, max: 127, got: -128 }
                }
            });
        }
        let tile = |panel: &Panel<'_>, rows: Range<usize>, out: &mut [[f32; NR]]| {
            let mut a = [Int8Row::default(); MR];
            let mut scales = [0.0; MR];
            for ((a, scale), r) in a.iter_mut().zip(&mut scales).zip(rows.clone()) {
                (*scale, *a) = row(r);
            }
            let a = &mut a[..rows.len()];
            let mut panel = Panel { exact, ..*panel };
            if exact && panel.sums.is_empty() {
                // Zeros of 0 for the one group that there is.
                panel.sums = &[[0; NR]];
                a.iter_mut().for_each(|a| (a.zeros, a.scales) = (&[0], &[1.0]));
            }
            self.microkernel().int8(&panel, a, out);
            for (out, scale) in out.iter_mut().zip(scales).filter(|_| !exact) {
                for y in out {
                    *y *= scale;
                }
            }
        };
        for (layer, y) in layers.iter().zip(outputs) {
            let bias = layer.bias().filter(|_| !exact);
            layer.tiles(y.reborrow(), threads, bias, &mut *spare, tile, &store);
        }
        Ok(())
    }

    /// Adds what the layer multiplies in f32.
    fn add_f32_terms(
        &self,
        x: Input<'_>,
        y: MatMut<'_, f32>,
        ctx: &mut Context,
        threads: Threads<'_>,
    ) -> Result<()> {
        let Input::F32(x) = x else { return Ok(()) };
        if let Some(outliers) = self.outlier_features() {
            self.add_outliers(outliers, x, y, ctx, threads);
            return Ok(());
        }
        match self.sparse() {
            Some(sparse) => add_rows(x, y, threads, |x, y| sparse.add(x, y)),
            None => Ok(()),
        }
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
        if n == 0 {
            return; // one of several layers
        }
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

    /// Rows of a task: equal parts of `m`, as near as calls of the kernel's rows allow.
    fn task_rows(&self, m: usize) -> usize {
        let kernel = self.microkernel();
        let mut most = kernel.task_rows;
        if kernel.keeps_rows {
            let bytes = match self.compute() {
                Compute::F32 => 4,
                Compute::Bf16(_) => 2,
                Compute::Int8 => 1,
            };
            most = (KEPT / (bytes * self.padded_k()).max(1)).clamp(kernel.rows, most);
        }
        m.div_ceil(m.div_ceil(most).max(1)).max(1).next_multiple_of(kernel.rows)
    }

    /// Computes every tile of `y`: `tile(panel, rows, out)` fills `out`, to which the bias is added
    /// before it is stored. Each thread has its part of `spare` for a widened panel, if that pays.
    fn tiles<T: Send>(
        &self,
        y: MatMut<'_, T>,
        threads: Threads<'_>,
        bias: Option<&[f32]>,
        spare: &mut [u8],
        tile: impl Fn(&Panel<'_>, Range<usize>, &mut [[f32; NR]]) + Sync,
        store: impl Fn(&[f32], &mut [T]) + Sync,
    ) {
        let ((m, n), stride) = (y.shape(), y.row_stride());
        let y = Columns { start: y.into_data().as_mut_ptr(), stride, m, n };
        let widened = self.widened_bytes(m);
        let count = threads.count();
        let spare = Columns { start: spare.as_mut_ptr(), stride: widened, m: count, n: widened };
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
            let bias = bias.map(|bias| &bias[cols.clone()]);
            let last = m.min(first + task_rows);
            let mut codes = self.panel(panel);
            if widened > 0 {
                #[allow(unsafe_code, reason = "each thread has its own part")]
                // SAFETY: the index is below the count, and no other thread has it; this one keeps
                // the part until the task ends, and a task does not wait for others.
                let spare = unsafe { spare.part(threads.index(), 0..widened) };
                codes = self.widened(codes, spare);
            }
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
                for (row, out) in rows.zip(&mut out) {
                    if let Some(bias) = bias {
                        out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
                    }
                    #[allow(
                        unsafe_code,
                        reason = "tasks write to interleaved columns of the same rows"
                    )]
                    // SAFETY: row < m and cols.end <= n; no other task has this panel's columns of
                    // these rows.
                    let y = unsafe { y.part(row, cols.clone()) };
                    store(&out[..y.len()], y);
                }
            }
        });
    }
}

/// The element of a row, or that of all rows.
fn shared<T: Copy>(values: &[T], row: usize) -> T {
    if values.len() == 1 { values[0] } else { values[row] }
}

fn check_scale(what: &'static str, scale: f32) -> Result<()> {
    if scale > 0.0 && scale.is_finite() {
        return Ok(());
    }
    let expected = "a positive finite number";
    Err(Error::Parameter { what, value: scale.into(), expected })
}

/// To the nearest, ties to even.
fn round<H: SmallFloat>(y: &[f32], to: &mut [H]) {
    // Fails only on unequal lengths.
    let _ = encode_slice(y, to, Rounding::NearestEven, Overflow::Infinity);
}

/// `y / scale` to the nearest integer, ties to even, saturating; 0 for NaN.
#[inline(always)]
fn steps(y: f32, scale: f32, lowest: f32, highest: f32) -> i32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 · 2^23: the sum has a unit of 1
    let steps = y / scale;
    let steps = if steps.is_nan() { 0.0 } else { steps };
    (steps.max(lowest).min(highest) + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32
}

struct EncodeInt8<'a> {
    y: &'a [f32],
    scale: f32,
    to: &'a mut [i8],
}

impl pulp::NullaryFnOnce for EncodeInt8<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (&y, to) in self.y.iter().zip(self.to) {
            *to = steps(y, self.scale, -127.0, 127.0) as i8;
        }
    }
}

struct EncodeUint8<'a> {
    y: &'a [f32],
    scale: f32,
    zero_point: u8,
    to: &'a mut [u8],
}

impl pulp::NullaryFnOnce for EncodeUint8<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let zero = f32::from(self.zero_point);
        for (&y, to) in self.y.iter().zip(self.to) {
            *to = (steps(y, self.scale, -zero, 255.0 - zero) + i32::from(self.zero_point)) as u8;
        }
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
fn pad<T: Copy + Default>(
    x: &[f32],
    to: &mut [T],
    group_size: usize,
    padded: usize,
    copy: &impl Fn(&mut [T], &[f32]),
) {
    // In one go where nothing lies between.
    let (group_size, padded) =
        if group_size == padded { (x.len().max(1), to.len().max(1)) } else { (group_size, padded) };
    for (x, to) in x.chunks(group_size).zip(to.chunks_mut(padded)) {
        let (values, rest) = to.split_at_mut(x.len());
        copy(values, x);
        rest.fill(T::default());
    }
}

/// Bytes of the largest widened panel that one of `layers` needs.
fn widened_bytes(layers: &[&PackedLinear], m: usize) -> usize {
    layers.iter().map(|layer| layer.widened_bytes(m)).max().unwrap_or(0)
}

/// The pool of `ctx`, where so many multiplications are worth handing out.
pub(crate) fn pool_for(ctx: &Context, work: usize) -> Option<Arc<ThreadPool>> {
    ctx.pool().filter(|_| work >= PARALLEL_WORK).cloned()
}

/// The caller's threads, or none.
#[derive(Clone, Copy)]
pub(crate) struct Threads<'a>(pub(crate) Option<&'a ThreadPool>);

impl Threads<'_> {
    fn count(self) -> usize {
        self.0.map_or(1, rayon::ThreadPool::current_num_threads)
    }

    /// Of the thread that runs a task, below [`count`](Self::count).
    fn index(self) -> usize {
        self.0.and_then(rayon::ThreadPool::current_thread_index).unwrap_or(0)
    }

    fn each(self, tasks: usize, f: impl Fn(usize) + Sync) {
        match self.0 {
            Some(pool) => pool.install(|| (0..tasks).into_par_iter().for_each(&f)),
            None => (0..tasks).for_each(f),
        }
    }

    fn chunks<T: Send>(self, data: &mut [T], len: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        match self.0.filter(|_| data.len() > len) {
            Some(pool) => pool.install(|| {
                data.par_chunks_mut(len.max(1)).enumerate().for_each(|(i, chunk)| f(i, chunk));
            }),
            None => data.chunks_mut(len.max(1)).enumerate().for_each(|(i, chunk)| f(i, chunk)),
        }
    }
}

/// A matrix whose parts different tasks write.
struct Columns<T> {
    start: *mut T,
    stride: usize,
    m: usize,
    n: usize,
}

#[allow(unsafe_code, reason = "tasks write to interleaved columns of the same rows")]
// SAFETY: `part` asks its callers to keep the parts apart.
unsafe impl<T: Send> Sync for Columns<T> {}

impl<T> Columns<T> {
    /// Columns `cols` of `row`.
    ///
    /// # Safety
    /// `row < m`, `cols.end <= n`, and nobody else uses these elements meanwhile.
    #[allow(unsafe_code, reason = "tasks write to interleaved columns of the same rows")]
    #[allow(clippy::mut_from_ref, reason = "the caller keeps the parts apart")]
    unsafe fn part(&self, row: usize, cols: Range<usize>) -> &mut [T] {
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
