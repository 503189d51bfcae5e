/// Runs `f` compiled for the newest instructions of this CPU that pulp knows, if there is std to
/// ask for them. What `f` calls must be `#[inline(always)]` to be compiled so too.
///
/// Plain Rust rounds every operation the same way on every instruction set, so results do not
/// depend on it.
#[inline(always)]
pub(crate) fn dispatch<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(feature = "std")]
    return pulp::Arch::new().dispatch(f);
    #[cfg(not(feature = "std"))]
    f()
}
