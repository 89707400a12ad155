"""The subcommands of `hmdiff`, one per file: `add_parser` defines the arguments, `run` executes the command.

Command modules import only the standard library at the top; heavy imports happen in `run`.
"""
