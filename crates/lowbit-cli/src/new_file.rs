//! Files that appear whole or not at all.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Result, anyhow};

/// A file to be written when the work is done: first beside its place, then moved there, so that an
/// interruption leaves no half of it.
pub(crate) struct NewFile {
    path: PathBuf,
    beside: PathBuf,
}

impl NewFile {
    /// Makes sure that `path` can be written, before any work is done, and leaves nothing behind.
    pub(crate) fn prepare(path: &Path) -> Result<Self> {
        if path.file_name().is_none() || (path.exists() && !path.is_file()) {
            let path = path.display();
            return Err(anyhow!("cannot write {path}: that is a folder or a device; name a file"));
        }
        // A link stays a link.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{}.part", std::process::id()));
        let new = Self { beside: path.with_file_name(name), path };
        File::create(&new.beside).and_then(|_| fs::remove_file(&new.beside)).map_err(|e| {
            let path = new.path.display();
            anyhow!("cannot write {path}: {e}; choose a folder that exists and is yours")
        })?;
        Ok(new)
    }

    /// Writes the file.
    pub(crate) fn write(self, text: &str) -> Result<()> {
        let written = File::create(&self.beside)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .and_then(|()| fs::rename(&self.beside, &self.path));
        written.map_err(|e| {
            // What is beside is of no use to anyone; the error says what went wrong first.
            let _ = fs::remove_file(&self.beside);
            anyhow!("cannot write {}: {e}", self.path.display())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_whole_and_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.svg");
        let new = NewFile::prepare(&path).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        new.write("text").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "text");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_place_that_cannot_be_written_is_an_error_at_once() {
        let folder = tempfile::tempdir().unwrap();
        assert!(NewFile::prepare(folder.path()).is_err());
        assert!(NewFile::prepare(&folder.path().join("missing/a.svg")).is_err());
        assert!(NewFile::prepare(Path::new("/dev/null")).is_err());
    }
}
