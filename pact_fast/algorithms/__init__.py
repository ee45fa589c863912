"""Algorithms, one file each: from the rollouts and expert trace of a prompt to token trees with weighted tokens.

base.py      the base class, and helpers that weight tokens
branches.py  rollouts whose history was rewritten, as nodes of a token tree
registry.py  `@algorithm("name")`; one of your own is named `file.py:Class` in the settings

Nothing outside this package tests an algorithm's name; an algorithm states its needs in `Requirements`.
"""
