use std::collections::BTreeMap;

use serde_json::Value;

use crate::{Error, Result, Safetensors, TensorSource, TensorView};

/// Several safetensors files under one `model.safetensors.index.json`, which maps each tensor to
/// the file that holds it.
///
/// # Example
/// ```
/// use lowbit_formats::{Sharded, TensorSource};
///
/// # let header = br#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
/// # let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
/// # bytes.extend(header);
/// # bytes.extend(1.0_f32.to_le_bytes());
/// let index = br#"{"weight_map": {"w": "model-00001-of-00001.safetensors"}}"#;
/// let shards = Sharded::new("model.safetensors.index.json", index, |file| {
///     // open `file`, which lies beside the index
/// #   let _ = file;
///     Ok::<_, lowbit_formats::Error>(bytes.as_slice())
/// })?;
/// assert_eq!(shards.tensor("w")?.to_f32()?, [1.0]);
/// # Ok::<(), lowbit_formats::Error>(())
/// ```
#[derive(Debug)]
pub struct Sharded<S> {
    index: String,
    shards: Vec<Safetensors<S>>,
    /// Tensor to position in `shards`.
    tensors: BTreeMap<String, usize>,
}

impl<S: AsRef<[u8]>> Sharded<S> {
    /// Reads the index, a JSON text that error messages call `name`, and the headers of the files
    /// that it lists; `open` gives the bytes of one.
    ///
    /// # Errors
    /// What `open` returns; [`Error::Malformed`] if `index` is no index or names a file outside
    /// its folder; [`Error::Missing`] if a file lacks a tensor; as [`Safetensors::new`].
    pub fn new<E: From<Error>>(
        name: impl Into<String>,
        index: &[u8],
        mut open: impl FnMut(&str) -> Result<S, E>,
    ) -> Result<Self, E> {
        let name = name.into();
        let malformed = |reason: String| Error::Malformed {
            file: name.clone(),
            format: "safetensors index",
            reason,
        };
        let parsed: Value = serde_json::from_slice(index).map_err(|e| malformed(e.to_string()))?;
        let map = parsed.get("weight_map").and_then(Value::as_object);
        let map = map.ok_or_else(|| malformed("it has no weight_map".into()))?;

        let mut positions = BTreeMap::new();
        let mut shards: Vec<Safetensors<S>> = Vec::new();
        let mut tensors = BTreeMap::new();
        for (tensor, file) in map {
            let Some(file) = file.as_str() else {
                return Err(
                    malformed(format!("the file of tensor {tensor} is not a string")).into()
                );
            };
            if file.is_empty() || file == ".." || file.contains(['/', '\\', ':', '\0']) {
                let reason = format!("tensor {tensor} should be in {file:?}, outside its folder");
                return Err(malformed(reason).into());
            }
            let position = match positions.get(file) {
                Some(&position) => position,
                None => {
                    // The shard lies beside the index, and is called so in messages.
                    let folder = name.rfind(['/', '\\']).map_or("", |i| &name[..=i]);
                    shards.push(Safetensors::new(format!("{folder}{file}"), open(file)?)?);
                    positions.insert(file, shards.len() - 1);
                    shards.len() - 1
                }
            };
            shards[position].tensor(tensor)?;
            tensors.insert(tensor.clone(), position);
        }
        Ok(Self { index: name, shards, tensors })
    }
}

impl<S: AsRef<[u8]>> TensorSource for Sharded<S> {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn names_under(&self, layer: &str) -> Vec<&str> {
        let prefix = format!("{layer}.");
        let behind = self.tensors.range(prefix.clone()..).map(|(name, _)| name.as_str());
        behind.take_while(|name| name.starts_with(&prefix)).collect()
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        match self.tensors.get(name) {
            Some(&shard) => self.shards[shard].tensor(name),
            None => Err(Error::Missing { file: self.index.clone(), tensor: name.into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(tensor: &str, value: f32) -> Vec<u8> {
        let header =
            format!(r#"{{"{tensor}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(value.to_le_bytes());
        bytes
    }

    fn open(index: &str) -> Result<Sharded<Vec<u8>>> {
        Sharded::new("folder/index.json", index.as_bytes(), |file| match file {
            "1" => Ok(shard("a", 1.0)),
            "2" => Ok(shard("b", 2.0)),
            _ => Ok(vec![]),
        })
    }

    #[test]
    fn tensors_come_from_the_file_that_the_index_names() {
        let source = open(r#"{"metadata":{},"weight_map":{"b":"2","a":"1"}}"#).unwrap();
        assert_eq!(source.names(), ["a", "b"]);
        assert_eq!(source.tensor("b").unwrap().to_f32().unwrap(), [2.0]);
        assert_eq!(source.tensor("b").unwrap().file, "folder/2");
        let error = source.tensor("c").unwrap_err().to_string();
        assert_eq!(error, "folder/index.json: tensor c is missing");
    }

    #[test]
    fn a_bad_index_is_an_error() {
        for (index, expected) in [
            ("{", "folder/index.json: expected a safetensors index file, but EOF"),
            (
                "{}",
                "folder/index.json: expected a safetensors index file, but it has no weight_map",
            ),
            (r#"{"weight_map":{"a":1}}"#, "folder/index.json: expected a safetensors index file"),
            (r#"{"weight_map":{"a":"../1"}}"#, "folder/index.json: expected"),
            (r#"{"weight_map":{"a":"2"}}"#, "folder/2: tensor a is missing"),
            (r#"{"weight_map":{"a":"3"}}"#, "folder/3: expected 8 bytes, got 0"),
        ] {
            let error = open(index).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
