"""Estimates before a run: peak memory of an update, and (experimental) the time of a training step.

memory.py        peak memory on one device: `pact-fast doctor RECIPE --memory`
update_trace.py  an update of the real model code on fake tensors, which the memory estimate reads
time.py          time of a step: `pact-fast plan RECIPE`
hardware.py      rates of this machine, measured, and of named GPUs, assumed
"""
