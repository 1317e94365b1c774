"""The command line: thin commands over the Python functions. Nothing here imports torch before a command runs."""
