//! Rotary frequencies, in `f32` like the reference implementations.

use super::config::Rope;

/// `theta^(-2j / head_dim)` for each pair, stretched as the scaling says.
pub fn frequencies(rope: &Rope, head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2)
        .map(|j| {
            let frequency = 1.0 / (rope.theta as f32).powf(2.0 * j as f32 / head_dim as f32);
            let Some(scaling) = &rope.scaling else { return frequency };
            let wavelength = 2.0 * std::f32::consts::PI / frequency;
            let original = scaling.original_max_position as f32;
            let (low, high) = (scaling.low_freq_factor as f32, scaling.high_freq_factor as f32);
            // Branches, not blended masks: Scout has low = high, where the middle band is empty and its formula 0 / 0.
            if wavelength < original / high {
                frequency
            } else if wavelength > original / low {
                frequency / scaling.factor as f32
            } else {
                let share = (original / wavelength - low) / (high - low);
                (1.0 - share) * frequency / scaling.factor as f32 + share * frequency
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use limbeck_kernels::rotary::Pairing;

    use super::*;
    use crate::models::config::Llama3Scaling;

    #[test]
    fn scout_divides_the_29_slowest_of_64_frequencies_by_16() {
        let plain = Rope { theta: 500_000.0, scaling: None, pairing: Pairing::Interleaved };
        let scaling =
            Llama3Scaling { factor: 16.0, low_freq_factor: 1.0, high_freq_factor: 1.0, original_max_position: 8192.0 };
        let scaled = Rope { scaling: Some(scaling), ..plain.clone() };
        for (j, (a, b)) in frequencies(&plain, 128).iter().zip(frequencies(&scaled, 128)).enumerate() {
            assert!(b.is_finite());
            assert_eq!(b, if j <= 34 { *a } else { a / 16.0 }, "pair {j}");
        }
    }
}
