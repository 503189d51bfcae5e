use std::ops::Range;

use lowbit_core::{
    ActivationScales, ActivationScheme, ActivationType, Adapter, Context, Error, Format, Linear,
    MatMut, MatRef, Outliers, Params, QLinear, QMatrix, QuantScheme, QuantType, Result,
    ScaleFormat, SparseRows, Transform, ZeroFormat, check_shapes, f16,
};

use crate::{
    bf16,
    isa::{self, Bf16Kernel, Kernel},
    panel::{Meaning, NR, Panel, Scales, TwoLevel, Zeros},
    storage::Storage,
};

/// A quantized layer rearranged for one kernel of this CPU.
///
/// Storage stays canonical: keep the [`QLinear`] (or the file it came from) to save it, and pack
/// it again on another machine.
///
/// # Example
/// ```
/// use lowbit_core::{Granularity, Mat, QLinear, QMatrix, QuantScheme};
/// use lowbit_kernels::{PackedLinear, kernels};
///
/// let w = Mat::from_fn(8, 16, |r, c| r as f32 - c as f32);
/// let q = QMatrix::quantize(w.as_ref(), QuantScheme::symmetric(8, Granularity::PerChannel))?;
/// let layer = QLinear::new(q);
/// for name in kernels() {
///     assert_eq!(PackedLinear::with_kernel(&layer, name)?.kernel(), name);
/// }
/// assert!(PackedLinear::with_kernel(&layer, "abacus").is_err());
/// # Ok::<(), lowbit_core::Error>(())
/// ```
#[derive(Clone)]
pub struct PackedLinear {
    n: usize,
    k: usize,
    kernel: &'static Kernel,
    transforms: Vec<Transform>,
    activation: Option<ActivationScheme>,
    outliers: Option<Outliers>,
    adapter: Option<Adapter>,
    bias: Option<Vec<f32>>,
    scheme: QuantScheme,
    storage: Storage,
    meaning: Meaning,
    /// See [`bf16::numbers`].
    numbers: bf16::Numbers,
    /// What an integer level is multiplied by.
    unit: f32,
    /// Input features of a full group, within which no scale changes, neither of weights nor of
    /// activations; and how many groups a row has.
    group: (usize, usize),
    /// See [`Panel::one_sum`].
    one_sum: bool,
    // codes:  [n/32][steps of all groups][words][32 rows][4 bytes]: see `Storage`
    // scales: [n/32][groups][32]
    // zeros:  [n/32][groups][32], or one for all
    // sums:   [n/32][groups][32], one for all groups, or none: see `Panel`
    // Groups are padded to whole steps and rows to whole panels: code 0, zero 0, scale 0.
    codes: Vec<Line>,
    scales: PackedScales,
    zeros: PackedZeros,
    sums: Vec<[i32; NR]>,
}

/// What activations are multiplied in.
pub(crate) enum Compute {
    F32,
    Bf16(&'static Bf16Kernel),
    /// 8 bits, signed or not.
    Int8,
}

/// The scales of all panels, see [`Scales`].
#[derive(Clone)]
enum PackedScales {
    F32(Vec<[f32; NR]>),
    F16(Vec<[u16; NR]>),
    Bf16(Vec<[u16; NR]>),
    E8m0(Vec<[u8; NR]>),
    TwoLevel {
        codes: Vec<[u8; NR]>,
        e4m3: bool,
        zero: i32,
        /// How many groups share a step, and how many steps a row has.
        groups: usize,
        steps_of_row: usize,
        steps: Vec<[f32; NR]>,
        minima: Vec<[f32; NR]>,
    },
}

/// The zeros of all panels, see [`Zeros`].
#[derive(Clone)]
enum PackedZeros {
    Constant(i32),
    Bytes(Vec<[u8; NR]>),
    Offset(Vec<[f32; NR]>),
}

/// A cache line, so that the vectors of a panel never straddle two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

#[allow(unsafe_code, reason = "a promise about a type's layout")]
// SAFETY: an array of bytes, without padding since its size is its alignment.
unsafe impl bytemuck::Zeroable for Line {}
#[allow(unsafe_code, reason = "a promise about a type's layout")]
// SAFETY: as above; every bit pattern is a value.
unsafe impl bytemuck::Pod for Line {}

impl PackedLinear {
    /// Packs `layer` for the best kernel of this CPU.
    ///
    /// # Errors
    /// As [`with_kernel`](Self::with_kernel).
    pub fn new<S: AsRef<[u8]>>(layer: &QLinear<S>) -> Result<Self> {
        Self::pack(layer, isa::best(), 0..layer.weight().rows())
    }

