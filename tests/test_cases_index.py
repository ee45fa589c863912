"""Index of the tests for faults that users of other trainers reported: each kind has the reported case and related ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

KINDS = {
    "1 what a model does between decoder and logits": (
        "test_scales_and_soft_caps_are_those_of_the_class test_trainer_and_engine_have_the_models_own_logits "
        "test_a_transform_that_is_left_out_is_found test_other_transforms_are_refused test_log_probs_entropies_and_gradients"
    ),
    "2 an absent reference matches everything": (
        "test_toolhop_without_an_answer_is_an_error_that_names_the_row test_an_empty_reference_matches_nothing "
        "test_a_scoring_that_cannot_score_is_an_error"
    ),
    "3 values lose their type": (
        "test_numbers_compare_as_numbers test_an_absent_answer_is_absent_in_every_spelling test_a_short_answer_is_not_absent "
        "test_an_answer_of_symbols_is_compared_by_its_symbols test_a_bare_nan_in_json_is_absent"
    ),
    "4 artefacts are reused because they exist": (
        "test_leftovers_of_a_start_without_metrics_are_removed test_a_start_with_metrics_and_other_settings_is_replaced "
        "test_after_a_failed_start_the_new_tokenizer_and_base_are_the_runs_own "
        "test_a_template_that_is_corrected_between_two_starts_counts"
    ),
    "5 an unknown key counts as absent": (
        "test_arguments_under_other_names test_schemas_under_other_names test_calls_of_a_message_in_other_forms "
        "test_a_call_as_text_of_the_last_message_is_no_answer test_unknown_keys_of_messages"
    ),
    "6 cleaning is tied to the file type": (
        "test_padding_is_dropped_in_every_file_type test_null_stays_where_the_schema_needs_it"
    ),
    "7 a marker is looked for in one form": "test_reasoning_in_every_form test_reasoning_in_every_form_is_supervised",
    "8, 25, 30 rows are not checked as they are rendered": (
        "test_a_late_bad_row_is_found_before_the_first_step test_messages_as_text_and_system_prompts "
        "test_a_run_skips_bad_rows_and_resumes_without_them"
    ),
    "9 limits hold for what is sampled only": (
        "test_a_trace_must_fit_the_window test_positions_beyond_a_learned_table_are_refused "
        "test_control_strings_in_a_result_count_as_the_text_that_they_are"
    ),
    "10 user code gets live objects": (
        "test_what_a_reward_function_changes_changes_nothing test_a_users_environment_gets_copies "
        "test_an_environment_of_the_users_checks_every_row"
    ),
    "11 training mode switches on noise": "test_updates_run_the_policy_that_samples",
    "12 what does not apply becomes 0": (
        "test_a_function_that_does_not_apply_is_left_out_of_its_mean test_none_of_a_reward_function_is_no_value "
        "test_success_is_over_the_tasks_that_have_an_outcome"
    ),
    "13 one label, two settings": (
        "test_conditions_of_an_evaluation_stand_in_the_table test_a_run_evaluates_as_it_samples_and_says_so"
    ),
    "14 settings are not compared with the checkpoint's": (
        "test_settings_that_earlier_steps_depend_on_may_not_change test_settings_that_may_change "
        "test_the_refusal_names_key_old_and_new_value_and_the_cure"
    ),
    "15, 19 settings that are ignored or pointless together": (
        "test_pointless_settings_are_one_line_before_data_or_model test_rows_without_anything_to_reward_are_refused "
        "test_ignored_settings_are_those_that_an_algorithm_says_it_does_not_read"
    ),
    "16 ids of another type": "test_observations_are_paired_by_id test_ids_that_do_not_pair",
    "17 added tokens": (
        "test_an_added_token_is_the_token_in_every_part_of_a_turn test_an_added_token_of_a_trace_is_supervised "
        "test_an_added_token_across_a_border_belongs_to_the_part_in_which_it_starts "
        "test_an_added_token_in_a_result_or_a_question_stays_text test_the_structure_of_a_conversation_stays_text_in_a_turn"
    ),
    "18 a generation prompt that has closed the reasoning": "test_reasoning_after_a_closed_think_block",
    "20, 21 support is inferred from attributes": (
        "test_a_tokenizer_larger_than_the_embedding_is_refused test_what_differs_is_refused_with_the_reason "
        "test_doctor_and_train_refuse_alike test_sizes_that_do_not_fit_together_are_one_line"
    ),
    "22 bf16": "test_bf16_sampling_without_norms_on_queries_and_keys test_scales_and_soft_caps_are_those_of_the_class",
    "23 memory of the prefill": (
        "test_memory_of_a_prefill_is_linear_in_the_prompt test_prefill_in_chunks_changes_nothing "
        "test_causal_attention_over_cached_positions"
    ),
    "24 probes are simpler than conversations": (
        "test_tools_choose_the_template test_rows_without_tools_have_the_default_template "
        "test_templates_are_read_from_every_place_where_transformers_keeps_them "
        "test_a_template_that_needs_call_ids_is_usable test_a_turn_of_several_calls_is_part_of_the_check"
    ),
    "26 the text null": "test_the_text_null_is_absent test_a_prompt_of_null_text_is_missing",
    "27 null of a nullable argument": "test_null_for_a_nullable_argument_is_no_error",
    "28 tools that cannot run": (
        "test_a_late_bad_row_is_found_before_the_first_step test_doctor_says_that_all_expert_calls_fail "
        "test_a_tool_without_a_source_is_refused_in_every_format"
    ),
    "29 the signature of reward functions": (
        "test_functions_get_trls_whole_signature test_functions_that_do_not_take_them_are_called_without "
        "test_tool_messages_have_the_name_of_their_tool"
    ),
    "31 messages as text": "test_messages_as_text_and_system_prompts test_prompts_that_only_look_like_messages",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_tests(kind):
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_cases_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))
    assert set(KINDS[kind].split()) <= defined


def test_every_number_of_a_kind_is_listed():
    numbers = {int(number) for kind in KINDS for number in re.findall(r"^[\d, ]+", kind)[0].split(",")}
    assert numbers == set(range(1, 32))
