"""The command line `pact-fast`: train, eval, rollout, doctor, plan, view, export, recipes, bench.

main.py      parser and dispatch; heavy modules are imported by the command that needs them
doctor.py    checks before a run
estimate.py  memory and time estimates as tables
session.py   sampling from a model without training it
versions.py  tested versions of other packages
"""
