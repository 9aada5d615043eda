//! The promises, by name.

use crate::{
    case_files, checks_cache as cache, checks_divergence as divergence, checks_refusals as refusals,
    checks_sampled as sampled, checks_scale as scale, checks_step as step, subject::Implementation, truth::Finding,
};

/// A promise: its name, and whether an implementation keeps it.
pub struct Check {
    pub name: &'static str,
    pub run: fn(&dyn Implementation) -> Finding,
}

macro_rules! checks {
    ($($module:ident::$name:ident),* $(,)?) => {
        &[$(Check { name: stringify!($name), run: $module::$name }),*]
    };
}

pub const CHECKS: &[Check] = checks![
    cache::the_cache_holds_probabilities_of_the_full_row,
    cache::tails_from_a_billionth_keep_their_digits,
    cache::equal_logits_lose_no_mass,
    cache::ids_above_seventeen_bits_survive,
    cache::short_rows_stay_short,
    cache::each_temperature_is_captured_from_the_full_row,
    divergence::every_divergence_has_the_oracles_value,
    divergence::every_divergence_has_the_oracles_gradient,
    divergence::the_gradient_is_the_slope_of_the_value,
    divergence::parameters_weigh_the_side_they_are_named_for,
    divergence::keeping_every_id_gives_the_dense_divergence,
    divergence::mass_outside_the_kept_ids_is_not_free,
    divergence::no_divergence_is_below_zero,
    divergence::a_student_equal_to_its_teacher_is_left_alone,
    divergence::a_tiny_tail_still_pulls,
    divergence::what_is_impossible_stays_finite,
    divergence::close_logits_keep_their_digits,
    scale::the_soft_gradient_keeps_its_size_at_any_temperature,
    scale::the_hard_loss_is_at_temperature_one,
    scale::each_weight_counts_once,
    scale::a_label_counts_kept_or_not,
    step::a_row_predicts_the_next_token,
    step::documents_and_padding_teach_nothing,
    step::any_partition_gives_the_same_step,
    step::hidden_states_and_head_get_the_oracles_gradients,
    sampled::draws_become_shares_that_sum_to_one,
    sampled::sampled_targets_are_unbiased,
    refusals::missing_targets_are_refused,
    refusals::targets_of_another_temperature_are_refused,
    refusals::sampled_targets_serve_linear_divergences_alone,
    refusals::an_id_twice_in_a_row_is_refused,
    refusals::parameters_without_meaning_are_refused,
    case_files::the_cases_written_as_data_are_met,
];

/// Those about what is kept of a teacher.
pub const CHECKS_OF_THE_CACHE: &[Check] = CHECKS.split_at(6).0;

/// The promises that an implementation breaks, and how.
pub fn broken(subject: &dyn Implementation) -> Vec<(&'static str, String)> {
    let failure = |check: &Check| (check.run)(subject).err().map(|how| (check.name, how));
    CHECKS.iter().filter_map(failure).collect()
}
