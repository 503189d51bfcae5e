use crate::{Dtype, Error, Result, TensorSource, TensorView};

/// A tensor that owns its bytes, on its way into a file.
///
/// # Example
/// ```
/// use lowbit_formats::{Dtype, Tensor, TensorSource};
///
/// let tensors = vec![Tensor::f32("bias", vec![2], &[0.5, -1.0])];
/// assert_eq!(tensors.tensor("bias")?.to_f32()?, [0.5, -1.0]);
/// # Ok::<(), lowbit_formats::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Its elements, little-endian.
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// A tensor of bytes that are elements of `dtype`.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8>) -> Self {
        Self { name: name.into(), dtype, shape, bytes }
    }

    /// A tensor of f32.
    pub fn f32(name: impl Into<String>, shape: Vec<usize>, elements: &[f32]) -> Self {
        let bytes = elements.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self::new(name, Dtype::F32, shape, bytes)
    }

    /// A tensor of i32.
    pub(crate) fn i32(name: String, shape: Vec<usize>, elements: &[i32]) -> Self {
        let bytes = elements.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self::new(name, Dtype::I32, shape, bytes)
    }

    /// The tensor as it is read.
    pub fn view(&self) -> TensorView<'_> {
        let Self { name, dtype, shape, bytes } = self;
        TensorView { file: "memory", name, dtype: *dtype, shape, bytes }
    }
}

/// Tensors in memory, as if they were in a file.
impl TensorSource for Vec<Tensor> {
    fn names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.iter().map(|tensor| tensor.name.as_str()).collect();
        names.sort_unstable();
        names
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        let found = self.iter().find(|tensor| tensor.name == name);
        let missing = || Error::Missing { file: "memory".into(), tensor: name.into() };
        found.map(Tensor::view).ok_or_else(missing)
    }
}
