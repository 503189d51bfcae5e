//! Whole models, block by block: on the embedded model, and on reference models where there are any.

use std::{collections::BTreeSet, fs, path::PathBuf, sync::Arc};

use lowbit::{
    ChannelScale, Context, Linear, Method, PackedLinear, QLinear, Quantizer, Recipe, SmoothQuant,
    formats::{Safetensors, Tensor, TensorSource, write_safetensors},
};
use lowbit_lm::{
    Checkpoint, Error, Finished, Model, Protocol, Windows,
    eval::{Baseline, Comparison},
    outliers,
    quantize::{self, LayerReport, Options},
};

fn find(path: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(path);
    if !path.exists() {
        println!("skipped: there is no {}", path.display());
        return None;
    }
    Some(path)
}

fn context() -> Context {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    Context::with_pool(Arc::new(pool))
}

/// As the command does: what no kernel computes yet is computed by the reference.
fn pack(layer: &QLinear) -> lowbit::Result<Arc<dyn Linear>> {
    match PackedLinear::new(layer) {
        Ok(packed) => Ok(Arc::new(packed)),
        Err(lowbit::Error::Unsupported { .. }) => Ok(Arc::new(layer.clone())),
        Err(e) => Err(e),
    }
}

struct Bench {
    checkpoint: Checkpoint,
    model: Model,
    calibration: Windows,
    baseline: Baseline,
    ctx: Context,
}

impl Bench {
    fn embedded() -> Option<Self> {
        let folder = find("models/stories3m")?;
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let tokens = |file: &str, max| {
            let text = fs::read_to_string(folder.join(file)).unwrap();
            Windows::from_tokens(checkpoint.config(), file, &text).unwrap().first(max)
        };
        let (calibration, windows) =
            (tokens("calibration.tokens", 1500), tokens("eval.tokens", 1000));
        Some(Self::new(checkpoint, calibration, windows))
    }

    /// Calibrated on the first MiB of the stories, evaluated on the second.
    fn reference(model: &str, max_tokens: usize) -> Option<Self> {
        let folder = find(&format!("../shared/data/models/{model}"))?;
        let file = "tinystories_train_2MiB_eot.txt";
        let text = fs::read(find(&format!("../shared/data/text/{file}"))?).unwrap();
        let checkpoint = Checkpoint::open(folder).unwrap();
        let windows = |skip_bytes| {
            let document_mark = Some("<|endoftext|>".to_string());
            let protocol =
                Protocol { max_tokens, document_mark, skip_bytes, ..Protocol::default() };
            Windows::from_text(&checkpoint, file, &text, &protocol).unwrap()
        };
        let (calibration, windows) = (windows(0), windows(1 << 20));
        Some(Self::new(checkpoint, calibration, windows))
    }

    fn new(checkpoint: Checkpoint, calibration: Windows, windows: Windows) -> Self {
        let mut ctx = context();
        let model = Model::load(&checkpoint).unwrap();
        let baseline = Baseline::new(&model, &windows, &mut ctx, |_| ()).unwrap();
        Self { checkpoint, model, calibration, baseline, ctx }
    }

    fn quantize(&mut self, recipe: &Recipe<'_>, options: Options<'_>) -> (Model, Vec<LayerReport>) {
        let mut reports = Vec::new();
        let model = quantize::quantize(
            &self.model,
            &self.checkpoint,
            recipe,
            Some(&self.calibration),
            options,
            &mut self.ctx,
            pack,
            |report| reports.push(report.clone()),
        );
        (model.unwrap(), reports)
    }

    fn compare(&mut self, name: &str) -> Comparison {
        let options = Options { true_sequential: true, ..Options::default() };
        let (model, _) = self.quantize(&Method::named(name).unwrap().quantizer, options);
        self.baseline.compare(&model, &mut self.ctx, |_| ()).unwrap()
    }

    /// Perplexity over that of the f32 model, less 1.
    fn gap(&mut self, name: &str) -> f64 {
        let comparison = self.compare(name);
        comparison.perplexity.value / self.baseline.perplexity().value - 1.0
    }
}

#[test]
fn without_statistics_it_is_each_layer_by_itself() {
    let Some(mut bench) = Bench::embedded() else { return };
    let recipe = Method::named("int4-g32-zp").unwrap().quantizer;
    let (by_block, reports) = bench.quantize(&recipe, Options::default());
    let names: Vec<_> = reports.iter().map(|report| report.name.clone()).collect();
    assert_eq!(names, bench.checkpoint.linear_names());
    assert!(reports.iter().all(|report| report.error.is_none() && !report.scaled_at_run_time));

    let ctx = &mut Context::new();
    let by_layer = bench.model.with_linears(&bench.checkpoint, |layer| {
        let calibration = lowbit::Calibration::new(layer.weight.cols());
        pack(&recipe.quantize(layer.weight.as_ref(), &calibration, ctx)?.layer)
    });
    let logits = |model: &Model| {
        let mut cache = lowbit_lm::KvCache::new(model.config());
        model.forward(&[1, 300, 301, 302], &mut cache, &mut Context::new()).unwrap()
    };
    assert_eq!(logits(&by_block), logits(&by_layer.unwrap()));
}

