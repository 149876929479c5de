"""Curves of a run: on a picture (panels, drawn with Pillow) and on a terminal (braille, plain text)."""
