//! Layers of a mixture of experts: each token goes to a few of many.

use lowbit_core::{ActivationScales, Context, Error, Linear, MatMut, MatRef, Result};

use crate::packed::PackedLinear;

/// Rows that are gathered at a time: they stay in cache, and the weights are read often enough.
const BATCH: usize = 256;

/// A token that an expert should see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Its row in the input.
    pub token: u32,
    /// The place of the expert.
    pub expert: u32,
}

/// Computes what experts make of the tokens routed to them: row `i` of `y`, `(routes, out_features)`, gets
/// what [`forward`](Linear::forward) of expert `routes[i].expert` gives for row `routes[i].token` of `x`,
/// `(tokens, in_features)`, bit for bit. Routes may be in any order, a token in none or many of them, an
/// expert too; adding the rows of a token, weighed by its gate, is left to the caller.
///
/// The rows of each expert are gathered and multiplied in batches. Nothing is allocated once `ctx` is
/// warm.
///
/// # Errors
/// [`Error::Shape`] if `y` does not have a row for each route, or an expert is of another shape than the
/// operands; [`Error::OutOfRange`] at the first route to a token or expert that there is not;
/// [`Error::NotFinite`] at the first NaN or infinity in the input of an expert that quantizes it;
/// [`Error::Unsupported`] for experts whose activations share a scale in a batch. Nothing has been written
/// then, unless finite inputs become infinite in a transform of an expert.
///
/// # Example
/// ```
/// use lowbit_core::{Context, Granularity, Linear, Mat, QLinear, QMatrix, QuantScheme};
/// use lowbit_kernels::{PackedLinear, Route, forward_experts};
///
/// let expert = |e: usize| {
///     let w = Mat::from_fn(16, 64, |r, c| ((r * 64 + c + e) as f32).sin());
///     let q = QMatrix::quantize(w.as_ref(), QuantScheme::symmetric(4, Granularity::PerGroup(32)))?;
///     PackedLinear::new(&QLinear::new(q))
/// };
/// let experts = [expert(0)?, expert(1)?, expert(2)?];
/// let x = Mat::from_fn(2, 64, |r, c| ((r + c) as f32).cos());
/// let ctx = &mut Context::new();
///
/// // The first token goes to experts 2 and 0, the second to expert 2.
/// let routes = [(0, 2), (0, 0), (1, 2)].map(|(token, expert)| Route { token, expert });
/// let mut y = Mat::zeros(3, 16);
/// forward_experts(&experts, &routes, x.as_ref(), y.as_mut(), ctx)?;
///
/// let mut second = Mat::zeros(1, 16);
/// experts[2].forward(x.as_ref().sub_rows(1..2).unwrap(), second.as_mut(), ctx)?;
/// assert_eq!(y.as_ref().row(2), second.as_ref().row(0));
/// # Ok::<(), lowbit_core::Error>(())
/// ```
pub fn forward_experts(
    experts: &[PackedLinear],
    routes: &[Route],
    x: MatRef<'_, f32>,
    mut y: MatMut<'_, f32>,
    ctx: &mut Context,
) -> Result<()> {
    check(experts, routes, x, &y)?;
    let (n, k) = (y.shape().1, x.cols());
    let most = routes.len().min(BATCH);
    // [routes, expert by expert u32; routes][where those of each expert end u32; experts]
    // [x of a batch; most, k][y of a batch; most, n]
    let mut memory = ctx.take_rows(routes.len() + experts.len() + most * (k + n));
    let (order, rest) = memory.split_at_mut(routes.len());
    let (ends, rest) = rest.split_at_mut(experts.len());
    let (x_rows, y_rows) = rest.split_at_mut(most * k);
    let (order, ends) = (bytemuck::cast_slice_mut(order), bytemuck::cast_slice_mut(ends));
    sort(routes, order, ends);

    let mut start = 0;
    let result = experts.iter().zip(&*ends).try_for_each(|(expert, &end)| {
        let all = &order[start..end as usize];
        start = end as usize;
        let token = |place: u32| routes[place as usize].token as usize;
        for batch in all.chunks(BATCH) {
            for (&place, to) in batch.iter().zip(x_rows.chunks_mut(k.max(1))) {
                to.copy_from_slice(x.row(token(place)).unwrap_or(&[]));
            }
            let m = batch.len();
            let x = MatRef::new(&x_rows[..m * k], m, k)?;
            let y_rows = &mut y_rows[..m * n];
            expert.forward(x, MatMut::new(y_rows, m, n)?, ctx).map_err(|error| match error {
                Error::NotFinite { row, .. } => error.at_row(token(batch[row])),
                error => error,
            })?;
            for (&place, from) in batch.iter().zip(y_rows.chunks(n.max(1))) {
                if let Some(y) = y.row_mut(place as usize) {
                    y.copy_from_slice(from);
                }
            }
        }
        Ok(())
    });
    ctx.give_back_rows(memory);
    result
}

/// Refuses what cannot be computed.
fn check(
    experts: &[PackedLinear],
    routes: &[Route],
    x: MatRef<'_, f32>,
    y: &MatMut<'_, f32>,
) -> Result<()> {
    let same = |what, expected, got| match expected == got {
        true => Ok(()),
        false => Err(Error::Shape { what, expected, got }),
    };
    same("output", (routes.len(), y.shape().1), y.shape())?;
    for expert in experts {
        same("input", (x.rows(), expert.in_features()), x.shape())?;
        same("output", (routes.len(), expert.out_features()), y.shape())?;
        let scales = expert.activation().map(|activation| activation.scales);
        if scales == Some(ActivationScales::PerTensor) {
            let what = "a scale that a batch of activations shares".to_string();
            return Err(Error::Unsupported { by: "forward_experts", what });
        }
    }
    for route in routes {
        for (what, got, len) in [
            ("token of a route", route.token, x.rows()),
            ("expert of a route", route.expert, experts.len()),
        ] {
            if got as usize >= len {
                let (max, got) = (len as i64 - 1, i64::from(got));
                return Err(Error::OutOfRange { what, min: 0, max, got });
            }
        }
        let row = route.token as usize;
        let x = x.row(row).unwrap_or(&[]);
        if experts[route.expert as usize].activation().is_some()
            && let Some(col) = x.iter().position(|x| !x.is_finite())
        {
            return Err(Error::NotFinite { what: "activation", row, col });
        }
    }
    Ok(())
}

