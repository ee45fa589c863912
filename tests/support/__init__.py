"""Helpers shared by test files. Test files import from here, never from each other."""