/// Scales that are powers of two change no bit of a weight, so nothing but the place where they end up
/// could change the result.
#[test]
fn folded_scales_leave_the_model_as_it_is() {
    let Some(mut bench) = Bench::embedded() else { return };
    let plain = Recipe::rounding(&Recipe::INT8);
    let scale = Some(ChannelScale::SmoothQuant(SmoothQuant::new(0.5)));
    for true_sequential in [false, true] {
        let options = Options { true_sequential, ..Options::default() };
        let (scaled, reports) = bench.quantize(&Recipe { scale, ..plain }, options);
        assert!(reports.iter().all(|report| report.report.alpha == Some(0.5)));
        for report in &reports {
            // Where v serves several queries, and where the layers before are quantized already.
            let at_run_time = report.name.ends_with("down_proj") && true_sequential
                || report.name.ends_with("o_proj")
                    && (true_sequential
                        || bench.model.config().num_key_value_heads
                            != bench.model.config().num_attention_heads);
            assert_eq!(report.scaled_at_run_time, at_run_time, "{}", report.name);
        }
        // Int8 weights and f32 activations: what folding got wrong would show at once.
        let kl = bench.baseline.compare(&scaled, &mut bench.ctx, |_| ()).unwrap().kl;
        assert!(kl < 0.002, "{kl}");
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let Some(mut bench) = Bench::embedded() else { return };
    bench.calibration = bench.calibration.first(300);
    for name in ["smoothquant-rot-gptq", "awq-clip-g32", "best-int4-g32-zp"] {
        let recipe = Method::named(name).unwrap().quantizer;
        let logits = |bench: &mut Bench| {
            let (model, _) =
                bench.quantize(&recipe, Options { true_sequential: true, ..Options::default() });
            let mut cache = lowbit_lm::KvCache::new(model.config());
            model.forward(&[1, 300, 301, 302], &mut cache, &mut Context::new()).unwrap()
        };
        let parallel = logits(&mut bench);
        let ctx = std::mem::replace(&mut bench.ctx, Context::new());
        assert_eq!(logits(&mut bench), parallel, "{name}");
        bench.ctx = ctx;
    }
}

#[test]
fn a_layer_without_calibration_is_an_error_that_names_it() {
    let Some(mut bench) = Bench::embedded() else { return };
    let result = quantize::quantize(
        &bench.model,
        &bench.checkpoint,
        &Recipe::SMOOTHQUANT,
        None,
        Options::default(),
        &mut bench.ctx,
        pack,
        |_| (),
    );
    let error = result.map(|_| ()).unwrap_err();
    let Error::Layer { layer, cause } = error else { panic!("{error}") };
    assert_eq!(layer, bench.checkpoint.linear_names()[0]);
    assert_eq!(cause, lowbit::Error::Empty { what: "calibration" });
}

#[test]
fn activations_that_are_not_finite_are_an_error_that_names_the_layer() {
    let Some(mut bench) = Bench::embedded() else { return };
    let folder = find("models/stories3m").unwrap();
    let read = |file: &str| fs::read(folder.join(file)).unwrap();
    // Values of block 1 that overflow: the first layer to see them is o.
    let source = Safetensors::new("model", read("model.safetensors")).unwrap();
    let tensors: Vec<_> = (source.names().into_iter())
        .map(|name| {
            let tensor = source.tensor(name).unwrap();
            let mut elements = tensor.to_f32().unwrap();
            if name == "model.layers.1.self_attn.v_proj.weight" {
                elements.iter_mut().for_each(|w| *w = w.signum() * 3e38);
            }
            Tensor::f32(name, tensor.shape.to_vec(), &elements)
        })
        .collect();
    let views: Vec<_> = tensors.iter().map(Tensor::view).collect();
    let mut bytes = Vec::new();
    write_safetensors(&mut bytes, &[], &views).unwrap();
    let checkpoint =
        Checkpoint::from_bytes("model", &read("config.json"), bytes, &read("tokenizer.json"));
    bench.checkpoint = checkpoint.unwrap();
    bench.model = Model::load(&bench.checkpoint).unwrap();
    let result = quantize::quantize(
        &bench.model,
        &bench.checkpoint,
        &Recipe::SMOOTHQUANT,
        Some(&bench.calibration.first(100)),
        Options::default(),
        &mut bench.ctx,
        pack,
        |_| (),
    );
    let error = result.map(|_| ()).unwrap_err();
    let Error::Layer { layer, cause } = error else { panic!("{error}") };
    assert_eq!(layer, "model.layers.1.self_attn.o_proj");
    assert!(matches!(cause, lowbit::Error::NotFinite { .. }), "{cause}");
}

#[test]
fn an_interrupted_run_continues_behind_the_finished_blocks() {
    let Some(mut bench) = Bench::embedded() else { return };
    bench.calibration = bench.calibration.first(300);
    let folder = tempfile::tempdir().unwrap();
    let finished = Some(Finished { folder: folder.path(), label: "smoothquant" });
    let options = Options { finished, ..Options::default() };
    let logits = |model: &Model| {
        let mut cache = lowbit_lm::KvCache::new(model.config());
        model.forward(&[1, 300, 301, 302], &mut cache, &mut Context::new()).unwrap()
    };
    let (whole, reports) = bench.quantize(&Recipe::SMOOTHQUANT, options);
    // As after an interruption in the last block.
    let last = bench.model.config().num_hidden_layers - 1;
    fs::remove_file(folder.path().join(format!("block-{last:04}.safetensors"))).unwrap();
    let (continued, again) = bench.quantize(&Recipe::SMOOTHQUANT, options);
    assert_eq!((logits(&continued), again), (logits(&whole), reports));

    let other = Some(Finished { folder: folder.path(), label: "another" });
    let result = quantize::quantize(
        &bench.model,
        &bench.checkpoint,
        &Recipe::SMOOTHQUANT,
        Some(&bench.calibration),
        Options { finished: other, ..Options::default() },
        &mut bench.ctx,
        pack,
        |_| (),
    );
    let error = result.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("another recipe"), "{error}");
}

