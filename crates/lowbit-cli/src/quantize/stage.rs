//! The folder in which the work is done: `OUT.part`, renamed to `OUT` at the end.
//!
//! ```text
//! OUT.part/
//!   model-00001-of-0000N.safetensors    tensors that are copied; one file for each block behind it
//!   .lowbit/                            what only a continuation needs, removed before the folder is renamed
//!     job.json                          what is being done, locked meanwhile: only the same may be continued
//!     report-00000.json                 what the report says of each file of tensors
//!     blocks/                           blocks of methods that calibrate: the next ones need their output
//!     *.tmp                             files on their way to their names
//! ```
//!
//! A run may end between any two steps, and the next one continues:
//!
//! | what is there | |
//! |---|---|
//! | nothing, or an empty folder | begins |
//! | `.lowbit` without a job, and no file of tensors | begins |
//! | `.lowbit` with the same job | does what is not there, or is not whole |
//! | no `.lowbit`, but the report, which is written last | gives the folder its name |

use std::{
    fs::{self, File, TryLockError},
    io::{BufWriter, Read as _, Seek as _, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use lowbit::formats::{TensorView, gguf, write_safetensors};
use lowbit_lm::Tensors;
use serde::Serialize;
use serde_json::Value;

use super::Part;

/// Where the files are that are not part of the result.
pub(super) const HIDDEN: &str = ".lowbit";

pub(super) struct Stage {
    folder: PathBuf,
    /// Are the parts GGUF files?
    pub(super) gguf: bool,
    /// Locked until the process ends; `None` where only the name of the folder is missing.
    job: Option<File>,
}

impl Stage {
    /// Makes the folder for `out`, or opens one in which the same `job` was begun. `report` is the file that is
    /// written last.
    pub(super) fn open(out: &Path, gguf: bool, job: &Value, report: &str) -> Result<Self> {
        // Without a slash at its end.
        let mut folder = out.components().collect::<PathBuf>().into_os_string();
        folder.push(".part");
        let mut stage = Self { folder: folder.into(), gguf, job: None };
        let name = stage.folder.display().to_string();
        let parent = stage.folder.parent().filter(|parent| !parent.as_os_str().is_empty());
        if let Some(parent) = parent.filter(|parent| !parent.is_dir()) {
            bail!("{} is no folder: make it first", parent.display());
        }
        let foreign = || {
            anyhow!(
                "{name} is there, and is no unfinished run; move it away or name another folder"
            )
        };
        if stage.folder.exists() && !stage.hidden("").exists() && !is_empty(&stage.folder) {
            let report = fs::read(stage.path(report)).map_err(|_| foreign())?;
            let report: Value = serde_json::from_slice(&report).map_err(|_| foreign())?;
            ensure!(report.get("job") == Some(&fingerprint(job)), foreign());
            return Ok(stage);
        }
        fs::create_dir_all(stage.hidden("")).with_context(|| format!("cannot make {name}"))?;
        let mut file = lock(&stage.hidden("job.json"), &name)?;
        if out.symlink_metadata().is_ok() {
            bail!("{} exists already; remove it or name another folder", out.display());
        }
        let mut text = String::new();
        file.read_to_string(&mut text).with_context(|| format!("cannot read {name}"))?;
        match serde_json::from_str::<Value>(&text) {
            Ok(begun) => {
                if let Some(key) = job.as_object().and_then(|job| {
                    job.iter()
                        .find(|(key, value)| begun.get(key) != Some(value))
                        .map(|(key, _)| key)
                }) {
                    bail!("{name} was begun with another {key}; remove it to begin anew");
                }
            }
            // Killed before it was written.
            Err(_) if stage.parts() == 0 => {
                let written = file
                    .set_len(0)
                    .and_then(|()| file.rewind())
                    .and_then(|()| file.write_all(job.to_string().as_bytes()))
                    .and_then(|()| file.sync_all());
                written.with_context(|| format!("cannot write in {name}"))?;
            }
            Err(_) => return Err(foreign()),
        }
        stage.job = Some(file);
        Ok(stage)
    }

    /// Is all done but for the name of the folder?
    pub(super) fn is_complete(&self) -> bool {
        self.job.is_none()
    }

    pub(super) fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    fn hidden(&self, file: &str) -> PathBuf {
        self.folder.join(HIDDEN).join(file)
    }

    /// Where methods that calibrate keep their blocks.
    pub(super) fn blocks(&self) -> PathBuf {
        self.hidden("blocks")
    }

    /// Writes a file that appears whole or not at all.
    pub(super) fn write(
        &self,
        file: &str,
        content: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
    ) -> Result<()> {
        let path = self.path(file);
        let beside = file.replace(['/', '\\'], "-");
        let beside = self.hidden(&format!("{beside}.{}.tmp", std::process::id()));
        let error = |e: std::io::Error| anyhow!("cannot write {}: {e}", path.display());
        let mut to = BufWriter::new(File::create(&beside).map_err(error)?);
        content(&mut to)?;
        let done = to.into_inner().map_err(|e| error(e.into_error()))?;
        // What is not on the disk before the file has its name may be missing after a power failure.
        done.sync_all().map_err(error)?;
        fs::rename(&beside, &path).map_err(error)
    }

    pub(super) fn write_json(&self, file: &str, json: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string_pretty(json)?;
        self.write(file, |to| Ok(to.write_all(text.as_bytes())?))
    }

    /// Part `index` of as many as there are blocks and one, if it is there as a whole.
    pub(super) fn part(&self, index: usize, blocks: usize) -> Option<Part> {
        // Its header says how long the file is.
        Tensors::open_file(&self.path(&self.part_name(index, blocks))).ok()?;
        let report = fs::read(self.path(&report_name(index))).ok()?;
        serde_json::from_slice(&report).ok()
    }

    /// Writes part `index`.
    pub(super) fn write_part(
        &self,
        (index, blocks): (usize, usize),
        part: &Part,
        tensors: &[TensorView<'_>],
    ) -> Result<()> {
        self.write_json(&report_name(index), part)?;
        self.write(&self.part_name(index, blocks), |to| match self.gguf {
            true => Ok(gguf::write(to, &[], tensors)?),
            false => Ok(write_safetensors(to, &[("format", "pt")], tensors)?),
        })
    }

    pub(super) fn part_name(&self, index: usize, blocks: usize) -> String {
        let extension = if self.gguf { "gguf" } else { "safetensors" };
        format!("model-{:05}-of-{:05}.{extension}", index + 1, blocks + 1)
    }

    /// Files of tensors that are there.
    fn parts(&self) -> usize {
        let is_part = |name: &str| name.starts_with("model-");
        entries(&self.folder).filter(|entry| is_part(&entry.file_name().to_string_lossy())).count()
    }

    /// Leaves nothing behind where no block was done.
    pub(super) fn discard_if_empty(&self) {
        if self.job.is_some() && self.parts() <= 1 && is_empty(&self.blocks()) {
            // It is of no use to anyone; the error says what went wrong first.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }

    /// Removes what only a continuation needed, and gives the folder the name `out`.
    pub(super) fn rename(self, out: &Path) -> Result<()> {
        let (from, to) = (self.folder.display(), out.display());
        if self.job.is_some() {
            let hidden = self.hidden("");
            let remove = |e| anyhow!("cannot remove {}: {e}", hidden.display());
            fs::remove_dir_all(&hidden).map_err(remove)?;
        }
        fs::rename(&self.folder, out).map_err(|e| anyhow!("cannot rename {from} to {to}: {e}"))
    }
}

fn report_name(index: usize) -> String {
    format!("{HIDDEN}/report-{index:05}.json")
}

fn entries(folder: &Path) -> impl Iterator<Item = fs::DirEntry> {
    fs::read_dir(folder).into_iter().flatten().flatten()
}

fn is_empty(folder: &Path) -> bool {
    entries(folder).next().is_none()
}

/// What tells jobs apart in a report: FNV-1a of the job.
pub(super) fn fingerprint(job: &Value) -> Value {
    let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = job.to_string().bytes().fold(0xcbf2_9ce4_8422_2325, fnv);
    format!("{hash:016x}").into()
}

/// Opens or makes the file, for this process alone.
fn lock(path: &Path, folder: &str) -> Result<File> {
    let busy = || {
        anyhow!(
            "another run is at work in {folder}: wait until it has ended, or name another folder"
        )
    };
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
    let file = file.with_context(|| format!("cannot make {}", path.display()))?;
    match file.try_lock() {
        // Whoever had it may have removed the folder, and somebody else may have made a new one.
        Ok(()) if is_still(&file, path) => Ok(file),
        Ok(()) | Err(TryLockError::WouldBlock) => Err(busy()),
        Err(TryLockError::Error(e)) => {
            let path = path.display();
            bail!("cannot lock {path}: {e}; name a folder on a disk whose files can be locked")
        }
    }
}

/// Is `file` what `path` leads to?
#[cfg(unix)]
fn is_still(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let id = |data: fs::Metadata| (data.dev(), data.ino());
    match (file.metadata(), fs::metadata(path)) {
        (Ok(file), Ok(path)) => id(file) == id(path),
        _ => false,
    }
}

#[cfg(not(unix))]
fn is_still(_: &File, path: &Path) -> bool {
    path.exists()
}

#[cfg(test)]
mod tests {
    use lowbit::formats::Tensor;
    use serde_json::json;

    use super::*;

    fn open(out: &Path, method: &str) -> Result<Stage> {
        Stage::open(out, false, &json!({"method": method}), "quantization.json")
    }

    #[test]
    fn a_part_is_there_when_its_file_is_and_a_folder_without_blocks_goes() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let stage = open(&out, "a").unwrap();
        let tensor = Tensor::f32("a", vec![1], &[1.0]);
        stage.write_part((0, 1), &Part::default(), &[tensor.view()]).unwrap();
        stage.discard_if_empty();
        assert!(!stage.folder.exists());
        drop(stage);

        let stage = open(&out, "a").unwrap();
        assert!(stage.part(1, 1).is_none());
        stage.write_part((0, 1), &Part::default(), &[tensor.view()]).unwrap();
        stage.write_part((1, 1), &Part::default(), &[tensor.view()]).unwrap();
        stage.discard_if_empty();
        drop(stage);
        assert!(open(&out, "b").is_err());
        let stage = open(&out, "a").unwrap();
        let path = stage.path(&stage.part_name(1, 1));
        assert!(stage.part(1, 1).is_some());
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert!(stage.part(1, 1).is_none());
        fs::remove_file(path).unwrap();
        assert!(stage.part(1, 1).is_none());
    }

    #[test]
    fn a_folder_has_one_run_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let stage = open(&out, "a").unwrap();
        for method in ["a", "b"] {
            let error = open(&out, method).err().unwrap().to_string();
            assert!(error.contains("out.part") && error.contains("another run"), "{error}");
        }
        drop(stage);
        assert!(open(&out, "a").is_ok());
    }

    #[test]
    fn what_a_killed_run_leaves_before_and_behind_its_work_is_continued() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let part = folder.path().join("out.part");
        // Before there is a job.
        fs::create_dir(&part).unwrap();
        drop(open(&out, "a").unwrap());
        for begun in ["", "{\"method\":"] {
            fs::write(part.join(".lowbit/job.json"), begun).unwrap();
            drop(open(&out, "b").unwrap());
        }
        assert!(open(&out, "a").is_err());
        // Behind the last file: the folder waits for its name.
        fs::remove_dir_all(part.join(".lowbit")).unwrap();
        let report = json!({"job": fingerprint(&json!({"method": "b"}))});
        fs::write(part.join("quantization.json"), report.to_string()).unwrap();
        assert!(open(&out, "a").is_err());
        let stage = open(&out, "b").unwrap();
        assert!(stage.is_complete());
        stage.discard_if_empty();
        stage.rename(&out).unwrap();
        assert!(out.join("quantization.json").exists() && !part.exists());
        // Folders of others are left alone.
        fs::create_dir(&part).unwrap();
        fs::write(part.join("letter.txt"), "dear").unwrap();
        assert!(open(&folder.path().join("out"), "b").is_err());
        assert_eq!(fs::read_dir(&part).unwrap().count(), 1);
    }
}