/// Writes the places of `routes` to `order`, expert by expert, and where those of each expert end to
/// `ends`.
fn sort(routes: &[Route], order: &mut [u32], ends: &mut [u32]) {
    ends.fill(0);
    for route in routes {
        ends[route.expert as usize] += 1;
    }
    // Where those of each expert start.
    let mut start = 0;
    for end in &mut *ends {
        start += std::mem::replace(end, start);
    }
    for (place, route) in routes.iter().enumerate() {
        let next = &mut ends[route.expert as usize];
        order[*next as usize] = place as u32;
        *next += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        kernels,
        shared::tests::{KINDS, layer},
    };
    use lowbit_core::{ActivationScheme, ActivationType, Mat};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// Batches of more than [`BATCH`] rows too, and experts that quantize in different ways.
        #[test]
        fn every_route_gets_what_its_expert_makes_of_its_token(
            (n, k, tokens) in (0..40_usize, 0..70_usize, 1..9_usize),
            kinds in prop::collection::vec(0..KINDS, 1..5),
            routes in prop_oneof![
                prop::collection::vec(any::<(u32, u32)>(), 0..30),
                prop::collection::vec(any::<(u32, u32)>(), 300..301),
            ],
        ) {
            let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap());
            let x = Mat::from_fn(tokens, k, |r, c| ((r * k + c) as f32).cos());
            let route = |(token, expert)| Route {
                token: token % tokens as u32,
                expert: expert % kinds.len() as u32,
            };
            let routes: Vec<_> = routes.into_iter().map(route).collect();
            for kernel in kernels() {
                let experts: Vec<_> = (kinds.iter().enumerate())
                    .map(|(i, &kind)| {
                        PackedLinear::with_kernel(&layer(n, k, kind, i), kernel).unwrap()
                    })
                    .collect();
                for mut ctx in [Context::new(), Context::with_pool(pool.clone())] {
                    let mut y = Mat::from_fn(routes.len(), n, |_, _| 7.0);
                    forward_experts(&experts, &routes, x.as_ref(), y.as_mut(), &mut ctx).unwrap();
                    for (route, y) in routes.iter().zip(y.as_ref().iter_rows()) {
                        let row = route.token as usize;
                        let x = x.as_ref().sub_rows(row..row + 1).unwrap();
                        let mut alone = Mat::zeros(1, n);
                        let expert = &experts[route.expert as usize];
                        expert.forward(x, alone.as_mut(), &mut ctx).unwrap();
                        let bits = |y: &[f32]| -> Vec<_> { y.iter().map(|y| y.to_bits()).collect() };
                        prop_assert_eq!(bits(y), bits(alone.data()), "{}, {:?}", kernel, route);
                    }
                }
            }
        }
    }

    #[test]
    fn bad_routes_and_operands_are_refused_before_anything_is_written() {
        let pack = |layer| PackedLinear::new(&layer).unwrap();
        let (f32, int8) = (layer(8, 64, 0, 1), layer(8, 64, 3, 2));
        let tensor =
            ActivationScheme { dtype: ActivationType::Int8, scales: ActivationScales::PerTensor };
        let experts = [pack(f32.clone()), pack(int8.clone())];
        let good = Mat::from_fn(2, 64, |r, c| (r + c) as f32);
        let mut bad = good.clone();
        bad.data_mut()[64 + 5] = f32::NAN;
        let route = |token, expert| Route { token, expert };
        let first = route(0, 0);
        let check = |experts: &[PackedLinear], routes: &[Route], x: &Mat<f32>, rows, word: &str| {
            let mut y = Mat::from_fn(rows, 8, |_, _| 7.0);
            let ctx = &mut Context::new();
            let error = forward_experts(experts, routes, x.as_ref(), y.as_mut(), ctx).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
            assert!(y.data().iter().all(|&y| y == 7.0), "{error}");
        };
        check(
            &experts,
            &[first, route(2, 0)],
            &good,
            2,
            "token of a route: expected 0 to 1, got 2",
        );
        check(
            &experts,
            &[first, route(0, 2)],
            &good,
            2,
            "expert of a route: expected 0 to 1, got 2",
        );
        check(&[], &[first], &good, 1, "expert of a route");
        check(&experts, &[first], &good, 2, "output");
        check(&experts, &[first, route(1, 1)], &bad, 2, "row 1, column 5");
        let narrow = Mat::from_fn(2, 63, |_, _| 1.0);
        check(&experts, &[first], &narrow, 1, "input");
        let wide = [pack(f32), pack(layer(9, 64, 0, 1))];
        check(&wide, &[first], &good, 1, "output");
        let shared = [experts[0].clone(), pack(int8.with_activation(Some(tensor)))];
        check(&shared, &[first], &good, 1, "shares");

        // A NaN that no expert quantizes is a result like any other.
        let mut y = Mat::zeros(1, 8);
        let ctx = &mut Context::new();
        forward_experts(&experts, &[route(1, 0)], bad.as_ref(), y.as_mut(), ctx).unwrap();
        assert!(y.data().iter().all(|y| y.is_nan()));
    }
}
