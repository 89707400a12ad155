"""The exception for errors in user input.

Every command prints a `UserError` as one line on stderr and exits with code 2. Its message names the file, argument or
key, what was found, what was expected, and the fix.
"""


class UserError(Exception):
    """Invalid input that the user can fix; the message is one line and says how."""
