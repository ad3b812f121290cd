"""Section 2 of the report, one file per idea."""
