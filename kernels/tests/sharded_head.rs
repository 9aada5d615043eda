//! A head in shards gives what the whole head gives.

mod linear_case;

use limbeck_kernels::{
    divergence::Divergence,
    fused_linear_distill::{
        LossSettings,
        host::{self, HostMatrix, Wanted},
        sharded::{Shard, ShardStatistics, finish, gradients, statistics},
    },
};
use linear_case::{assert_close, linear, weigh};

#[test]
fn three_uneven_shards_equal_one_head() {
    let (rows, width, vocab) = (23, 16, 301);
    for divergence in Divergence::EXAMPLES {
        for temperature in [1.0, 2.5] {
            let settings = LossSettings { temperature, ..LossSettings::new(divergence) };
            let case = linear(rows, width, vocab, 9, settings);
            let hidden = HostMatrix::F32(&case.hidden);
            let whole = host::run(
                hidden,
                HostMatrix::F32(&case.lm_head),
                width,
                &case.targets,
                &settings,
                &weigh,
                Wanted::BOTH,
            );
            let cuts = [0, 7, 200, vocab];
            let shards: Vec<Shard<'_>> = cuts
                .windows(2)
                .map(|cut| Shard {
                    lm_head: HostMatrix::F32(&case.lm_head[cut[0] * width..cut[1] * width]),
                    first_id: cut[0],
                })
                .collect();
            let parts: Vec<ShardStatistics> =
                shards.iter().map(|&shard| statistics(hidden, shard, width, &case.targets, &settings)).collect();
            let what = format!("{} at temperature {temperature}", divergence.name());
            // In any order.
            for order in [[0, 1, 2], [2, 0, 1]] {
                let joined =
                    parts[order[0]].clone().join(&parts[order[1]], &settings).join(&parts[order[2]], &settings);
                let finished = finish(&case.targets, &settings, &joined, &weigh);
                let bound = 1e-6 * whole.loss.abs();
                assert!((finished.loss - whole.loss).abs() <= bound, "{what}: {} not {}", finished.loss, whole.loss);
                for (found, whole) in finished.rows.iter().zip(&whole.rows) {
                    let (Some((found, _)), Some((whole, _))) = (found, whole) else {
                        assert!(found.is_none() && whole.is_none());
                        continue;
                    };
                    assert_eq!(found.argmax, whole.argmax, "{what}");
                    assert!((found.log_sum_exp - whole.log_sum_exp).abs() <= 1e-6 * whole.log_sum_exp.abs(), "{what}");
                }
                let mut hidden_grad = vec![0.0f32; rows * width];
                let mut lm_head_grad = vec![];
                for &shard in &shards {
                    let (part, rows_of_shard) =
                        gradients(hidden, shard, width, &case.targets, &settings, &finished, Wanted::BOTH);
                    hidden_grad.iter_mut().zip(part.unwrap()).for_each(|(sum, part)| *sum += part);
                    lm_head_grad.extend(rows_of_shard.unwrap());
                }
                let exact = |values: &Option<Vec<f32>>| -> Vec<f64> {
                    values.as_ref().unwrap().iter().map(|&value| value as f64).collect()
                };
                assert_close(&hidden_grad, &exact(&whole.hidden_grad), 1e-6, &format!("{what}: hidden"));
                assert_close(&lm_head_grad, &exact(&whole.lm_head_grad), 1e-6, &format!("{what}: head"));
            }
        }
    }
}

#[test]
fn a_shard_computes_only_what_is_asked_for() {
    let settings = LossSettings::new(Divergence::ForwardKl);
    let case = linear(9, 8, 40, 5, settings);
    let hidden = HostMatrix::F32(&case.hidden);
    let shard = Shard { lm_head: HostMatrix::F32(&case.lm_head), first_id: 0 };
    let found = statistics(hidden, shard, 8, &case.targets, &settings);
    let finished = finish(&case.targets, &settings, &found, &weigh);
    assert!((finished.loss / case.loss - 1.0).abs() < 1e-6);
    let only = |wanted| gradients(hidden, shard, 8, &case.targets, &settings, &finished, wanted);
    assert!(matches!(only(Wanted::NOTHING), (None, None)));
    assert!(matches!(only(Wanted { hidden: true, lm_head: false }), (Some(_), None)));
    assert!(matches!(only(Wanted { hidden: false, lm_head: true }), (None, Some(_))));
}
