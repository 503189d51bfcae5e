//! Whole-slice conversion on one thread, in GB/s of the f32 (or f64) side, with `half` and `float8` beside.
//!
//! `cargo bench -p lowbit-benches --bench convert`. Every case runs in cache (256 KiB) and out of it (64 MiB), and on
//! each instruction set of the machine. Packing to nibbles is part of the 4-bit block formats.
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::slice::HalfFloatSliceExt;
use lowbit::dtypes::{
    F8E4M3, F8E8M0, Format, Isa, Mx, NibbleOrder, Nvfp4, Overflow, Rounding, ScaleRule, Table16,
    bf16, decode_slice_on, encode_slice_on, f16, pack, unpack,
};

/// Elements of the block formats handled at a time, so that codes are still in cache when they are packed.
const CHUNK: usize = 4096;

/// Numbers such as weights have: a heavy-tailed mix of exponents, both signs.
fn weights(count: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| uniform() * 4.0 * (0.01 + uniform().abs())).collect()
}

fn convert(c: &mut Criterion) {
    for (size, bytes) in [("256KiB", 256 << 10), ("64MiB", 64 << 20)] {
        let count = bytes / 4;
        let x = weights(count);
        let wide: Vec<f64> = x[..count / 2].iter().map(|&x| f64::from(x) * 1.000_000_1).collect();
        let mut out = vec![0f32; count];
        let mut codes = vec![0u8; count];
        let mut packed = vec![0u8; count / 2];
        let mut chunk = [0u8; CHUNK];
        let mut group = c.benchmark_group("convert");
        group.throughput(Throughput::Bytes(bytes as u64));
        group.sample_size(20);
        group.warm_up_time(Duration::from_millis(200));
        group.measurement_time(Duration::from_millis(800));
        let mut time = |case: &str, who: &str, f: &mut dyn FnMut()| {
            group.bench_function(format!("{case}/{who}/{size}"), |b| b.iter(&mut *f));
        };

        time("f32-f32", "copy", &mut || out.copy_from_slice(black_box(&x)));

        let (near, saturate) = (Rounding::NearestEven, Overflow::Saturate);
        let random = Rounding::Stochastic { seed: 1, index: 0 };
        for isa in Isa::available() {
            let who = format!("lowbit-{}", isa.name());
            for (name, format) in [
                ("e4m3", Format::F8E4M3),
                ("e5m2", Format::F8E5M2),
                ("e4m3fnuz", Format::F8E4M3FNUZ),
                ("e2m3", Format::F6E2M3),
                ("e3m2", Format::F6E3M2),
                ("e2m1", Format::F4E2M1),
            ] {
                time(&format!("f32-{name}"), &who, &mut || {
                    format.encode_slice_on(isa, black_box(&x), &mut codes, near, saturate).unwrap();
                });
                time(&format!("{name}-f32"), &who, &mut || {
                    format.decode_slice_on(isa, black_box(&codes), &mut out).unwrap();
                });
            }
            time("f64-e4m3", &who, &mut || {
                let codes = &mut codes[..count / 2];
                Format::F8E4M3
                    .encode_slice_on(isa, black_box(&wide), codes, near, saturate)
                    .unwrap();
            });
            time("f32-e4m3-stochastic", &who, &mut || {
                Format::F8E4M3
                    .encode_slice_on(isa, black_box(&x), &mut codes, random, saturate)
                    .unwrap();
            });
            time("f64-e4m3-stochastic", &who, &mut || {
                let codes = &mut codes[..count / 2];
                Format::F8E4M3
                    .encode_slice_on(isa, black_box(&wide), codes, random, saturate)
                    .unwrap();
            });
            let mut halves = vec![f16::ZERO; count];
            time("f32-f16", &who, &mut || {
                encode_slice_on(isa, black_box(&x), &mut halves, near, Overflow::Infinity).unwrap();
            });
            time("f16-f32", &who, &mut || {
                decode_slice_on(isa, black_box(&halves), &mut out).unwrap();
            });
            let mut brains = vec![bf16::ZERO; count];
            time("f32-bf16", &who, &mut || {
                encode_slice_on(isa, black_box(&x), &mut brains, near, Overflow::Infinity).unwrap();
            });
            time("bf16-f32", &who, &mut || {
                decode_slice_on(isa, black_box(&brains), &mut out).unwrap();
            });
            time("f32-bf16-stochastic", &who, &mut || {
                encode_slice_on(isa, black_box(&x), &mut brains, random, saturate).unwrap();
            });

            let mut scales = vec![0f32; count / 64];
            time("f32-nf4b64", &who, &mut || {
                let outs = packed.chunks_mut(CHUNK / 2).zip(scales.chunks_mut(CHUNK / 64));
                for (x, (packed, scales)) in black_box(&x).chunks(CHUNK).zip(outs) {
                    Table16::NF4.quantize_on(isa, 64, x, scales, &mut chunk).unwrap();
                    NibbleOrder::HighFirst.pack(&chunk, packed).unwrap();
                }
            });
            time("nf4b64-f32", &who, &mut || {
                let ins = black_box(&packed).chunks(CHUNK / 2).zip(scales.chunks(CHUNK / 64));
                for (out, (packed, scales)) in out.chunks_mut(CHUNK).zip(ins) {
                    NibbleOrder::HighFirst.unpack(packed, &mut chunk).unwrap();
                    Table16::NF4.dequantize_on(isa, 64, scales, &chunk, out).unwrap();
                }
            });
            let mut scales = vec![F8E8M0::ONE; count / 32];
            time("f32-mxfp4", &who, &mut || {
                let outs = packed.chunks_mut(CHUNK / 2).zip(scales.chunks_mut(CHUNK / 32));
                for (x, (packed, scales)) in black_box(&x).chunks(CHUNK).zip(outs) {
                    Mx::Fp4
                        .quantize_on(isa, ScaleRule::Floor, near, x, scales, &mut chunk)
                        .unwrap();
                    pack(4, &chunk, packed).unwrap();
                }
            });
            time("f32-mxfp4-stochastic", &who, &mut || {
                let outs = packed.chunks_mut(CHUNK / 2).zip(scales.chunks_mut(CHUNK / 32));
                for (x, (packed, scales)) in black_box(&x).chunks(CHUNK).zip(outs) {
                    Mx::Fp4
                        .quantize_on(isa, ScaleRule::Floor, random, x, scales, &mut chunk)
                        .unwrap();
                    pack(4, &chunk, packed).unwrap();
                }
            });
            time("mxfp4-f32", &who, &mut || {
                let ins = black_box(&packed).chunks(CHUNK / 2).zip(scales.chunks(CHUNK / 32));
                for (out, (packed, scales)) in out.chunks_mut(CHUNK).zip(ins) {
                    unpack(4, packed, &mut chunk).unwrap();
                    Mx::Fp4.dequantize_on(isa, scales, &chunk, out).unwrap();
                }
            });
            time("f32-mxfp8", &who, &mut || {
                Mx::Fp8E4M3
                    .quantize_on(
                        isa,
                        ScaleRule::Floor,
                        near,
                        black_box(&x),
                        &mut scales,
                        &mut codes,
                    )
                    .unwrap();
            });
            let mut scales = vec![F8E4M3::ONE; count / 16];
            let nvfp4 = Nvfp4::fit(&x).unwrap();
            time("f32-nvfp4", &who, &mut || {
                let outs = packed.chunks_mut(CHUNK / 2).zip(scales.chunks_mut(CHUNK / 16));
                for (x, (packed, scales)) in black_box(&x).chunks(CHUNK).zip(outs) {
                    nvfp4.quantize_on(isa, near, x, scales, &mut chunk).unwrap();
                    pack(4, &chunk, packed).unwrap();
                }
            });
        }

        let mut halves = vec![f16::ZERO; count];
        time("f32-f16", "half", &mut || halves.convert_from_f32_slice(black_box(&x)));
        time("f16-f32", "half", &mut || black_box(&halves).convert_to_f32_slice(&mut out));
        let mut brains = vec![bf16::ZERO; count];
        time("f32-bf16", "half", &mut || brains.convert_from_f32_slice(black_box(&x)));
        time("bf16-f32", "half", &mut || black_box(&brains).convert_to_f32_slice(&mut out));

        let mut e4m3 = vec![float8::F8E4M3::from_bits(0); count];
        time("f32-e4m3", "float8", &mut || {
            for (y, &x) in e4m3.iter_mut().zip(black_box(&x)) {
                *y = float8::F8E4M3::from_f32(x);
            }
        });
        time("e4m3-f32", "float8", &mut || {
            for (y, x) in out.iter_mut().zip(black_box(&e4m3)) {
                *y = x.to_f32();
            }
        });
        let mut e5m2 = vec![float8::F8E5M2::from_bits(0); count];
        time("f32-e5m2", "float8", &mut || {
            for (y, &x) in e5m2.iter_mut().zip(black_box(&x)) {
                *y = float8::F8E5M2::from_f32(x);
            }
        });
        time("e5m2-f32", "float8", &mut || {
            for (y, x) in out.iter_mut().zip(black_box(&e5m2)) {
                *y = x.to_f32();
            }
        });
        group.finish();
    }
}

criterion_group!(benches, convert);
criterion_main!(benches);