    /// Packs `layer` for the kernel called `name`, one of [`kernels`](crate::kernels): for tests,
    /// benchmarks and reports of defects.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if there is no such kernel or this CPU lacks its instructions, or if no
    /// kernel computes such a layer yet: activations in other than f32, bfloat16, int8 or uint8; FP8 and FP6 weights
    /// beside 8-bit activations; real zeros or offsets beside uint8 activations or those with a scale for each
    /// group, real zeros beside outlier features; groups of a token neither of which divides those of the
    /// weights nor the other way round; a group whose integer sum might overflow, of more than 65,793
    /// weights beside int8 activations or 33,025 beside uint8 (511 and 257 for tables of 16-bit levels), or a
    /// row of [integer scales](QuantScheme::has_integer_scales) of more than 131,071 or 65,793; outlier
    /// features beside f32 or bfloat16 activations; a threshold for them beside a scale that the batch shares.
    /// [`Error::NotFinite`] at the first weight of NaN or infinity.
    pub fn with_kernel<S: AsRef<[u8]>>(layer: &QLinear<S>, name: &str) -> Result<Self> {
        Self::pack(layer, isa::named(name)?, 0..layer.weight().rows())
    }

    /// Multiplies by a layer that is used once: `y = layer(x)` as [`new`](Self::new) and
    /// [`forward`](lowbit_core::Linear::forward) would compute it, bit for bit, but never with more than 1024
    /// rows of the weight packed at a time. (All of them if the layer has outliers with weights of their own
    /// or an adapter.)
    ///
    /// # Errors
    /// Those of [`with_kernel`](Self::with_kernel) and of [`forward`](lowbit_core::Linear::forward); nothing
    /// has been written to `y` then.
    ///
    /// # Example
    /// ```
    /// use lowbit_core::{Context, Granularity, Mat, QLinear, QMatrix, QuantScheme};
    /// use lowbit_kernels::PackedLinear;
    ///
    /// let w = Mat::from_fn(64, 32, |r, c| (r + c) as f32);
    /// let q = QMatrix::quantize(w.as_ref(), QuantScheme::affine(4, Granularity::PerGroup(16)))?;
    /// let (x, mut y) = (Mat::from_fn(3, 32, |_, _| 1.0), Mat::zeros(3, 64));
    /// PackedLinear::multiply_once(&QLinear::new(q), x.as_ref(), y.as_mut(), &mut Context::new())?;
    /// assert!((y.data()[0] - 496.0).abs() < 16.0); // 0 + 1 + … + 31
    /// # Ok::<(), lowbit_core::Error>(())
    /// ```
    pub fn multiply_once<S: AsRef<[u8]> + Send + Sync>(
        layer: &QLinear<S>,
        x: MatRef<'_, f32>,
        mut y: MatMut<'_, f32>,
        ctx: &mut Context,
    ) -> Result<()> {
        /// Rows of the weight that are packed at a time.
        const ROWS: usize = 32 * NR;
        check_shapes(layer, x, &y)?;
        let (n, own_weights) = (
            layer.weight().rows(),
            match layer.outliers() {
                None | Some(Outliers::Threshold(_)) => false,
                Some(_) => true,
            },
        );
        let rows = if own_weights || layer.adapter().is_some() { n.max(1) } else { ROWS };
        check_supported(layer)?;
        check_finite(layer.weight())?;
        if y.rows() == 0 {
            return Ok(());
        }
        for first in (0..n).step_by(rows) {
            let last = n.min(first + rows);
            let packed = Self::pack(layer, isa::best(), first..last)?;
            let (m, stride) = (y.rows(), y.row_stride());
            let columns = y.reborrow().into_data().get_mut(first..).unwrap_or(&mut []);
            let y = MatMut::with_row_stride(columns, m, last - first, stride)?;
            packed.forward(x, y, ctx)?;
        }
        Ok(())
    }

