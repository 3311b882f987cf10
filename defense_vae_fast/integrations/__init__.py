"""Outside toolboxes, one a file, each imported only when asked for; the extra of the same name installs its toolbox."""
