//! Optional losses on what lies inside a model: hidden states and router decisions of a live teacher.
//!
//! A cache has neither, so recipes do not offer them; they are for those who run teacher and student side by side.
//! Like every loss here they return sums, to be divided once. The teacher's side gets no gradient.

use burn::tensor::{Tensor, activation::log_softmax};

/// `sum_t mean_d (s - p)^2`: the squared distance of hidden states, per width. FitNets, Romero et al. 2015
/// (arXiv 1412.6550). Project the student first where widths differ.
///
/// # Shapes
/// - `student` and `teacher` `[T, D]`, `mask` `[T, 1]` of ones and zeros; result `[1]`
pub fn hidden_mean_square_sum(student: Tensor<2>, teacher: Tensor<2>, mask: Tensor<2>) -> Tensor<1> {
    ((student - teacher.detach()).square().mean_dim(1) * mask).sum()
}

/// `sum_t (1 - cos(s_t, p_t))`: the angle of hidden states, whatever their length. DistilBERT, Sanh et al. 2019
/// (arXiv 1910.01108). A state of length zero has no angle and counts 1.
///
/// # Shapes
/// - `student` and `teacher` `[T, D]`, `mask` `[T, 1]` of ones and zeros; result `[1]`
pub fn hidden_cosine_sum(student: Tensor<2>, teacher: Tensor<2>, mask: Tensor<2>) -> Tensor<1> {
    let teacher = teacher.detach();
    let product = (student.clone() * teacher.clone()).sum_dim(1);
    // The square root of the product of squares, kept away from 0, where its slope is not finite.
    let lengths = (student.square().sum_dim(1) * teacher.square().sum_dim(1)).clamp_min(1e-24).sqrt();
    ((product / lengths).neg().add_scalar(1.0) * mask).sum()
}

/// `sum_t KL(P_t || Q_t)` of two routers' distributions over the same experts.
///
/// # Shapes
/// - `student` and `teacher` logits `[T, E]`, `mask` `[T, 1]` of ones and zeros; result `[1]`
pub fn router_kl_sum(student: Tensor<2>, teacher: Tensor<2>, mask: Tensor<2>) -> Tensor<1> {
    let teacher = log_softmax(teacher.detach(), 1);
    ((teacher.clone().exp() * (teacher - log_softmax(student, 1))).sum_dim(1) * mask).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    fn pair() -> (Tensor<2>, Tensor<2>, Tensor<2>, Device) {
        let device = Device::flex().autodiff();
        let student = Tensor::<2>::from_data([[1.0f32, 2.0, -1.0], [0.0, 0.5, 0.5], [9.0, 9.0, 9.0]], &device);
        let teacher = Tensor::<2>::from_data([[2.0f32, 4.0, -2.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], &device);
        let mask = Tensor::<2>::from_data([[1.0f32], [1.0], [0.0]], &device);
        (student.require_grad(), teacher.require_grad(), mask, device)
    }

    fn number(tensor: &Tensor<1>) -> f64 {
        crate::loss::distill::scalar(tensor)
    }

    #[test]
    fn taps_have_their_formulas_value_and_pull_the_student_alone() {
        type Tap = fn(Tensor<2>, Tensor<2>, Tensor<2>) -> Tensor<1>;
        let log_softmax = |z: [f64; 3]| {
            let sum = z.iter().map(|z| z.exp()).sum::<f64>().ln();
            z.map(|z| z - sum)
        };
        let row = |p: [f64; 3], q: [f64; 3]| -> f64 {
            log_softmax(p).iter().zip(log_softmax(q)).map(|(p, q)| p.exp() * (p - q)).sum()
        };
        let kl = row([2.0, 4.0, -2.0], [1.0, 2.0, -1.0]) + row([1.0, 0.0, 0.0], [0.0, 0.5, 0.5]);
        let taps: [(Tap, f64); 3] = [
            (hidden_mean_square_sum, (1.0 + 4.0 + 1.0) / 3.0 + (1.0 + 0.25 + 0.25) / 3.0),
            (hidden_cosine_sum, 0.0 + 1.0),
            (router_kl_sum, kl),
        ];
        for (place, (tap, truth)) in taps.into_iter().enumerate() {
            let (student, teacher, mask, _) = pair();
            let sum = tap(student.clone(), teacher.clone(), mask);
            assert!((number(&sum) - truth).abs() < 1e-6, "{place}: {} instead of {truth}", number(&sum));
            let gradients = sum.backward();
            let gradient = student.grad(&gradients).unwrap().into_data().try_into_vec::<f32>().unwrap();
            assert!(gradient[3..6].iter().any(|g| g.abs() > 1e-3) && gradient[6..].iter().all(|&g| g == 0.0));
            assert!(teacher.grad(&gradients).is_none(), "the teacher is a constant");
        }
    }

    #[test]
    fn a_hidden_state_of_length_zero_has_a_finite_gradient() {
        let (_, teacher, mask, device) = pair();
        let student = Tensor::<2>::zeros([3, 3], &device).require_grad();
        let gradients = hidden_cosine_sum(student.clone(), teacher, mask).backward();
        let gradient = student.grad(&gradients).unwrap().into_data().try_into_vec::<f32>().unwrap();
        assert!(gradient.iter().all(|g| g.is_finite()));
    }
}
