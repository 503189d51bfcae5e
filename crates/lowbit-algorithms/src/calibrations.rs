//! The calibrations of a whole model: added up, and kept in a file.
//!
//! The file is a safetensors file, so Python reads it too; `docs/formats.md` describes it. Layers
//! that share a calibration (one [`Arc`]) share it in the file and after reading it.
//!
//! # Example
//! Two machines collect, a third adds up:
//! ```
//! use std::sync::Arc;
//! use lowbit_algorithms::{Calibration, Calibrations, calibrations};
//! use lowbit_core::{Context, MatRef};
//!
//! let collect = |x: &[f32]| -> Result<Calibrations, lowbit_core::Error> {
//!     let mut c = Calibration::with_second_moment(2)?;
//!     c.observe(MatRef::new(x, x.len() / 2, 2)?, &mut Context::new())?;
//!     let c = Arc::new(c);
//!     Ok(Calibrations::from([("gate".into(), c.clone()), ("up".into(), c)]))
//! };
//! let folder = std::env::temp_dir();
//! let name = |machine| folder.join(format!("{}-{machine}.safetensors", std::process::id()));
//! calibrations::save(&collect(&[1.0, -4.0])?, &name(1))?;
//! calibrations::save(&collect(&[3.0, 0.0])?, &name(2))?;
//!
//! let mut all = calibrations::load(&name(1))?;
//! calibrations::merge(&mut all, &calibrations::load(&name(2))?)?;
//! assert_eq!((all["up"].tokens(), all["up"].abs_mean()), (2, vec![2.0, 2.0]));
//! assert_eq!(all["up"].second_moment()?.data(), [10.0, -4.0, -4.0, 16.0]);
//! assert!(Arc::ptr_eq(&all["up"], &all["gate"]));
//! # std::fs::remove_file(name(1))?;
//! # std::fs::remove_file(name(2))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::sync::atomic::{AtomicU64, Ordering};
use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use pulp::bytemuck::{self, Pod};
use safetensors::{Dtype, SafeTensorError, View, tensor::Metadata};
use serde_json::{Value, json};

use crate::{
    Calibration,
    calibration::MAX_TOKENS,
    second_moment::{CHUNK, row_start},
};

/// Calibrations by the name of the layer. Layers with the same input share one.
pub type Calibrations = BTreeMap<String, Arc<Calibration>>;

/// What can be wrong with calibrations of a model and with their file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        cause: io::Error,
    },
    /// A file that does not hold calibrations.
    #[error("{file}: {reason}")]
    File {
        /// The file.
        file: String,
        /// What is expected and what is there.
        reason: String,
    },
    /// A layer in a file whose statistics are incomplete, or cannot be those of any input.
    #[error("{file}: layer {layer}: {reason}")]
    Layer {
        /// The file.
        file: String,
        /// The layer.
        layer: String,
        /// What is expected and what is there.
        reason: String,
    },
    /// Two calibrations of one layer cannot be added up.
    #[error("layer {layer}: {cause}")]
    Merge {
        /// The layer.
        layer: String,
        /// Why.
        cause: lowbit_core::Error,
    },
}

/// A result whose error is [`enum@Error`].
type Result<T, E = Error> = std::result::Result<T, E>;

/// Adds what another machine has seen of the same model; layers that only it has seen are taken over.
///
/// # Errors
/// [`Error::Merge`] with the first layer for which [`Calibration::merge`] fails. Nothing has been
/// added then.
///
/// # Example
/// See the [module](self).
pub fn merge(all: &mut Calibrations, other: &Calibrations) -> Result<()> {
    for (layer, other) in other {
        if let Some(calibration) = all.get(layer) {
            let error = |cause| Error::Merge { layer: layer.clone(), cause };
            calibration.check_merge(other).map_err(error)?;
        }
    }
    // Names whose statistics were shared on both sides stay so.
    let mut groups: BTreeMap<_, (Arc<Calibration>, &Calibration, Vec<String>)> = BTreeMap::new();
    for (layer, other) in other {
        let Some((layer, calibration)) = all.remove_entry(layer) else {
            all.insert(layer.clone(), other.clone());
            continue;
        };
        let pair = (Arc::as_ptr(&calibration), Arc::as_ptr(other));
        groups.entry(pair).or_insert((calibration, other, Vec::new())).2.push(layer);
    }
    for (mut calibration, other, layers) in groups.into_values() {
        Arc::make_mut(&mut calibration).add(other);
        all.extend(layers.into_iter().map(|layer| (layer, calibration.clone())));
    }
    Ok(())
}

