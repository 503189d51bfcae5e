//! Plain old data: what lets a slice of bytes be read as a slice of numbers without copying.

macro_rules! pod {
    ($($name:ident)*) => {$(
        #[allow(unsafe_code, reason = "bytemuck's markers are unsafe to implement")]
        // SAFETY: a transparent wrapper of a u8, of which every bit pattern is a value: bits above the code are ignored.
        unsafe impl bytemuck::Zeroable for $name {}
        #[allow(unsafe_code, reason = "bytemuck's markers are unsafe to implement")]
        // SAFETY: as above, and it has no padding.
        unsafe impl bytemuck::Pod for $name {}
    )*};
}
pub(crate) use pod;
