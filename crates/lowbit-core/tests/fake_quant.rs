//! Fake quantization: gradients against finite differences and published formulas.
//!
//! Rounding has no useful derivative, so the finite differences are those of a smooth problem with
//! the same value: `y(x, s, z) = s·(clamp(x/s, Qn − z, Qp − z) + r)`, where `r`, what rounding adds
//! at the point in question, is held constant. That is the straight-through estimator.

mod golden;

use golden::ROUNDING;
use lowbit_core::fake_quant::{
    Grid, forward, lsq_gradient_scale, lsq_initial_scale, pact_gradient, range_gradient,
    scale_gradient, straight_through, zero_gradient,
};
use lowbit_core::{Error, Granularity, Mat, QMatrix, QuantScheme, ScaleFormat, ZeroFormat};
use proptest::prelude::*;

/// A grid with its parameters as real numbers.
#[derive(Clone, Copy)]
struct Real {
    scale: f64,
    zero: f64,
    min: f64,
    max: f64,
}

impl Real {
    fn new(grid: Grid) -> Self {
        let codes = grid.codes();
        let [zero, min, max] = [grid.zero(), *codes.start(), *codes.end()].map(f64::from);
        Self { scale: grid.scale().into(), zero, min, max }
    }

    fn clipped(self, x: f64) -> f64 {
        (x / self.scale).clamp(self.min - self.zero, self.max - self.zero)
    }

    fn residual(self, x: f64) -> f64 {
        self.clipped(x).round_ties_even() - self.clipped(x)
    }

    /// The smooth problem.
    fn y(self, x: f64, residual: f64) -> f64 {
        self.scale * (self.clipped(x) + residual)
    }

    /// Whether `x` is far enough from the kinks at both ends for a finite difference.
    fn smooth(self, x: f64) -> bool {
        let v = x / self.scale;
        [self.min, self.max].iter().all(|end| (v - (end - self.zero)).abs() > 1e-3)
    }

    /// The derivative along the line `at(t)` through the grid `at(0)`.
    fn slope(at: impl Fn(f64) -> Self, x: f64) -> f64 {
        let (h, r) = (1e-6, at(0.0).residual(x));
        (at(h).y(x, r) - at(-h).y(x, r)) / (2.0 * h)
    }
}

fn codes() -> impl Strategy<Value = (i32, i32)> {
    prop_oneof![
        Just((-8, 7)),
        Just((0, 15)),
        Just((-127, 127)),
        Just((0, 1)),
        Just((3, 9)),
        (-300..300_i32, 1..600_i32).prop_map(|(min, n)| (min, min + n)),
    ]
}

fn grid() -> impl Strategy<Value = Grid> {
    (codes(), 0.0..=1.0_f32, 0.05..3.0_f32).prop_map(|((min, max), at, scale)| {
        let zero = min + (at * (max - min) as f32) as i32;
        Grid::new(scale, zero, min..=max).unwrap()
    })
}

/// A grid, and values within and around it.
fn problem() -> impl Strategy<Value = (Grid, Vec<f32>)> {
    grid().prop_flat_map(|grid| {
        let codes = grid.codes();
        let (lo, hi) = (grid.value(*codes.start()), grid.value(*codes.end()));
        let value = prop_oneof![
            4 => lo - grid.scale()..hi + grid.scale(),
            2 => 2.0 * lo - hi..2.0 * hi - lo,
            1 => codes.prop_map(move |code| grid.value(code)),
        ];
        (Just(grid), prop::collection::vec(value, 0..20))
    })
}

fn upstream(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 + 11) % 17) as f32 / 8.0 - 1.0).collect()
}

fn run(x: &[f32], grid: Grid) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.len()];
    forward(x, grid, &mut y).unwrap();
    y
}

fn dx(x: &[f32], dy: &[f32], grid: Grid) -> Vec<f32> {
    let mut dx = vec![f32::NAN; x.len()];
    straight_through(x, dy, grid, &mut dx).unwrap();
    dx
}