/// The file of `calibrations` as bytes. The same calibrations give the same bytes.
///
/// # Errors
/// [`Error::File`] if the names take more than the 100 MB that the header of a safetensors file
/// may have.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use lowbit_algorithms::{Calibration, Calibrations, calibrations};
///
/// let all = Calibrations::from([("q_proj".to_string(), Arc::new(Calibration::new(64)))]);
/// let bytes = calibrations::to_bytes(&all)?;
/// assert_eq!(calibrations::from_bytes("a file", &bytes)?, all);
/// # Ok::<(), calibrations::Error>(())
/// ```
pub fn to_bytes(calibrations: &Calibrations) -> Result<Vec<u8>> {
    let (tensors, metadata) = tensors(calibrations);
    let error = |e: SafeTensorError| Error::File { file: "bytes".into(), reason: e.to_string() };
    safetensors::serialize(tensors, Some(metadata)).map_err(error)
}

/// Writes the file of `calibrations`: first beside `path`, then moved there, so that an
/// interruption leaves either the old file or the new one.
///
/// # Errors
/// [`Error::Io`] if it cannot be written, and as [`to_bytes`].
///
/// # Example
/// See the [module](self).
pub fn save(calibrations: &Calibrations, path: &Path) -> Result<()> {
    let mut beside = path.as_os_str().to_os_string();
    // Two threads may save to one path: the last one to finish wins.
    static SAVES: AtomicU64 = AtomicU64::new(0);
    let save = SAVES.fetch_add(1, Ordering::Relaxed);
    beside.push(format!(".{}-{save}.part", std::process::id()));
    let beside = Path::new(&beside);
    let (tensors, metadata) = tensors(calibrations);
    let io = |cause| Error::Io { path: path.to_path_buf(), cause };
    let written = safetensors::serialize_to_file(tensors, Some(metadata), beside)
        .map_err(|e| match e {
            SafeTensorError::IoError(cause) => io(cause),
            e => Error::File { file: path.display().to_string(), reason: e.to_string() },
        })
        // What is not on the disk before the file has its name may be missing after a power failure.
        .and_then(|()| fs::OpenOptions::new().write(true).open(beside).map_err(io))
        .and_then(|file| file.sync_all().map_err(io))
        .and_then(|()| fs::rename(beside, path).map_err(io));
    if written.is_err() {
        // It is of no use to anyone; the error says what went wrong first.
        let _ = fs::remove_file(beside);
    }
    written
}

/// Reads a file that [`save`] wrote.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, and as [`from_bytes`].
///
/// # Example
/// See the [module](self).
pub fn load(path: &Path) -> Result<Calibrations> {
    let io = |cause| Error::Io { path: path.to_path_buf(), cause };
    let file = fs::File::open(path).map_err(io)?;
    let len = file.metadata().map_err(io)?.len();
    let name = path.display().to_string();
    read(&name, io::BufReader::new(file), len)
}

/// Reads a file from its bytes. `file` is what error messages call it.
///
/// # Errors
/// [`Error::File`] if it is not such a file, is of another version, or ends early;
/// [`Error::Layer`] if a layer's statistics are incomplete or cannot be those of any input: a
/// number that is not finite, a minimum above the maximum, a mean above the maximum, a negative
/// diagonal, an element of the second moment larger than the diagonal allows.
///
/// # Example
/// See [`to_bytes`].
pub fn from_bytes(file: &str, bytes: &[u8]) -> Result<Calibrations> {
    read(file, bytes, bytes.len() as u64)
}

/// The only key in the file's metadata, which would have a random order otherwise.
const KEY: &str = "lowbit_calibration";
const VERSION: u64 = 1;
/// What a layer's tensors are called behind its name and a dot, and their types. `size` holds the
/// number of tokens and of channels.
const SIZE: &str = "size";
const MIN: &str = "min";
const MAX: &str = "max";
const ABS_SUM: &str = "abs_sum";
const SECOND_MOMENT: &str = "second_moment";

/// A tensor to be written.
struct Tensor<'a> {
    shape: [usize; 1],
    data: Data<'a>,
}

