"""The configuration: its blocks, how a file is read and what is said of a wrong one."""
