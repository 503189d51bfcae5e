//! Hadamard matrices that files have, as transforms of a layer's input.

use lowbit_core::Transform;
use serde_json::json;

use super::{config::Rotation, parts::Layer};
use crate::{Dtype, Error, Result, TensorView};

/// The product of a row of `k` features with the matrix of `rotation`, which `layer` may have.
///
/// compressed-tensors stores the matrix of signs and divides by √k as it multiplies; older files have it
/// divided. Layers may share one matrix, which is then stored with one of them.
pub(super) fn transforms(
    layer: Layer<'_>,
    rotation: &Rotation,
    k: usize,
) -> Result<Vec<Transform>> {
    let Rotation { name, inverse, block, random, permuted, .. } = rotation;
    let error = |reason: String| {
        let reason = format!("the transform {name} of the input of {}: {reason}", layer.name);
        Error::Config { reason }
    };
    if block.is_some_and(|block| block != k) {
        return Err(error(format!("blocks of {} in rows of {k} are not held", json!(block))));
    }
    let part = format!("{name}_input.weight");
    let Some(matrix) = layer.find(&part).or_else(|| elsewhere(layer, &part, k)) else {
        return match *random || !k.is_power_of_two() {
            false => Ok(vec![Transform::Hadamard { negate: vec![false; k] }]),
            true => Err(error(format!("expected its matrix as the tensor {}.{part}", layer.name))),
        };
    };
    if !k.is_power_of_two() {
        return Err(error(format!(
            "rows of {k}, expected a power of two: such products are not held"
        )));
    }
    let signs = signs(&matrix, k)?;
    let perm = format!("{name}_input.perm");
    let order = match layer.find(&perm).or_else(|| elsewhere(layer, &perm, k)) {
        None if *permuted => {
            return Err(error(format!("expected the tensor {}.{perm}", layer.name)));
        }
        None => (0..k).collect(),
        Some(perm) => permutation(&perm, k)?,
    };
    let sign = |i: usize, j: usize| {
        let (i, j) = if *inverse { (j, i) } else { (i, j) };
        signs[order[i] * k + order[j]]
    };
    factors(k, sign).ok_or_else(|| {
        let reason = "it is no Hadamard matrix of Sylvester's, but for signs and the order of rows and \
                      columns: such products are not held";
        matrix.error(reason.into())
    })
}

/// The tensor of another layer under this name, of `k` features.
fn elsewhere<'a>(layer: Layer<'a>, part: &str, k: usize) -> Option<TensorView<'a>> {
    let end = format!(".{part}");
    let names = layer.source.names();
    let views = names.iter().filter(|name| name.ends_with(&end));
    let views = views.filter_map(|name| layer.source.tensor(name).ok());
    views.into_iter().find(|view| view.shape.first() == Some(&k))
}

/// Which elements are negative, of a matrix whose elements are all ±1, or all ±1/√k.
fn signs(matrix: &TensorView<'_>, k: usize) -> Result<Vec<bool>> {
    super::parts::expect_shape(matrix, &[k, k])?;
    matrix.check_len()?;
    let elements = match matrix.dtype {
        Dtype::I8 => matrix.bytes.iter().map(|&byte| f32::from(byte.cast_signed())).collect(),
        Dtype::F32 | Dtype::F16 | Dtype::Bf16 => matrix.to_f32()?,
        Dtype::Other("F64") => {
            let doubles = matrix.bytes.as_chunks().0.iter();
            doubles.map(|&bytes| f64::from_le_bytes(bytes) as f32).collect()
        }
        got => return Err(matrix.error(format!("it is {got}, expected a matrix of floats"))),
    };
    let size = 1.0 / (k as f32).sqrt();
    // A size in bfloat16 has 8 bits.
    let is = |size: f32| elements.iter().all(|x| (x.abs() - size).abs() <= size / 128.0);
    if !is(1.0) && !is(size) {
        return Err(
            matrix.error("its elements are not all 1 or -1: it is no Hadamard matrix".into())
        );
    }
    Ok(elements.iter().map(|&x| x < 0.0).collect())
}

fn permutation(view: &TensorView<'_>, k: usize) -> Result<Vec<usize>> {
    super::parts::expect_dtype(view, Dtype::I64)?;
    let places = view.bytes.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes));
    let places: Vec<_> = places.filter_map(|place| usize::try_from(place).ok()).collect();
    let mut sorted = places.clone();
    sorted.sort_unstable();
    match sorted.into_iter().eq(0..k) {
        true => Ok(places),
        false => Err(view.error(format!("it is no order of {k} features"))),
    }
}

