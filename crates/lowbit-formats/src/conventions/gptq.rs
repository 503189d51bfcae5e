//! GPTQ checkpoints of AutoGPTQ, GPTQModel and their relatives (`gptqmodel/nn_modules/qlinear`).
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `qweight` | I32 (⌈k·bits/32⌉, n) | codes, packed along k |
//! | `qzeros` | I32 (groups, ⌈n·bits/32⌉) | zeros, packed along n; may be absent: all midpoints |
//! | `scales` | F16, BF16 or F32 (groups, n) | |
//! | `g_idx` | I32 (k) | the group of each input feature; may be absent: `k / group_size` |
//! | `bias` | (n) | optional |
//!
//! Bits are one stream, least significant first, so that 10⅔ 3-bit codes are in a word and a column of
//! `qweight` is a row of [`QMatrix`] word by word. Version 1 of the format stores zeros less 1, with
//! 2^bits − 1 for 0; version 2 as they are.
//!
//! Groups that act-order has scattered (an unsorted `g_idx`) become consecutive, behind a
//! [permutation](lowbit_core::Transform::Permute) of the input.

use std::borrow::Cow;

use lowbit_core::{QLinear, QMatrix, ZeroFormat};
use lowbit_dtypes::packed_len;
use serde_json::{Value, json};

use super::{
    Convention,
    parts::{self, Layer, Writer},
};
use crate::{Dtype, Result, Tensor, TensorSource, TensorView};

const NAME: &str = "gptq";

/// The tensors of GPTQ: 2, 3, 4 or 8 bits, groups along the input.
///
/// # Example
/// See [`Convention`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gptq {
    /// Bits of a code, for layers whose shapes leave it open.
    pub bits: Option<u8>,
    /// The group size, for layers without `g_idx` whose last group is shorter.
    pub group_size: Option<usize>,
    /// Are zeros stored as they are (`gptq_v2`), not less 1?
    pub v2: bool,
    /// Are layers symmetric? Then the version that a layer is read by is seen from its zeros, all
    /// 2^(bits−1) or all one less: there are files with the wrong label.
    pub symmetric: bool,
    /// Does nothing say the version? Then layers whose zeros do not show it, as those of symmetric layers
    /// do, are refused.
    pub unlabelled: bool,
}

impl Gptq {
    /// Bits of a code and in_features, from the shapes.
    fn shape(
        self,
        qweight: &TensorView<'_>,
        words: usize,
        n: usize,
        zero_words: Option<usize>,
        k: Option<usize>,
    ) -> Result<(u8, usize)> {
        let fits = |bits: u8| {
            let per = usize::from(bits);
            let whole = |bits: &usize| bits.is_multiple_of(per);
            let k_of = |words: usize| words.checked_mul(32).filter(whole).map(|bits| bits / per);
            let words_of = |codes: usize| packed_len(codes, bits.into()).div_ceil(4);
            let k = k.or_else(|| k_of(words))?;
            let fits = words_of(k) == words && zero_words.is_none_or(|zeros| words_of(n) == zeros);
            fits.then_some((bits, k))
        };
        let mut all = [2, 3, 4, 8].into_iter().filter_map(fits);
        if let Some(found) = self.bits.filter(|bits| [2, 3, 4, 8].contains(bits)).and_then(fits) {
            return Ok(found);
        }
        match (all.next(), all.next()) {
            (Some(found), None) => Ok(found),
            (None, _) => Err(qweight.error(format!(
                "its {words} x {n} words are no codes of 2, 3, 4 or 8 bits beside qzeros and g_idx"
            ))),
            (Some((a, _)), Some((b, _))) => Err(qweight.error(format!(
                "its {words} x {n} words may be codes of {a} or of {b} bits: say which"
            ))),
        }
    }
}

