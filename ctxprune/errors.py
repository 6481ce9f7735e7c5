"""How does a person's mistake differ from ours? It is a UserError: one line that says what to do, exit code 2."""


class UserError(ValueError):
    """A mistake a person can mend: the message is one line, what is wrong and what to do."""
