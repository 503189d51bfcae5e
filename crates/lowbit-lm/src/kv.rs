use crate::Config;

/// The keys and values of the tokens that a model has seen in one text.
///
/// Memory grows with the tokens: `num_hidden_layers · 2 · num_key_value_heads · head_dim · 4`
/// bytes each.
///
/// # Example
/// ```no_run
/// # fn main() -> Result<(), lowbit_lm::Error> {
/// use lowbit::Context;
/// use lowbit_lm::{Checkpoint, KvCache, Model};
///
/// let checkpoint = Checkpoint::open("models/stories3m")?;
/// let model = Model::load(&checkpoint)?;
/// let mut cache = KvCache::new(model.config());
/// let ctx = &mut Context::new();
/// model.forward(&[1, 300, 301], &mut cache, ctx)?; // three tokens at once
/// model.forward(&[302], &mut cache, ctx)?; // and a fourth
/// assert_eq!(cache.len(), 4);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct KvCache {
    /// One for each block.
    pub(crate) blocks: Vec<KvBlock>,
    pub(crate) kv_size: usize,
    len: usize,
    capacity: usize,
}

/// Keys (already turned) and values of one block, a row of `kv_size` numbers for each token.
#[derive(Clone, Debug, Default)]
pub(crate) struct KvBlock {
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
}

impl KvCache {
    /// An empty cache for a model of this shape, with room for max_position_embeddings tokens.
    pub fn new(config: &Config) -> Self {
        Self {
            blocks: vec![KvBlock::default(); config.num_hidden_layers],
            kv_size: config.kv_size(),
            len: 0,
            capacity: config.max_position_embeddings,
        }
    }

    /// Tokens seen.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nothing seen yet?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens that fit: max_position_embeddings.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all tokens but the first `len`. Keeps its memory.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        for KvBlock { k, v } in &mut self.blocks {
            k.truncate(self.len * self.kv_size);
            v.truncate(self.len * self.kv_size);
        }
    }

    /// Every block has got its rows of `tokens` more tokens.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}
