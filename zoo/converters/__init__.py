"""Published state dicts and configs <-> ours: tables and pure functions, one pair of files per published family."""