    /// Packs `rows` of the weight, all or of a layer without weights beside it.
    fn pack<S: AsRef<[u8]>>(
        layer: &QLinear<S>,
        kernel: &'static Kernel,
        rows: Range<usize>,
    ) -> Result<Self> {
        let weight = layer.weight();
        let (n, k) = (rows.len(), weight.cols());
        let (block_rows, block_cols) = weight.block();
        let group_size = check_supported(layer)?;
        check_finite(weight)?;
        let groups = k.div_ceil(group_size);
        let scheme = weight.scheme();
        let refuse = |what| Err(Error::Unsupported { by: "PackedLinear", what });
        let Some(meaning) = Meaning::of(scheme.dtype) else {
            return refuse(format!("weights of {:?}", scheme.dtype));
        };
        let integers = layer
            .activation()
            .filter(|scheme| *scheme != ActivationScheme::BF16)
            .and(scheme.dtype.integer_levels());
        let table = matches!(meaning, Meaning::Table(_));
        let storage = Storage::for_groups(scheme.dtype.bits(), table, group_size, k);
        let panels = n.div_ceil(NR);
        let steps = storage.steps(group_size, k);
        let one_sum = layer.activation().is_some_and(|activation| has_one_sum(scheme, activation));
        let sums_of_row = if one_sum { groups.min(1) } else { groups };
        let mut packed = Self {
            n,
            k,
            kernel,
            transforms: layer.transforms().to_vec(),
            activation: layer.activation(),
            outliers: layer.outliers().cloned(),
            adapter: layer.adapter().cloned(),
            bias: layer.bias().map(|bias| bias[rows.clone()].to_vec()),
            scheme,
            storage,
            numbers: bf16::numbers(scheme.dtype),
            unit: integers.map_or(1.0, |levels| levels.unit),
            group: (group_size, groups),
            one_sum,
            codes: vec![Line([0; 64]); panels * steps * storage.words() * (4 * NR / 64)],
            scales: PackedScales::new(weight, group_size, rows.clone()),
            zeros: match scheme.zero {
                ZeroFormat::Int => PackedZeros::Bytes(vec![[0; NR]; panels * groups]),
                ZeroFormat::Real(_) | ZeroFormat::Offset(_) => {
                    PackedZeros::Offset(vec![[0.0; NR]; panels * groups])
                }
                ZeroFormat::None | ZeroFormat::Midpoint => PackedZeros::Constant(match &meaning {
                    Meaning::Table(table) if integers.is_some() => table.offset,
                    _ => i32::from(scheme.midpoint()),
                }),
            },
            sums: match layer.activation() {
                Some(scheme) if has_zeros_or_groups(scheme) => vec![[0; NR]; panels * sums_of_row],
                _ => Vec::new(),
            },
            meaning,
        };
        if one_sum && !matches!(packed.scales, PackedScales::TwoLevel { .. }) {
            return refuse("integer scales that cannot be read".to_string());
        }
        if n == 0 || k == 0 {
            return Ok(packed); // however many rows or columns without elements there are
        }
        let mut row_codes = vec![0; k];
        let panel_words = steps * storage.words() * NR;
        let words: &mut [[u8; 4]] = bytemuck::cast_slice_mut(&mut packed.codes);
        for (i, row) in rows.enumerate() {
            let (panel, lane) = (i / NR, i % NR);
            weight.unpack_row(row, &mut row_codes)?;
            let words = &mut words[panel * panel_words..][..panel_words];
            for (g, group) in row_codes.chunks(group_size).enumerate() {
                let params = weight.params(row / block_rows, g * group_size / block_cols);
                let at = panel * groups + g;
                packed.scales.put(params.scale, at, lane);
                match &mut packed.zeros {
                    PackedZeros::Constant(_) => {}
                    PackedZeros::Bytes(zeros) => zeros[at][lane] = params.zero as u8, // an integer
                    PackedZeros::Offset(offsets) => offsets[at][lane] = params.to_offset().offset,
                }
                let sums_at = if one_sum { panel } else { at };
                if let (Some(sums), Some(levels)) = (packed.sums.get_mut(sums_at), &integers) {
                    let level = |code: &u8| i32::from(levels.integers[usize::from(*code)]);
                    let sum: i32 = group.iter().map(|code| level(code) - params.zero as i32).sum();
                    let scale = if one_sum { packed.scales.integer(at, lane) } else { 1 };
                    sums[lane] += sum * scale;
                }
                let first = g * storage.steps_of_group(group_size) * storage.words();
                let words = &mut words[first * NR + lane..];
                for (j, &code) in group.iter().enumerate() {
                    storage.put(code, j, words, NR);
                }
            }
        }
        Ok(packed)
    }

