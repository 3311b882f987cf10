"""Everything that needs torch: the module, its losses, and the classifier behind it."""
