"""The commands of `zoo`, one file each: `register` says what may be asked, and the rest answers it.

Each file imports what it needs when it is run, so that `zoo list` waits for no torch.
"""