    /// The kernel this layer is packed for, for example `"avx512_vnni"`.
    pub fn kernel(&self) -> &'static str {
        self.kernel.name
    }

    /// Bytes that the packed weights and what belongs to their groups take in memory.
    pub fn packed_bytes(&self) -> usize {
        let zeros = match &self.zeros {
            PackedZeros::Constant(_) => 0,
            PackedZeros::Bytes(zeros) => size_of_val(&zeros[..]),
            PackedZeros::Offset(offsets) => size_of_val(&offsets[..]),
        };
        size_of_val(&self.codes[..]) + self.scales.bytes() + zeros + size_of_val(&self.sums[..])
    }

    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    pub(crate) fn microkernel(&self) -> &'static Kernel {
        self.kernel
    }

    pub(crate) fn activation(&self) -> Option<ActivationScheme> {
        self.activation
    }

    pub(crate) fn transforms(&self) -> &[Transform] {
        &self.transforms
    }

    pub(crate) fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    pub(crate) fn sparse(&self) -> Option<&SparseRows> {
        match &self.outliers {
            Some(Outliers::Sparse(sparse)) => Some(sparse),
            _ => None,
        }
    }

    /// Features that are taken out of the quantized product.
    pub(crate) fn outlier_features(&self) -> Option<&Outliers> {
        self.outliers.as_ref().filter(|outliers| !matches!(outliers, Outliers::Sparse(_)))
    }

    /// The dequantized weights of input feature `j`, one for each output: `Params::real`.
    pub(crate) fn column(&self, j: usize, to: &mut [f32]) {
        let (g, within) = (j / self.group.0, j % self.group.0);
        let first = g * self.storage.steps_of_group(self.group.0) * self.storage.words();
        for (panel, to) in to.chunks_mut(NR).enumerate() {
            let panel = self.panel(panel);
            let words: &[[u8; 4]] = bytemuck::cast_slice(panel.codes);
            for (lane, to) in to.iter_mut().enumerate() {
                let code = self.storage.get(within, &words[first * NR + lane..], NR);
                let (zero, offset) = match panel.zeros {
                    Zeros::Constant(_) => (f32::from(self.scheme.midpoint()), 0.0),
                    Zeros::Bytes(zeros) => (f32::from(zeros[g][lane]), 0.0),
                    Zeros::Offset(offsets) => (0.0, offsets[g][lane]),
                };
                let params = Params { scale: panel.scales.get(g, lane), zero, offset };
                *to = params.real(self.scheme.dtype.level(code));
            }
        }
    }

    pub(crate) fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// Input features of a full group, and groups of a row.
    pub(crate) fn group(&self) -> (usize, usize) {
        self.group
    }

    /// Does one sum go over all groups of a row?
    pub(crate) fn one_sum(&self) -> bool {
        self.one_sum
    }

    /// Sums of integers that a row has: one for each group, or one for all.
    pub(crate) fn sums_of_row(&self) -> usize {
        if self.one_sum { self.group.1.min(1) } else { self.group.1 }
    }

    /// Input features of a full group once padded to whole steps.
    pub(crate) fn padded_group(&self) -> usize {
        self.storage.steps_of_group(self.group.0) * self.storage.k_per_step()
    }

    /// Input features of a row once every group is padded to whole steps.
    pub(crate) fn padded_k(&self) -> usize {
        self.storage.steps(self.group.0, self.k) * self.storage.k_per_step()
    }

    /// What activations are multiplied in.
    pub(crate) fn compute(&self) -> Compute {
        match self.activation {
            None => Compute::F32,
            Some(ActivationScheme::BF16) => match &self.kernel.bf16 {
                Some(kernel) => Compute::Bf16(kernel),
                None => Compute::F32,
            },
            Some(_) => Compute::Int8,
        }
    }

    /// See [`bf16::numbers`].
    pub(crate) fn numbers(&self) -> &bf16::Numbers {
        &self.numbers
    }

    /// Bytes of a panel once its codes are widened, where that pays for `m` rows; 0 otherwise.
    pub(crate) fn widened_bytes(&self, m: usize) -> usize {
        let two_tables = matches!(&self.meaning, Meaning::Table(table) if table.high.is_some());
        let few = match (self.compute(), self.storage) {
            // What is looked up is unpacked sooner than what is computed.
            (Compute::Bf16(_), Storage::Nibbles | Storage::Bits3 | Storage::Crumbs) => 16,
            (Compute::Bf16(_), _) if matches!(self.meaning, Meaning::Float(_)) => 16,
            (Compute::Bf16(_), _) => 8,
            (_, Storage::Bytes) => usize::MAX,
            (Compute::F32, _) => 1,
            // Tables of two bytes stay one code.
            (Compute::Int8, _) if two_tables => usize::MAX,
            (Compute::Int8, Storage::Nibbles) => self.kernel.direct_rows,
            (Compute::Int8, _) => self.kernel.direct_rows.min(16),
        };
        let bytes = if matches!(self.compute(), Compute::Bf16(_)) { 2 } else { 1 };
        if m <= few { 0 } else { self.padded_k() * NR * bytes }
    }

    /// A panel of widened codes, see [`tile::widen`](crate::tile::widen) and [`bf16::widen`]; `widened` are
    /// those of `panel`.
    pub(crate) fn widened<'a>(&'a self, panel: Panel<'a>, widened: &'a mut [u8]) -> Panel<'a> {
        let steps = panel.steps * panel.storage.quads();
        if let Compute::Bf16(kernel) = self.compute() {
            kernel.widen(&panel, &self.numbers, widened);
            let zeros = match panel.zeros {
                Zeros::Offset(_) => panel.zeros,
                _ => Zeros::Constant(0),
            };
            return Panel { codes: widened, storage: Storage::Pairs, steps, zeros, ..panel };
        }
        let integers = matches!(self.compute(), Compute::Int8);
        self.kernel.widen(&panel, integers, widened);
        if self.one_sum {
            return panel.of_scaled(widened);
        }
        let meaning = if integers { &Meaning::Int } else { panel.meaning };
        Panel { codes: widened, storage: Storage::Bytes, steps, meaning, ..panel }
    }

    /// The panel of rows `32·index ..`.
    pub(crate) fn panel(&self, index: usize) -> Panel<'_> {
        let steps = self.padded_k() / self.storage.k_per_step();
        let bytes = steps * self.storage.words() * 4 * NR;
        let codes: &[u8] = bytemuck::cast_slice(&self.codes);
        let groups = index * self.group.1..(index + 1) * self.group.1;
        let sums = index * self.sums_of_row()..(index + 1) * self.sums_of_row();
        Panel {
            codes: &codes[index * bytes..][..bytes],
            storage: self.storage,
            steps: self.storage.steps_of_group(self.group.0),
            groups: self.group.1,
            meaning: &self.meaning,
            unit: self.unit,
            scales: self.scales.panel(index, groups.clone()),
            zeros: match &self.zeros {
                PackedZeros::Constant(zero) => Zeros::Constant(*zero),
                PackedZeros::Bytes(zeros) => Zeros::Bytes(&zeros[groups.clone()]),
                PackedZeros::Offset(offsets) => Zeros::Offset(&offsets[groups.clone()]),
            },
            sums: self.sums.get(sums).unwrap_or(&[]),
            exact: false,
            next: &[],
            one_sum: self.one_sum,
        }
    }
}

