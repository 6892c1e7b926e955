"""The command line `audiophi`, also `python -m audiophi`: a file per subcommand; `hear.py` is what three of them share."""
