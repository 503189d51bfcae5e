//! The GGUF files of a model: one of any name, or parts `NAME-00001-of-00003.gguf`.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use lowbit::formats::{
    self, TensorSource, TensorView,
    gguf::{Gguf, Value},
};

use crate::{Error, Result};

/// The files, in the order of their parts, that `path` stands for: a GGUF file, known by its first bytes;
/// any part of one; or the folder of either, unless it has safetensors. `None` if there is no GGUF.
///
/// # Errors
/// [`Error::File`] naming the part that is missing, or the models of a folder that has several.
pub(crate) fn find(path: &Path) -> Result<Option<Vec<PathBuf>>> {
    if path.is_file() {
        return is_gguf(path).then(|| parts_of(path)).transpose();
    }
    let safetensors = ["model.safetensors", "model.safetensors.index.json"];
    // What a file is called does not make it one.
    let is_other = |file: PathBuf| file.exists() && !(file.is_file() && is_gguf(&file));
    if !path.is_dir() || safetensors.iter().any(|name| is_other(path.join(name))) {
        return Ok(None);
    }
    let default = path.join("model.gguf");
    if default.is_file() {
        return Ok(Some(vec![default]));
    }
    let error = |cause| Error::Io { path: path.into(), cause };
    // One entry for each model, however many parts it has.
    let mut models = BTreeMap::new();
    for entry in fs::read_dir(path).map_err(error)? {
        let file = entry.map_err(error)?.path();
        if file.is_file() && is_gguf(&file) {
            let name = name_of(&file);
            let key = part(&name).map_or(name.clone(), |p| format!("{}-of-{}", p.stem, p.count));
            let first: &mut PathBuf = models.entry(key).or_insert_with(|| file.clone());
            *first = file.min(std::mem::take(first));
        }
    }
    let mut files = models.into_values();
    match (files.next(), files.next()) {
        (None, _) => Ok(None),
        (Some(only), None) => parts_of(&only).map(Some),
        (Some(first), Some(second)) => {
            let (first, second, more) = (name_of(&first), name_of(&second), files.count());
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let reason = format!(
                "it has several GGUF models, {first}, {second}{more}: give one of the files"
            );
            Err(Error::File { file: path.display().to_string(), reason })
        }
    }
}

/// Is this a GGUF file, by its first bytes? What cannot be read is none.
///
/// # Example
/// ```
/// assert!(!lowbit_lm::is_gguf("Cargo.toml".as_ref()));
/// ```
pub fn is_gguf(file: &Path) -> bool {
    let mut magic = [0; 4];
    File::open(file).and_then(|mut f| f.read_exact(&mut magic)).is_ok() && magic == *b"GGUF"
}

fn name_of(file: &Path) -> String {
    file.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// What a name says of a part.
struct Part<'a> {
    stem: &'a str,
    /// From 1 on.
    number: usize,
    count: usize,
    extension: &'a str,
}

fn part(name: &str) -> Option<Part<'_>> {
    let (rest, extension) = name.rsplit_once('.')?;
    let (rest, count) = rest.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let five = |digits: &str| match digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit())
    {
        true => digits.parse().ok(),
        false => None,
    };
    let (number, count) = (five(number)?, five(count)?);
    let all = extension.eq_ignore_ascii_case("gguf") && (1..=count).contains(&number);
    all.then_some(Part { stem, number, count, extension })
}

/// The file and its other parts, in their order.
fn parts_of(file: &Path) -> Result<Vec<PathBuf>> {
    let name = name_of(file);
    let Some(Part { stem, number, count, extension }) = part(&name) else {
        return Ok(vec![file.into()]);
    };
    let path = |at| file.with_file_name(format!("{stem}-{at:05}-of-{count:05}.{extension}"));
    let files = (1..=count).map(|at| match path(at) {
        path if at == number || path.is_file() => Ok(path),
        path => {
            let reason = format!(
                "this part is missing: {name} is part {number} of {count}, which belong into one folder"
            );
            Err(Error::File { file: path.display().to_string(), reason })
        }
    });
    files.collect()
}

/// One GGUF file, or all parts of one, under the names of llama.cpp.
pub(crate) struct GgufFiles<S> {
    /// At least one; the first has the metadata.
    parts: Vec<Gguf<S>>,
    /// Tensor to the part that has it.
    tensors: BTreeMap<String, usize>,
}

impl<S: AsRef<[u8]>> GgufFiles<S> {
    /// # Errors
    /// [`Error::File`] if the files are not the parts that their metadata speak of, if a tensor occurs
    /// twice, or if two parts contradict each other.
    pub(crate) fn new(parts: Vec<Gguf<S>>) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for (at, part) in parts.iter().enumerate() {
            let wrong = |reason| Error::File { file: part.file().into(), reason };
            let number = |key: &str| match part.get(key).map(|value| (value.as_u64(), value)) {
                None => Ok(None),
                Some((Some(number), _)) => Ok(Some(number)),
                Some((None, got)) => Err(wrong(format!("{key}: expected a number, got {got}"))),
            };
            match (parts.len() as u64, number(SPLIT_COUNT)?) {
                (1, None | Some(0 | 1)) => {}
                (count, Some(got)) if got == count => {}
                (1, Some(count)) => {
                    return Err(wrong(format!(
                        "it is one of {count} parts: give the parts their names back, which end in -00001-of-{count:05}.gguf"
                    )));
                }
                (count, got) => {
                    let got = got.map_or("nothing".into(), |got| got.to_string());
                    let reason =
                        format!("{SPLIT_COUNT}: expected {count}, as its name says, got {got}");
                    return Err(wrong(reason));
                }
            }
            if let Some(got) = number(SPLIT_NO)?.filter(|&got| got != at as u64) {
                let reason = format!(
                    "{SPLIT_NO}: expected {at}, as its name says, got {got}: is it renamed?"
                );
                return Err(wrong(reason));
            }
            for key in part.keys().filter(|key| !key.starts_with("split.")) {
                let (first, here) = (parts[0].get(key), part.get(key));
                if at > 0 && !key.starts_with("general.") && first != here {
                    return Err(wrong(format!("{key} is not the same in {}", parts[0].file())));
                }
            }
            for name in part.names() {
                if let Some(other) = tensors.insert(name.to_string(), at) {
                    let other = parts[other].file();
                    return Err(wrong(format!("it has the tensor {name}, which {other} has, too")));
                }
            }
        }
        let files = Self { parts, tensors };
        let total = files.get(SPLIT_TENSORS).and_then(|total| total.as_u64());
        match total.filter(|&total| total != files.tensors.len() as u64) {
            Some(total) => Err(files.wrong(format!(
                "{SPLIT_TENSORS}: expected {total} tensors in all parts, got {}: copy or download them again",
                files.tensors.len()
            ))),
            None => Ok(files),
        }
    }

    /// The file that has the metadata.
    pub(crate) fn file(&self) -> &str {
        self.parts[0].file()
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        self.parts[0].keys()
    }

    pub(crate) fn get(&self, key: &str) -> Option<Value<'_>> {
        self.parts[0].get(key)
    }

    pub(crate) fn wrong(&self, reason: String) -> Error {
        Error::File { file: self.file().into(), reason }
    }
}

const SPLIT_COUNT: &str = "split.count";
const SPLIT_NO: &str = "split.no";
const SPLIT_TENSORS: &str = "split.tensors.count";

impl<S: AsRef<[u8]>> TensorSource for GgufFiles<S> {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn tensor(&self, name: &str) -> formats::Result<TensorView<'_>> {
        let part = self.tensors.get(name).copied().unwrap_or(0);
        self.parts[part].tensor(name)
    }
}
