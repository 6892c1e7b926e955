"""The command line `audiophi`, also `python -m cli`: one file per subcommand, `hear.py` is what three of them share."""
