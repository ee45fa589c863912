"""Benchmarks: one command per question, competing implementations in the same run, results as JSON and one table.

Run them from the checkout: `python -m benchmarks.head --help`, `python -m benchmarks.head --help`, or
`pact-fast bench head --help`. What came out: docs/benchmarks.md. What was tried on the way: benchmarks/LOG.md.

commands    contention, correctness, gpu_suite, head, quickstart, quickstart_sharing, rollout, softmax_bandwidth,
            tau2_verdicts, update_step, weights_fingerprint
shared      harness (command line, cases, methods, tables, result files), measure (time and memory), stamp, objective
head        head_problem (tensors), head_methods (ours and competing implementations)
tau2        tau2_reference (the verdict of the package's evaluator)
update      update_problem (token data), update_methods, update_peers (competing implementations), update_run (model, clock)
"""

import pact_fast  # noqa: F401  before torch, whose threads then wait as in a training run
