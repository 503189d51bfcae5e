//! The GGUF container and ggml's blocks, against files of the `gguf` Python package.

use lowbit_core::{Mat, QLinear, QMatrix};
use lowbit_formats::{
    Dtype, Tensor, TensorSource, TensorView,
    conventions::{Convention, Ggml},
    gguf::{self, Array, GgmlType, Gguf, Value},
};
use proptest::prelude::*;

/// Written by the Python package `gguf` 0.19.
const SMALL: &[u8] = include_bytes!("golden/small.gguf");

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

/// Random blocks with scales of a sane size, and what `gguf` 0.19 makes of them.
macro_rules! golden {
    ($($name:ident)+) => {
        [$((
            GgmlType::$name,
            &include_bytes!(concat!("golden/", stringify!($name), ".blocks"))[..],
            &include_bytes!(concat!("golden/", stringify!($name), ".f32"))[..],
        )),+]
    };
}

#[test]
fn every_block_format_decodes_to_the_bits_of_the_reference() {
    let golden = golden! {
        Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4 NVFP4
    };
    for (dtype, bytes, expected) in golden {
        let expected = f32s(expected);
        let shape = [expected.len()];
        let dtype = Dtype::Ggml(dtype);
        let view = TensorView { file: "f", name: "t", dtype, shape: &shape, bytes };
        let got = view.to_f32().unwrap();
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert_eq!(got.to_bits(), expected.to_bits(), "{dtype} {i}: {got} {expected}");
        }
        assert_eq!(got.len(), expected.len(), "{dtype}");
    }
}

#[test]
fn one_and_two_bits_decode_in_order() {
    let mut q1 = vec![0, 0x3c];
    q1.extend([0b0000_0101; 16]);
    let mut q2 = vec![0, 0x40];
    q2.extend([0b11_10_01_00; 16]);
    let view = |dtype, bytes| {
        let dtype = Dtype::Ggml(dtype);
        TensorView { file: "f", name: "t", dtype, shape: &[], bytes }.to_f32().unwrap()
    };
    assert_eq!(view(GgmlType::Q1_0, &q1)[..4], [1.0, -1.0, 1.0, -1.0]);
    assert_eq!(view(GgmlType::Q2_0, &q2)[..4], [-2.0, 0.0, 2.0, 4.0]);
}

#[test]
fn a_file_of_the_reference_is_read_whole_at_any_alignment() {
    for offset in 0..4 {
        let mut moved = vec![0; offset];
        moved.extend(SMALL);
        let file = Gguf::new("small.gguf", &moved[offset..]).unwrap();
        assert_eq!(file.version(), 3);
        assert_eq!(file.names(), ["f16", "f32", "one", "q8_0"]);
        let x: Vec<f32> = (0..64).map(|i| i as f32 / 8.0 - 3.0).collect();
        let f32s_of = |name| file.tensor(name).unwrap().to_f32().unwrap();
        assert_eq!((f32s_of("f32"), f32s_of("f16")), (x.clone(), x));
        assert_eq!(file.tensor("f32").unwrap().shape, [2, 32]);
        assert_eq!(f32s_of("one"), [7.5]);
        assert_eq!(f32s_of("q8_0"), f32s(include_bytes!("golden/small_q8_0.f32")));
        assert_eq!(file.get("general.name").unwrap().as_str(), Some("small"));
        assert_eq!(file.get("llama.block_count").unwrap().as_u64(), Some(2));
        assert_eq!(file.get("big").unwrap().as_u64(), Some(1 << 40));
        assert_eq!(file.get("half").unwrap().as_f64(), Some(0.5));
        assert_eq!(file.get("yes"), Some(Value::Bool(true)));
        let words = file.get("words").unwrap();
        let words: Vec<_> = words.as_array().unwrap().iter().collect();
        assert_eq!(words, ["a".into(), "bc".into(), "".into()]);
        assert_eq!(file.get("numbers").unwrap().as_array().unwrap().len(), 3);
        assert_eq!(file.get("none"), None);
    }
}

