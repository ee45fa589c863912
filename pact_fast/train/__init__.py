"""Training: a run's life cycle, rollout collection, optimizer steps, checkpoints, evaluation and metrics.

run.py         life cycle: build, resume, step, evaluate, save, stop
step.py        one training step: collect → score → plan → update → sync
collect.py     rollouts → groups with rewards and advantages
learner.py     optimizer steps on prompt batches
backends/      parameter ownership: replicated, or sharded by DeepSpeed ZeRO
checkpoint.py  checkpoints that are complete or invisible
"""
