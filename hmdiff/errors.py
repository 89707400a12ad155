"""The one exception that is meant for a person to read.

Every command of the package turns a `UserError` into one line on stderr and exit code 2. Its message names the thing
(file, argument, key), what was found, what was expected, and the mend.
"""


class UserError(Exception):
    """Bad input that the user can mend; the message is one line and says how."""
