"""Search over config fields: spaces, points, trials, and what a sweep leaves behind. Knows no Ray."""
