"""Training adapters beside a frozen model: made, saved without it, exported and merged."""
