"""What a run will need, before it begins: memory of an update (memory.py), time of a step (plan.py)."""
