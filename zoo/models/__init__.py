"""The networks, one file each, read downwards: config, parts, whole. No loading code lives here."""