#[test]
fn every_cut_is_an_error_that_names_the_file() {
    // Behind the last tensor there is padding, which a file may lack.
    let data = Gguf::new("f", SMALL).unwrap();
    let end =
        data.names().into_iter().map(|name| data.tensor(name).unwrap().bytes.as_ptr_range().end);
    let end = end.max().unwrap() as usize - SMALL.as_ptr() as usize;
    for len in 0..end {
        let error = Gguf::new("small.gguf", &SMALL[..len]).unwrap_err().to_string();
        assert!(error.starts_with("small.gguf: "), "{error}");
    }
    for len in end..=SMALL.len() {
        assert!(Gguf::new("small.gguf", &SMALL[..len]).is_ok());
    }
}

/// A header of `version`, metadata entries and tensors, given as bytes.
fn file(version: u32, entries: &[Vec<u8>], tensors: &[Vec<u8>], data: usize) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((entries.len() as u64).to_le_bytes());
    entries.iter().chain(tensors).for_each(|part| bytes.extend(part));
    bytes.resize(bytes.len().next_multiple_of(32) + data, 0);
    bytes
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn tensor(name: &str, dims: &[u64], dtype: u32, offset: u64) -> Vec<u8> {
    let mut bytes = string(name);
    bytes.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
    bytes.extend(dtype.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&string(key), &kind.to_le_bytes()[..], value].concat()
}

