"""One file for each subcommand: its options, and what it does with them.

Imports at the top are light, so that --help answers at once; torch comes with the command that needs it.
"""
