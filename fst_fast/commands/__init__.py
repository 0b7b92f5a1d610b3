"""What the subcommands of `fst` do; cli.py only parses their arguments."""