/// Two channels of every norm are 60 times larger than the others there. The bounds are those that an
/// independent program has shown to be possible on the whole text.
#[test]
fn outlier_channels_cost_no_more_than_a_few_parts_in_a_thousand() {
    let Some(mut bench) = Bench::reference("stories260k-outliers", 16_000) else { return };
    let plain = bench.gap("w8a8");
    assert!(plain > 0.3, "{plain}");
    for (name, bound) in [
        ("llm-int8", 0.002),
        ("smoothquant", 0.002),
        ("smoothquant-auto", 0.002),
        ("llm-int8-tensor", 0.005),
        ("smoothquant-tensor", 0.009),
        ("smoothquant-rot-gptq", 0.0025),
        ("smoothquant-rot-gptq-tensor", 0.0025),
    ] {
        let gap = bench.gap(name);
        assert!(gap < bound, "{name}: {gap}");
    }
    // int8 weights for the outliers, as bitsandbytes has them: the matching columns are too small.
    assert!((0.03..0.06).contains(&bench.gap("llm-int8-bnb")));
}

/// The same channels ruin weight-only int4; a scale that vanishes in the norms repairs it.
#[test]
fn a_folded_scale_repairs_int4_on_outlier_channels() {
    let Some(mut bench) = Bench::reference("stories260k-outliers", 16_000) else { return };
    let [plain, smooth, awq] =
        ["int4-g32-zp", "smooth-int4-g32", "awq-g32"].map(|n| bench.compare(n).kl);
    assert!(plain > 0.25 && smooth < 0.4 * plain && awq < 0.4 * plain, "{plain} {smooth} {awq}");
}

/// outliers.json of the model lists the channels that were made large, two behind each norm.
#[test]
fn outlier_features_are_those_that_were_put_in() {
    let Some(mut bench) = Bench::reference("stories260k-outliers", 1000) else { return };
    let file = find("../shared/data/models/stories260k-outliers/outliers.json").unwrap();
    let listed: serde_json::Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    let found =
        outliers::find(&bench.model, &bench.calibration, 6.0, &mut bench.ctx, |_| ()).unwrap();
    assert_eq!(found.inputs.len(), 4 * bench.model.config().num_hidden_layers);
    let behind_norms = found.inputs.iter().filter(|input| input.layers.len() > 1);
    let listed = listed["injected"].as_array().unwrap();
    assert_eq!(listed.len(), behind_norms.clone().count());
    for (input, listed) in behind_norms.zip(listed) {
        let mut order: Vec<_> = (0..input.largest.len()).collect();
        order.sort_by(|&a, &b| input.largest[b].total_cmp(&input.largest[a]));
        let channels = listed["channels"].as_array().unwrap().iter();
        let channels: BTreeSet<_> = channels.map(|c| c.as_u64().unwrap() as usize).collect();
        assert_eq!(order[..2].iter().copied().collect::<BTreeSet<_>>(), channels, "{listed}");
    }
    for feature in &found.features {
        let share = (feature.layers * 10.0).round();
        assert_eq!(feature.is_outlier(), share >= 3.0 && feature.positions >= 0.06, "{feature:?}");
    }
}