impl PackedScales {
    /// All 0, in the smallest form that holds the scales of `weight`.
    fn new<S: AsRef<[u8]>>(weight: &QMatrix<S>, group_size: usize, rows: Range<usize>) -> Self {
        let (panels, groups) = (rows.len().div_ceil(NR), weight.cols().div_ceil(group_size));
        let count = panels * groups;
        match weight.scheme().scale_format {
            ScaleFormat::F16 => Self::F16(vec![[0; NR]; count]),
            ScaleFormat::Bf16 => Self::Bf16(vec![[0; NR]; count]),
            // The exponent of 2^-127, which is subnormal, is that of 0.
            ScaleFormat::E8m0 if !weight.scales().contains(&0) => Self::E8m0(vec![[0; NR]; count]),
            ScaleFormat::TwoLevel(_) if group_size == weight.block().1 => {
                Self::two_level(weight, rows).unwrap_or_else(|| Self::F32(vec![[0.0; NR]; count]))
            }
            _ => Self::F32(vec![[0.0; NR]; count]),
        }
    }

    /// Two-level scales of integers or of FP8 E4M3 without signs, all filled in.
    fn two_level<S: AsRef<[u8]>>(weight: &QMatrix<S>, rows: Range<usize>) -> Option<Self> {
        let grid = weight.scale_grid()?;
        let rows = if grid.cols() == 0 { 0..0 } else { rows };
        let e4m3 = match grid.scheme().dtype {
            QuantType::Int { .. } => false,
            QuantType::Float(Format::F8E4M3) => true,
            _ => return None,
        };
        let (panels, cols) = (rows.len().div_ceil(NR), grid.cols());
        let (block_rows, (step_rows, groups)) = (weight.block().0, grid.block());
        let steps_of_row = grid.grid().1;
        let mut codes = vec![[0; NR]; panels * cols];
        let mut steps = vec![[0.0; NR]; panels * steps_of_row];
        let mut minima = match grid.scheme().zero {
            ZeroFormat::Offset(_) => steps.clone(),
            _ => Vec::new(),
        };
        let mut row_codes = vec![0; if rows.is_empty() { 0 } else { cols }];
        for (i, r) in rows.enumerate() {
            let (panel, lane, row) = (i / NR, i % NR, r / block_rows);
            grid.unpack_row(row, &mut row_codes).ok()?;
            if e4m3 && row_codes.iter().any(|code| *code >= 128) {
                return None;
            }
            for (codes, code) in codes[panel * cols..].iter_mut().zip(&row_codes) {
                codes[lane] = *code;
            }
            for step in 0..steps_of_row {
                let params = grid.params(row / step_rows, step);
                steps[panel * steps_of_row + step][lane] = params.scale;
                if let Some(minima) = minima.get_mut(panel * steps_of_row + step) {
                    minima[lane] = params.offset;
                }
            }
        }
        let zero = i32::from(grid.scheme().midpoint());
        let zero = if grid.scheme().zero == ZeroFormat::Midpoint { zero } else { 0 };
        Some(Self::TwoLevel { codes, e4m3, zero, groups, steps_of_row, steps, minima })
    }

