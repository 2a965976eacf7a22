"""The one error that is meant for a person: what is wrong, where, and what to do, in one line."""


class UserError(Exception):
    """Something outside the program is not as it should be (a file, a flag, the machine).

    The command line prints the message alone and exits with 1; any other exception is a defect and keeps
    its traceback.
    """


class UsageError(UserError):
    """A flag or an argument that no run could use: the command line exits with 2."""
