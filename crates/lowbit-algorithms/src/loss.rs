use lowbit_core::{Error, MatRef, QLinear, Result};

use crate::Calibration;

/// What a layer's output differs from that of `w`, on the inputs that `calibration` has seen:
/// `tr(ΔW·H·ΔWᵀ) / tokens`, the squared error of all outputs in the mean over tokens, without that of
/// quantized activations.
///
/// # Errors
/// [`Error::Shape`] if `w` is of another shape than the layer, and as
/// [`Calibration::second_moment`].
///
/// # Example
/// See [`Gptq`](crate::Gptq).
pub fn layer_loss(w: MatRef<'_, f32>, layer: &QLinear, calibration: &Calibration) -> Result<f64> {
    let q = layer.effective_weight()?;
    let expected = (q.rows(), q.cols());
    if w.shape() != expected {
        return Err(Error::Shape { what: "weight", expected, got: w.shape() });
    }
    calibration.check_seen(w.cols())?;
    let h = calibration.second_moment()?;
    let mut loss = 0.0;
    for (w, q) in w.iter_rows().zip(q.as_ref().iter_rows()) {
        let d: Vec<_> = w.iter().zip(q).map(|(&w, &q)| f64::from(w) - f64::from(q)).collect();
        for (h, &x) in h.as_ref().iter_rows().zip(&d) {
            loss += x * h.iter().zip(&d).map(|(h, d)| h * d).sum::<f64>();
        }
    }
    Ok(loss / calibration.tokens() as f64)
}
