"""The subcommands of `hmdiff`, one a file: `add_parser` says what it takes, `run` does it.

A command's file imports only the standard library at its top; what is heavy is imported when it runs.
"""
