"""Algorithms, one file each: rollouts and traces of a prompt in, token trees with weighted tokens out."""
