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


class EngineError(PactError):
    """The inference engine failed. `engine` names the peer."""

    def __init__(self, engine: str, problem: str):
        self.engine, self.problem = engine, problem
        super().__init__(f"{engine}: {problem}")


class EngineDied(EngineError):
    """The engine's process has ended, or nobody answers at its address."""


class EngineTimeout(EngineError):
    """The engine is there but has not answered within the deadline."""
