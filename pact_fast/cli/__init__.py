"""The command line `pact-fast`: train, eval, rollout, doctor, plan, view, export, recipes, data, traces, bench.

main.py            the process: arguments, exit status, errors as one line
parser.py          commands, options and help texts
commands.py        the commands; heavy modules are imported by the command that needs them
doctor.py          checks before a run
model_row.py       features that work with a model, for `doctor MODEL`
estimate.py        memory and time estimates as tables
session.py         sampling from a model without training it
eval_benchmark.py  `eval BENCH`: a benchmark's samples, resumable
traces.py, mtr.py, eigendata.py, data_convert.py
                   commands that make data
language_model.py  the option --llm of these
versions.py        tested versions of other packages
"""