proptest! {
    #[test]
    fn every_value_becomes_the_nearest_level((grid, x) in problem()) {
        let codes = grid.codes();
        let levels: Vec<f32> = codes.map(|code| grid.value(code)).collect();
        for (&x, y) in x.iter().zip(run(&x, grid)) {
            prop_assert!(levels.contains(&y));
            let best = levels.iter().map(|level| (level - x).abs()).fold(f32::INFINITY, f32::min);
            // Within a rounding of x / scale and of the level, near a tie.
            prop_assert!((y - x).abs() <= best + (x.abs() + y.abs()) * 2.0_f32.powi(-22));
        }
    }

    #[test]
    fn forward_is_idempotent_monotone_and_keeps_zero((grid, mut x) in problem()) {
        x.push(0.0);
        x.sort_by(f32::total_cmp);
        let y = run(&x, grid);
        prop_assert_eq!(run(&y, grid), y.clone());
        prop_assert!(y.is_sorted());
        prop_assert_eq!(y[x.iter().position(|&x| x == 0.0).unwrap()], 0.0);
    }

    #[test]
    fn powers_of_two_pass_through((grid, x) in problem(), e in -20..20_i32) {
        let factor = 2.0_f32.powi(e);
        let scaled = Grid::new(grid.scale() * factor, grid.zero(), grid.codes()).unwrap();
        let by = |v: &[f32]| v.iter().map(|v| v * factor).collect::<Vec<_>>();
        let (wide, dy) = (by(&x), upstream(x.len()));
        prop_assert_eq!(run(&wide, scaled), by(&run(&x, grid)));
        prop_assert_eq!(dx(&wide, &dy, scaled), dx(&x, &dy, grid));
        prop_assert_eq!(scale_gradient(&wide, &dy, scaled), scale_gradient(&x, &dy, grid));
        prop_assert_eq!(
            zero_gradient(&wide, &dy, scaled).unwrap(),
            zero_gradient(&x, &dy, grid).unwrap() * factor
        );
    }

    #[test]
    fn straight_through_is_the_slope_of_clipping((grid, x) in problem()) {
        let dy = upstream(x.len());
        let real = Real::new(grid);
        for ((&x, &dy), dx) in x.iter().zip(&dy).zip(dx(&x, &dy, grid)) {
            let (x, h) = (f64::from(x), 1e-6);
            if real.smooth(x) {
                let slope = (real.y(x + h, 0.0) - real.y(x - h, 0.0)) / (2.0 * h);
                prop_assert!((f64::from(dx) - f64::from(dy) * slope).abs() < 1e-6);
            } else {
                prop_assert!(dx == dy || dx == 0.0);
            }
        }
    }

    #[test]
    fn gradients_of_scale_and_zero_are_those_of_the_smooth_problem((grid, x) in problem()) {
        let real = Real::new(grid);
        let x: Vec<f32> = x.into_iter().filter(|&x| real.smooth(x.into())).collect();
        let dy = upstream(x.len());
        let expected = |at: &dyn Fn(f64) -> Real| -> f64 {
            x.iter().zip(&dy).map(|(&x, &dy)| f64::from(dy) * Real::slope(at, x.into())).sum()
        };
        let scale = expected(&|t| Real { scale: real.scale + t, ..real });
        let got = f64::from(scale_gradient(&x, &dy, grid).unwrap());
        prop_assert!((got - scale).abs() < 1e-4 * (1.0 + real.max - real.min), "{got} {scale}");
        let zero = expected(&|t| Real { zero: real.zero + t, ..real });
        let got = f64::from(zero_gradient(&x, &dy, grid).unwrap());
        prop_assert!((got - zero).abs() < 1e-4, "{got} {zero}");
    }

    #[test]
    fn gradients_of_a_range_are_those_of_the_smooth_problem(
        (min, max) in codes(), lo in -4.0_f32..0.0, hi in 0.01_f32..4.0,
        at in prop::collection::vec(-0.5_f32..1.5, 0..20),
    ) {
        let grid = Grid::from_range(lo, hi, min..=max).unwrap();
        let (lo, hi) = (f64::from(lo), f64::from(hi));
        // The real zero-point: the smooth problem does not round it. What that changes is which
        // residual a value has, so residuals come from the grid itself.
        let steps = f64::from(max - min);
        let real = |lo: f64, hi: f64| {
            let scale = (hi - lo) / steps;
            Real { scale, zero: f64::from(min) - lo / scale, min: min.into(), max: max.into() }
        };
        let rounded = Real::new(grid);
        let x: Vec<f32> = at
            .iter()
            .map(|&at| (lo + f64::from(at) * (hi - lo)) as f32)
            // Values between an end and where the rounded zero-point has moved it have no say.
            .filter(|&x| {
                let v = f64::from(x) / rounded.scale;
                [rounded.min, rounded.max].iter().all(|end| (v - (end - rounded.zero)).abs() > 0.51)
            })
            .collect();
        let dy = upstream(x.len());
        let h = 1e-6;
        let slope = |dlo: f64, dhi: f64| -> f64 {
            x.iter().zip(&dy).map(|(&x, &dy)| {
                let x = f64::from(x);
                let r = rounded.residual(x);
                let y = |t: f64| real(lo + t * dlo, hi + t * dhi).y(x, r);
                f64::from(dy) * (y(h) - y(-h)) / (2.0 * h)
            }).sum()
        };
        let (got_lo, got_hi) = range_gradient(&x, &dy, grid).unwrap();
        prop_assert!((f64::from(got_lo) - slope(1.0, 0.0)).abs() < 1e-3);
        prop_assert!((f64::from(got_hi) - slope(0.0, 1.0)).abs() < 1e-3);
    }

    /// `scale = (hi − lo) / n` and `zero = Qn − lo / scale`.
    #[test]
    fn gradients_of_a_range_are_the_chain_rule(
        (min, max) in codes(), zero in 0.0..=1.0_f32, e in -3..3_i32, at in prop::collection::vec(-0.5_f32..1.5, 0..20),
    ) {
        // Ends that are levels, so that nothing was rounded on the way to the grid.
        let zero = min + (zero * (max - min) as f32) as i32;
        let scale = 2.0_f32.powi(e);
        let (lo, hi) = ((min - zero) as f32 * scale, (max - zero) as f32 * scale);
        let grid = Grid::from_range(lo, hi, min..=max).unwrap();
        prop_assert_eq!(grid, Grid::new(scale, zero, min..=max).unwrap());
        let x: Vec<f32> = at.iter().map(|at| lo + at * (hi - lo)).collect();
        let dy = upstream(x.len());
        let (n, s) = (f64::from(max - min), f64::from(scale));
        let (lo, hi) = (f64::from(lo), f64::from(hi));
        let ds = f64::from(scale_gradient(&x, &dy, grid).unwrap());
        let dz = f64::from(zero_gradient(&x, &dy, grid).unwrap());
        let (dlo, dhi) = range_gradient(&x, &dy, grid).unwrap();
        prop_assert!((f64::from(dlo) - (-ds / n - dz * hi / (n * s * s))).abs() < 1e-4);
        prop_assert!((f64::from(dhi) - (ds / n + dz * lo / (n * s * s))).abs() < 1e-4);
    }

    #[test]
    fn gradients_of_parts_add_up((grid, x) in problem(), at in 0.0..=1.0_f32) {
        let dy = upstream(x.len());
        let at = (at * x.len() as f32) as usize;
        let parts = |f: fn(&[f32], &[f32], Grid) -> lowbit_core::Result<f32>| {
            let whole = f(&x, &dy, grid).unwrap();
            let parts = f(&x[..at], &dy[..at], grid).unwrap() + f(&x[at..], &dy[at..], grid).unwrap();
            (whole - parts).abs() <= 1e-5 * (1.0 + 600.0 * x.len() as f32)
        };
        prop_assert!(parts(scale_gradient) && parts(zero_gradient));
        let mut split = dx(&x[..at], &dy[..at], grid);
        split.extend(dx(&x[at..], &dy[at..], grid));
        prop_assert_eq!(split, dx(&x, &dy, grid));
    }

    #[test]
    fn pact_is_its_formula(
        alpha in 0.1_f32..8.0, bits in 1..=8_u8, x in prop::collection::vec(-4.0_f32..12.0, 0..20),
    ) {
        let grid = Grid::pact(alpha, bits).unwrap();
        let n = f64::from((1 << bits) - 1);
        for (&x, y) in x.iter().zip(run(&x, grid)) {
            let (x, alpha) = (f64::from(x), f64::from(alpha));
            let clipped = 0.5 * (x.abs() - (x - alpha).abs() + alpha); // equation 1
            let steps = clipped * n / alpha;
            let quantized = steps.round_ties_even() * alpha / n; // equation 2
            // Near a tie the f32 quotient may fall to the other side.
            let slack = if (steps.fract() - 0.5).abs() < 1e-3 { alpha / n } else { 0.0 };
            prop_assert!((f64::from(y) - quantized).abs() <= slack + 1e-5);
        }
    }

    #[test]
    fn gradients_of_pact_are_the_slopes_of_clipping(
        alpha in 0.1_f32..8.0, x in prop::collection::vec(-4.0_f32..12.0, 0..20),
    ) {
        let smooth = |x: &f32| x.abs() > 1e-3 && (x - alpha).abs() > 1e-3;
        let x: Vec<f32> = x.into_iter().filter(smooth).collect();
        let dy = upstream(x.len());
        let mut dx = vec![f32::NAN; x.len()];
        let dalpha = pact_gradient(&x, &dy, alpha, &mut dx).unwrap();
        let (h, alpha) = (1e-6, f64::from(alpha));
        let mut expected = 0.0;
        for ((&x, &dy), dx) in x.iter().zip(&dy).zip(dx) {
            let (x, dy) = (f64::from(x), f64::from(dy));
            let slope = ((x + h).clamp(0.0, alpha) - (x - h).clamp(0.0, alpha)) / (2.0 * h);
            prop_assert!((f64::from(dx) - dy * slope).abs() < 1e-6);
            expected += dy * (x.clamp(0.0, alpha + h) - x.clamp(0.0, alpha - h)) / (2.0 * h);
        }
        prop_assert!((f64::from(dalpha) - expected).abs() < 1e-5);
    }

    /// Anything at all is a result or an error.
    #[test]
    fn nothing_panics(
        scale in any::<f32>(), zero in any::<i32>(), min in any::<i32>(), max in any::<i32>(),
        small in (-5..5_i32, -5..5_i32, -5..5_i32), ends in any::<(f32, f32)>(), bits in any::<u8>(),
        x in prop::collection::vec(any::<f32>(), 0..6), n in 0..6_usize, max_code in any::<i32>(),
    ) {
        let grids = [
            Grid::new(scale, zero, min..=max),
            Grid::new(scale, small.0, small.1..=small.2),
            Grid::from_range(ends.0, ends.1, min..=max),
            Grid::from_range(-ends.0.abs(), ends.1.abs(), small.1..=small.2),
            Grid::pact(scale, bits),
        ];
        let (dy, mut out) = (vec![1.0; n], vec![0.0; n]);
        for grid in grids.into_iter().flatten() {
            prop_assert!(grid.codes().contains(&grid.zero()));
            let _ = (grid.code(scale), grid.value(zero));
            let valid = x.len() == n && x.iter().all(|x| x.is_finite());
            prop_assert_eq!(forward(&x, grid, &mut out).is_ok(), valid);
            prop_assert!(out.iter().all(|y| y.is_finite()));
            prop_assert_eq!(straight_through(&x, &dy, grid, &mut out).is_ok(), valid);
            prop_assert_eq!(scale_gradient(&x, &dy, grid).is_ok(), valid);
            prop_assert_eq!(zero_gradient(&x, &dy, grid).is_ok(), valid);
            prop_assert_eq!(range_gradient(&x, &dy, grid).is_ok(), valid);
        }
        let _ = pact_gradient(&x, &dy, scale, &mut out);
        let _ = lsq_gradient_scale(n, max_code);
        if let Ok(scale) = lsq_initial_scale(&x, max_code) {
            prop_assert!(scale > 0.0 && scale.is_finite());
        }
    }

    /// Training computes with the weights that deployment will store.
    #[test]
    fn forward_is_what_quantizing_gives(
        w in prop::collection::vec(-2.0_f32..2.0, 1..40), bits in 2..=8_u8, symmetric in any::<bool>(),
    ) {
        let scheme = QuantScheme {
            zero: if symmetric { ZeroFormat::Midpoint } else { ZeroFormat::Int },
            scale_format: ScaleFormat::F32,
            ..QuantScheme::affine(bits, Granularity::PerTensor)
        };
        let w = Mat::new(w.clone(), 1, w.len()).unwrap();
        let q = QMatrix::quantize(w.as_ref(), scheme).unwrap();
        let params = q.params(0, 0);
        let grid = Grid::new(params.scale, params.zero as i32, 0..=(1 << bits) - 1).unwrap();
        prop_assert_eq!(run(w.data(), grid), q.dequantize().data().to_vec());
    }
}

