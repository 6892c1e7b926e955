"""The command line, also `python -m audiophi`: a file per subcommand; `hear.py` is what three of them share."""
