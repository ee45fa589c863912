"""Benchmarks: one command per question, competing implementations in the same run, results as JSON and one table.

Run them from the checkout: `python -m benchmarks.head --help`, or `pact-fast bench head --help`; `pact-fast bench` lists them.
Results: docs/benchmarks.md. What was tried on the way: benchmarks/LOG.md.

kernels     head, correctness, softmax_bandwidth, weights_fingerprint; update_step: a whole optimizer update
rollouts    rollout, decoding, sandbox
runs        quickstart, quickstart_sharing, eigendata, learning (PACT and its baselines on equal budgets), learning_report
verdicts    bfcl_verdicts, tau2_verdicts: our scores against the official checkers
machines    gpu_suite (all GPU checks), gate (is anything slower than recorded), contention, scale
hosts       hosts: TRL's step with and without our kernels; whole_loop: the whole RL loop beside TRL's

shared      harness (command line, cases, methods, tables, result files), measure (time and memory), stamp, objective
head        head_problem (tensors), head_methods (ours and competing implementations)
tau2        tau2_reference (the verdict of the package's evaluator)
update      update_problem (token data), update_methods, update_peers (competing implementations), update_run (model, clock)
learning    learning_regimes, learning_tasks, learning_methods, learning_outcome, learning_run, learning_clock, learning_stats
whole_loop  whole_loop_task (environment, rows), whole_loop_pact, whole_loop_trl (the sides), whole_loop_check,
            whole_loop_phases, whole_loop_report
scale       scale_parts, scale_ranks (simulated ranks)
"""

import pact_fast  # noqa: F401  before torch, whose threads then wait as in a training run
