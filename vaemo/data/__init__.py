"""Reading of data: manifests, sessions of a store, speakers, splits, and the windows of a training."""