    /// Stores a scale, which its format holds.
    fn put(&mut self, scale: f32, at: usize, lane: usize) {
        match self {
            Self::F32(scales) => scales[at][lane] = scale,
            Self::F16(scales) => scales[at][lane] = f16::from_f32(scale).to_bits(),
            Self::Bf16(scales) => scales[at][lane] = (scale.to_bits() >> 16) as u16,
            Self::E8m0(scales) => scales[at][lane] = (scale.to_bits() >> 23) as u8,
            Self::TwoLevel { .. } => {}
        }
    }

    /// The code of a scale that is an integer.
    fn integer(&self, at: usize, lane: usize) -> i32 {
        match self {
            Self::TwoLevel { codes, .. } => i32::from(codes[at][lane]),
            _ => 1,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F32(scales) => size_of_val(&scales[..]),
            Self::F16(scales) | Self::Bf16(scales) => size_of_val(&scales[..]),
            Self::E8m0(scales) => size_of_val(&scales[..]),
            Self::TwoLevel { codes, steps, minima, .. } => {
                size_of_val(&codes[..]) + size_of_val(&steps[..]) + size_of_val(&minima[..])
            }
        }
    }

    fn panel(&self, index: usize, range: Range<usize>) -> Scales<'_> {
        match self {
            Self::F32(scales) => Scales::F32(&scales[range]),
            Self::F16(scales) => Scales::F16(&scales[range]),
            Self::Bf16(scales) => Scales::Bf16(&scales[range]),
            Self::E8m0(scales) => Scales::E8m0(&scales[range]),
            Self::TwoLevel { codes, e4m3, zero, groups, steps_of_row, steps, minima } => {
                let of_panel = index * steps_of_row..(index + 1) * steps_of_row;
                Scales::TwoLevel(TwoLevel {
                    codes: &codes[range],
                    e4m3: *e4m3,
                    zero: *zero,
                    groups: *groups,
                    steps: &steps[of_panel.clone()],
                    minima: minima.get(of_panel).unwrap_or(&[]),
                })
            }
        }
    }
}

/// Do activations have a zero, or scales for groups of a token?
pub(crate) fn has_zeros_or_groups(scheme: ActivationScheme) -> bool {
    scheme.dtype == ActivationType::UInt8
        || matches!(scheme.scales, ActivationScales::PerTokenGroup(_))
}

/// Do all groups of a row have one sum, as the reference says?
fn has_one_sum(scheme: QuantScheme, activation: ActivationScheme) -> bool {
    // Bfloat16 has no integer sums.
    scheme.has_integer_scales()
        && activation != ActivationScheme::BF16
        && !matches!(activation.scales, ActivationScales::PerTokenGroup(_))
}

