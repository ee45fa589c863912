"""Training: a run's life cycle, rollout collection, optimizer steps, checkpoints, evaluation and metrics.

run.py            life cycle: build, resume, step, evaluate, save, stop
preflight.py      settings and tasks that fit each other; check_rows.py: every row
inputs.py         data files, tokenizer, rows and checkpoint, the same on all ranks
models.py         base model, policy and reference policy
pretrain.py       the training of the base model
user_model.py     the frozen model that plays the user
step.py           one training step: collect → score → batch → update → sync
collect.py        rollouts → groups with rewards and advantages
filter_groups.py  dynamic sampling: groups without signal are replaced
prefetch.py       rollouts of the next steps, sampled during the update
learner.py        optimizer steps on prompt batches
backends/         parameter ownership: replicated, or sharded by DeepSpeed ZeRO
checkpoint.py     checkpoints that are complete or invisible, written in the background
warning_signs.py  signs that a run degenerates
trackers/         where metrics go
"""
