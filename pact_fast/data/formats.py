"""RESERVED for tool-call formats (rendering part). The readers' row formats live in row_formats.py — do not write row formats here."""
