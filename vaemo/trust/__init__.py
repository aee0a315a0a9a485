"""Whether scores can be trusted: intervals that cover, calibration on one's own calls, novelty of the data, groups."""
