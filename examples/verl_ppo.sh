#!/usr/bin/env bash
# GRPO in verl 0.9 on these kernels: one pass over the logits, and a prompt computed once for all of its responses.
#
#     pip install pact-fast verl
#     bash examples/verl_ppo.sh Qwen/Qwen3-0.6B ~/data/gsm8k
#
# Two variables and use_prefix_grouper are not verl's own. Responses of a prompt share it where they are in one micro-batch.
set -euo pipefail
model=$1 data=$2
shift 2
export VERL_USE_EXTERNAL_MODULES=pact_fast.integrations.verl_plugin # imported in every worker
export VERL_ENGINE_VENDOR=pact_tree                                 # pact: one pass, without shared prompts
exec python -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files="$data/train.parquet" data.val_files="$data/test.parquet" \
    data.train_batch_size=64 data.max_prompt_length=512 data.max_response_length=1024 \
    actor_rollout_ref.model.path="$model" \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.actor.use_prefix_grouper=true \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \
    actor_rollout_ref.actor.use_dynamic_bsz=true \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=8 \
    trainer.n_gpus_per_node=1 trainer.nnodes=1 "$@"
