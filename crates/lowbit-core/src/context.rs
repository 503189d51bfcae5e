use alloc::vec::Vec;
#[cfg(feature = "std")]
use {alloc::sync::Arc, rayon::ThreadPool};

/// What a [`Linear`](crate::Linear) may use while it computes: the caller's threads, and scratch
/// memory that is kept from call to call.
///
/// Results do not depend on it: any thread count gives the same bits.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use lowbit_core::Context;
///
/// let sequential = Context::new();
/// assert!(sequential.pool().is_none());
///
/// let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
/// let parallel = Context::with_pool(Arc::new(pool));
/// assert_eq!(parallel.threads(), 2);
/// ```
#[derive(Debug, Default)]
pub struct Context {
    #[cfg(feature = "std")]
    pool: Option<Arc<ThreadPool>>,
    scratch: Vec<u8>,
    /// Given back, the last one first.
    rows: Vec<Vec<f32>>,
}

/// Scratch memory starts at a multiple of this: a cache line, and the widest vector.
const ALIGN: usize = 64;

impl Context {
    /// Computes on the calling thread.
    pub fn new() -> Self {
        Self::default()
    }

    /// Computes on the threads of `pool`. No other pool is ever touched, rayon's global one
    /// included.
    #[cfg(feature = "std")]
    pub fn with_pool(pool: Arc<ThreadPool>) -> Self {
        Self { pool: Some(pool), ..Self::default() }
    }

    /// The pool to compute on; `None` for the calling thread.
    #[cfg(feature = "std")]
    pub fn pool(&self) -> Option<&Arc<ThreadPool>> {
        self.pool.as_ref()
    }

    /// How many threads may compute.
    pub fn threads(&self) -> usize {
        #[cfg(feature = "std")]
        let threads = self.pool.as_ref().map_or(1, |pool| pool.current_num_threads());
        #[cfg(not(feature = "std"))]
        let threads = 1;
        threads
    }

    /// `len` bytes of scratch memory, aligned to 64, with whatever an earlier call left in them.
    /// Allocates only if no earlier call asked for as many.
    pub fn scratch(&mut self, len: usize) -> &mut [u8] {
        if self.scratch.len() < len.saturating_add(ALIGN) {
            self.scratch.resize(len.saturating_add(ALIGN), 0);
        }
        let start = (self.scratch.as_ptr() as usize).next_multiple_of(ALIGN)
            - self.scratch.as_ptr() as usize;
        &mut self.scratch[start..start + len]
    }

    /// `len` numbers beside the [`scratch`](Self::scratch), with whatever an earlier call left in them, for
    /// what must outlive a call that takes the context. Such a call may take more. Give them back by
    /// [`give_back_rows`](Self::give_back_rows), the last ones first, or the next call allocates again.
    pub fn take_rows(&mut self, len: usize) -> Vec<f32> {
        let mut rows = self.rows.pop().unwrap_or_default();
        rows.resize(len, 0.0);
        rows
    }

    /// Keeps the memory of [`take_rows`](Self::take_rows) for the next call.
    pub fn give_back_rows(&mut self, rows: Vec<f32>) {
        self.rows.push(rows);
    }
}
