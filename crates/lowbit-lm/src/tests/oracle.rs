//! The decoder again, from the equations, one number at a time in f64.

use std::f64::consts::TAU;

use super::tiny::Tiny;
use crate::{Config, RopeScaling};

type Rows = Vec<Vec<f64>>;

pub(crate) fn logits(tiny: &Tiny, tokens: &[u32]) -> Rows {
    let c = Config::parse("config.json", tiny.config.to_string().as_bytes()).unwrap();
    let tensor =
        |name: &str| -> Vec<f64> { tiny.tensors[name].1.iter().map(|&x| f64::from(x)).collect() };
    let linear = |x: &Rows, name: &str| -> Rows {
        let w = tensor(&format!("{name}.weight"));
        let bias = format!("{name}.bias");
        let bias = tiny.tensors.contains_key(&bias).then(|| tensor(&bias));
        x.iter()
            .map(|x| {
                w.chunks(x.len())
                    .enumerate()
                    .map(|(i, w)| {
                        let dot: f64 = w.iter().zip(x).map(|(w, x)| w * x).sum();
                        dot + bias.as_ref().map_or(0.0, |b| b[i])
                    })
                    .collect()
            })
            .collect()
    };
    let norm = |x: &Rows, name: &str| -> Rows {
        let gain = tensor(&format!("{name}.weight"));
        x.iter()
            .map(|x| {
                let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
                let scale = 1.0 / (mean + f64::from(c.rms_norm_eps)).sqrt();
                x.iter().zip(&gain).map(|(x, g)| x * scale * g).collect()
            })
            .collect()
    };
    let add = |x: &mut Rows, y: Rows| {
        x.iter_mut().flatten().zip(y.into_iter().flatten()).for_each(|(x, y)| *x += y);
    };
    let dim = c.head_dim;
    let rope = |x: &mut Rows| {
        for (position, x) in x.iter_mut().enumerate() {
            for head in x.chunks_mut(dim) {
                for i in 0..dim / 2 {
                    let angle = position as f64 * frequency(&c, i);
                    let (a, b) = (head[i], head[i + dim / 2]);
                    head[i] = a * angle.cos() - b * angle.sin();
                    head[i + dim / 2] = b * angle.cos() + a * angle.sin();
                }
            }
        }
    };

    let embedding = tensor("model.embed_tokens.weight");
    let row = |token: u32| embedding[token as usize * c.hidden_size..][..c.hidden_size].to_vec();
    let mut x: Rows = tokens.iter().map(|&token| row(token)).collect();
    for layer in 0..c.num_hidden_layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let h = norm(&x, &name("input_layernorm"));
        let [mut q, mut k, v] =
            ["q", "k", "v"].map(|p| linear(&h, &name(&format!("self_attn.{p}_proj"))));
        rope(&mut q);
        rope(&mut k);
        let mut a = vec![vec![0.0; c.q_size()]; tokens.len()];
        for (t, a) in a.iter_mut().enumerate() {
            for head in 0..c.num_attention_heads {
                let kv = head * c.num_key_value_heads / c.num_attention_heads * dim;
                let q = &q[t][head * dim..][..dim];
                let scores: Vec<f64> = (0..=t)
                    .map(|s| {
                        let k = &k[s][kv..][..dim];
                        let dot: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
                        (dot / (dim as f64).sqrt()).exp()
                    })
                    .collect();
                let total: f64 = scores.iter().sum();
                for (s, score) in scores.iter().enumerate() {
                    for i in 0..dim {
                        a[head * dim + i] += score / total * v[s][kv + i];
                    }
                }
            }
        }
        add(&mut x, linear(&a, &name("self_attn.o_proj")));
        let h = norm(&x, &name("post_attention_layernorm"));
        let (mut gate, up) = (linear(&h, &name("mlp.gate_proj")), linear(&h, &name("mlp.up_proj")));
        for (g, u) in gate.iter_mut().flatten().zip(up.into_iter().flatten()) {
            *g = *g / (1.0 + (-*g).exp()) * u;
        }
        add(&mut x, linear(&gate, &name("mlp.down_proj")));
    }
    let x = norm(&x, "model.norm");
    linear(&x, if c.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" })
}

/// By wavelength, as the rule is usually written.
fn frequency(c: &Config, i: usize) -> f64 {
    let f = f64::from(c.rope_theta).powf(-((2 * i) as f64) / c.head_dim as f64);
    let s = match c.rope_scaling {
        None => return f,
        Some(RopeScaling::Linear(factor)) => return f / f64::from(factor),
        Some(RopeScaling::Llama3(s)) => s,
        Some(other) => panic!("{other:?} is not in the oracle"),
    };
    let [factor, low, high] = [s.factor, s.low_freq_factor, s.high_freq_factor].map(f64::from);
    let (wavelength, original) = (TAU / f, s.original_max_position_embeddings as f64);
    if wavelength < original / high {
        f
    } else if wavelength > original / low {
        f / factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * f / factor + smooth * f
    }
}