/// Esser et al., equation 3, by hand: s = 1/2, Q_N = 4, Q_P = 3, so levels from −2 to 1.5.
#[test]
fn the_scale_gradient_of_lsq_is_the_published_one() {
    let grid = Grid::new(0.5, 0, -4..=3).unwrap();
    for (x, ds, inside) in [
        (-9.0, -4.0, false),
        (-2.0, -4.0, true), // v = −Q_N: the case "v <= −Q_N"
        (-1.9375, -0.125, true),
        (-0.3125, -0.375, true),
        (0.0, 0.0, true),
        (0.125, -0.25, true),
        (0.25, -0.5, true), // 0.5 rounds to 0
        (0.75, 0.5, true),  // 1.5 rounds to 2
        (1.4375, 0.125, true),
        (1.5, 3.0, true),
        (1.5625, 3.0, false), // would round to Q_P
        (70.0, 3.0, false),
    ] {
        assert_eq!(scale_gradient(&[x], &[1.0], grid), Ok(ds), "{x}");
        assert_eq!(dx(&[x], &[3.0], grid), [if inside { 3.0 } else { 0.0 }], "{x}");
    }
}

/// From −0.5 to 1.5; a value on an outermost level moves the end of the range.
#[test]
fn gradients_on_the_ends_of_a_range_are_those_beyond_them() {
    let grid = Grid::from_range(-0.5, 1.5, 0..=4).unwrap();
    for (x, zero, ends) in [
        (-7.0, -0.5, (1.0, 0.0)),
        (-0.5, -0.5, (1.0, 0.0)),
        (-0.375, 0.0, (0.0625, -0.0625)),
        (0.0, 0.0, (0.0, 0.0)),
        (1.375, 0.0, (-0.0625, 0.0625)),
        (1.5, -0.5, (0.0, 1.0)),
        (7.0, -0.5, (0.0, 1.0)),
    ] {
        assert_eq!(zero_gradient(&[x], &[1.0], grid), Ok(zero), "{x}");
        assert_eq!(range_gradient(&[x], &[1.0], grid), Ok(ends), "{x}");
    }
}

