//! Quality against size, as a picture.

use anyhow::Result;
use lowbit_lm::outliers::{self, Outliers};
use plotters::prelude::*;

use crate::compare::Row;

const SIZE: (u32, u32) = (960, 640);
const FONT: &str = "sans-serif";
/// Pixels that a label takes: a line, and roughly a character.
const LINE: i32 = 17;
const CHARACTER: i32 = 8;

/// A loss on the logarithmic axis may not be zero: rounding alone moves it by about as much.
const LOSSLESS: f64 = 1e-7;

/// Draws mean KL divergence (logarithmic) over bits per weight for every row but the first, which is
/// what the others are compared with, and returns the SVG.
pub(crate) fn svg(model: &str, rows: &[Row]) -> Result<String> {
    let loss = |row: &Row| row.kl.max(LOSSLESS);
    let mut points: Vec<_> = rows.iter().skip(1).collect();
    points.sort_by(|a, b| loss(b).total_cmp(&loss(a)));
    let over = |f: &dyn Fn(&Row) -> f64| {
        points.iter().fold((f64::MAX, f64::MIN), |(lo, hi), row| (lo.min(f(row)), hi.max(f(row))))
    };
    let (x, y) = (over(&|row| row.bits_per_weight), over(&loss));

    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(format!("{model}: loss against size, down and left is better"), (FONT, 20))
            .margin(16)
            .x_label_area_size(48)
            .y_label_area_size(80)
            .build_cartesian_2d(
                (x.0 - 0.5).floor()..x.1.ceil() + 1.0,
                (y.0 / 2.0..y.1 * 2.0).log_scale(),
            )?;
        chart
            .configure_mesh()
            .x_desc("bits per weight")
            .y_desc("mean KL divergence from f32, nats per token")
            .y_label_formatter(&|kl| format!("{kl}"))
            .light_line_style(WHITE)
            .bold_line_style(BLACK.mix(0.12))
            .label_style((FONT, 14))
            .axis_desc_style((FONT, 16))
            .draw()?;

        // Labels stand right of their points, and lower where a point or another label is already.
        let place = |row: &Row| chart.backend_coord(&(row.bits_per_weight, loss(row)));
        let mut taken: Vec<_> = points
            .iter()
            .map(|row| place(row))
            .map(|(x, y)| (x - 6, x + 6, y - LINE / 2))
            .collect();
        for row in points {
            let point = place(row);
            let width = CHARACTER * row.method.len() as i32;
            let (left, mut top) = (point.0 + 14, point.1 - LINE / 2);
            while taken.iter().any(|&(other, end, line)| {
                left < end && other < left + width && (top - line).abs() < LINE
            }) {
                top += 1;
            }
            taken.push((left, left + width, top));
            let line = [point, (left - 2, top + LINE / 2)];
            root.draw(&PathElement::new(line, BLACK.mix(0.3)))?;
            root.draw(&Circle::new(point, 5, RGBColor(0x1f, 0x77, 0xb4).filled()))?;
            root.draw(&Text::new(row.method.clone(), (left, top + 2), (FONT, 14)))?;
        }
        root.present()?;
    }
    Ok(svg)
}

/// Draws the largest magnitude (logarithmic) of each feature of the residual stream in each layer that
/// reads it, those of outlier features in another colour, and returns the SVG.
pub(crate) fn outliers(model: &str, found: &Outliers) -> Result<String> {
    let inputs: Vec<_> = found.inputs.iter().filter(|input| input.layers.len() > 1).collect();
    let features = inputs.first().map_or(0, |input| input.largest.len());
    let points = || {
        let of = |input: &&'_ outliers::Input| input.largest.clone().into_iter().enumerate();
        inputs.iter().flat_map(of).filter(|(_, x)| *x > 0.0)
    };
    let ends = points()
        .fold((found.threshold, found.threshold), |(lo, hi), (_, x)| (lo.min(x), hi.max(x)));
    let outliers: Vec<_> =
        found.features.iter().filter(|f| f.is_outlier()).map(|f| f.feature).collect();
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(format!("{model}: largest activations of each layer"), (FONT, 20))
            .margin(16)
            .x_label_area_size(48)
            .y_label_area_size(80)
            .build_cartesian_2d(0..features.max(1), (ends.0 / 1.5..ends.1 * 1.5).log_scale())?;
        chart
            .configure_mesh()
            .x_desc("feature of the residual stream")
            .y_desc("largest magnitude over all positions")
            .light_line_style(WHITE)
            .bold_line_style(BLACK.mix(0.12))
            .label_style((FONT, 14))
            .axis_desc_style((FONT, 16))
            .draw()?;
        let line = [(0, found.threshold), (features.max(1), found.threshold)];
        chart.draw_series([PathElement::new(line, BLACK.mix(0.5))])?;
        chart.draw_series(points().map(|(feature, x)| {
            let colour = match outliers.contains(&feature) {
                true => RGBColor(0xd6, 0x27, 0x28),
                false => RGBColor(0x1f, 0x77, 0xb4),
            };
            Circle::new((feature, x), 3, colour.mix(0.6).filled())
        }))?;
        root.present()?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(method: &str, bits_per_weight: f64, kl: f64) -> Row {
        Row {
            method: method.into(),
            bits_per_weight,
            weight_bytes: 1,
            perplexity: 1.0,
            kl,
            top1: 1.0,
            prefill_tokens_per_s: 1.0,
            decode_tokens_per_s: 1.0,
        }
    }

    #[test]
    fn every_method_is_drawn_with_a_loss_or_without() {
        let rows = [row("f32", 32.0, 0.0), row("a", 4.0, 0.1), row("b", 4.0, 0.0)];
        let svg = svg("model", &rows).unwrap();
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(!svg.contains("\nf32"));
    }
}
