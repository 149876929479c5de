"""Scripts to read, run and change. Installed as zoo.examples, which is what `zoo train` runs."""