/// Choi et al., equation 3.
#[test]
fn the_gradient_of_pact_is_the_published_one() {
    let x = [-1.0, 0.0, 1.9999, 2.0, 5.0];
    let mut dx = [9.0; 5];
    assert_eq!(pact_gradient(&x, &[1.0, 2.0, 4.0, 8.0, 16.0], 2.0, &mut dx), Ok(24.0));
    assert_eq!(dx, [0.0, 2.0, 4.0, 0.0, 0.0]);
}

#[test]
fn rounding_is_to_nearest_even() {
    let grid = Grid::new(1.0, 0, -60_000..=60_000).unwrap();
    for (x, expected) in ROUNDING {
        assert_eq!(run(&[x], grid), [expected.clamp(-60_000.0, 60_000.0)], "{x}");
    }
}

#[test]
fn extreme_grids_work() {
    let tiny = f32::from_bits(1);
    let grid = Grid::from_range(-tiny, 0.0, 0..=255).unwrap();
    assert_eq!((grid.scale(), grid.zero()), (tiny, 1));
    assert_eq!(run(&[f32::MAX, -tiny, f32::MIN], grid), [254.0 * tiny, -tiny, -tiny]);
    // hi − lo is not a number of f32 here; and then an end moves by half a step, out of f32.
    let most = 0.9 * f32::MAX;
    let grid = Grid::from_range(-most, most, -128..=127).unwrap();
    assert!(run(&[f32::MIN, f32::MAX], grid).iter().all(|y| y.is_finite()));
    let beyond = Grid::from_range(f32::MIN, f32::MAX, -128..=127);
    assert!(matches!(beyond, Err(Error::RealRange { lo: f32::NEG_INFINITY, .. })));
    let grid = Grid::new(1.0, 65_535, -65_535..=65_535).unwrap();
    assert_eq!(run(&[-1e9, -131_069.0, 1.0], grid), [-131_070.0, -131_069.0, 0.0]);
    assert_eq!(grid.code(f32::NAN), grid.zero());
    assert_eq!(lsq_initial_scale(&[0.0, -0.0], 7), Ok(1.0));
    assert_eq!(lsq_initial_scale(&[f32::MAX], 1), Ok(f32::MAX));
    assert_eq!(lsq_initial_scale(&[tiny], 65_535), Ok(tiny));
    assert_eq!(lsq_gradient_scale(usize::MAX, 1).map(|g| g > 0.0), Ok(true));
    assert_eq!(lsq_gradient_scale(25, 4), Ok(0.1));
}

