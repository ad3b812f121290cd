"""The `dsv3` command: parsing, messages and exit codes; nothing numerical."""
