"""What the user can mend, told apart from what went wrong under way."""


class UserError(Exception):
    """A user's mistake: the message gives the value, the rule and the remedy; commands exit with 2."""