/// `x·M` for the matrix with elements ±1/√k, −1/√k where `negative`: as
/// `M[i][j] = r_i · c_j · (−1)^(bits of a_i & b_j) / √k` it is a permutation and signs of the input, the
/// Sylvester matrix, and a permutation and signs of the output. `None` if it has no such form.
fn factors(k: usize, negative: impl Fn(usize, usize) -> bool) -> Option<Vec<Transform>> {
    if !k.is_power_of_two() {
        return None;
    }
    // With the signs of the first row and column divided out, rows are linear in the bits of labels.
    let row_sign = |i: usize| negative(i, 0) != negative(0, 0);
    let column_sign = |j: usize| negative(0, j);
    let bit = |i: usize, j: usize| negative(i, j) != (row_sign(i) != column_sign(j));
    // A column's label is what independent rows have there: one more row tells twice as many apart.
    let mut columns = vec![0_usize; k];
    let mut width = 0;
    for i in 1..k {
        let longer = |j: usize| columns[j] | usize::from(bit(i, j)) << width;
        let mut seen = vec![0_usize; 2 << width];
        (0..k).for_each(|j| seen[longer(j)] += 1);
        if seen.iter().all(|&count| count == k >> (width + 1)) {
            columns = (0..k).map(longer).collect();
            width += 1;
            if 1 << width == k {
                break;
            }
        }
    }
    if 1 << width != k {
        return None;
    }
    let place = |label: usize| columns.iter().position(|&column| column == label);
    let ones: Vec<usize> = (0..width).map(|t| place(1 << t)).collect::<Option<_>>()?;
    let row = |i: usize| ones.iter().rev().fold(0, |label, &j| label << 1 | usize::from(bit(i, j)));
    let rows: Vec<usize> = (0..k).map(row).collect();
    let mut input = vec![u32::MAX; k];
    let mut negate = vec![false; k];
    for (i, &label) in rows.iter().enumerate() {
        input[label] = i as u32;
        negate[label] = row_sign(i);
        for (j, &column) in columns.iter().enumerate() {
            if bit(i, j) != ((label & column).count_ones() % 2 == 1) {
                return None;
            }
        }
    }
    if input.contains(&u32::MAX) {
        return None;
    }
    let output: Vec<u32> = columns.iter().map(|&label| label as u32).collect();
    let signs: Vec<f32> = (0..k).map(|j| if column_sign(j) { -1.0 } else { 1.0 }).collect();
    let moves = |places: &[u32]| places.iter().enumerate().any(|(to, &from)| to != from as usize);
    let mut all = Vec::new();
    all.extend(moves(&input).then_some(Transform::Permute(input)));
    all.push(Transform::Hadamard { negate });
    all.extend(moves(&output).then_some(Transform::Permute(output)));
    all.extend(signs.contains(&-1.0).then_some(Transform::Scale(signs)));
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The product by the definition, and by the transforms.
    fn check(k: usize, negative: impl Fn(usize, usize) -> bool) {
        let transforms = factors(k, &negative).unwrap();
        let input: Vec<f32> = (0..k).map(|i| ((i * i + 3) as f32 * 0.7).sin()).collect();
        let mut x = input.clone();
        for transform in &transforms {
            transform.check(k).unwrap();
            transform.apply(&mut x, &mut vec![0.0; k]).unwrap();
        }
        for (j, x) in x.iter().enumerate() {
            let sum: f64 = (0..k)
                .map(|i| if negative(i, j) { -f64::from(input[i]) } else { f64::from(input[i]) })
                .sum();
            assert!((sum / (k as f64).sqrt() - f64::from(*x)).abs() < 1e-5, "{k} {j}");
        }
    }

    fn odd(i: usize, j: usize) -> bool {
        (i & j).count_ones() % 2 == 1
    }

    #[test]
    fn every_signed_and_reordered_sylvester_matrix_is_recognized() {
        for k in [1, 2, 4, 32, 64] {
            check(k, odd);
            assert_eq!(factors(k, odd).unwrap().len(), 1);
            let mix = |i: usize| (i * 5 + 3) % k;
            check(k, |i, j| odd(mix(i), mix(j)) != (i % 3 == 1));
            check(k, |i, j| odd(mix(i), j) ^ (j % 3 == 0) ^ (i % 5 == 2));
        }
    }

    #[test]
    fn a_matrix_that_is_none_is_refused() {
        assert!(factors(4, |_, _| false).is_none());
        assert!(factors(3, odd).is_none());
        assert!(factors(8, |i, j| odd(i, j) != ((i, j) == (3, 5))).is_none());
        // The last two columns alike.
        assert!(factors(4, |i, j| odd(i, j.min(2))).is_none());
    }
}
