//! What a file is that is not what it should be.

/// A kind of file, and the bytes that it starts with.
const MAGICS: &[(&[u8], &str)] = &[
    (b"GGUF", "a GGUF file of llama.cpp"),
    (b"ggjt", OLD_GGML),
    (b"tjgg", OLD_GGML),
    (b"fmgg", OLD_GGML),
    (b"lmgg", OLD_GGML),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file: fetch it by git lfs pull"),
    (b"\x80\x02", PICKLE),
    (b"\x80\x03", PICKLE),
    (b"\x80\x04", PICKLE),
    (b"\x80\x05", PICKLE),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first"),
    (b"\xfd7zXZ\0", "compressed by xz: unpack it first"),
    (b"BZh", "compressed by bzip2: unpack it first"),
    (b"\x93NUMPY", "an array of NumPy: it is no file of a model or a text"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, of Keras: convert it to safetensors"),
    (b"%PDF-", "a PDF document: extract its text"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"\x7fELF", "a program"),
    (b"PAR1", "a Parquet table: extract its text"),
    (b"\xff\xfe", UTF16),
    (b"\xfe\xff", UTF16),
];
const OLD_GGML: &str = "a GGML file from before GGUF: convert the model anew";
const PICKLE: &str = "a PyTorch pickle: save the model as safetensors";
const UTF16: &str = "a text in UTF-16: save it as UTF-8";

/// What a file is, by its first bytes, and what to do with it: the end of a sentence that begins with "it
/// is". `None` for what is not known, plain text among it.
///
/// # Example
/// ```
/// use lowbit_formats::recognize;
///
/// assert_eq!(recognize(b"\x1f\x8b\x08\0"), Some("compressed by gzip: unpack it first"));
/// assert_eq!(recognize(b"Once upon a time"), None);
/// ```
pub fn recognize(bytes: &[u8]) -> Option<&'static str> {
    if is_safetensors(bytes) {
        return Some("a safetensors file");
    }
    if let Some((_, kind)) = MAGICS.iter().find(|(magic, _)| bytes.starts_with(magic)) {
        return Some(kind);
    }
    if bytes.starts_with(b"PK\x03\x04") {
        // The name of the archive's first file stands behind 30 bytes.
        let start = &bytes[..bytes.len().min(256)];
        let holds = |part: &[u8]| start.windows(part.len()).any(|window| window == part);
        return Some(match holds(b"/data.pkl") || holds(b"/version") || holds(b"/.format") {
            true => "a PyTorch file: save the model as safetensors",
            false => "a zip archive: unpack it first",
        });
    }
    if bytes.get(257..262) == Some(b"ustar") {
        return Some("a tar archive: unpack it first");
    }
    let text = bytes.trim_ascii_start();
    let starts = |tag: &[u8]| text.get(..tag.len()).is_some_and(|t| t.eq_ignore_ascii_case(tag));
    (starts(b"<!doctype html") || starts(b"<html"))
        .then_some("a web page, perhaps an error of the server: download the file again")
}

/// Is this a safetensors file, by its first bytes? Any of the [`MAGICS`] may be a part of the length that
/// it starts with.
pub(crate) fn is_safetensors(bytes: &[u8]) -> bool {
    match bytes.split_first_chunk::<8>() {
        Some((length, rest)) => {
            u64::from_le_bytes(*length) <= 100_000_000 && rest.first() == Some(&b'{')
        }
        None => false,
    }
}

/// What a file is that should hold tensors, texts included.
pub(crate) fn not_tensors(bytes: &[u8]) -> Option<&'static str> {
    if is_safetensors(bytes) {
        return None;
    }
    // Less may be the beginning of anything.
    let start = bytes.get(..bytes.len().min(4096)).filter(|start| start.len() > 16);
    let text = start.is_some_and(|start| {
        let control = |byte: &u8| byte.is_ascii_control() && !byte.is_ascii_whitespace();
        let cut = |e: std::str::Utf8Error| e.error_len().is_none();
        !start.iter().any(control) && std::str::from_utf8(start).err().is_none_or(cut)
    });
    recognize(bytes).or(match bytes.trim_ascii_start().first() {
        Some(b'{' | b'[') if text => Some("a JSON text: give the file of the tensors"),
        Some(_) if text => Some("a text: give the file of the tensors"),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_known_by_their_first_bytes() {
        // As zip writes the first entry of what torch.save makes: 30 bytes, then its name.
        let torch = [&b"PK\x03\x04"[..], &[0; 26], b"archive/data.pkl"].concat();
        let zip = [&b"PK\x03\x04"[..], &[0; 26], b"letters/a.txt"].concat();
        let mut tar = vec![0; 512];
        tar[257..262].copy_from_slice(b"ustar");
        for (bytes, expected) in [
            (&b"GGUF\x03\0\0\0"[..], "GGUF"),
            (&torch, "PyTorch"),
            (b"\x80\x02}q\0", "pickle"),
            (&zip, "zip"),
            (&tar, "tar"),
            (b"\n<!DOCTYPE html>", "web page"),
            (b"<html lang=en>", "web page"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
            (b"\x1f\x8b\x08", "gzip"),
            (b"\xff\xfeO\0n\0", "UTF-16"),
        ] {
            let kind = recognize(bytes).unwrap();
            assert!(kind.contains(expected), "{kind}");
        }
        // A header of 0x04034b50 bytes, of 0x8b1f, of 0x80 and 2, of 0xfeff.
        for start in [&b"PK\x03\x04"[..], b"\x1f\x8b", b"\x80\x02", b"\xff\xfe"] {
            let mut file = start.to_vec();
            file.resize(8, 0);
            file.extend(b"{\"a\":");
            assert_eq!(recognize(&file), Some("a safetensors file"), "{start:x?}");
            assert_eq!(not_tensors(&file), None);
        }
    }

    #[test]
    fn texts_are_no_tensors() {
        assert_eq!(recognize(b"{\"version\": \"1.0\"}"), None);
        assert!(not_tensors(b" {\"version\": \"1.0\"}").unwrap().contains("JSON"));
        assert!(not_tensors(b"Once upon a time there was").unwrap().contains("a text"));
        assert_eq!(not_tensors(b"\0\x01\x02"), None);
        assert_eq!(not_tensors(b""), None);
    }
}