#[test]
fn contradictions_are_errors_that_say_what_is_wrong() {
    let array = |kind: u32, len: u64| [&kind.to_le_bytes()[..], &len.to_le_bytes()].concat();
    let mut magic = SMALL.to_vec();
    magic[0] = b'g';
    let mut counts = file(3, &[], &[], 0);
    counts[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    let alignment = |x: u32| entry("general.alignment", 4, &x.to_le_bytes());
    for (bytes, expected) in [
        (magic, "expected a GGUF file, but it starts with [67, 47, 55, 46], not with \"GGUF\""),
        (file(1, &[], &[], 0), "expected a GGUF file, but it has version 1, expected 2 or 3"),
        (file(0x0300_0000, &[], &[], 0), "expected a GGUF file, but it is big-endian"),
        (
            counts,
            "expected a GGUF file, but it announces 18446744073709551615 tensors and has room for 0",
        ),
        (
            file(3, &[entry("a", 4, &[0; 4]), entry("a", 0, &[0])], &[], 0),
            "expected a GGUF file, but the key a occurs twice",
        ),
        (
            file(3, &[entry("a", 13, &[])], &[], 0),
            "expected a GGUF file, but the value of a at byte 33 has an unknown type or passes the end of the file",
        ),
        (
            file(3, &[entry("a", 9, &array(4, u64::MAX / 4))], &[], 0),
            "expected a GGUF file, but the value of a at byte 33 has an unknown type or passes the end of the file",
        ),
        (
            file(3, &[entry("a", 9, &array(9, u64::MAX))], &[], 0),
            "expected a GGUF file, but the value of a at byte 33 has an unknown type or passes the end of the file",
        ),
        (
            file(3, &[alignment(24)], &[], 0),
            "expected a GGUF file, but its general.alignment is no u32 power of two",
        ),
        (
            file(3, &[], &[tensor("t", &[1], 0, 0), tensor("t", &[1], 0, 32)], 64),
            "expected a GGUF file, but the tensor t occurs twice",
        ),
        (
            file(3, &[], &[tensor("t", &[9], 0, 0), tensor("u", &[1], 0, 32)], 64),
            "tensor t: its data at offset 0 overlap those of u at 32",
        ),
        (
            file(3, &[], &[tensor("t", &[1], 0, 8)], 64),
            "tensor t: its offset 8 is not a multiple of 32",
        ),
        (
            file(3, &[], &[tensor("t", &[33], 2, 0)], 64),
            "tensor t: rows of 33 are no whole number of Q4_0 blocks of 32",
        ),
        (
            file(3, &[], &[tensor("t", &[1 << 33, 1 << 33], 0, 0)], 64),
            "tensor t: its shape [8589934592, 8589934592] is too large",
        ),
        (
            file(3, &[], &[tensor("t", &[1; 5], 0, 0)], 64),
            "tensor t: it has 5 dimensions, expected at most 4",
        ),
        (file(3, &[], &[tensor("t", &[16], 0, 32)], 64), "expected 160 bytes, got 128"),
        (file(3, &[], &[tensor("t", &[16], 0, u64::MAX - 31)], 64), "tensor t: its offset"),
    ] {
        let error = Gguf::new("f", bytes).unwrap_err().to_string();
        assert!(error.starts_with(&format!("f: {expected}")), "{error}");
    }
}

#[test]
fn unknown_types_are_passed_over_by_name() {
    let tensors = [tensor("a", &[5], 99, 0), tensor("b", &[8], 0, 32), tensor("c", &[5], 31, 64)];
    let file = Gguf::new("f", file(3, &[], &tensors, 100)).unwrap();
    assert_eq!(file.tensor("a").unwrap().bytes.len(), 32);
    assert_eq!(file.tensor("b").unwrap().to_f32().unwrap(), [0.0; 8]);
    for (name, expected) in [
        ("a", "f: tensor a is of the unknown ggml type 99, expected"),
        ("c", "f: tensor c is Q4_0_4_4 (ggml type 31, removed from ggml), expected"),
    ] {
        let error = file.tensor(name).unwrap().to_f32().unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn what_gguf_does_not_have_is_not_written() {
    let view = |name, dtype, shape, bytes| TensorView { file: "", name, dtype, shape, bytes };
    let one = view("t", Dtype::F32, &[1], &[0; 4]);
    for (metadata, tensors) in [
        (vec![], vec![view("t", Dtype::U8, &[1], &[0])]),
        (vec![], vec![view("t", Dtype::F32, &[1], &[0; 3])]),
        (vec![], vec![view("t", Dtype::F32, &[1; 5], &[0; 4])]),
        (vec![], vec![one, one]),
        (vec![("a", Value::U8(1)), ("a", Value::U8(1))], vec![one]),
        (vec![("general.alignment", Value::U32(64))], vec![one]),
    ] {
        let mut bytes = Vec::new();
        let error = gguf::write(&mut bytes, &metadata, &tensors).unwrap_err();
        assert_eq!((error.kind(), bytes.len()), (std::io::ErrorKind::InvalidInput, 0));
    }
}

fn values() -> impl Strategy<Value = Value<'static>> {
    let scalar = prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<bool>().prop_map(Value::Bool),
        (-1e9_f32..1e9).prop_map(Value::F32),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        (-1e9_f64..1e9).prop_map(Value::F64),
        any::<Vec<u8>>().prop_map(|bytes| Value::String(bytes.into())),
    ];
    let array = |item: Value<'static>, len| Array::new(&vec![item; len]).map(Value::Array);
    (scalar, 0..4_usize, 0..3_usize).prop_map(move |(scalar, len, depth)| {
        (0..depth).fold(scalar, |value, _| array(value.clone(), len).unwrap_or(value))
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        values in prop::collection::btree_map("[a-z.]{1,9}", values(), 0..6),
        tensors in prop::collection::btree_map(
            any::<String>(),
            (0..3_usize, prop::collection::vec(0..4_usize, 0..4)),
            0..6,
        ),
        fill: u8,
    ) {
        let types = [Dtype::F32, Dtype::Ggml(GgmlType::Q6_K), Dtype::I8];
        let tensors: Vec<_> = tensors.into_iter().map(|(name, (dtype, mut shape))| {
            let (weights, bytes) = types[dtype].block().unwrap();
            shape.push(weights);
            let len = shape.iter().product::<usize>() / weights * bytes;
            (name, types[dtype], shape, vec![fill; len])
        }).collect();
        let views: Vec<_> = tensors.iter().map(|(name, dtype, shape, bytes)| {
            TensorView { file: "f", name, dtype: *dtype, shape, bytes }
        }).collect();
        let values: Vec<_> = values.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
        let mut bytes = Vec::new();
        gguf::write(&mut bytes, &values, &views).unwrap();
        prop_assert!(bytes.len().is_multiple_of(32));

        let file = Gguf::new("f", bytes).unwrap();
        prop_assert!(file.keys().eq(values.iter().map(|(key, _)| *key)));
        for (key, value) in values {
            prop_assert_eq!(file.get(key), Some(value));
        }
        prop_assert_eq!(file.names().len(), views.len());
        for view in views {
            prop_assert_eq!(file.tensor(view.name).unwrap(), view);
        }
    }

    #[test]
    fn any_change_gives_a_result(
        changes in prop::collection::vec((0..SMALL.len(), any::<u8>()), 1..4),
        cut in 0..SMALL.len(),
    ) {
        let mut bytes = SMALL.to_vec();
        changes.iter().for_each(|&(at, value)| bytes[at] = value);
        for len in [cut, bytes.len()] {
            let Ok(file) = Gguf::new("f", &bytes[..len]) else { continue };
            for key in file.keys() {
                if let Some(value) = file.get(key) {
                    let _ = value.as_array().map(|array| array.iter().count());
                }
            }
            for name in file.names() {
                let _ = file.tensor(name).unwrap().to_f32();
            }
        }
    }
}

/// A file with a tensor of every type that layers are written as, read by another program.
#[test]
fn what_is_written_is_read_by_the_gguf_package() {
    let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let python =
        |args: &[&std::ffi::OsStr]| std::process::Command::new("python3").args(args).output();
    let import = ["-c".as_ref(), "import gguf, numpy".as_ref()];
    if !python(&import).is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: python3 has no packages gguf and numpy; see tests/check_gguf.py");
        return;
    }
    let types = [
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q5_0,
        GgmlType::Q5_1,
        GgmlType::Q8_0,
        GgmlType::Q2_K,
        GgmlType::Q3_K,
        GgmlType::Q4_K,
        GgmlType::Q5_K,
        GgmlType::Q6_K,
        GgmlType::IQ4_NL,
        GgmlType::IQ4_XS,
        GgmlType::TQ2_0,
        GgmlType::MXFP4,
    ];
    let w =
        Mat::from_fn(6, 512, |r, c| ((r * 512 + c) as f32 * 0.73).sin() * (1.0 + c as f32 / 99.0));
    let (mut tensors, mut numbers) = (Vec::new(), Vec::new());
    for dtype in types {
        let scheme = Ggml::scheme(dtype).unwrap();
        let layer = QLinear::new(QMatrix::quantize(w.as_ref(), scheme).unwrap());
        tensors.extend(Ggml.write(&layer, &dtype.to_string()).unwrap());
        numbers.extend(layer.weight().dequantize().data().iter().flat_map(|x| x.to_le_bytes()));
    }
    let plain = Tensor::f32("plain", vec![6, 512], w.data());
    numbers.extend(&plain.bytes);
    tensors.push(plain);

    let folder = tempfile::tempdir().unwrap();
    let (file, expected) = (folder.path().join("w.gguf"), folder.path().join("w.f32"));
    let views: Vec<_> = tensors.iter().map(Tensor::view).collect();
    let metadata = [("general.architecture", "llama".into()), ("general.name", "all types".into())];
    gguf::write(std::fs::File::create(&file).unwrap(), &metadata, &views).unwrap();
    std::fs::write(&expected, numbers).unwrap();
    let script = here.join("tests/check_gguf.py");
    let output = python(&[script.as_ref(), file.as_ref(), expected.as_ref()]).unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{printed}{said}");
    assert!(printed.ends_with("15 tensors agree\n"), "{printed}");
}
