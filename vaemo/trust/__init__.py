"""Whether scores can be trusted: intervals that cover, calibration on your own calls, novelty of the data, groups."""
