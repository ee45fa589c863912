"""Errors a user can act on."""


class PactError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and the cure.

    The command line prints it without a traceback and exits with status 2.
    """


class DataError(PactError):
    """A data row that cannot be used; names the file, the line (1-based) and the field."""

    def __init__(self, problem: str, *, file: str = "", line: int | None = None, field: str = ""):
        self.problem, self.file, self.line, self.field = problem, file, line, field
        where = file + (f":{line}" if line is not None else "")
        parts = [part for part in (where, f"field '{field}'" if field else "") if part]
        super().__init__(": ".join([*parts, problem]))
