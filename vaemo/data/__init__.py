"""What is read: manifests, sessions of a store, their speakers and splits, and windows cut from them."""