#[test]
#[expect(clippy::reversed_empty_ranges, reason = "an empty range is what is refused")]
fn impossible_operands_are_errors_and_nothing_is_written() {
    for scale in [0.0, -0.0, -1.0, f32::INFINITY, f32::NEG_INFINITY] {
        let got = f64::from(scale);
        assert_eq!(
            Grid::new(scale, 0, 0..=1),
            Err(Error::Parameter {
                what: "scale",
                value: got,
                expected: "a positive finite number"
            })
        );
        let what = "clipping level";
        assert_eq!(
            Grid::pact(scale, 4),
            Err(Error::Parameter { what, value: got, expected: "a positive finite number" })
        );
        assert_eq!(
            pact_gradient(&[], &[], scale, &mut []),
            Err(Error::Parameter { what, value: got, expected: "a positive finite number" })
        );
    }
    assert!(matches!(Grid::new(f32::NAN, 0, 0..=1), Err(Error::Parameter { .. })));
    assert!(matches!(Grid::new(f32::MAX, 0, 0..=2), Err(Error::RealRange { .. })));
    fn range<T>(what: &'static str, min: i64, max: i64, got: i64) -> Result<T, Error> {
        Err(Error::OutOfRange { what, min, max, got })
    }
    assert_eq!(Grid::new(1.0, 3, 3..=3), range("highest code", 4, 65_535, 3));
    assert_eq!(Grid::new(1.0, 3, 9..=3), range("highest code", 10, 65_535, 3));
    assert_eq!(Grid::new(1.0, 0, -65_536..=3), range("lowest code", -65_535, 65_534, -65_536));
    assert_eq!(Grid::new(1.0, 0, 0..=65_536), range("highest code", 1, 65_535, 65_536));
    assert_eq!(Grid::new(1.0, 8, -8..=7), range("zero-point", -8, 7, 8));
    assert_eq!(Grid::pact(1.0, 0), range("bits", 1, 16, 0));
    assert_eq!(Grid::pact(1.0, 17), range("bits", 1, 16, 17));
    for (lo, hi) in [(0.5, 1.0), (-2.0, -1.0), (0.0, 0.0), (1.0, -1.0), (f32::NEG_INFINITY, 0.0)] {
        assert_eq!(Grid::from_range(lo, hi, 0..=255), Err(Error::RealRange { lo, hi }));
    }
    assert!(matches!(Grid::from_range(f32::NAN, 1.0, 0..=1), Err(Error::RealRange { .. })));
    assert_eq!(Grid::from_range(-1.0, 1.0, 5..=5), range("highest code", 6, 65_535, 5));
    assert_eq!(lsq_gradient_scale(0, 7), range("elements", 1, i64::MAX, 0));
    assert_eq!(lsq_gradient_scale(1, 0), range("highest code", 1, 65_535, 0));
    assert_eq!(lsq_initial_scale(&[], 7), range("elements", 1, i64::MAX, 0));

    let grid = Grid::new(1.0, 0, -8..=7).unwrap();
    let (x, bad, mut out) = ([1.0; 3], [1.0, f32::INFINITY, f32::NAN], [7.0; 3]);
    let not_finite = Error::NotFinite { what: "x", row: 0, col: 1 };
    let length = |what, expected, got| Error::Length { what, expected, got };
    assert_eq!(forward(&bad, grid, &mut out), Err(not_finite.clone()));
    assert_eq!(forward(&x[..2], grid, &mut out), Err(length("y", 2, 3)));
    assert_eq!(straight_through(&bad, &x, grid, &mut out), Err(not_finite.clone()));
    assert_eq!(straight_through(&x, &x[..1], grid, &mut out), Err(length("dy", 3, 1)));
    assert_eq!(straight_through(&x[..2], &x[..2], grid, &mut out), Err(length("dx", 2, 3)));
    assert_eq!(scale_gradient(&x, &x[..1], grid), Err(length("dy", 3, 1)));
    assert_eq!(range_gradient(&bad, &x, grid), Err(not_finite.clone()));
    assert_eq!(zero_gradient(&bad, &x, grid), Err(not_finite.clone()));
    assert_eq!(pact_gradient(&bad, &x, 1.0, &mut out), Err(not_finite.clone()));
    assert_eq!(pact_gradient(&x, &x[..1], 1.0, &mut out), Err(length("dy", 3, 1)));
    assert_eq!(pact_gradient(&x[..2], &x[..2], 1.0, &mut out), Err(length("dx", 2, 3)));
    assert_eq!(lsq_initial_scale(&bad, 7), Err(not_finite));
    assert_eq!(out, [7.0; 3]);
    // A gradient that is not finite passes through: scaling of losses looks for it.
    assert_eq!(dx(&x, &[1.0, f32::INFINITY, 2.0], grid), [1.0, f32::INFINITY, 2.0]);
}
