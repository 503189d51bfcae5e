//! The tensors of a checkpoint's files, mapped into memory.

use std::{fs, path::Path, sync::Arc};

use lowbit::formats::{self, Safetensors, Sharded, TensorSource, TensorView, gguf::Gguf};
use memmap2::Mmap;

pub(crate) use crate::files::read_json as read;
use crate::{Config, Error, Result, files, llama_gguf::LlamaGguf};

/// The tensors of one file or several. They stay in their files until somebody looks at them; do not
/// change the files meanwhile.
pub struct Tensors {
    source: Box<dyn TensorSource + Send + Sync>,
    maps: Vec<Map>,
}

impl Tensors {
    /// Opens a folder with `model.safetensors`, several files under `model.safetensors.index.json`, or
    /// `model.gguf`; or a single file of either kind.
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
        if !path.is_dir() {
            let name = path.display().to_string();
            let map = map(path)?;
            let maps = vec![map.clone()];
            return Ok(match path.extension().is_some_and(|extension| extension == "gguf") {
                true => Self { source: Box::new(Gguf::new(name, map)?), maps },
                false => Self { source: Box::new(Safetensors::new(name, map)?), maps },
            });
        }
        let (index, file) = (path.join("model.safetensors.index.json"), "model.safetensors");
        let file = path.join(file);
        if holds_gguf(path) {
            return Self::open(&path.join("model.gguf"));
        }
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
        Ok(Self { source: Box::new(sharded), maps })
    }

    /// The `model.gguf` of a folder, under the names of a checkpoint.
    pub(crate) fn open_llama_gguf(folder: &Path, config: &Config) -> Result<Self> {
        let path = folder.join("model.gguf");
        let map = map(&path)?;
        let maps = vec![map.clone()];
        let file = Gguf::new(path.display().to_string(), map)?;
        Ok(Self { source: Box::new(LlamaGguf::new(file, config)?), maps })
    }

    /// Tensors that lie in memory anyway.
    pub(crate) fn in_memory(source: impl TensorSource + Send + Sync + 'static) -> Self {
        Self { source: Box::new(source), maps: Vec::new() }
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

/// Does a folder hold its weights in `model.gguf`?
pub(crate) fn holds_gguf(folder: &Path) -> bool {
    folder.join("model.gguf").exists() && !folder.join("model.safetensors").exists()
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
            "no such file: a model folder has config.json, tokenizer.json and model.safetensors"
                .into()
        }
    };
    Error::File { file: folder.join("model.safetensors").display().to_string(), reason }
}

/// A file that is only read.
#[derive(Clone)]
struct Map(Arc<Mmap>);

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
