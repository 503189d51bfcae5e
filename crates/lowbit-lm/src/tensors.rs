//! The tensors of a checkpoint's files, mapped into memory.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use lowbit::formats::{self, Safetensors, Sharded, TensorSource, TensorView, gguf::Gguf};
use memmap2::Mmap;

pub(crate) use crate::files::read_json as read;
use crate::{
    Error, Result, files,
    gguf_files::{self, GgufFiles},
};

/// The tensors of one file or several. They stay in their files until somebody looks at them; do not
/// change the files meanwhile.
pub struct Tensors {
    source: Box<dyn TensorSource + Send + Sync>,
    maps: Vec<Map>,
    metadata: Vec<(String, String)>,
}

impl Tensors {
    /// Opens a folder with `model.safetensors`, several files under `model.safetensors.index.json`, or a GGUF
    /// model in one part or several; or a single file of either kind. GGUF files are known by their first
    /// bytes.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`].
    ///
    /// # Example
    /// ```no_run
    /// use lowbit::formats::TensorSource;
    ///
    /// let tensors = lowbit_lm::Tensors::open("models/stories3m".as_ref())?;
    /// println!("{:?}", tensors.names());
    /// # Ok::<(), lowbit_lm::Error>(())
    /// ```
    pub fn open(path: &Path) -> Result<Self> {
        if let Some(files) = gguf_files::find(path)? {
            let (parts, maps) = Self::map_gguf(&files)?;
            let files = GgufFiles::new(parts)?;
            let text =
                |key: &str| Some((key.escape_debug().to_string(), files.get(key)?.to_string()));
            let metadata = files.keys().filter_map(text).collect();
            return Ok(Self { metadata, ..Self::of(files, maps) });
        }
        if !path.is_dir() {
            return Self::open_file(path);
        }
        let (index, file) = (path.join("model.safetensors.index.json"), "model.safetensors");
        let file = path.join(file);
        if file.exists() {
            return Self::open(&file);
        }
        if !index.exists() {
            return Err(no_weights(path));
        }
        let json = read(&index)?;
        let mut maps = Vec::new();
        let sharded = Sharded::new(index.display().to_string(), &json, |file| {
            let map = map(&path.join(file))?;
            maps.push(map.clone());
            Ok::<_, Error>(map)
        })?;
        Ok(Self::of(sharded, maps))
    }

    /// Opens one file of either kind by itself, whatever its name says of other parts.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_file(path: &Path) -> Result<Self> {
        let (name, map) = (path.display().to_string(), map(path)?);
        let maps = vec![map.clone()];
        Ok(match gguf_files::is_gguf(path) {
            true => Self::of(Gguf::new(name, map)?, maps),
            false => Self::of(Safetensors::new(name, map)?, maps),
        })
    }

    /// The parts of a GGUF model.
    pub(crate) fn map_gguf(files: &[PathBuf]) -> Result<(Vec<Gguf<Map>>, Vec<Map>)> {
        let maps = files.iter().map(|file| map(file)).collect::<Result<Vec<_>>>()?;
        let parts = files.iter().zip(&maps);
        let parts = parts.map(|(file, map)| Gguf::new(file.display().to_string(), map.clone()));
        Ok((parts.collect::<formats::Result<_>>()?, maps))
    }

    /// Tensors of mapped files, or of none.
    pub(crate) fn of(source: impl TensorSource + Send + Sync + 'static, maps: Vec<Map>) -> Self {
        Self { source: Box::new(source), maps, metadata: Vec::new() }
    }

    /// The keys of a GGUF file and their values, to be shown: of long texts and lists, the beginning.
    pub fn metadata(&self) -> &[(String, String)] {
        &self.metadata
    }

    /// Gives memory back that holds what has been looked at: it is read from the files again when it is
    /// asked for. Does nothing where the system offers no such thing.
    pub fn release(&self) {
        self.maps.iter().for_each(|map| map.release());
    }
}

impl TensorSource for Tensors {
    fn names(&self) -> Vec<&str> {
        self.source.names()
    }

    fn names_under(&self, layer: &str) -> Vec<&str> {
        self.source.names_under(layer)
    }

    fn tensor(&self, name: &str) -> formats::Result<TensorView<'_>> {
        self.source.tensor(name)
    }
}

/// A folder without weights that can be read: names those that cannot.
fn no_weights(folder: &Path) -> Error {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let is_other = |name: &&String| {
        [".bin", ".pth", ".pt", ".onnx", ".h5", ".msgpack"].iter().any(|end| name.ends_with(end))
    };
    let reason = match names.iter().find(is_other) {
        Some(other) => format!("no such file; save {other}, which is there, as safetensors"),
        None => {
            "no such file: a model folder has config.json, tokenizer.json and model.safetensors, or a GGUF file"
                .into()
        }
    };
    Error::File { file: folder.join("model.safetensors").display().to_string(), reason }
}

/// A file that is only read.
#[derive(Clone)]
pub(crate) struct Map(Arc<Mmap>);

impl AsRef<[u8]> for Map {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

#[allow(unsafe_code, reason = "mapping is unsafe because other processes may change the file")]
fn map(path: &Path) -> Result<Map> {
    let error = |cause| Error::Io { path: path.into(), cause };
    let file = files::open(path)?;
    // SAFETY: the map is only read, as bytes, of which every pattern is valid, and keeps the file
    // alive. That nobody changes the file meanwhile is asked of the caller of `Tensors::open`:
    // no process can rule it out.
    let map = unsafe { Mmap::map(&file) }.map_err(error)?;
    Ok(Map(Arc::new(map)))
}

impl Map {
    #[cfg(unix)]
    #[allow(unsafe_code, reason = "other kinds of maps would lose what they hold")]
    fn release(&self) {
        // SAFETY: the pages of a map of a file that nobody writes to are copies of the file. Whoever reads
        // them next, also through a slice that exists already, gets the same bytes from the file.
        let released = unsafe { self.0.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        // It is advice: without it, only the system's own use of memory is another.
        let _ = released;
    }

    #[cfg(not(unix))]
    fn release(&self) {}
}
