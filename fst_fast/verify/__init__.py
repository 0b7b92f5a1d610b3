"""Verification: graders, and the programs they run, in killable and confined child processes."""
