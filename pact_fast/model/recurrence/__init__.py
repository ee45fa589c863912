"""Recurrent layers on a packed tree: children of a node start from its final state."""
