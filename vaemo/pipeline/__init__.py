"""From a source to features and scores: what is read, what is planned, what is done to it, and where it runs."""
