//! The testing kit itself: right kernels pass, whatever their order of operations, and wrong ones are
//! found.

use std::ops::RangeInclusive;

use lowbit_core::testing::{
    Failure, Family, Int8Problem, LinearProblem, Promise, bounds, proptest::prelude::*, strategies,
};
use lowbit_core::{
    ActivationScheme, Adapter, Context, Error, Granularity, Linear, Mat, MatMut, MatRef,
    OutlierColumns, Outliers, QActivations, QLinear, QMatrix, QuantScheme, Result, SparseRows,
    Transform, f16,
};

/// Calls `f(x row, output row)` for each.
fn each_row<T: Copy>(
    x: MatRef<'_, T>,
    mut y: MatMut<'_, f32>,
    mut f: impl FnMut(&[T], &mut [f32]),
) -> Result<()> {
    for (x, y) in x.iter_rows().zip(y.iter_rows_mut()) {
        f(x, y);
    }
    Ok(())
}

fn bias(layer: &QLinear, i: usize) -> f32 {
    layer.bias().map_or(0.0, |b| b[i])
}

/// The input as the layer quantizes it.
fn input(layer: &QLinear, x: MatRef<'_, f32>) -> Result<Mat<f32>> {
    Ok(match layer.activation() {
        Some(scheme) => QActivations::quantize(x, scheme)?.dequantize(),
        None => Mat::from_fn(x.rows(), x.cols(), |r, c| x.row(r).unwrap()[c]),
    })
}

/// Dequantizes, then sums from right to left, in four lanes.
fn lanes(layer: &QLinear, x: MatRef<'_, f32>, y: MatMut<'_, f32>) -> Result<()> {
    let w = layer.weight().dequantize();
    each_row(input(layer, x)?.as_ref(), y, |x, y| {
        for (i, (w, y)) in w.as_ref().iter_rows().zip(y).enumerate() {
            let mut sums = [bias(layer, i), 0.0, 0.0, 0.0];
            for (j, (w, x)) in w.iter().zip(x).enumerate().rev() {
                sums[j % 4] += w * x;
            }
            *y = sums.iter().sum();
        }
    })
}

/// Multiplies codes, and subtracts zeros times sums of x for each group, as kernels for GGUF do.
fn expanded(layer: &QLinear, x: MatRef<'_, f32>, y: MatMut<'_, f32>) -> Result<()> {
    let weight = layer.weight();
    let (block_rows, block_cols) = weight.block();
    let mut codes = vec![0; weight.cols()];
    each_row(input(layer, x)?.as_ref(), y, |x, y| {
        for (i, y) in y.iter_mut().enumerate() {
            weight.unpack_row(i, &mut codes).unwrap();
            *y = bias(layer, i);
            for (g, (codes, x)) in codes.chunks(block_cols).zip(x.chunks(block_cols)).enumerate() {
                let p = weight.params(i / block_rows, g);
                let dot: f32 = codes.iter().zip(x).map(|(&c, x)| f32::from(c) * x).sum();
                let sum: f32 = x.iter().sum();
                *y += p.scale * dot - (p.scale * p.zero) * sum + p.offset * sum;
            }
        }
    })
}

/// Int8 for each token, by the reciprocal of the scale and rounded half away.
fn int8(layer: &QLinear, x: MatRef<'_, f32>, y: MatMut<'_, f32>) -> Result<()> {
    let x = Mat::from_fn(x.rows(), x.cols(), |r, c| {
        let row = x.row(r).unwrap();
        let max = row.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
        let reciprocal = 127.0 / max;
        let scale = max / 127.0;
        if !reciprocal.is_finite() { row[c] } else { (row[c] * reciprocal).round() * scale }
    });
    lanes(&layer.clone().with_activation(None), x.as_ref(), y)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    #[test]
    fn kernels_with_other_orders_of_operations_pass(
        problem in strategies::linear_problems(0..=4, 0..=9, 0..=150),
    ) {
        problem.check(Promise::Bits, |layer, x, y| layer.forward(x, y, &mut Context::new()))?;
        problem.check(Promise::Rounding, lanes)?;
        problem.check(Promise::Rounding, expanded)?;
        problem.check(Promise::Int8Activations, int8)?;
    }

    #[test]
    fn an_f32_product_in_another_order_is_within_its_bound(
        x in strategies::matrices(3..=3, 0..=100), seed in any::<u64>(),
    ) {
        let w = Family::Normal.matrix(2, x.cols(), seed);
        let bound = bounds::product(x.as_ref(), w.as_ref())?;
        for (r, x) in x.as_ref().iter_rows().enumerate() {
            for (i, w) in w.as_ref().iter_rows().enumerate() {
                let exact: f64 = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                let forward: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                let backward = x.iter().zip(w).rev().fold(0.0_f32, |sum, (x, w)| x.mul_add(*w, sum));
                for y in [forward, backward] {
                    let error = (f64::from(y) - exact).abs();
                    // f64 rounds the exact sum too.
                    prop_assert!(error <= bound.data()[r * 2 + i] * (1.0 + 1e-6), "{y} for {exact}");
                }
            }
        }
    }
}

