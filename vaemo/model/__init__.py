"""The session model: see `vaemo.model.regressor`."""
