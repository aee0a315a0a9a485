"""Reports: one HTML page that opens from disk, and pictures."""
