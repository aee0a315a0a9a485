"""What each part of the model is worth: it is taken out or replaced, and the results are compared with the whole."""
