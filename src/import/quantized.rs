//! A compressed row of DistillKit back to ids and log-probabilities, with the number formats and the roundings of its own
//! decoder: the first values as they are, a curve through the rest, quantised residuals on it, and distances summed up.

use super::compression::{CompressionConfig, Float, Term};

/// Decodes rows of one configuration.
#[derive(Debug)]
pub(super) struct RowDecoder {
    config: CompressionConfig,
    /// `[k - exact_k][terms]`: the curve's terms at each place.
    terms: Vec<Vec<f64>>,
    id_bits: usize,
}

impl RowDecoder {
    pub fn new(config: CompressionConfig) -> RowDecoder {
        let count = config.k - config.exact_k;
        let terms = places(count, config.normalize_t, config.term_dtype);
        let terms = terms
            .into_iter()
            .map(|place| config.polynomial_terms.iter().map(|term| at(*term, place, config.term_dtype)).collect())
            .collect();
        // In f32, as there: a size just above a large power of two may come out as that power.
        let id_bits = (config.d as f32).log2().ceil() as usize;
        RowDecoder { config, terms, id_bits }
    }

    /// Bytes of a row's log-probabilities, and of its ids.
    pub fn row_bytes(&self) -> (usize, usize) {
        let config = &self.config;
        let bins = config.residual_bins.iter();
        let bins: usize =
            bins.map(|bin| bin.scale_dtype.bytes() + (bin.element_bits * bin.num_elements).div_ceil(8)).sum();
        let values = config.exact_k * config.exact_dtype.bytes()
            + config.polynomial_terms.len() * config.term_dtype.bytes()
            + bins;
        (values, (config.k * self.id_bits).div_ceil(8))
    }

    /// The ids of a row, `bytes` as long as [`row_bytes`](Self::row_bytes) says.
    pub fn ids(&self, bytes: &[u8]) -> Vec<u32> {
        unpack(bytes, self.id_bits, self.config.k)
    }

    /// The log-probabilities of a row, `bytes` as long as [`row_bytes`](Self::row_bytes) says.
    pub fn log_probs(&self, bytes: &[u8]) -> Vec<f32> {
        let config = &self.config;
        let (out, term) = (config.exact_dtype, config.term_dtype);
        let mut rest = bytes;
        let mut take = |length: usize| {
            let (taken, left) = rest.split_at(length);
            rest = left;
            taken
        };
        let numbers = |bytes: &[u8], dtype: Float| -> Vec<f64> {
            bytes.chunks_exact(dtype.bytes()).map(|bytes| dtype.read(bytes)).collect()
        };
        let mut values = numbers(take(config.exact_k * out.bytes()), out);
        let coefficients = numbers(take(config.polynomial_terms.len() * term.bytes()), term);
        let mut residuals = Vec::with_capacity(config.k - config.exact_k);
        for bin in &config.residual_bins {
            let scale = bin.scale_dtype.read(take(bin.scale_dtype.bytes()));
            let product = Float::F32.with(bin.scale_dtype);
            let elements =
                unpack(take((bin.element_bits * bin.num_elements).div_ceil(8)), bin.element_bits, bin.num_elements);
            residuals.extend(elements.into_iter().map(|element| {
                let level = match bin.element_bits {
                    1 => 2.0 * f64::from(element) - 1.0,
                    bits => f64::from((f64::from(element) - (1u64 << (bits - 1)) as f64) as f32),
                };
                product.round(level * scale)
            }));
        }
        residuals.resize(config.k - config.exact_k, 0.0);
        for (residual, terms) in residuals.into_iter().zip(&self.terms) {
            let residual = out.round(residual);
            values.push(if coefficients.is_empty() {
                residual
            } else {
                term.with(out).round(weighted(&coefficients, terms, term) + residual)
            });
        }
        if config.delta_encoding {
            let mut sum = 0.0;
            for value in &mut values {
                sum += Float::F32.round(*value);
                *value = out.round(Float::F32.round(sum));
            }
        }
        values.into_iter().map(|value| value as f32).collect()
    }
}

/// A sum of products in a number format: each product rounded to it, summed no narrower than f32, and rounded.
fn weighted(coefficients: &[f64], terms: &[f64], dtype: Float) -> f64 {
    let wide = dtype.with(Float::F32);
    let products = coefficients.iter().zip(terms).map(|(coefficient, term)| dtype.round(coefficient * term));
    dtype.round(products.fold(0.0, |sum, product| wide.round(sum + product)))
}

/// The curve's argument at each place: 0, 1, 2, ... or evenly from 0 to 1.
fn places(count: usize, normalize: bool, dtype: Float) -> Vec<f64> {
    if !normalize {
        return (0..count).map(|place| dtype.round(place as f64)).collect();
    }
    // The step is no narrower than f32.
    let step = if count > 1 { dtype.with(Float::F32).round(1.0 / (count - 1) as f64) } else { 0.0 };
    // From both ends, as there.
    let from_start = |place: usize| dtype.round(step * place as f64);
    let from_end = |place: usize| dtype.round(1.0 - step * (count - 1 - place) as f64);
    (0..count).map(|place| if place < count / 2 || count == 1 { from_start(place) } else { from_end(place) }).collect()
}

fn at(term: Term, place: f64, dtype: Float) -> f64 {
    dtype.round(match term {
        Term::Power(power) if dtype == Float::F64 => place.powi(power),
        Term::Power(power) => f64::from((place as f32).powi(power)),
        Term::Sqrt => place.sqrt(),
        Term::Exp => place.exp(),
    })
}

/// Numbers of `bits` bits each, the highest bit first.
fn unpack(bytes: &[u8], bits: usize, count: usize) -> Vec<u32> {
    let (mut numbers, mut held, mut held_bits) = (Vec::with_capacity(count), 0u64, 0);
    let mut bytes = bytes.iter();
    let mask = (1u64 << bits) - 1;
    for _ in 0..count {
        while held_bits < bits {
            held = held << 8 | u64::from(*bytes.next().expect("the length was compared"));
            held_bits += 8;
        }
        held_bits -= bits;
        numbers.push((held >> held_bits & mask) as u32);
        held &= (1 << held_bits) - 1;
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_read_from_the_highest() {
        assert_eq!(unpack(&[0b1010_0110, 0b1100_0000], 3, 4), [5, 1, 5, 4]);
        assert_eq!(unpack(&[0xff, 0xff, 0xff, 0xff, 0x80, 0, 0, 0], 32, 2), [u32::MAX, 0x8000_0000]);
        assert_eq!(unpack(&[], 5, 0), [0u32; 0]);
    }

    #[test]
    fn places_go_from_end_to_end() {
        assert_eq!(places(5, true, Float::F32), [0.0, 0.25, 0.5, 0.75, 1.0]);
        assert_eq!(places(1, true, Float::F32), [0.0]);
        assert_eq!(places(3, false, Float::F16), [0.0, 1.0, 2.0]);
    }
}