/// Refuses codes of NaN and infinities.
fn check_finite<S: AsRef<[u8]>>(weight: &QMatrix<S>) -> Result<()> {
    let dtype = weight.scheme().dtype;
    let all_finite = (0..=dtype.max_code()).all(|code| dtype.level(code).is_finite());
    if all_finite || weight.rows() == 0 || weight.cols() == 0 {
        return Ok(());
    }
    let mut codes = vec![0; weight.cols()];
    for row in 0..weight.rows() {
        weight.unpack_row(row, &mut codes)?;
        if let Some(col) = codes.iter().position(|code| !dtype.level(*code).is_finite()) {
            return Err(Error::NotFinite { what: "weight", row, col });
        }
    }
    Ok(())
}

/// Are codes of this type integers, or few enough to look integers up?
pub(crate) fn has_integers(dtype: QuantType) -> bool {
    matches!(dtype, QuantType::Int { .. }) || dtype.bits() <= 4
}

/// Refuses what no kernel computes yet; otherwise how many weights a packed group has.
fn check_supported<S: AsRef<[u8]>>(layer: &QLinear<S>) -> Result<usize> {
    let refuse = |what: String| Err(Error::Unsupported { by: "PackedLinear", what });
    let weight = layer.weight();
    let features = match layer.outliers() {
        None | Some(Outliers::Sparse(_)) => false,
        Some(Outliers::Threshold(_) | Outliers::Columns(_)) => true,
        Some(other) => return refuse(format!("outliers found by {other:?}")),
    };
    if features && matches!(weight.scheme().zero, ZeroFormat::Real(_)) {
        return refuse("outlier features beside real zeros".to_string());
    }
    let weight_group = weight.block().1;
    let integers = layer.activation().filter(|scheme| *scheme != ActivationScheme::BF16);
    let Some(scheme) = integers else {
        return match features {
            false => Ok(weight_group),
            true => refuse("outlier features beside f32 or bfloat16 activations".to_string()),
        };
    };
    scheme.check()?;
    let dtype = weight.scheme().dtype;
    let Some(levels) = dtype.integer_levels().filter(|_| has_integers(dtype)) else {
        return refuse(format!("weights of {dtype:?} beside {:?} activations", scheme.dtype));
    };
    let real_zeros = matches!(weight.scheme().zero, ZeroFormat::Real(_) | ZeroFormat::Offset(_));
    if real_zeros && has_zeros_or_groups(scheme) {
        return refuse(format!(
            "zeros stored as {:?} beside activations of {scheme:?}",
            weight.scheme().zero
        ));
    }
    // |code − zero| or |level| is at most this much.
    let words = levels.integers.iter().any(|level| !(-128..256).contains(level));
    let one_sum = has_one_sum(weight.scheme(), scheme);
    let largest = match () {
        () if words => 32_768,
        () if one_sum => 128, // scaled
        () => 255,
    };
    let max = match scheme.dtype {
        ActivationType::Int8 => i32::MAX as usize / (largest * 128),
        ActivationType::UInt8 => i32::MAX as usize / (largest * 255),
        _ => return refuse(format!("activations of {scheme:?}")),
    };
    let k = weight.cols().max(1);
    let activation_group = match scheme.scales {
        ActivationScales::PerTokenGroup(group_size) => group_size.min(k),
        // The rest would have to be known before the scale is.
        ActivationScales::PerTensor if matches!(layer.outliers(), Some(Outliers::Threshold(_))) => {
            let what = "an outlier threshold beside a scale that the batch shares";
            return refuse(what.to_string());
        }
        _ => k,
    };
    let (short, long) = (weight_group.min(activation_group), weight_group.max(activation_group));
    if long < k && !long.is_multiple_of(short) {
        return refuse(format!(
            "activations in groups of {activation_group} beside weights in groups of {weight_group}: one must divide the other"
        ));
    }
    let summed = if one_sum { k } else { short };
    if summed > max {
        return refuse(format!(
            "sums of {summed} weights beside {:?} activations: at most {max} are sure not to overflow",
            scheme.dtype
        ));
    }
    Ok(short)
}

impl core::fmt::Debug for PackedLinear {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("PackedLinear")
            .field("kernel", &self.kernel.name)
            .field("out_features", &self.n)
            .field("in_features", &self.k)
            .field("activation", &self.activation)
            .finish_non_exhaustive()
    }
}
