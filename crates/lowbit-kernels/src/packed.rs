use lowbit_core::{
    ActivationScales, ActivationScheme, ActivationType, Adapter, Error, Outliers, QLinear,
    QuantType, Result, SparseRows, Transform, ZeroFormat,
};

use crate::{
    isa::{self, Kernel},
    tile::{NR, Panel, Storage},
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
    storage: Storage,
    /// Input features of a full group, within which no scale changes, neither of weights nor of
    /// activations; and how many groups a row has.
    group: (usize, usize),
    // codes:  [n/32][steps of all groups][32 rows][4 bytes]; a step is 4 (bytes) or 8 (nibbles) k
    // scales: [n/32][groups][32]
    // zeros:  [n/32][groups][32]
    // sums:   [n/32][groups][32], or none: see `Panel`
    // Groups are padded to whole steps and rows to whole panels: code 0, zero 0, scale 0.
    codes: Vec<Line>,
    scales: Vec<[f32; NR]>,
    zeros: Vec<[u8; NR]>,
    sums: Vec<[i32; NR]>,
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

/// The longest group for which `Σ (code − zero)·a` surely fits an i32: `(2^31 − 1) / (255 · 128)`.
const MAX_INT8_GROUP: usize = 65_793;

/// As [`MAX_INT8_GROUP`], with `a − zero` up to 255: `(2^31 − 1) / (255 · 255)`.
const MAX_UINT8_GROUP: usize = 33_025;

impl PackedLinear {
    /// Packs `layer` for the best kernel of this CPU.
    ///
    /// # Errors
    /// As [`with_kernel`](Self::with_kernel).
    pub fn new<S: AsRef<[u8]>>(layer: &QLinear<S>) -> Result<Self> {
        Self::pack(layer, isa::best())
    }

    /// Packs `layer` for the kernel called `name`, one of [`kernels`](crate::kernels): for tests,
    /// benchmarks and reports of defects.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if there is no such kernel or this CPU lacks its instructions, or if no
    /// kernel computes such a layer yet: zeros that are real numbers or offsets; activations in other
    /// than f32, int8 or uint8; groups of a token neither of which divides those of the weights nor the
    /// other way round; a group of more than 65,793 weights beside int8 activations or 33,025 beside
    /// uint8 (whose sum might overflow); outlier features beside f32 activations; a threshold for them beside a scale that the batch
    /// shares.
    pub fn with_kernel<S: AsRef<[u8]>>(layer: &QLinear<S>, name: &str) -> Result<Self> {
        Self::pack(layer, isa::named(name)?)
    }

    fn pack<S: AsRef<[u8]>>(layer: &QLinear<S>, kernel: &'static Kernel) -> Result<Self> {
        let weight = layer.weight();
        let (n, k) = (weight.rows(), weight.cols());
        let (block_rows, block_cols) = weight.block();
        let group_size = check_supported(layer)?;
        let groups = k.div_ceil(group_size);
        let storage = match weight.scheme().dtype.bits() {
            ..=4 => Storage::Nibbles,
            _ => Storage::Bytes,
        };
        let panels = n.div_ceil(NR);
        let steps = storage.steps(group_size, k);
        let mut packed = Self {
            n,
            k,
            kernel,
            transforms: layer.transforms().to_vec(),
            activation: layer.activation(),
            outliers: layer.outliers().cloned(),
            adapter: layer.adapter().cloned(),
            bias: layer.bias().map(<[f32]>::to_vec),
            storage,
            group: (group_size, groups),
            codes: vec![Line([0; 64]); panels * steps * (4 * NR / 64)],
            scales: vec![[0.0; NR]; panels * groups],
            zeros: vec![[0; NR]; panels * groups],
            sums: match layer.activation() {
                Some(scheme) if has_zeros_or_groups(scheme) => vec![[0; NR]; panels * groups],
                _ => Vec::new(),
            },
        };
        let mut row_codes = vec![0; if n == 0 { 0 } else { k }];
        let panel_bytes = steps * 4 * NR;
        let codes: &mut [u8] = bytemuck::cast_slice_mut(&mut packed.codes);
        for row in 0..if k == 0 { 0 } else { n } {
            let (panel, lane) = (row / NR, row % NR);
            weight.unpack_row(row, &mut row_codes)?;
            let codes = &mut codes[panel * panel_bytes..][..panel_bytes];
            for (g, group) in row_codes.chunks(group_size).enumerate() {
                let params = weight.params(row / block_rows, g * group_size / block_cols);
                packed.scales[panel * groups + g][lane] = params.scale;
                packed.zeros[panel * groups + g][lane] = params.zero as u8; // an integer below 256
                if let Some(sums) = packed.sums.get_mut(panel * groups + g) {
                    sums[lane] = group.iter().map(|&c| i32::from(c) - params.zero as i32).sum();
                }
                let first = g * storage.steps_of_group(group_size);
                for (j, &code) in group.iter().enumerate() {
                    let (step, byte, shift) = storage.place(j);
                    codes[((first + step) * NR + lane) * 4 + byte] |= code << shift;
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
        size_of_val(&self.codes[..])
            + size_of_val(&self.scales[..])
            + size_of_val(&self.zeros[..])
            + size_of_val(&self.sums[..])
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

    /// The dequantized weights of input feature `j`, one for each output: `Params::level`.
    pub(crate) fn column(&self, j: usize, to: &mut [f32]) {
        let (g, within) = (j / self.group.0, j % self.group.0);
        let (step, byte, shift) = self.storage.place(within);
        let step = g * self.storage.steps_of_group(self.group.0) + step;
        let mask = match self.storage {
            Storage::Bytes => 255,
            Storage::Nibbles => 15,
        };
        for (panel, to) in to.chunks_mut(NR).enumerate() {
            let panel = self.panel(panel);
            for (lane, to) in to.iter_mut().enumerate() {
                let code = panel.codes[(step * NR + lane) * 4 + byte] >> shift & mask;
                let zero = f32::from(panel.zeros[g][lane]);
                *to = panel.scales[g][lane] * (f32::from(code) - zero) + 0.0;
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

    /// Input features of a full group once padded to whole steps.
    pub(crate) fn padded_group(&self) -> usize {
        self.storage.steps_of_group(self.group.0) * self.storage.k_per_step()
    }

    /// Input features of a row once every group is padded to whole steps.
    pub(crate) fn padded_k(&self) -> usize {
        self.storage.steps(self.group.0, self.k) * self.storage.k_per_step()
    }

    /// The panel of rows `32·index ..`.
    pub(crate) fn panel(&self, index: usize) -> Panel<'_> {
        let bytes = self.padded_k() / self.storage.k_per_step() * 4 * NR;
        let codes: &[u8] = bytemuck::cast_slice(&self.codes);
        Panel {
            codes: &codes[index * bytes..][..bytes],
            scales: &self.scales[index * self.group.1..][..self.group.1],
            zeros: &self.zeros[index * self.group.1..][..self.group.1],
            sums: match self.sums.is_empty() {
                true => &[],
                false => &self.sums[index * self.group.1..][..self.group.1],
            },
            exact: false,
            storage: self.storage,
            steps: self.storage.steps_of_group(self.group.0),
            next: &[],
        }
    }
}

/// Do activations have a zero, or scales for groups of a token?
pub(crate) fn has_zeros_or_groups(scheme: ActivationScheme) -> bool {
    scheme.dtype == ActivationType::UInt8
        || matches!(scheme.scales, ActivationScales::PerTokenGroup(_))
}

/// Refuses what no kernel computes yet; otherwise how many weights a packed group has.
fn check_supported<S: AsRef<[u8]>>(layer: &QLinear<S>) -> Result<usize> {
    let refuse = |what: String| Err(Error::Unsupported { by: "PackedLinear", what });
    let weight = layer.weight();
    if !matches!(weight.scheme().dtype, QuantType::Int { .. }) {
        return refuse(format!("weights of {:?}", weight.scheme().dtype));
    }
    if !matches!(weight.scheme().zero, ZeroFormat::Midpoint | ZeroFormat::Int) {
        return refuse(format!("zeros stored as {:?}", weight.scheme().zero));
    }
    let features = match layer.outliers() {
        None | Some(Outliers::Sparse(_)) => false,
        Some(Outliers::Threshold(_) | Outliers::Columns(_)) => true,
        Some(other) => return refuse(format!("outliers found by {other:?}")),
    };
    let weight_group = weight.block().1;
    let Some(scheme) = layer.activation() else {
        return match features {
            false => Ok(weight_group),
            true => refuse("outlier features beside f32 activations".to_string()),
        };
    };
    scheme.check()?;
    let max = match scheme.dtype {
        ActivationType::Int8 => MAX_INT8_GROUP,
        ActivationType::UInt8 => MAX_UINT8_GROUP,
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
    if short > max {
        return refuse(format!(
            "groups of {short} weights beside {:?} activations: at most {max} may share a scale",
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
