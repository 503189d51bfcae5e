//! Loops compiled for the instructions that this CPU turns out to have.

/// Runs `f` with the newest instructions that pulp knows, if there is std to ask for them.
///
/// `f` is a struct of its operands, not a closure: `call_once` of a closure stays a call of a
/// function compiled for the oldest CPU. For the same reason `with_simd`, and all that it calls,
/// must be `#[inline(always)]`. Loops round every operation the same way on every instruction set,
/// so results do not depend on it.
pub(crate) fn dispatch<F: pulp::WithSimd>(f: F) -> F::Output {
    #[cfg(feature = "std")]
    return pulp::Arch::new().dispatch(f);
    #[cfg(not(feature = "std"))]
    pulp::Simd::vectorize(pulp::Scalar::new(), f)
}
