"""The two ways in which a run ends early by design; everything else is a bug and keeps its traceback."""


class UserError(ValueError):
    """Something given to kdjax cannot be used: one sentence says what was wrong, where, and what would be right."""

    exit_code = 78


class NumericError(ArithmeticError):
    """The loss left the finite numbers; what was saved before stays."""

    exit_code = 70
