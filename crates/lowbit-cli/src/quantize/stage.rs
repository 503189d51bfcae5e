//! The folder in which the work is done: `OUT.part`, renamed to `OUT` at the end.
//!
//! ```text
//! job.json                            what is being done: only the same may be continued
//! model-00001-of-0000N.safetensors    tensors that are copied; one file for each block behind it,
//! report-00000.json                   and what the report says of each: what is there is done
//! blocks/                             blocks of methods that calibrate: the next ones need their output
//! ```

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, bail};
use lowbit::formats::{TensorView, gguf, write_safetensors};
use serde::Serialize;
use serde_json::Value;

use super::Part;

pub(super) struct Stage {
    folder: PathBuf,
    /// Are the parts GGUF files?
    pub(super) gguf: bool,
}

impl Stage {
    /// Makes the folder for `out`, or opens one in which the same `job` was begun.
    pub(super) fn open(out: &Path, gguf: bool, job: &Value) -> Result<Self> {
        // Without a slash at its end.
        let mut folder = out.components().collect::<PathBuf>().into_os_string();
        folder.push(".part");
        let stage = Self { folder: folder.into(), gguf };
        let name = stage.folder.display();
        let parent = stage.folder.parent().filter(|parent| !parent.as_os_str().is_empty());
        if let Some(parent) = parent.filter(|parent| !parent.is_dir()) {
            bail!("{} is no folder: make it first", parent.display());
        }
        if stage.folder.exists() {
            let begun = fs::read(stage.path("job.json")).ok();
            let begun: Option<Value> = begun.and_then(|text| serde_json::from_slice(&text).ok());
            let Some(begun) = begun else {
                bail!(
                    "{name} is there, and is no unfinished run; move it away or name another folder"
                );
            };
            if let Some(key) = job.as_object().and_then(|job| {
                job.iter().find(|(key, value)| begun.get(key) != Some(value)).map(|(key, _)| key)
            }) {
                bail!("{name} was begun with another {key}; remove it to begin anew");
            }
        } else {
            fs::create_dir(&stage.folder).with_context(|| format!("cannot make {name}"))?;
            stage.write("job.json", |to| Ok(to.write_all(job.to_string().as_bytes())?))?;
        }
        Ok(stage)
    }

    pub(super) fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    /// Where methods that calibrate keep their blocks.
    pub(super) fn blocks(&self) -> PathBuf {
        self.path("blocks")
    }

    /// Writes a file that appears whole or not at all.
    pub(super) fn write(
        &self,
        file: &str,
        content: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
    ) -> Result<()> {
        let (path, beside) = (self.path(file), self.path(&format!("{file}.tmp")));
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

    /// Part `index` of as many as there are blocks and one, if it is there.
    pub(super) fn part(&self, index: usize, blocks: usize) -> Option<Part> {
        if !self.path(&self.part_name(index, blocks)).exists() {
            return None;
        }
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

    /// Leaves nothing behind where no block was done.
    pub(super) fn discard_if_empty(&self) {
        let entries = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
        let is_block = |name: &str| name.starts_with("model-") && !name.contains("-00001-of-");
        let parts =
            entries(&self.folder).any(|entry| is_block(&entry.file_name().to_string_lossy()));
        if !parts && entries(&self.blocks()).next().is_none() {
            // It is of no use to anyone; the error says what went wrong first.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }

    /// Gives the folder the name `out`, and removes what only a continuation needed.
    pub(super) fn rename(&self, out: &Path, blocks: usize) -> Result<()> {
        let (from, to) = (self.folder.display(), out.display());
        fs::rename(&self.folder, out).map_err(|e| anyhow!("cannot rename {from} to {to}: {e}"))?;
        let kept = out.join("blocks");
        if kept.exists() {
            fs::remove_dir_all(kept)?;
        }
        for index in 0..=blocks {
            fs::remove_file(out.join(report_name(index)))?;
        }
        Ok(fs::remove_file(out.join("job.json"))?)
    }
}

fn report_name(index: usize) -> String {
    format!("report-{index:05}.json")
}

#[cfg(test)]
mod tests {
    use lowbit::formats::Tensor;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_part_is_there_when_its_file_is_and_a_folder_without_blocks_goes() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let stage = Stage::open(&out, false, &json!({"method": "a"})).unwrap();
        let tensor = Tensor::f32("a", vec![1], &[1.0]);
        stage.write_part((0, 1), &Part::default(), &[tensor.view()]).unwrap();
        stage.discard_if_empty();
        assert!(!stage.folder.exists());

        let stage = Stage::open(&out, false, &json!({"method": "a"})).unwrap();
        assert!(stage.part(1, 1).is_none());
        stage.write_part((1, 1), &Part::default(), &[tensor.view()]).unwrap();
        stage.discard_if_empty();
        assert!(Stage::open(&out, false, &json!({"method": "b"})).is_err());
        let stage = Stage::open(&out, false, &json!({"method": "a"})).unwrap();
        assert!(stage.part(1, 1).is_some());
        fs::remove_file(stage.path(&stage.part_name(1, 1))).unwrap();
        assert!(stage.part(1, 1).is_none());
    }
}
