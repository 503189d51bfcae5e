//! Evaluates a model folder on a token file, and a quantized version beside it:
//! `cargo run --release -p lowbit-lm --example evaluate -- models/stories3m int4-g32`

use std::{error::Error, fs, sync::Arc, time::Duration, time::Instant};

use lowbit::{Context, Method, PackedLinear, Quantizer};
use lowbit_lm::{Checkpoint, Model, Windows, eval, measure_speed};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().unwrap_or("models/stories3m".into());
    let method = args.next().unwrap_or("int4-g32".into());
    let method = Method::named(&method).ok_or("there is no such method")?;

    let checkpoint = Checkpoint::open(&folder)?;
    let read = |file: &str| -> Result<Windows, Box<dyn Error>> {
        let file = format!("{folder}/{file}");
        Ok(Windows::from_tokens(checkpoint.config(), &file, &fs::read_to_string(&file)?)?)
    };
    let (text, other_text) = (read("eval.tokens")?, read("calibration.tokens")?);

    for threads in [1, 2] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        let ctx = &mut Context::with_pool(Arc::new(pool));
        let start = Instant::now();
        let model = Model::load(&checkpoint)?;
        println!("{threads} threads: loaded in {:?}", start.elapsed());
        let start = Instant::now();
        let baseline = eval::Baseline::new(&model, &text, ctx, |_| ())?;
        println!("f32 {:?} in {:?}", baseline.perplexity(), start.elapsed());
        println!("{:?}", measure_speed(&model, Duration::from_millis(300), ctx)?);

        let start = Instant::now();
        let calibration = eval::calibrate(&model, &other_text.first(4000), false, ctx, |_| ())?;
        println!("calibrated in {:?}", start.elapsed());
        let quantized = model.with_linears(&checkpoint, |layer| {
            let w = layer.weight.as_ref();
            let q = method.quantizer.quantize(w, &calibration[&layer.name], ctx)?;
            Ok(Arc::new(PackedLinear::new(&q.layer.with_bias(layer.bias)?)?))
        })?;
        let start = Instant::now();
        let comparison = baseline.compare(&quantized, ctx, |_| ())?;
        println!("{} {comparison:?} in {:?}", method.name, start.elapsed());
        println!("{:?}", measure_speed(&quantized, Duration::from_millis(300), ctx)?);
    }
    Ok(())
}
