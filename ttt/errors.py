"""What the user can mend, told apart from what went wrong under way."""


class UserError(Exception):
    """A user's mistake: the message gives value, rule and remedy; commands exit with 2."""
