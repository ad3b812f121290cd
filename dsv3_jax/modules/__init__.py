"""Section 2 of the report, one file an idea."""