/// The layer of a problem with transforms, outliers and an adapter, as the bits of `parts` choose.
fn with_terms(problem: &LinearProblem, parts: u8) -> LinearProblem {
    let layer = problem.layer().clone();
    let (n, k) = (layer.out_features(), layer.in_features());
    let wave =
        |rows, cols, by: f32| Mat::from_fn(rows, cols, |r, c| ((r * 31 + c * 7) as f32 + by).sin());
    let transforms = [
        Transform::Scale((0..k).map(|j| 0.3 + (j % 7) as f32).collect()),
        Transform::Permute((0..k as u32).rev().collect()),
        Transform::hadamard(k, 3),
    ];
    let chosen = transforms.into_iter().enumerate().filter(|(i, _)| parts >> i & 1 == 1);
    let layer = layer.with_transforms(chosen.map(|(_, t)| t).collect()).unwrap();
    let outliers = match parts >> 3 & 3 {
        1 => {
            let of_row = k.div_ceil(3) as u32;
            let starts = (0..=n as u32).map(|r| r * of_row).collect();
            let columns: Vec<u32> = (0..n).flat_map(|_| (0..k as u32).step_by(3)).collect();
            let values = columns.iter().map(|&c| f16::from_f32((c as f32).cos())).collect();
            Some(Outliers::Sparse(SparseRows::new(n, k, starts, columns, values).unwrap()))
        }
        2 => {
            let columns: Vec<_> = (0..k).step_by(5).collect();
            let weight = Mat::from_fn(columns.len(), n, |r, c| f16::from_f32((r + c) as f32));
            Some(Outliers::Columns(OutlierColumns::new(columns, weight).unwrap()))
        }
        3 => Some(Outliers::Threshold(0.05)),
        _ => None,
    };
    let adapter =
        (parts >> 5 & 1 == 1).then(|| Adapter::new(wave(3, k, 0.5), wave(n, 3, 1.5)).unwrap());
    let layer = layer.with_outliers(outliers).unwrap().with_adapter(adapter).unwrap();
    let x = Mat::from_fn(problem.x().rows(), k, |r, c| problem.x().row(r).unwrap()[c]);
    LinearProblem::new(layer, x).unwrap()
}

/// A Hadamard block by its definition: every element one sum of all, from right to left.
fn dense_hadamard(x: &mut [f32], negate: &[bool]) {
    let mut start = 0;
    while start < x.len() {
        let b = 1 << (x.len() - start).ilog2();
        let signed: Vec<f32> = (start..start + b)
            .map(|j| if negate[j] { -x[j] } else { x[j] } / (b as f32).sqrt())
            .collect();
        for i in 0..b {
            let sign = |j: usize| if (i & j).count_ones() % 2 == 1 { -1.0 } else { 1.0 };
            x[start + i] = (0..b).rev().map(|j| sign(j) * signed[j]).sum();
        }
        start += b;
    }
}

