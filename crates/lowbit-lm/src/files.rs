//! Files of a model or a text, of which any may be something else than its name says.

use std::{
    fs::{self, File, FileType},
    io::Read,
    path::Path,
};

use lowbit::formats::recognize;

use crate::{Error, Result};

/// The largest tokenizers take some 35 MB.
const MAX_JSON: u64 = 256 << 20;

/// Reads a file whole.
///
/// # Errors
/// [`Error::Io`] if it cannot be read; [`Error::File`] if it is no regular file: a pipe or a device may
/// never end.
///
/// # Example
/// ```no_run
/// let text = lowbit_lm::read_file("story.txt".as_ref())?;
/// # let _ = text;
/// # Ok::<(), lowbit_lm::Error>(())
/// ```
pub fn read_file(path: &Path) -> Result<Vec<u8>> {
    read_at_most(path, u64::MAX)
}

/// Reads a JSON file of a model.
pub(crate) fn read_json(path: &Path) -> Result<Vec<u8>> {
    read_at_most(path, MAX_JSON)
}

fn read_at_most(path: &Path, most: u64) -> Result<Vec<u8>> {
    let mut file = open(path)?;
    let error = |cause| Error::Io { path: path.into(), cause };
    let len = file.metadata().map_err(error)?.len();
    if len > most {
        let reason = format!("expected a JSON text of at most {most} bytes, got {len} bytes");
        return Err(Error::File { file: path.display().to_string(), reason });
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(error)?;
    Ok(bytes)
}

/// Opens a regular file, or a link to one.
pub(crate) fn open(path: &Path) -> Result<File> {
    let error = |cause| Error::Io { path: path.into(), cause };
    // Opening a pipe that nobody writes to waits for ever, so look before.
    let kind = fs::metadata(path).map_err(error)?.file_type();
    if !kind.is_file() {
        let reason = format!("expected a file, got {}", name(kind));
        return Err(Error::File { file: path.display().to_string(), reason });
    }
    File::open(path).map_err(error)
}

fn name(kind: FileType) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_fifo() {
            return "a pipe: write what it gives into a file first";
        }
        if kind.is_char_device() || kind.is_block_device() {
            return "a device: write what it gives into a file first";
        }
        if kind.is_socket() {
            return "a socket";
        }
    }
    if kind.is_dir() { "a folder" } else { "something else" }
}

/// What is wrong with bytes that should be a JSON text, in which `cause` was found: what they are instead,
/// if that is known.
pub(crate) fn not_json(bytes: &[u8], cause: impl std::fmt::Display) -> String {
    match recognize(bytes) {
        Some(kind) => format!("it is {kind}"),
        None => cause.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("a"), "text").unwrap();
        assert_eq!(read_file(&path("a")).unwrap(), b"text");
        let error = read_file(folder.path()).unwrap_err().to_string();
        assert!(error.ends_with(": expected a file, got a folder"), "{error}");
        assert!(matches!(read_file(&path("b")), Err(Error::Io { .. })));
        let error = read_at_most(&path("a"), 3).unwrap_err().to_string();
        assert!(error.ends_with("of at most 3 bytes, got 4 bytes"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_and_devices_are_not_read() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("a"), "text").unwrap();
        symlink(path("a"), path("link")).unwrap();
        assert_eq!(read_file(&path("link")).unwrap(), b"text");
        symlink("/dev/zero", path("zero")).unwrap();
        let error = read_file(&path("zero")).unwrap_err().to_string();
        assert!(error.contains("zero: expected a file, got a device"), "{error}");
        let made = std::process::Command::new("mkfifo").arg(path("pipe")).status();
        if made.is_ok_and(|status| status.success()) {
            let error = read_file(&path("pipe")).unwrap_err().to_string();
            assert!(error.contains("pipe: expected a file, got a pipe"), "{error}");
        }
    }
}
