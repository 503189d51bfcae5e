//! The kernels of this crate against the reference of `lowbit`.

use lowbit::testing::{Failure, Int8Problem, proptest::prelude::*, strategies};
use lowbit::{Mat, MatMut, MatRef};

/// Views of matrices to the slices that the kernels take.
fn adapt(
    kernel: fn(&[u8], &[i8], &mut [i32], usize),
) -> impl Fn(MatRef<'_, u8>, MatRef<'_, i8>, MatMut<'_, i32>) -> Result<(), String> {
    move |a, b, c| {
        kernel(a.data(), b.data(), c.into_data(), a.cols());
        Ok(())
    }
}

#[test]
fn the_right_kernel_passes_everything_that_kernels_have_failed_on() {
    for problem in Int8Problem::adversarial() {
        problem.check(adapt(host_kernel::gemm)).unwrap();
    }
}

proptest! {
    #[test]
    fn the_right_kernel_is_exact(problem in strategies::int8_problems(0..=8, 0..=20, 0..=300)) {
        problem.check(adapt(host_kernel::gemm))?;
    }
}

/// What the fast kernel looks like to someone who does not know what is wrong with it.
#[test]
fn the_harness_finds_the_saturation_and_names_two_products() {
    let failure = Int8Problem::adversarial()
        .find_map(|problem| problem.check(adapt(host_kernel::gemm_fast)).err())
        .expect("255 times 127 is among the problems");
    let Failure::Wrong(mismatch) = &failure else { panic!("{failure}") };
    let cause = mismatch.cause.as_ref().expect("integer problems are narrowed down");
    assert_eq!(cause.k.len(), 2, "{failure}");
    assert_eq!(cause.got, if cause.expected > 0 { 32767 } else { -32768 }, "{failure}");
}

#[test]
fn a_long_product_fails_with_the_two_bytes_that_saturate() {
    let a = Mat::from_fn(2, 100, |r, c| if r == 1 && c >= 70 { 255 } else { 1 });
    let b = Mat::from_fn(3, 100, |r, _| if r == 2 { 127 } else { 1 });
    let problem = Int8Problem::new(a, b).unwrap();
    problem.check(adapt(host_kernel::gemm)).unwrap();
    assert_eq!(
        problem.check(adapt(host_kernel::gemm_fast)).unwrap_err().to_string(),
        "row 1, column 2 of 2 x 3, k = 100: expected 980440, got 500395; \
         with k 98..100 alone: 255·127 + 255·127 = 64770, got 32767",
    );
}

/// Random bytes saturate too, and proptest shrinks them to one row, one column and two products.
#[test]
fn proptest_shrinks_the_saturation_to_two_products() {
    use lowbit::testing::proptest::test_runner::{TestError, TestRunner};

    let problems = strategies::int8_problems(0..=8, 0..=20, 0..=300);
    let result = TestRunner::deterministic()
        .run(&problems, |problem| Ok(problem.check(adapt(host_kernel::gemm_fast))?));
    let Err(TestError::Fail(reason, problem)) = result else { panic!("{result:?}") };
    assert_eq!(problem.shape(), (1, 1, 2), "{reason}");
}