impl Convention for Gptq {
    fn name(&self) -> &'static str {
        NAME
    }

    fn holds(&self, source: &dyn TensorSource, layer: &str) -> bool {
        let layer = Layer { source, name: layer };
        layer.has("qweight") && layer.has("scales")
    }

    fn read(&self, source: &dyn TensorSource, name: &str) -> Result<QLinear> {
        let layer = Layer { source, name };
        let (qweight, [words, n]) = layer.matrix("qweight", Dtype::I32)?;
        let (scales, scale_format, [groups, _]) = layer.scales("scales")?;
        parts::expect_shape(&scales, &[groups, n])?;
        let qzeros = layer.find("qzeros").map(|_| layer.matrix("qzeros", Dtype::I32));
        let qzeros = qzeros.transpose()?;
        let g_idx = layer.find("g_idx").map(|view| parts::groups_of(&view)).transpose()?.flatten();
        let zero_words = qzeros.as_ref().map(|(_, [_, words])| *words);
        let k = g_idx.as_ref().map(Vec::len);
        let (bits, k) = self.shape(&qweight, words, n, zero_words, k)?;

        let (group_size, order) = match &g_idx {
            Some(g_idx) => parts::order(g_idx, groups).ok_or_else(|| {
                scales.error(format!("g_idx does not make {groups} groups of one size"))
            })?,
            None => {
                let size = parts::group_size(k, groups, self.group_size);
                let wrong = || scales.error(format!("{groups} groups of one size are not {k}"));
                (size.ok_or_else(wrong)?, None)
            }
        };

        let width = u32::from(bits);
        let codes = parts::transposed::<4>(qweight.bytes, words, n);
        let mut codes = parts::restride(codes, n, 4 * words, packed_len(k, width));
        parts::clear_padding(&mut codes, k, width);
        if let Some(order) = &order {
            parts::gather_columns(width, &mut codes, order);
        }
        let zeros = match &qzeros {
            Some((view, shape)) => {
                parts::expect_shape(view, &[groups, shape[1]])?;
                self.zeros(bits, view, groups, n)?
            }
            None => None,
        };
        let scheme = parts::integers(
            bits,
            parts::granularity(k, group_size),
            scale_format,
            zeros.as_deref(),
        );
        let scales = parts::transposed_scales(scale_format, scales.bytes, groups, n);
        let zeros = zeros.map(|zeros| {
            parts::pack_rows(width, &parts::transposed::<1>(&zeros, groups, n), groups)
        });
        let weight = QMatrix::from_parts(n, k, scheme, codes, scales, zeros);
        let linear = layer.finish(weight, qweight.file)?;
        layer.permuted(linear, order, qweight.file)
    }

    fn write(&self, layer: &QLinear, name: &str) -> Result<Vec<Tensor>> {
        let writer = Writer { convention: NAME, layer, name };
        writer.plain(true, false)?;
        let weight = writer.weight();
        let (bits, group_size) = (writer.bits()?, writer.group_size()?);
        if ![2, 3, 4, 8].contains(&bits) {
            return Err(writer.unsupported(format!("codes of {bits} bits, only of 2, 3, 4 or 8")));
        }
        let scale_dtype = writer.scale_dtype()?;
        let order = writer.order()?;
        let ((n, k), (_, groups)) = ((weight.rows(), weight.cols()), weight.grid());
        let width = u32::from(bits);
        let stride = packed_len(k, width);

        let mut codes = Cow::Borrowed(weight.codes());
        let mut g_idx: Vec<i32> = (0..k).map(|j| (j / group_size) as i32).collect();
        if let Some(places) = &order {
            parts::gather_columns(width, codes.to_mut(), places);
            g_idx = places.iter().map(|at| (at / group_size) as i32).collect();
        }
        let (codes, words) = parts::words(&codes, n, stride);
        let qweight = parts::transposed::<4>(&codes, n, words);

        let max = weight.scheme().dtype.max_code();
        let zeros = match writer.zeros()? {
            Some(zeros) if !self.v2 && zeros.contains(&0) => {
                return Err(writer.unsupported("a zero of 0 in version 1 of the format"));
            }
            Some(zeros) => parts::transposed::<1>(&zeros, n, groups),
            None => vec![weight.scheme().midpoint(); n * groups],
        };
        let stored: Vec<u8> = match self.v2 {
            true => zeros,
            false => zeros.iter().map(|zero| zero.wrapping_sub(1) & max).collect(),
        };
        let zero_words = packed_len(n, width).div_ceil(4);
        let qzeros = parts::pack_rows(width, &stored, n);
        let qzeros = parts::restride(qzeros, groups, packed_len(n, width), 4 * zero_words);
        let format = weight.scheme().scale_format;
        let scales = parts::transposed_scales(format, weight.scales(), n, groups);
        let mut tensors = vec![
            writer.tensor("qweight", Dtype::I32, &[words, n], qweight),
            writer.tensor("qzeros", Dtype::I32, &[groups, zero_words], qzeros),
            writer.tensor("scales", scale_dtype, &[groups, n], scales),
            Tensor::i32(format!("{name}.g_idx"), vec![k], &g_idx),
        ];
        tensors.extend(writer.bias());
        Ok(tensors)
    }

    fn config(&self, layer: &QLinear) -> Option<Value> {
        let scheme = layer.weight().scheme();
        Some(json!({
            "quant_method": NAME,
            "bits": scheme.dtype.bits(),
            "group_size": parts::config_group_size(scheme),
            "sym": scheme.zero == ZeroFormat::Midpoint,
            "desc_act": !layer.transforms().is_empty(),
            "checkpoint_format": if self.v2 { "gptq_v2" } else { "gptq" },
            "pack_dtype": "int32",
        }))
    }
}

impl Gptq {
    /// The zeros, one a byte, `(groups, n)`; `None` if they are all midpoints.
    fn zeros(
        self,
        bits: u8,
        packed: &TensorView<'_>,
        groups: usize,
        n: usize,
    ) -> Result<Option<Vec<u8>>> {
        let width = u32::from(bits);
        let stride = packed_len(n, width);
        let rows =
            parts::restride(packed.bytes.to_vec(), groups, stride.next_multiple_of(4), stride);
        let mut zeros = vec![0; groups * n];
        parts::unpack_rows(width, &rows, n, &mut zeros);
        let max = (u16::MAX >> (16 - bits)) as u8;
        let midpoint = max / 2 + 1;
        let all = |value| zeros.iter().all(|&zero| zero == value);
        let v2 = match self.v2 {
            _ if self.symmetric && all(midpoint) => true,
            _ if self.symmetric && all(midpoint - 1) => false,
            _ if self.unlabelled => {
                return Err(packed.error(
                    "its zeros do not show whether they are stored less 1 (version 1 of GPTQ): expected \
                     checkpoint_format \"gptq\" or \"gptq_v2\" in the quantization_config"
                        .into(),
                ));
            }
            label => label,
        };
        if !v2 {
            zeros.iter_mut().for_each(|zero| *zero = zero.wrapping_add(1) & max);
        }
        Ok(zeros.iter().any(|&zero| zero != midpoint).then_some(zeros))
    }
}
