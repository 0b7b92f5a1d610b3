"""Verification: graders and the programs they run, in killable, confined child processes."""
