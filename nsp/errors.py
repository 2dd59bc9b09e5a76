"""Errors that a user meets: one clear message that names what is wrong and what would work."""


class NspError(Exception):
    """A run failed for a reason that nsp can name. Exit code 1."""

    exit_code = 1


class InputError(NspError, ValueError):
    """What the user asked for is wrong or impossible; the message says what would be valid. Exit code 2."""

    exit_code = 2


class BackendError(NspError):
    """A server, or the way there, failed; finished work is in the store, and ``--resume`` goes on. Exit code 1."""
