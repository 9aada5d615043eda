//! The size of a gradient.

use burn::tensor::{Tensor, TensorData};
use rayon::prelude::*;

use crate::{host_op, profile, vector_math::dot};

/// Sum of squares, in f64 across stretches of fixed length; the tensor comes back untouched.
///
/// # Shapes
/// - `tensor` `[N]`, outside any graph
pub fn sum_of_squares(tensor: Tensor<1>) -> (Tensor<1>, f64) {
    let device = tensor.device();
    if !host_op::runs_on(&device) {
        let sum = tensor.clone().powf_scalar(2.0).sum().into_data().convert::<f64>();
        return (tensor, sum.try_into_vec::<f64>().expect("converted to f64")[0]);
    }
    let _span = profile::op("gradient norm").with("weights", tensor.dims()[0] as u64);
    // Taking the data out and putting it back moves no bytes when nothing else holds the tensor.
    let values = tensor.into_data().try_into_vec::<f32>().expect("gradients are f32");
    const STRETCH: usize = 4096;
    let parts: Vec<f64> = values.par_chunks(STRETCH).map(|part| dot(part, part) as f64).collect();
    let sum = parts.into_iter().sum();
    let count = values.len();
    (Tensor::from_data(TensorData::new(values, [count]), &device), sum)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn the_sum_is_right_and_the_tensor_unchanged() {
        let values: Vec<f32> = (0..10_000).map(|i| (i % 17) as f32 - 8.0).collect();
        let truth: f64 = values.iter().map(|&v| (v as f64).powi(2)).sum();
        let tensor = Tensor::<1>::from_data(TensorData::new(values.clone(), [values.len()]), &Device::flex());
        let (tensor, sum) = sum_of_squares(tensor);
        assert!((sum - truth).abs() < 1e-6 * truth);
        assert_eq!(tensor.into_data().try_into_vec::<f32>().unwrap(), values);
    }
}
