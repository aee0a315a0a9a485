"""Trust in scores: intervals, calibration on your own calls, novelty of the data, and groups."""
