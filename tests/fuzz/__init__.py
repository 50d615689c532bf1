"""Random calls of every op, right and wrong ones: `python -m tests.fuzz --calls N --seed S`."""
