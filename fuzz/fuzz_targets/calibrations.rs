//! Any bytes are a file of calibrations that can be used, or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lowbit::calibrations;

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut all) = calibrations::from_bytes("fuzz", bytes) else { return };
    let again = calibrations::to_bytes(&all).expect("as short a header");
    assert_eq!(calibrations::from_bytes("again", &again).expect("our own file"), all);
    let _ = calibrations::merge(&mut all.clone(), &all);
    all.retain(|_, calibration| calibration.tokens() > 0);
    assert!(all.values().all(|c| c.abs_mean().iter().all(|mean| mean.is_finite())));
});
