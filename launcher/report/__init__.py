"""``narrowgauge report``: run folders as a page that opens without a network."""