/// Every term of the equation, in another order than the reference's. `skip` leaves a part out.
fn terms(layer: &QLinear, x: MatRef<'_, f32>, y: MatMut<'_, f32>, skip: u8) -> Result<()> {
    let mut t = Mat::from_fn(x.rows(), x.cols(), |r, c| x.row(r).unwrap()[c]);
    for row in t.as_mut().iter_rows_mut() {
        let mut spare = vec![0.0; row.len()];
        for transform in layer.transforms().iter().filter(|_| skip != 1) {
            match transform {
                Transform::Hadamard { negate } => dense_hadamard(row, negate),
                other => other.apply(row, &mut spare)?,
            }
        }
    }
    let k = x.cols();
    let outliers = layer.outliers().filter(|_| skip != 2);
    let is_outlier =
        |at: usize| outliers.is_some_and(|outliers| outliers.contains(at % k, t.data()[at]));
    let rest =
        Mat::from_fn(
            x.rows(),
            k,
            |r, c| {
                if is_outlier(r * k + c) { 0.0 } else { t.data()[r * k + c] }
            },
        );
    let rest = input(layer, rest.as_ref())?;
    let w = layer.weight().dequantize();
    let row = std::cell::Cell::new(0);
    each_row(x, y, |x, y| {
        let r = row.replace(row.get() + 1);
        for (i, y) in y.iter_mut().enumerate() {
            let mut sum = 0.0;
            if let Some(adapter) = layer.adapter().filter(|_| skip != 3) {
                let b = adapter.b().as_ref().row(i).unwrap();
                for (a, b) in adapter.a().as_ref().iter_rows().zip(b) {
                    sum += a.iter().zip(x).map(|(a, x)| a * b * x).sum::<f32>();
                }
            }
            for j in (0..k).rev() {
                let dense = w.data()[i * k + j];
                let own = match outliers {
                    Some(Outliers::Columns(known)) if is_outlier(r * k + j) => {
                        let at = known.columns().binary_search(&j).unwrap();
                        known.weight().data()[at * layer.out_features() + i].to_f32()
                    }
                    _ => dense,
                };
                sum += dense * rest.data()[r * k + j];
                sum += if is_outlier(r * k + j) { own * t.data()[r * k + j] } else { 0.0 };
            }
            if let Some(Outliers::Sparse(sparse)) = outliers {
                sum += sparse.row(i).map(|(j, v)| v * t.data()[r * k + j]).sum::<f32>();
            }
            *y = sum + bias(layer, i);
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    #[test]
    fn kernels_with_other_orders_of_all_terms_pass(
        problem in strategies::linear_problems(0..=3, 0..=6, 0..=90), parts in 0..64_u8,
    ) {
        let problem = with_terms(&problem, parts);
        problem.check(Promise::Bits, |layer, x, y| layer.forward(x, y, &mut Context::new()))?;
        problem.check(Promise::Rounding, |layer, x, y| terms(layer, x, y, 0))?;
    }
}

#[test]
fn kernels_that_leave_a_term_out_are_found() {
    for (skip, parts) in [(1, 1), (1, 2), (1, 4), (2, 8), (2, 16), (3, 32), (3, 39), (2, 12)] {
        let failures = LinearProblem::adversarial()
            .filter(|problem| problem.layer().activation().is_none())
            .map(|problem| with_terms(&problem, parts))
            .filter(|problem| {
                problem.check(Promise::Rounding, |layer, x, y| terms(layer, x, y, skip)).is_err()
            });
        assert!(failures.count() > 50, "without term {skip} of {parts}");
    }
}

/// Offsets of 0 times a sum of x that overflows: no kernel has to give the reference's number.
#[test]
fn nothing_is_checked_where_a_sum_of_inputs_overflows() {
    let scheme = QuantScheme {
        zero: lowbit_core::ZeroFormat::Offset(lowbit_core::ScaleFormat::F32),
        ..QuantScheme::affine(4, Granularity::PerChannel)
    };
    let q = QMatrix::quantize(Mat::zeros(1, 3).as_ref(), scheme).unwrap();
    let x = Mat::from_fn(1, 3, |_, _| f32::MAX);
    let problem = LinearProblem::new(QLinear::new(q), x).unwrap();
    problem.check(Promise::Rounding, expanded).unwrap();
}

/// A defect in a kernel for quantized weights, by what it does to the layer or to the result.
#[test]
fn wrong_kernels_are_found() {
    type Kernel = fn(&QLinear, MatRef<'_, f32>, MatMut<'_, f32>) -> Result<()>;
    let kernels: [(&str, Kernel); 5] = [
        ("takes the scale of the group before", |layer, x, y| {
            let mut scales = layer.weight().scales().to_vec();
            let one = scales.len().min(2);
            scales.rotate_right(one);
            let (w, zeros) = (layer.weight(), layer.weight().zeros().map(<[u8]>::to_vec));
            let (n, k) = (w.rows(), w.cols());
            let weight = QMatrix::from_parts(n, k, w.scheme(), w.codes().to_vec(), scales, zeros)?;
            lanes(&QLinear::new(weight).with_bias(layer.bias().map(<[f32]>::to_vec))?, x, y)
        }),
        ("forgets the last feature", |layer, x, mut y| {
            lanes(layer, x, y.reborrow())?;
            let w = layer.weight().dequantize();
            for (x, y) in x.iter_rows().zip(y.iter_rows_mut()) {
                for (w, y) in w.as_ref().iter_rows().zip(y) {
                    *y -= w.last().unwrap_or(&0.0) * x.last().unwrap_or(&0.0);
                }
            }
            Ok(())
        }),
        ("forgets the bias", |layer, x, y| lanes(&layer.clone().with_bias(None)?, x, y)),
        ("accumulates in f16", |layer, x, y| {
            let w = layer.weight().dequantize();
            each_row(x, y, |x, y| {
                for (i, (w, y)) in w.as_ref().iter_rows().zip(y).enumerate() {
                    *y = w.iter().zip(x).fold(bias(layer, i), |sum, (w, x)| {
                        lowbit_dtypes::f16::from_f32(sum + w * x).to_f32()
                    });
                }
            })
        }),
        ("writes all rows but the last", |layer, x, mut y| {
            lanes(layer, x, y.reborrow())?;
            if let Some(last) = y.rows().checked_sub(1) {
                y.row_mut(last).unwrap().fill(f32::NAN);
            }
            Ok(())
        }),
    ];
    for (what, kernel) in kernels {
        let failures = LinearProblem::adversarial()
            .filter(|problem| problem.layer().activation().is_none())
            .filter_map(|problem| problem.check(Promise::Rounding, kernel).err());
        let failures: Vec<Failure> = failures.collect();
        assert!(failures.len() > 20, "a kernel that {what} fails {} times", failures.len());
    }
}

#[test]
fn wrong_integer_kernels_are_found_and_narrowed_down() {
    let dot = |a: &[i8], b: &[i8]| -> i32 {
        a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum()
    };
    type Row<'a> = &'a dyn Fn(&[i8], &[i8]) -> i32;
    let kernels: [(&str, RangeInclusive<usize>, Row<'_>); 4] = [
        ("takes |−128| as −128", 1..=1, &|a, b| {
            a.iter()
                .zip(b)
                .map(|(&a, &b)| match (a, b) {
                    (..0, -128) => i32::from(a) * 128,
                    _ => i32::from(a) * i32::from(b),
                })
                .sum()
        }),
        ("leaves out what does not fill a step of 16", 1..=1, &|a, b| {
            let k = a.len() / 16 * 16;
            dot(&a[..k], &b[..k])
        }),
        ("adds pairs in 16 bits", 2..=2, &|a, b| {
            a.chunks(2).zip(b.chunks(2)).map(|(a, b)| i32::from(dot(a, b) as i16)).sum()
        }),
        // 2^24 / 127² = 1040
        ("sums in f32", 1000..=1100, &|a, b| {
            a.iter().zip(b).map(|(&a, &b)| f32::from(a) * f32::from(b)).sum::<f32>() as i32
        }),
    ];
    for (what, products, row) in kernels {
        let failure = Int8Problem::<i8>::adversarial().find_map(|problem| {
            let kernel = |a: MatRef<'_, i8>, b: MatRef<'_, i8>, mut c: MatMut<'_, i32>| {
                for (a, c) in a.iter_rows().zip(c.iter_rows_mut()) {
                    b.iter_rows().zip(c).for_each(|(b, c)| *c = row(a, b));
                }
                Ok::<(), Error>(())
            };
            problem.check(kernel).err()
        });
        let Some(Failure::Wrong(mismatch)) = failure else { panic!("a kernel that {what} passes") };
        let cause = mismatch.cause.unwrap();
        assert!(products.contains(&cause.k.len()), "{what}: {cause}");
        assert_eq!(cause.k.len(), cause.products.len());
    }
}

#[test]
fn a_failure_is_one_line_and_carries_its_numbers() {
    let w = Mat::from_fn(2, 3, |_, _| 1.0);
    let q = QMatrix::quantize(w.as_ref(), QuantScheme::affine(8, Granularity::PerTensor)).unwrap();
    let problem = LinearProblem::new(QLinear::new(q), Mat::from_fn(1, 3, |_, _| 1.0)).unwrap();
    let failure = problem
        .check(Promise::Rounding, |layer, x, mut y| {
            layer.forward(x, y.reborrow(), &mut Context::new())?;
            y.row_mut(0).unwrap()[1] += 0.5;
            Ok::<(), Error>(())
        })
        .unwrap_err();
    let text = failure.to_string();
    assert_eq!(format!("{failure:?}"), text);
    assert!(text.starts_with("row 0, column 1 of 1 x 2, k = 3: expected "), "{text}");
    assert!(text.contains("away where at most ") && !text.contains('\n'), "{text}");
    let Failure::Wrong(mismatch) = failure else { panic!("{text}") };
    assert_eq!((mismatch.row, mismatch.col, mismatch.wrong), (0, 1, 1));
    assert!(mismatch.bound > 0.0 && mismatch.bound < 1e-4);

    let refused = problem.check(Promise::Bits, |_, _, _| Err("no such CPU")).unwrap_err();
    assert_eq!(refused.to_string(), "the kernel refused 1 x 2, k = 3: no such CPU");
    let unwritten = problem.check(Promise::Rounding, |_, _, _| Ok::<(), Error>(()));
    assert!(unwritten.unwrap_err().to_string().contains("got NaN"));
}

#[test]
fn parts_that_do_not_fit_are_errors() {
    let (a, b) = (Mat::from_fn(2, 3, |_, _| 1_u8), Mat::from_fn(4, 5, |_, _| 1_i8));
    assert_eq!(
        Int8Problem::new(a, b),
        Err(Error::Shape { what: "right factor", expected: (4, 3), got: (4, 5) })
    );
    let long = || Mat::<i8>::zeros(1, 65_794);
    assert!(matches!(Int8Problem::new(long(), long()), Err(Error::Unsupported { .. })));

    let q = QMatrix::quantize(
        Mat::zeros(2, 3).as_ref(),
        QuantScheme::affine(8, Granularity::PerTensor),
    );
    let layer = QLinear::new(q.unwrap());
    let error = Error::Shape { what: "input", expected: (1, 3), got: (1, 4) };
    let x = Mat::zeros(1, 4);
    assert_eq!(bounds::linear(&layer, x.as_ref()), Err(error.clone()));
    assert_eq!(bounds::int8_activations(&layer, x.as_ref()), Err(error.clone()));
    assert_eq!(LinearProblem::new(layer.clone(), x), Err(error));
    assert!(bounds::product(Mat::zeros(1, 2).as_ref(), Mat::zeros(1, 3).as_ref()).is_err());

    let x = Mat::from_fn(1, 3, |_, c| if c == 1 { f32::NAN } else { 0.0 });
    let int8 = layer.with_activation(Some(ActivationScheme::INT8_PER_TOKEN));
    let problem = LinearProblem::new(int8, x).unwrap();
    let failure = problem.check(Promise::Bits, lanes).unwrap_err();
    assert!(failure.to_string().contains("activation is not finite at row 0, column 1"));
}

#[test]
fn strategies_take_any_limits() {
    #[expect(clippy::reversed_empty_ranges, reason = "what a caller might compute")]
    let empty = 5..=3;
    proptest!(|(
        size in strategies::sizes(empty.clone()),
        w in strategies::matrices_of(&[], empty.clone(), 0..=0),
        granularity in strategies::granularities(0),
        problem in strategies::int8_problems::<i8>(0..=0, 0..=1, 65_793..=usize::MAX),
    )| {
        prop_assert_eq!((size, w.rows(), w.cols()), (5, 5, 0));
        prop_assert!(granularity.grid(3, 3).0 > 0);
        prop_assert_eq!(problem.shape().2, 65_793);
    });
}
