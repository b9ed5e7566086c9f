"""The embedded worlds: small documents of our own, and the models trained on them that ship with the package."""
