"""Who speaks when in a channel that holds several people, and which of them may be scored."""
