//! Quantized layers, ready to be multiplied.

use std::sync::Arc;

use lowbit::{Context, Error, Linear, MatMut, MatRef, PackedLinear, QLinear, Result};

use crate::DenseLinear;

/// A layer packed for this CPU. One that no kernel takes is computed by the reference, which is slow; those of
/// a model are listed by [`Model::unpacked`](crate::Model::unpacked).
///
/// # Errors
/// Those of [`PackedLinear::new`], but for layers that no kernel takes.
///
/// # Example
/// ```
/// use lowbit::{Granularity, Mat, QLinear, QMatrix, QuantScheme};
///
/// let w = Mat::from_fn(4, 64, |r, c| ((r * 64 + c) as f32).sin());
/// let int8 = QuantScheme::symmetric(8, Granularity::PerChannel);
/// let layer = lowbit_lm::pack(&QLinear::new(QMatrix::quantize(w.as_ref(), int8)?))?;
/// assert_eq!((layer.out_features(), layer.in_features()), (4, 64));
/// # Ok::<(), lowbit::Error>(())
/// ```
pub fn pack(layer: &QLinear) -> Result<Arc<dyn Linear>> {
    match PackedLinear::new(layer) {
        Ok(packed) => Ok(Arc::new(packed)),
        Err(cause @ Error::Unsupported { .. }) => {
            let linear: Box<dyn Linear> = match layer.activation() {
                // The same product, with the weights it is of in f32.
                None => {
                    let weight = layer.effective_weight()?;
                    let bias = layer.bias().map(<[f32]>::to_vec);
                    Box::new(DenseLinear::new(weight.as_ref(), bias)?)
                }
                Some(_) => Box::new(layer.clone()),
            };
            Ok(Arc::new(Reference { linear, reason: cause.to_string() }))
        }
        Err(cause) => Err(cause),
    }
}

/// A layer that no kernel takes.
struct Reference {
    linear: Box<dyn Linear>,
    reason: String,
}

impl Linear for Reference {
    fn in_features(&self) -> usize {
        self.linear.in_features()
    }

    fn out_features(&self) -> usize {
        self.linear.out_features()
    }

    fn forward(&self, x: MatRef<'_, f32>, y: MatMut<'_, f32>, ctx: &mut Context) -> Result<()> {
        self.linear.forward(x, y, ctx)
    }

    fn as_any(&self) -> Option<&dyn std::any::Any> {
        Some(self)
    }
}

/// A layer that is computed by the reference, and so slowly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unpacked {
    /// Its name in the checkpoint.
    pub layer: String,
    /// Why no kernel takes it.
    pub reason: String,
}

impl Unpacked {
    /// The layer `name`, if it is one.
    pub(crate) fn of(name: &str, linear: &dyn Linear) -> Option<Self> {
        let reference: &Reference = linear.as_any()?.downcast_ref()?;
        Some(Self { layer: name.into(), reason: reference.reason.clone() })
    }

    /// A sentence for each reason, with the first of its layers.
    ///
    /// # Example
    /// ```
    /// use lowbit_lm::Unpacked;
    ///
    /// let reason = "PackedLinear does not support it".to_string();
    /// let [a, b] = ["a", "b"].map(|layer| Unpacked { layer: layer.into(), reason: reason.clone() });
    /// assert_eq!(
    ///     Unpacked::sentences(&[a, b]),
    ///     ["no kernel computes a and 1 other layer, the reference does, slowly: PackedLinear does not support it"]
    /// );
    /// ```
    pub fn sentences(all: &[Self]) -> Vec<String> {
        let mut reasons: Vec<&str> = all.iter().map(|one| one.reason.as_str()).collect();
        reasons.sort_unstable();
        reasons.dedup();
        let sentence = |reason: &str| {
            let mut layers = all.iter().filter(|one| one.reason == reason);
            let first = layers.next().map_or("", |one| one.layer.as_str());
            let others = match layers.count() {
                0 => String::new(),
                1 => " and 1 other layer".into(),
                n => format!(" and {n} other layers"),
            };
            format!("no kernel computes {first}{others}, the reference does, slowly: {reason}")
        };
        reasons.into_iter().map(sentence).collect()
    }
}
