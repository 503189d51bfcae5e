//! Which features of a model's activations are outliers, by the criterion of LLM.int8().
//!
//! Dettmers et al., arXiv:2208.07339, section 4: a feature dimension is an outlier if values of magnitude
//! 6 and more occur in at least 25 % of the layers and at least 6 % of the sequence positions. Features
//! are those of the residual stream behind its norms, the inputs of attention and MLP, which all blocks
//! number alike. A layer has the feature if any position does, and a position if any layer does. Per
//! input, those of o and down are counted too; their features are others in each block.

use std::collections::BTreeMap;

use lowbit::Context;

use crate::{Error, KvCache, Model, Result, Windows};

/// Where the activations of a model are large.
#[derive(Clone, Debug, PartialEq)]
pub struct Outliers {
    /// From which magnitude on a value counts.
    pub threshold: f32,
    /// Sequence positions looked at.
    pub positions: usize,
    /// For each input of linear layers, in the order of the model.
    pub inputs: Vec<Input>,
    /// The features of the residual stream, behind its norms, that are large anywhere: those in most
    /// layers first.
    pub features: Vec<Feature>,
}

/// The input that some linear layers share.
#[derive(Clone, Debug, PartialEq)]
pub struct Input {
    /// The layers that get it.
    pub layers: Vec<String>,
    /// The largest magnitude of each feature.
    pub largest: Vec<f32>,
    /// At how many positions each feature is large.
    pub counts: Vec<usize>,
}

/// A feature of the residual stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Feature {
    /// Its number.
    pub feature: usize,
    /// In which share of the layers' inputs it is large.
    pub layers: f64,
    /// At which share of the positions.
    pub positions: f64,
    /// Its largest magnitude.
    pub largest: f32,
}

impl Feature {
    /// In at least 25 % of the layers and 6 % of the positions?
    pub fn is_outlier(&self) -> bool {
        self.layers >= 0.25 && self.positions >= 0.06
    }
}

impl Input {
    /// How many features are large anywhere.
    pub fn features(&self) -> usize {
        self.counts.iter().filter(|&&count| count > 0).count()
    }
}

/// Looks for values of at least `threshold` (the paper's is 6) in the inputs of all linear layers over the
/// texts `windows`. `progress` is called with the positions done.
///
/// # Errors
/// [`Error::Invalid`] for a threshold that is no positive number, and as [`Model::forward`].
///
/// # Example
/// ```no_run
/// use lowbit_lm::{Checkpoint, Model, Windows, outliers};
///
/// let checkpoint = Checkpoint::open("models/stories3m")?;
/// let windows = Windows::from_tokens(checkpoint.config(), "a text", "1 403 407 261 378 432")?;
/// let model = Model::load(&checkpoint)?;
/// let found = outliers::find(&model, &windows, 6.0, &mut lowbit::Context::new(), |_| ())?;
/// for feature in found.features.iter().filter(|feature| feature.is_outlier()) {
///     println!("{}: up to {}", feature.feature, feature.largest);
/// }
/// # Ok::<(), lowbit_lm::Error>(())
/// ```
pub fn find(
    model: &Model,
    windows: &Windows,
    threshold: f32,
    ctx: &mut Context,
    mut progress: impl FnMut(usize),
) -> Result<Outliers> {
    if !(threshold > 0.0 && threshold.is_finite()) {
        let wrong = format!("an outlier threshold of {threshold}: expected a positive number");
        return Err(Error::Invalid(wrong));
    }
    let hidden = model.config().hidden_size;
    let mut inputs: BTreeMap<usize, Input> = BTreeMap::new();
    // At how many positions a feature of the residual stream is large in any layer.
    let mut anywhere = vec![0_usize; hidden];
    let mut positions = 0;
    let mut cache = KvCache::new(model.config());
    for tokens in windows.iter() {
        cache.truncate(0);
        let mut large = vec![false; tokens.len() * hidden];
        let mut index = 0;
        model.observe(tokens, &mut cache, ctx, |names, x| {
            let input = inputs.entry(index).or_insert_with(|| Input {
                layers: names.iter().map(|&name| name.to_owned()).collect(),
                largest: vec![0.0; x.cols()],
                counts: vec![0; x.cols()],
            });
            index += 1;
            // Several layers share what comes from a norm.
            let residual = names.len() > 1;
            for (position, x) in x.iter_rows().enumerate() {
                let features = input.largest.iter_mut().zip(&mut input.counts).zip(x).enumerate();
                for (feature, ((largest, count), x)) in features {
                    *largest = largest.max(x.abs());
                    if x.abs() >= threshold {
                        *count += 1;
                        if residual {
                            large[position * hidden + feature] = true;
                        }
                    }
                }
            }
            Ok(())
        })?;
        for row in large.chunks(hidden) {
            anywhere.iter_mut().zip(row).for_each(|(count, &large)| *count += usize::from(large));
        }
        positions += tokens.len();
        progress(positions);
    }
    let inputs: Vec<Input> = inputs.into_values().collect();
    let residual: Vec<&Input> = inputs.iter().filter(|input| input.layers.len() > 1).collect();
    let share = |count: usize, of: usize| count as f64 / of.max(1) as f64;
    let mut features: Vec<Feature> = (0..hidden)
        .filter(|&feature| anywhere[feature] > 0)
        .map(|feature| Feature {
            feature,
            layers: share(
                residual.iter().filter(|input| input.counts[feature] > 0).count(),
                residual.len(),
            ),
            positions: share(anywhere[feature], positions),
            largest: residual.iter().fold(0.0, |max, input| max.max(input.largest[feature])),
        })
        .collect();
    // Stable: equals stay in the order of their numbers.
    features
        .sort_by(|a, b| b.layers.total_cmp(&a.layers).then(b.positions.total_cmp(&a.positions)));
    Ok(Outliers { threshold, positions, inputs, features })
}