enum Data<'a> {
    U64(Vec<u64>),
    F32(&'a [f32]),
    F64(&'a [f64]),
}

impl View for Tensor<'_> {
    fn dtype(&self) -> Dtype {
        match self.data {
            Data::U64(_) => Dtype::U64,
            Data::F32(_) => Dtype::F32,
            Data::F64(_) => Dtype::F64,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        fn bytes<T: Pod, const N: usize>(data: &[T], le: impl Fn(&T) -> [u8; N]) -> Cow<'_, [u8]> {
            match cfg!(target_endian = "little") {
                true => Cow::Borrowed(bytemuck::cast_slice(data)),
                false => Cow::Owned(data.iter().flat_map(le).collect()),
            }
        }
        match &self.data {
            Data::U64(data) => bytes(data, |x| x.to_le_bytes()),
            Data::F32(data) => bytes(data, |x| x.to_le_bytes()),
            Data::F64(data) => bytes(data, |x| x.to_le_bytes()),
        }
    }

    fn data_len(&self) -> usize {
        self.shape[0] * self.dtype().bitsize() / 8
    }
}

/// What is written: each calibration under the first of its names, and which others share it.
fn tensors(calibrations: &Calibrations) -> (Vec<(String, Tensor<'_>)>, HashMap<String, String>) {
    let (mut tensors, mut first, mut shared) = (Vec::new(), HashMap::new(), BTreeMap::new());
    for (layer, calibration) in calibrations {
        if let Some(first) = first.get(&Arc::as_ptr(calibration)) {
            shared.insert(layer, *first);
            continue;
        }
        first.insert(Arc::as_ptr(calibration), layer);
        let c = calibration.as_ref();
        let mut push = |part, len, data| {
            tensors.push((format!("{layer}.{part}"), Tensor { shape: [len], data }));
        };
        push(SIZE, 2, Data::U64(vec![c.tokens, c.in_features as u64]));
        push(MIN, c.min.len(), Data::F32(&c.min));
        push(MAX, c.max.len(), Data::F32(&c.max));
        push(ABS_SUM, c.abs_sum.len(), Data::F64(&c.abs_sum));
        if let Some(triangle) = &c.triangle {
            push(SECOND_MOMENT, triangle.len(), Data::F64(triangle));
        }
    }
    let value = json!({ "version": VERSION, "shared": shared }).to_string();
    (tensors, HashMap::from([(KEY.to_string(), value)]))
}

/// What has been read of a layer.
#[derive(Default)]
struct Parts {
    size: Option<Vec<u64>>,
    min: Option<Vec<f32>>,
    max: Option<Vec<f32>>,
    abs_sum: Option<Vec<f64>>,
    second_moment: Option<Vec<f64>>,
}

/// Reads a file of `len` bytes. All lengths are checked against it before anything is allocated.
fn read(file: &str, mut reader: impl Read, len: u64) -> Result<Calibrations> {
    let wrong = |reason: String| Error::File { file: file.into(), reason };
    let truncated = |expected: u64| {
        wrong(format!("expected {expected} bytes, got {len}: the file is truncated, copy it again"))
    };
    let mut start = [0; 8];
    if len < 8 {
        return Err(truncated(8));
    }
    reader.read_exact(&mut start).map_err(|e| wrong(e.to_string()))?;
    let header = u64::from_le_bytes(start);
    if header > 100_000_000 {
        return Err(wrong(format!(
            "expected a safetensors file, but its first 8 bytes announce a header of {header} bytes"
        )));
    }
    if len - 8 < header {
        return Err(truncated(8 + header));
    }
    let header: Vec<u8> = numbers(&mut reader, header as usize).map_err(wrong)?;
    let data = len - 8 - header.len() as u64;
    let header: Metadata = serde_json::from_slice(&header)
        .map_err(|e| wrong(format!("expected a safetensors file, but {e}")))?;
    let shared = shared(header.metadata().as_ref()).map_err(wrong)?;
    // `Metadata` has made sure that tensors lie back to back and are as long as their shapes say.
    let mut tensors: Vec<_> = header.tensors().into_iter().collect();
    tensors.sort_by(|(a, x), (b, y)| (x.data_offsets, a).cmp(&(y.data_offsets, b)));
    let end = tensors.last().map_or(0, |(_, info)| info.data_offsets.1 as u64);
    if end > data {
        return Err(truncated((len - data).saturating_add(end)));
    }
    if end < data {
        let expected = len - (data - end);
        return Err(wrong(format!("expected {expected} bytes, got {len}")));
    }

    let mut layers: BTreeMap<&str, Parts> = BTreeMap::new();
    for (name, info) in &tensors {
        let unknown = || wrong(format!("tensor {name} is not one of a calibration"));
        let (layer, part) = name.rsplit_once('.').ok_or_else(unknown)?;
        let dtype = match part {
            SIZE => Dtype::U64,
            MIN | MAX => Dtype::F32,
            ABS_SUM | SECOND_MOMENT => Dtype::F64,
            _ => return Err(unknown()),
        };
        let wrong = |reason| Error::Layer { file: file.into(), layer: layer.into(), reason };
        let &[len] = &info.shape[..] else {
            return Err(wrong(format!("{part}: expected one dimension, got {:?}", info.shape)));
        };
        if info.dtype != dtype {
            return Err(wrong(format!("{part}: expected {dtype}, got {}", info.dtype)));
        }
        let parts = layers.entry(layer).or_default();
        let reader = &mut reader;
        match part {
            SIZE => parts.size = Some(u64s(reader, len).map_err(wrong)?),
            MIN => parts.min = Some(f32s(reader, len).map_err(wrong)?),
            MAX => parts.max = Some(f32s(reader, len).map_err(wrong)?),
            ABS_SUM => parts.abs_sum = Some(f64s(reader, len).map_err(wrong)?),
            _ => parts.second_moment = Some(f64s(reader, len).map_err(wrong)?),
        }
    }

    let mut all = Calibrations::new();
    for (layer, parts) in layers {
        let wrong = |reason| Error::Layer { file: file.into(), layer: layer.into(), reason };
        all.insert(layer.into(), Arc::new(parts.check().map_err(wrong)?));
    }
    let mut copies = Vec::new();
    for (layer, first) in shared {
        let wrong = |reason| Error::Layer { file: file.into(), layer: layer.clone(), reason };
        if all.contains_key(&layer) {
            return Err(wrong(format!("it has statistics and shares those of {first}")));
        }
        match all.get(&first) {
            Some(calibration) => copies.push((layer, calibration.clone())),
            None => return Err(wrong(format!("it shares those of {first}, which has none"))),
        }
    }
    all.extend(copies);
    Ok(all)
}

/// Which layers share the statistics of which others.
fn shared(metadata: Option<&HashMap<String, String>>) -> Result<BTreeMap<String, String>, String> {
    let value = metadata.and_then(|metadata| metadata.get(KEY));
    let value = value.ok_or_else(|| {
        format!("expected a file of calibrations, but its metadata have no {KEY}")
    })?;
    let value: Value = serde_json::from_str(value).map_err(|e| format!("{KEY}: {e}"))?;
    match value.get("version") {
        Some(version) if *version == VERSION => {}
        Some(version) => return Err(format!("expected version {VERSION}, got {version}")),
        None => return Err(format!("{KEY}: expected a version")),
    }
    match value.get("shared") {
        None => Ok(BTreeMap::new()),
        Some(shared) => {
            serde_json::from_value(shared.clone()).map_err(|e| format!("{KEY}: shared: {e}"))
        }
    }
}

/// `len` numbers in the byte order of this machine.
fn numbers<T: Pod>(reader: &mut impl Read, len: usize) -> Result<Vec<T>, String> {
    let mut numbers = Vec::new();
    numbers.try_reserve_exact(len).map_err(|_| format!("no memory for {len} numbers"))?;
    numbers.resize(len, T::zeroed());
    reader.read_exact(bytemuck::cast_slice_mut(&mut numbers)).map_err(|e| e.to_string())?;
    Ok(numbers)
}

fn u64s(reader: &mut impl Read, len: usize) -> Result<Vec<u64>, String> {
    Ok(numbers(reader, len)?.into_iter().map(u64::from_le).collect())
}

fn f32s(reader: &mut impl Read, len: usize) -> Result<Vec<f32>, String> {
    let numbers: Vec<u32> = numbers(reader, len)?;
    Ok(numbers.into_iter().map(|bits| f32::from_bits(u32::from_le(bits))).collect())
}

fn f64s(reader: &mut impl Read, len: usize) -> Result<Vec<f64>, String> {
    Ok(u64s(reader, len)?.into_iter().map(f64::from_bits).collect())
}

impl Parts {
    /// Refuses what `observe` and `merge` cannot have made.
    fn check(self) -> Result<Calibration, String> {
        let Some(size) = self.size else { return Err(format!("{SIZE} is missing")) };
        let &[tokens, channels] = &size[..] else {
            return Err(format!(
                "{SIZE}: expected tokens and channels, got {} numbers",
                size.len()
            ));
        };
        if tokens > MAX_TOKENS {
            return Err(format!("{SIZE}: expected at most 2^53 tokens, got {tokens}"));
        }
        let in_features = usize::try_from(channels)
            .map_err(|_| format!("{SIZE}: {channels} channels are too many for this machine"))?;
        let k = if tokens == 0 { 0 } else { in_features };
        let c = Calibration {
            in_features,
            tokens,
            min: checked(MIN, self.min, Some(k), |x| x.is_finite())?,
            max: checked(MAX, self.max, Some(k), |x| x.is_finite())?,
            abs_sum: checked(ABS_SUM, self.abs_sum, Some(k), |x| x.is_finite() && *x >= 0.0)?,
            triangle: match self.second_moment {
                None => None,
                h => Some(checked(SECOND_MOMENT, h, row_start(in_features), |x| x.is_finite())?),
            },
        };
        for (i, ((min, max), sum)) in c.min.iter().zip(&c.max).zip(&c.abs_sum).enumerate() {
            if min > max {
                return Err(format!("channel {i}: {MIN} {min:e} is above {MAX} {max:e}"));
            }
            // The largest of `tokens` numbers is part of their sum, and not below their mean.
            let largest = f64::from(min.abs().max(max.abs()));
            if *sum < largest * (1.0 - SLACK) || *sum > largest * tokens as f64 * (1.0 + SLACK) {
                return Err(format!(
                    "channel {i}: {ABS_SUM} {sum:e} of {tokens} tokens contradicts a largest |x| of {largest:e}"
                ));
            }
        }
        c.check_triangle()?;
        Ok(c)
    }
}

/// What rounding may do to sums, with room to spare.
const SLACK: f64 = 2.0 * CHUNK as f64 / (1 << 24) as f64;

impl Calibration {
    fn check_triangle(&self) -> Result<(), String> {
        let Some(h) = &self.triangle else { return Ok(()) };
        // What f32 loses of products near 0.
        let tiny = self.tokens as f64 * f64::from(f32::from_bits(1));
        let mut roots = Vec::with_capacity(self.max.len());
        let mut rest = h.as_slice();
        for (r, largest) in self.abs_max().iter().enumerate() {
            let Some((row, behind)) = rest.split_at_checked(r + 1) else { break };
            let (largest, diagonal) = (f64::from(*largest).powi(2), row[r]);
            if diagonal < largest * (1.0 - SLACK) - tiny
                || diagonal > largest * self.tokens as f64 * (1.0 + SLACK) + tiny
            {
                return Err(format!(
                    "{SECOND_MOMENT}: {diagonal:e} at row {r}, column {r} contradicts a largest x² of {largest:e} in {} tokens",
                    self.tokens
                ));
            }
            roots.push((diagonal + tiny).sqrt());
            // Cauchy-Schwarz: |H_rc| <= sqrt(H_rr · H_cc)
            let limit = roots[r] * (1.0 + 2.0 * SLACK);
            let too_large = |(h, root): (&f64, &f64)| h.abs() > limit * root + tiny;
            if let Some(c) = row.iter().zip(&roots).position(too_large) {
                return Err(format!(
                    "{SECOND_MOMENT}: {:e} at row {r}, column {c} is larger than the diagonal allows",
                    row[c]
                ));
            }
            rest = behind;
        }
        // Without tokens, h has rows but there are no channels above.
        match rest.iter().position(|&h| h != 0.0) {
            Some(_) => Err(format!("{SECOND_MOMENT}: expected zeros, as there are no tokens")),
            None => Ok(()),
        }
    }
}

/// Numbers of a tensor, as many as there should be, all of them good.
fn checked<T: Copy + std::fmt::LowerExp>(
    part: &str,
    numbers: Option<Vec<T>>,
    expected: Option<usize>,
    good: impl Fn(&T) -> bool,
) -> Result<Vec<T>, String> {
    let Some(numbers) = numbers else { return Err(format!("{part} is missing")) };
    match expected {
        Some(expected) if expected == numbers.len() => {}
        Some(expected) => {
            return Err(format!("{part}: expected {expected} numbers, got {}", numbers.len()));
        }
        None => return Err(format!("{part}: too many channels for this machine")),
    }
    match numbers.iter().position(|x| !good(x)) {
        Some(i) => Err(format!("{part}: {:e} at {i}", numbers[i])),
        None => Ok(numbers),
    }
}

#[cfg(test)]
mod tests {
    use lowbit_core::{Context, Mat};
    use proptest::prelude::*;

    use super::*;

    fn observed(tokens: usize, k: usize, seed: usize, second_moment: bool) -> Calibration {
        let x = Mat::from_fn(tokens, k, |t, c| {
            ((t * 31 + c * 17 + seed * 7) % 101) as f32 * 0.02 - 1.0 + (c % 3) as f32
        });
        let mut c = match second_moment {
            true => Calibration::with_second_moment(k).unwrap(),
            false => Calibration::new(k),
        };
        c.observe(x.as_ref(), &mut Context::new()).unwrap();
        c
    }

    /// Two layers that share, one without the second moment, one without tokens.
    fn model(seed: usize) -> Calibrations {
        let qk = Arc::new(observed(20, 3, seed, true));
        Calibrations::from([
            ("0.q.weight".into(), qk.clone()),
            ("0.k.weight".into(), qk),
            ("0.down.weight".into(), Arc::new(observed(20, 5, seed, false))),
            ("0.expert.weight".into(), Arc::new(Calibration::with_second_moment(2).unwrap())),
        ])
    }

    #[test]
    fn a_file_has_each_shared_calibration_once_and_always_the_same_bytes() {
        let (all, bytes) = (model(1), to_bytes(&model(1)).unwrap());
        let read = from_bytes("f", &bytes).unwrap();
        assert_eq!(read, all);
        assert!(Arc::ptr_eq(&read["0.q.weight"], &read["0.k.weight"]));
        assert_eq!(to_bytes(&read).unwrap(), bytes);
        let text = String::from_utf8_lossy(&bytes);
        let header = r#"{"__metadata__":{"lowbit_calibration":"{\"shared\":{\"0.q.weight\":\"0.k.weight\"},\"version\":1}"},"#;
        assert_eq!(&text[8..8 + header.len()], header);
        assert_eq!(from_bytes("f", &to_bytes(&Calibrations::new()).unwrap()).unwrap().len(), 0);
    }

    #[test]
    fn a_file_cut_anywhere_is_an_error_that_gives_both_lengths() {
        let bytes = to_bytes(&model(1)).unwrap();
        for len in 0..bytes.len() {
            let error = from_bytes("f", &bytes[..len]).unwrap_err().to_string();
            assert!(error.contains(&format!("bytes, got {len}: the file is truncated")), "{error}");
        }
        let long = [&bytes[..], &[0]].concat();
        let (expected, got) = (bytes.len(), long.len());
        let error = from_bytes("f", &long).unwrap_err().to_string();
        assert_eq!(error, format!("f: expected {expected} bytes, got {got}"));
    }

    /// A file of tensors as they are, with the metadata that it should have.
    fn file(tensors: Vec<(&str, Vec<usize>, Data<'_>)>, metadata: &str) -> Vec<u8> {
        let tensors: Vec<_> = tensors
            .into_iter()
            .map(|(name, shape, data)| {
                let tensor = Tensor { shape: [0], data };
                let bytes = tensor.data().into_owned();
                (name, tensor.dtype(), shape, bytes)
            })
            .collect();
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            (*name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        let metadata = HashMap::from([(KEY.to_string(), metadata.to_string())]);
        safetensors::serialize(views, Some(metadata)).unwrap()
    }

    const GOOD: &str = r#"{"version":1,"shared":{}}"#;

    #[test]
    fn every_contradiction_is_named() {
        let good = || {
            vec![
                ("l.size", vec![2], Data::U64(vec![2, 2])),
                ("l.min", vec![2], Data::F32(&[-1.0, 0.0])),
                ("l.max", vec![2], Data::F32(&[3.0, 0.5])),
                ("l.abs_sum", vec![2], Data::F64(&[4.0, 0.75])),
                ("l.second_moment", vec![3], Data::F64(&[10.0, 1.25, 0.3125])),
            ]
        };
        assert_eq!(from_bytes("f", &file(good(), GOOD)).unwrap()["l"].tokens(), 2);
        let cases: Vec<(usize, Vec<usize>, Data<'_>, &str)> = vec![
            (0, vec![1], Data::U64(vec![2]), "size: expected tokens and channels, got 1 numbers"),
            (0, vec![2], Data::U64(vec![2, 3]), "min: expected 3 numbers, got 2"),
            (
                0,
                vec![2],
                Data::U64(vec![2, u64::MAX]),
                "min: expected 18446744073709551615 numbers, got 2",
            ),
            (0, vec![2], Data::U64(vec![0, 2]), "min: expected 0 numbers, got 2"),
            (
                0,
                vec![2],
                Data::U64(vec![1, 2]),
                "channel 0: abs_sum 4e0 of 1 tokens contradicts a largest |x| of 3e0",
            ),
            (
                0,
                vec![2],
                Data::U64(vec![u64::MAX, 2]),
                "size: expected at most 2^53 tokens, got 18446744073709551615",
            ),
            (0, vec![2], Data::F32(&[2.0, 2.0]), "size: expected U64, got F32"),
            (1, vec![1, 2], Data::F32(&[-1.0, 0.0]), "min: expected one dimension, got [1, 2]"),
            (1, vec![2], Data::F32(&[f32::NAN, 0.0]), "min: NaN at 0"),
            (1, vec![2], Data::F32(&[-1.0, 0.6]), "channel 1: min 6e-1 is above max 5e-1"),
            (2, vec![2], Data::F32(&[3.0, f32::INFINITY]), "max: inf at 1"),
            (2, vec![1], Data::F32(&[3.0]), "max: expected 2 numbers, got 1"),
            (3, vec![2], Data::F64(&[4.0, -0.75]), "abs_sum: -7.5e-1 at 1"),
            (
                3,
                vec![2],
                Data::F64(&[2.0, 0.75]),
                "channel 0: abs_sum 2e0 of 2 tokens contradicts a largest |x| of 3e0",
            ),
            (3, vec![2], Data::F32(&[4.0, 0.75]), "abs_sum: expected F64, got F32"),
            (
                4,
                vec![4],
                Data::F64(&[10.0, 1.25, 1.25, 0.3125]),
                "second_moment: expected 3 numbers, got 4",
            ),
            (4, vec![3], Data::F64(&[10.0, f64::NAN, 0.3125]), "second_moment: NaN at 1"),
            (
                4,
                vec![3],
                Data::F64(&[10.0, 1.25, -0.3125]),
                "second_moment: -3.125e-1 at row 1, column 1 contradicts a largest x² of 2.5e-1 in 2 tokens",
            ),
            (
                4,
                vec![3],
                Data::F64(&[1e9, 1.25, 0.3125]),
                "second_moment: 1e9 at row 0, column 0 contradicts a largest x² of 9e0 in 2 tokens",
            ),
            (
                4,
                vec![3],
                Data::F64(&[10.0, -1.8, 0.3125]),
                "second_moment: -1.8e0 at row 1, column 0 is larger than the diagonal allows",
            ),
        ];
        for (at, shape, data, expected) in cases {
            let mut tensors = good();
            tensors[at] = (tensors[at].0, shape, data);
            let error = from_bytes("f", &file(tensors, GOOD)).unwrap_err();
            assert_eq!(error.to_string(), format!("f: layer l: {expected}"));
        }
        for at in 0..4 {
            let mut tensors = good();
            let part = tensors.remove(at).0.trim_start_matches("l.");
            let error = from_bytes("f", &file(tensors, GOOD)).unwrap_err().to_string();
            assert_eq!(error, format!("f: layer l: {part} is missing"));
        }
        let empty = || {
            vec![
                ("l.size", vec![2], Data::U64(vec![0, 2])),
                ("l.min", vec![0], Data::F32(&[])),
                ("l.max", vec![0], Data::F32(&[])),
                ("l.abs_sum", vec![0], Data::F64(&[])),
                ("l.second_moment", vec![3], Data::F64(&[0.0, 0.0, 1.0])),
            ]
        };
        let error = from_bytes("f", &file(empty(), GOOD)).unwrap_err().to_string();
        assert_eq!(error, "f: layer l: second_moment: expected zeros, as there are no tokens");

        for (metadata, expected) in [
            (r#"{"version":2}"#, "expected version 1, got 2"),
            (r#"{"version":"1"}"#, "expected version 1, got \"1\""),
            ("{}", "lowbit_calibration: expected a version"),
            ("[]", "lowbit_calibration: expected a version"),
            (r#"{"version":1,"shared":{"a":1}}"#, "lowbit_calibration: shared: invalid type"),
            (
                r#"{"version":1,"shared":{"a":"b"}}"#,
                "layer a: it shares those of b, which has none",
            ),
            (
                r#"{"version":1,"shared":{"l":"l"}}"#,
                "layer l: it has statistics and shares those of l",
            ),
        ] {
            let error = from_bytes("f", &file(good(), metadata)).unwrap_err().to_string();
            assert!(error.starts_with(&format!("f: {expected}")), "{error}");
        }
        let stranger = vec![("w", vec![1], Data::F32(&[1.0]))];
        let error = from_bytes("f", &file(stranger, GOOD)).unwrap_err().to_string();
        assert_eq!(error, "f: tensor w is not one of a calibration");
        let none = safetensors::serialize(Vec::<(&str, Tensor<'_>)>::new(), None).unwrap();
        let error = from_bytes("f", &none).unwrap_err().to_string();
        assert!(error.ends_with("but its metadata have no lowbit_calibration"), "{error}");
    }

    #[test]
    fn headers_that_promise_too_much_are_errors() {
        let mut bytes = u64::MAX.to_le_bytes().to_vec();
        bytes.extend([b'{'; 100]);
        assert!(from_bytes("f", &bytes).unwrap_err().to_string().contains("a header of 184467"));
        // Eight tensors of 2^61 − 1 bytes each: lengths that nearly overflow.
        let size = (1_u64 << 61) - 1;
        let tensors: Vec<_> = (0..8)
            .map(|i| {
                let (from, to) = (i * size, (i + 1) * size);
                format!(
                    r#""{i}.min":{{"dtype":"U8","shape":[{size}],"data_offsets":[{from},{to}]}}"#
                )
            })
            .collect();
        let header =
            format!(r#"{{"__metadata__":{{"{KEY}":"{{\"version\":1}}"}},{}}}"#, tensors.join(","));
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
        let error = from_bytes("f", &bytes).unwrap_err().to_string();
        assert!(error.contains("the file is truncated"), "{error}");
    }

    #[test]
    fn merging_models_keeps_sharing_and_takes_over_what_is_new() {
        let (mut all, other) = (model(1), model(2));
        all.remove("0.down.weight");
        let before = all.clone();
        merge(&mut all, &other).unwrap();
        assert_eq!(all["0.q.weight"].tokens(), 40);
        assert!(Arc::ptr_eq(&all["0.q.weight"], &all["0.k.weight"]));
        assert_eq!(all["0.down.weight"], other["0.down.weight"]);
        assert_eq!(before["0.q.weight"].tokens(), 20); // a copy that someone else holds

        // Shared on one side only.
        let mut all = model(1);
        let mut split = model(2);
        split.insert("0.q.weight".into(), Arc::new(observed(7, 3, 3, true)));
        merge(&mut all, &split).unwrap();
        assert_eq!((all["0.q.weight"].tokens(), all["0.k.weight"].tokens()), (27, 40));
    }

    #[test]
    fn a_model_that_does_not_fit_leaves_no_trace() {
        let (mut all, mut other) = (model(1), model(2));
        other.insert("0.q.weight".into(), Arc::new(observed(1, 4, 1, true)));
        let error = merge(&mut all, &other).unwrap_err().to_string();
        let expected = "layer 0.q.weight: calibration channels: expected 3 elements, got 4";
        assert_eq!(error, expected);
        assert_eq!(all, model(1));
    }

    #[test]
    fn a_file_appears_whole_and_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        save(&model(1), &path).unwrap();
        save(&model(2), &path).unwrap();
        assert_eq!(load(&path).unwrap(), model(2));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);

        let missing = folder.path().join("missing").join("file");
        for error in [save(&model(1), &missing), load(&missing).map(drop)] {
            let error = error.unwrap_err().to_string();
            assert!(error.starts_with(&format!("{}: ", missing.display())), "{error}");
        }
        // A folder is in the way: nothing is left beside it.
        assert!(save(&model(1), folder.path()).is_err());
        assert!(!folder.path().with_extension(format!("{}.part", std::process::id())).exists());
    }

    proptest! {
        #[test]
        fn files_hold_what_was_put_in(
            layers in prop::collection::btree_map(".*", (0..40_usize, 0..9_usize, any::<bool>()), 0..5),
        ) {
            let all: Calibrations = layers
                .into_iter()
                .map(|(name, (tokens, k, h))| (name, Arc::new(observed(tokens, k, 1, h))))
                .collect();
            prop_assert_eq!(from_bytes("f", &to_bytes(&all).unwrap()).unwrap(), all);
        }

        #[test]
        fn any_bytes_give_a_result(bytes: Vec<u8>) {
            prop_assert!(from_bytes("f", &bytes).is_err());
        }

        #[test]
        fn any_change_of_bytes_gives_a_result(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let mut bytes = to_bytes(&model(1)).unwrap();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            // What is still a file has statistics that can be used.
            if let Ok(mut all) = from_bytes("f", &bytes) {
                let _ = merge(&mut all, &model(2));
                for c in all.values().filter(|c| c.tokens() > 0) {
                    prop_assert!(c.abs_mean().iter().all(|x| x.is_finite()));
                    if c.has_second_moment() {
                        prop_assert!(c.second_moment().unwrap().data().iter().all(|h| h.is_finite()));
                    }
                }
            }
        }
    }
}
