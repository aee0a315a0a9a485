"""What a person looks at: one HTML page that opens from disk, and pictures."""
